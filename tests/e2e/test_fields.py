"""Fields that random configurations can't tell much about: what they do is seen when a container ends, or not at all.

See docs/cri-coverage.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cgroups import in_force
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, failure, until
from tests.e2e.test_lifecycle import porto_socket
from tools import images
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def pods(node: Node, busybox: str) -> Iterator[Pods]:
    """One for all tests of this file: none of them minds the others' containers."""
    made = Pods(node, busybox)
    yield made
    made.remove_all()


@pytest.fixture(scope="module")
def sandbox(pods: Pods) -> str:
    return pods.run()


class TestStopSignal:
    """The one that the container is given first, by the number it has inside."""

    def stopped_by(self, pods: Pods, sandbox: str, wanted: pb.Signal, *, image: str = "", own: bool = False) -> int:
        known = (*range(1, 32), *range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
        traps = "; ".join(f"trap 'echo {n}; exit 0' {n}" for n in known if n not in (9, 17, 18, 19, 20, 21, 22))
        linux = pb.LinuxContainerConfig()
        if own:
            linux.security_context.namespace_options.pid = pb.CONTAINER
        container = pods.container(
            sandbox,
            *("sh", "-c", f"{traps}; echo up; while :; do sleep 0.05; done"),
            image=pb.ImageSpec(image=image or pods.image),
            stop_signal=wanted,
            linux=linux,
        )
        until(partial(pods.log, container), lambda log: log == "up\n")
        pods.stop(container, timeout=30)
        assert pods.status(container).exit_code == 0
        found = int(pods.log(container).split()[1])
        pods.remove(container)
        return found

    @pytest.mark.parametrize("own", [False, True])
    def test_as_asked(self, pods: Pods, sandbox: str, own: bool) -> None:
        """Also where the command is the first process of its namespace, which gets no signal that it doesn't expect."""
        assert self.stopped_by(pods, sandbox, pb.SIGNAL_RUNTIME_DEFAULT, own=own) == signal.SIGTERM
        assert self.stopped_by(pods, sandbox, pb.SIGNAL_SIGUSR1, own=own) == signal.SIGUSR1
        assert self.stopped_by(pods, sandbox, pb.SIGNAL_SIGWINCH, own=own) == signal.SIGWINCH
        assert self.stopped_by(pods, sandbox, pb.SIGNAL_SIGRTMINPLUS3, own=own) == signal.SIGRTMIN + 3
        assert self.stopped_by(pods, sandbox, pb.SIGNAL_SIGRTMAX, own=own) == signal.SIGRTMAX

    def test_over_the_images(self, pods: Pods, sandbox: str, node: Node, registry: LocalRegistry) -> None:
        images.push(images.busybox({"StopSignal": "SIGRTMIN+2"}), registry, "public/stop", ["1"])
        image = pull(node, f"{registry.address}/public/stop:1")
        default = pb.SIGNAL_RUNTIME_DEFAULT
        assert self.stopped_by(pods, sandbox, default, image=image) == signal.SIGRTMIN + 2
        assert self.stopped_by(pods, sandbox, pb.SIGNAL_SIGHUP, image=image) == signal.SIGHUP

    def test_kill(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "sh", "-c", "trap '' TERM; sleep 1000", stop_signal=pb.SIGNAL_SIGKILL)
        pods.stop(container, timeout=600)
        assert pods.status(container).exit_code == 128 + signal.SIGKILL


class TestLog:
    def test_below_the_pods_directory(self, pods: Pods) -> None:
        config = pods.config()
        container = pods.container(pods.run(config), "echo", "here", log_path="a/b.log")
        status = pods.exited(container)
        assert status.log_path == f"{config.log_directory}/a/b.log"
        assert pods.log(container) == "here\n"

    @pytest.mark.parametrize("whose", ["pod", "container"])
    def test_none(self, pods: Pods, whose: str) -> None:
        config = pods.config()
        directory = config.log_directory
        sandbox = pods.run(config)
        if whose == "pod":
            # A directory that is named, but not to kubelet's runtime.
            config = pods.config(log_directory="")
            sandbox = pods.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id
            pods.adopt(sandbox, config)
        fields = {"log_path": ""} if whose == "container" else {}
        container = pods.container(sandbox, "sh", "-c", "yes | head -c 1000000; sleep 1000", **fields)
        assert pods.status(container).log_path == ""
        until(lambda: "yes" not in pods.shell(container, "ps"))
        assert os.listdir(directory) == []
        if whose == "pod":
            pods.stop_sandbox(sandbox)
            pods.remove_sandbox(sandbox)


class TestIds:
    """Any id may be cut short; what begins several is none of them."""

    def test_their_beginnings(self, pods: Pods, node: Node) -> None:
        sandbox = pods.run()
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="short"),
            image=pb.ImageSpec(image=pods.image),
            command=["sleep", "1000"],
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=sandbox[:12], config=config)
        container = pods.cri.CreateContainer(request).container_id
        short = container[:12]
        pods.start(short)
        assert pods.shell(short, "hostname") == pods.shell(container, "hostname")
        limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
        pods.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=short, linux=limits))
        pod_limits = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox[:12], resources=limits)
        pods.cri.UpdatePodSandboxResources(pod_limits)
        with Client(porto_socket(node)) as porto:
            assert in_force(porto, f"{sandbox}/{container}").memory == in_force(porto, sandbox).memory == 64 * MIB
        target = pb.LinuxContainerConfig()
        options = target.security_context.namespace_options
        options.pid, options.target_id = pb.TARGET, short
        other = pods.container(sandbox, linux=target)
        assert pods.shell(other, "readlink /proc/self/ns/pid") == pods.shell(short, "readlink /proc/self/ns/pid")
        pods.stop(short)
        pods.remove(short)
        assert failure(pods.status, container)[0] == "NOT_FOUND"

    def test_the_beginning_of_several(self, pods: Pods) -> None:
        sandbox = pods.run()
        made: dict[str, str] = {}
        while True:
            container = pods.create(sandbox, "true")
            if container[0] in made:
                break
            made[container[0]] = container
        code, text = failure(pods.start, container[0])
        assert (code, "ids begin with this" in text) == ("INVALID_ARGUMENT", True)


def test_no_swap_beside_a_limit(pods: Pods, node: Node, sandbox: str) -> None:
    """As kubelet wants it on a node whose swap pods don't use."""
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    container = pods.container(sandbox, linux=pb.LinuxContainerConfig(resources=limits))
    with Client(porto_socket(node)) as porto:
        assert in_force(porto, f"{sandbox}/{container}").memory_and_swap in (64 * MIB, None)
        limits.memory_limit_in_bytes = 128 * MIB
        pods.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=limits))
        assert in_force(porto, f"{sandbox}/{container}").memory_and_swap in (128 * MIB, None)


def test_the_last_of_two_variables(pods: Pods, sandbox: str) -> None:
    variables = [pb.KeyValue(key="A", value=value) for value in (b"first", b"last")]
    assert pods.output(sandbox, "env", envs=variables).count("A=last\n") == 1
