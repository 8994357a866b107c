"""A pod from pull to removal, and everything CRI says of the calls on the way."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shim_porto_runtime.names import new_id

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import require_crictl
from tests.e2e.pods import Pods, failure, until
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root


def test_a_pod_from_pull_to_removal(node: Node, registry: LocalRegistry) -> None:
    cri = node.cri
    assert registry.credentials is not None
    name = f"{registry.address}/private/busybox:1"
    pulled = pb.PullImageRequest(image=pb.ImageSpec(image=name))
    assert failure(cri.PullImage, pulled)[0] == "UNKNOWN"
    pulled.auth.username, pulled.auth.password = registry.credentials
    image_id = cri.PullImage(pulled).image_ref
    assert cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name))).image.id == image_id

    pods = Pods(node, name)
    sandbox = pods.run(hostname="web-0", labels={"app": "web"})
    status = pods.sandbox_status(sandbox)
    assert status.state == pb.SANDBOX_READY
    assert status.network.ip.startswith("10.88.")
    assert len(sandbox) == 64

    container = pods.create(sandbox, "sh", "-c", "echo out $PRIVATE; echo err >&2; hostname; exec sleep 1000", name="c")
    assert pods.status(container).state == pb.CONTAINER_CREATED
    pods.start(container)
    running = pods.status(container)
    assert running.state == pb.CONTAINER_RUNNING
    assert (running.image_id, running.image.image) == (image_id, name)
    assert running.created_at <= running.started_at <= time.time_ns()
    records = until(lambda: pods.log_records(container), lambda found: len(found) == 3)
    assert sorted(records) == [("stderr", "err\n"), ("stdout", "out 1\n"), ("stdout", "web-0\n")]
    assert status.network.ip in pods.shell(container, "ip -4 -o address show eth0")

    pods.stop(container)
    ended = pods.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    assert ended.started_at < ended.finished_at <= time.time_ns()
    pods.remove(container)
    assert failure(pods.status, container)[0] == "NOT_FOUND"
    pods.stop_sandbox(sandbox)
    assert pods.sandbox_status(sandbox).state == pb.SANDBOX_NOTREADY
    assert pods.sandbox_status(sandbox).network.ip == ""
    pods.remove_sandbox(sandbox)
    assert failure(pods.sandbox_status, sandbox)[0] == "NOT_FOUND"
    cri.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))
    assert not cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name))).HasField("image")


def test_version_and_status(node: Node) -> None:
    version = node.cri.Version(pb.VersionRequest())
    assert (version.version, version.runtime_name, version.runtime_api_version) == ("0.1.0", "porto", "v1")
    assert version.runtime_version == "5.3.59"
    status = node.cri.Status(pb.StatusRequest(verbose=True))
    assert {c.type: c.status for c in status.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    assert json.loads(status.info["porto"])["socket"]
    assert {handler.name for handler in status.runtime_handlers} == {"", "porto"}
    for handler in status.runtime_handlers:
        # Tried in test_mounts.py and test_namespaces.py.
        assert handler.features == pb.RuntimeHandlerFeatures(recursive_read_only_mounts=True)
    assert status.features == pb.RuntimeFeatures(supplemental_groups_policy=True, mount_options=True)
    assert node.cri.RuntimeConfig(pb.RuntimeConfigRequest()).linux.cgroup_driver == pb.CGROUPFS


def test_metadata_comes_back_byte_for_byte(pods: Pods) -> None:
    annotations = {f"example.org/key-{n}": f"value\n{n}\0ü" for n in range(200)}
    annotations["example.org/large"] = "é" * (200 * 1024 // 2)
    annotations["example.org/empty"] = ""
    labels = {"app": "web", "with/slash": "a b;c=d"}
    config = pods.config(annotations=annotations, labels=labels)
    sandbox = pods.run(config)
    container = pods.create(sandbox, "true", annotations=annotations, labels=labels)
    status = pods.sandbox_status(sandbox)
    assert dict(status.annotations) == annotations
    assert dict(status.labels) == labels
    assert dict(pods.status(container).annotations) == annotations
    listed = pods.cri.ListPodSandbox(pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id=sandbox))).items
    assert [dict(item.annotations) for item in listed] == [annotations]
    assert listed[0].metadata == config.metadata


class TestIdempotence:
    """CRI: multiple Stop and Remove calls are expected, and none of them is an error."""

    def test_unknown_ids(self, pods: Pods) -> None:
        unknown = new_id()
        pods.stop(unknown)
        pods.remove(unknown)
        pods.stop_sandbox(unknown)
        pods.remove_sandbox(unknown)
        for call in (pods.status, pods.start, pods.sandbox_status):
            assert failure(call, unknown)[0] == "NOT_FOUND"
        assert failure(pods.exec, unknown, "true")[0] == "NOT_FOUND"

    def test_stop_and_remove_many_times(self, pods: Pods) -> None:
        sandbox = pods.run()
        container = pods.container(sandbox)
        for _ in range(3):
            pods.stop(container)
        code = pods.status(container).exit_code
        for _ in range(3):
            pods.stop_sandbox(sandbox)
        assert pods.status(container).exit_code == code == 137
        for _ in range(3):
            pods.remove(container)
        for _ in range(3):
            pods.remove_sandbox(sandbox)

    def test_ten_at_once(self, pods: Pods) -> None:
        sandbox = pods.run()
        pods.container(sandbox)
        errors: list[Exception] = []

        def call(step: Callable[[str], object]) -> None:
            try:
                step(sandbox)
            except Exception as err:
                errors.append(err)

        for step in (pods.stop_sandbox, pods.remove_sandbox):
            threads = [threading.Thread(target=call, args=(step,)) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert errors == []

    def test_a_running_container_is_removed_by_force(self, pods: Pods) -> None:
        sandbox = pods.run()
        container = pods.container(sandbox)
        pods.remove(container)
        assert failure(pods.status, container)[0] == "NOT_FOUND"
        other = pods.container(sandbox)
        pods.remove_sandbox(sandbox)
        assert failure(pods.status, other)[0] == "NOT_FOUND"

    @pytest.mark.parametrize("text", ["../../etc", "/", "a/b", "self", ".", "***", "*", "%00", "x" * 100_000])
    def test_what_is_no_id_reaches_nothing(self, pods: Pods, text: str) -> None:
        sandbox = pods.run()
        for look in (pods.status, pods.sandbox_status, pods.start):
            assert failure(look, text)[0] == "NOT_FOUND"
        assert failure(pods.exec, text, "true")[0] == "NOT_FOUND"
        for idempotent in (pods.stop, pods.remove, pods.stop_sandbox, pods.remove_sandbox):
            idempotent(text)
        assert pods.sandbox_status(sandbox).state == pb.SANDBOX_READY


class TestRepeatedCalls:
    """kubelet repeats what it has given up waiting for."""

    def test_the_same_attempt_is_the_same_sandbox(self, pods: Pods) -> None:
        config = pods.config()
        sandbox = pods.run(config)
        assert pods.run(config) == sandbox
        made = pods.create(sandbox, "true", name="twice")
        assert pods.create(sandbox, "true", name="twice") == made
        config.metadata.attempt = 1
        assert pods.run(config) != sandbox

    def test_at_the_same_time_too(self, pods: Pods) -> None:
        config = pods.config()
        made: list[str] = []
        threads = [threading.Thread(target=lambda: made.append(pods.run(config))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 5
        assert len(set(made)) == 1

    def test_another_configuration_is_another_thing(self, pods: Pods) -> None:
        config = pods.config()
        sandbox = pods.run(config)
        config.hostname = "other"
        code, text = failure(pods.run, config)
        assert code == "ALREADY_EXISTS"
        assert sandbox in text
        pods.create(sandbox, "true", name="c")
        assert failure(pods.create, sandbox, "false", name="c")[0] == "ALREADY_EXISTS"

    def test_a_started_container_does_not_start_again(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        assert failure(pods.start, container)[0] == "FAILED_PRECONDITION"


class TestStates:
    def test_nothing_is_put_into_a_stopped_sandbox(self, pods: Pods) -> None:
        sandbox = pods.run()
        created = pods.create(sandbox, "true")
        pods.stop_sandbox(sandbox)
        assert failure(pods.create, sandbox, "true")[0] == "FAILED_PRECONDITION"
        assert failure(pods.start, created)[0] == "FAILED_PRECONDITION"

    def test_an_unknown_image_is_not_found(self, pods: Pods) -> None:
        sandbox = pods.run()
        code, text = failure(pods.create, sandbox, "true", image=pb.ImageSpec(image="nowhere.example/none:1"))
        assert code == "NOT_FOUND"
        assert "nowhere.example/none:1" in text

    @pytest.mark.parametrize(
        ("script", "code", "reason"),
        [
            ("exit 0", 0, "Completed"),
            ("exit 3", 3, "Error"),
            ("kill -9 $$", 137, "Error"),
            ("kill -15 $$", 143, "Error"),
        ],
    )
    def test_how_a_container_ends(self, pods: Pods, script: str, code: int, reason: str) -> None:
        status = pods.exited(pods.container(pods.run(), "sh", "-c", script))
        assert (status.exit_code, status.reason) == (code, reason)
        assert status.finished_at > status.started_at

    def test_the_log_is_complete_when_a_container_is_seen_to_have_exited(self, pods: Pods) -> None:
        container = pods.container(
            pods.run(), "sh", "-c", "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
        )
        pods.exited(container)
        assert pods.log(container) == "".join(f"line {n}\n" for n in range(20000))

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            (["no-such-program"], 'exec: "no-such-program": executable file not found in $PATH'),
            (["/no/such/program"], 'exec: "/no/such/program": No such file or directory'),
            (["/etc/passwd"], 'exec: "/etc/passwd": Permission denied'),
        ],
    )
    def test_a_command_that_cannot_run_fails_the_start(self, pods: Pods, command: list[str], expected: str) -> None:
        sandbox = pods.run()
        container = pods.create(sandbox, *command)
        code, text = failure(pods.start, container)
        assert code == "INVALID_ARGUMENT"
        assert expected in text
        status = pods.status(container)
        assert (status.state, status.reason, status.message) == (pb.CONTAINER_EXITED, "StartError", expected)
        assert status.exit_code != 0

    def test_stop_waits_and_then_kills(self, pods: Pods) -> None:
        sandbox = pods.run()
        polite = pods.container(
            sandbox, "sh", "-c", "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done"
        )
        stubborn = pods.container(sandbox, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
        for container in (polite, stubborn):
            until(partial(pods.log, container), lambda log: log == "up\n")
        started = time.monotonic()
        pods.stop(polite, timeout=30)
        assert time.monotonic() - started < 20
        assert (pods.status(polite).exit_code, pods.log(polite)) == (5, "up\nbye\n")
        started = time.monotonic()
        pods.stop(stubborn, timeout=1)
        assert 0.9 < time.monotonic() - started < 20
        assert pods.status(stubborn).exit_code == 137

    def test_the_sandbox_is_not_ready_once_its_pause_process_is_gone(self, pods: Pods, node: Node) -> None:
        from porto_api import Client

        sandbox = pods.run()
        with Client(porto_socket(node)) as porto:
            porto.kill(f"{sandbox}/pause", 9)
        until(lambda: pods.sandbox_status(sandbox).state == pb.SANDBOX_NOTREADY)


class TestLists:
    def test_filters(self, pods: Pods) -> None:
        one, two = pods.run(labels={"app": "one", "tier": "x"}), pods.run(labels={"app": "two", "tier": "x"})
        running = pods.container(one, labels={"name": "running"})
        created = pods.create(two, "true", labels={"name": "created"})

        def sandboxes(**fields: Any) -> set[str]:
            wanted = pb.PodSandboxFilter(**fields)
            return {i.id for i in pods.cri.ListPodSandbox(pb.ListPodSandboxRequest(filter=wanted)).items} & {one, two}

        def containers(**fields: Any) -> set[str]:
            wanted = pb.ContainerFilter(**fields)
            found = pods.cri.ListContainers(pb.ListContainersRequest(filter=wanted)).containers
            return {c.id for c in found} & {running, created}

        assert sandboxes() == {one, two}
        assert sandboxes(id=one) == {one}
        assert sandboxes(label_selector={"tier": "x"}) == {one, two}
        assert sandboxes(label_selector={"tier": "x", "app": "two"}) == {two}
        assert sandboxes(state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)) == set()
        assert sandboxes(id=one, label_selector={"app": "two"}) == set()
        assert containers() == {running, created}
        assert containers(id=created) == {created}
        assert containers(pod_sandbox_id=one) == {running}
        assert containers(state=pb.ContainerStateValue(state=pb.CONTAINER_CREATED)) == {created}
        assert containers(label_selector={"name": "running"}) == {running}
        assert sandboxes(id=one[:13]) == {one}

    def test_a_removed_one_is_in_no_list(self, pods: Pods) -> None:
        sandbox = pods.run()
        pods.remove_sandbox(sandbox)
        items = pods.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
        assert sandbox not in {item.id for item in items}

    def test_exited_by_itself(self, pods: Pods) -> None:
        container = pods.container(pods.run(), "true")

        def state() -> int:
            found = pods.cri.ListContainers(pb.ListContainersRequest(filter=pb.ContainerFilter(id=container)))
            return int(found.containers[0].state)

        until(state, lambda s: s == pb.CONTAINER_EXITED)


class TestExecSync:
    def test_output_and_exit_code(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        answer = pods.exec(container, "sh", "-c", "echo out; echo err >&2; exit 7")
        assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 7)
        assert pods.exec(container, "sh", "-c", "kill -9 $$").exit_code == 137

    def test_a_timeout_ends_the_process_and_is_told_apart(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        started = time.monotonic()
        code, _ = failure(pods.exec, container, "sh", "-c", "sleep 1234 & sleep 1234", timeout=1)
        assert code == "DEADLINE_EXCEEDED"
        assert time.monotonic() - started < 10
        assert "1234" not in pods.shell(container, "ps -o args")

    def test_a_child_that_holds_the_pipes_is_not_waited_for(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        started = time.monotonic()
        answer = pods.exec(container, "sh", "-c", "sleep 1000 & echo started", timeout=60)
        assert answer.stdout == b"started\n"
        assert time.monotonic() - started < 20

    def test_a_gigabyte_of_output(self, pods: Pods, node: Node) -> None:
        container = pods.container(pods.run())
        before = rss_mib(node.pid)
        script = "dd if=/dev/zero bs=1M count=512 2>/dev/null; dd if=/dev/zero bs=1M count=512 2>/dev/null >&2"
        answer = pods.exec(container, "sh", "-c", script, timeout=120)
        assert answer.exit_code == 0
        assert 15 * 2**20 < answer.ByteSize() < 16 * 2**20
        assert rss_mib(node.pid) - before < 100

    def test_a_command_that_does_not_exist(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        code, text = failure(pods.exec, container, "no-such-program")
        assert code == "UNKNOWN"
        assert "executable file not found in $PATH" in text
        assert failure(pods.exec, container)[0] == "INVALID_ARGUMENT"

    def test_not_in_a_container_that_does_not_run(self, pods: Pods) -> None:
        sandbox = pods.run()
        created = pods.create(sandbox, "true")
        assert failure(pods.exec, created, "true")[0] == "FAILED_PRECONDITION"
        exited = pods.container(sandbox, "true")
        pods.exited(exited)
        assert failure(pods.exec, exited, "true")[0] == "FAILED_PRECONDITION"

    def test_a_client_that_leaves_ends_its_command(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        future = pods.cri.ExecSync.future(pb.ExecSyncRequest(container_id=container, cmd=["sleep", "4321"]))
        until(lambda: "4321" in pods.shell(container, "ps -o args"))
        future.cancel()
        until(lambda: "4321" not in pods.shell(container, "ps -o args"))

    def test_many_at_once(self, pods: Pods) -> None:
        container = pods.container(pods.run())
        futures = [
            pods.cri.ExecSync.future(pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", f"echo {n}"]))
            for n in range(30)
        ]
        assert [future.result(timeout=60).stdout for future in futures] == [f"{n}\n".encode() for n in range(30)]


class TestNothingIsLeft:
    def test_on_the_machine(self, pods: Pods, node: Node) -> None:
        keep = pods.run()
        before = traces(node)
        sandbox = pods.run()
        pods.container(sandbox)
        pods.create(sandbox, "true")
        assert traces(node) != before
        pods.remove_sandbox(sandbox)
        until(lambda: traces(node), lambda found: found == before)
        assert pods.sandbox_status(keep).state == pb.SANDBOX_READY

    def test_after_a_failed_creation(self, pods: Pods, node: Node) -> None:
        sandbox = pods.run()
        before = traces(node)
        security = pb.LinuxContainerSecurityContext(run_as_username="nobody-there")
        code, text = failure(
            pods.create, sandbox, "true", linux=pb.LinuxContainerConfig(security_context=security), name="failed"
        )
        assert code == "INVALID_ARGUMENT"
        assert "nobody-there" in text
        assert traces(node) == before
        pods.create(sandbox, "true", name="failed")

    def test_of_descriptors_and_threads(self, pods: Pods, node: Node) -> None:
        sandbox = pods.run()
        container = pods.container(sandbox)
        pods.exec(container, "true")
        before = descriptors(node.pid)
        for _ in range(20):
            pods.exec(container, "true")
            pods.remove(pods.container(sandbox))
        until(lambda: descriptors(node.pid) <= before + 5)


def porto_socket(node: Node) -> str:
    return node.porto_socket or str(node.directory / "porto.sock")


def porto_pid(node: Node) -> int:
    """The process that serves Porto: that which listens, or with portod, which has a master, its child."""
    with socket.socket(socket.AF_UNIX) as peer:
        until(lambda: peer.connect_ex(porto_socket(node)) == 0)
        pid = int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    if node.porto_socket:
        # Containers become the master's children, too.
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next(int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "portod\n")
    return pid


def traces(node: Node) -> dict[str, list[str]]:
    """What the pods of a node leave on the machine."""
    netns = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "netns": sorted(netns),
        "mounts": sorted(m for m in mounts if m.startswith(str(node.directory))),
        "leases": sorted(p.name for p in (node.directory / "leases").glob("*/[0-9]*")),
        "volumes": sorted(os.listdir(node.directory / "volumes")),
        "helpers": sorted(os.listdir(node.directory / "state" / "containers")),
    }


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss_mib(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) // 1024


class TestStreaming:
    """Through the real crictl; the protocols themselves have tests of their own."""

    @pytest.mark.parametrize("transport", ["spdy", "websocket"])
    def test_exec(self, pods: Pods, crictl: Callable[..., str], transport: str) -> None:
        container = pods.container(pods.run())
        assert crictl("exec", "--transport", transport, container, "sh", "-c", "echo out") == "out\n"
        assert crictl("exec", "--transport", transport, "-i", container, "cat", stdin="from here") == "from here"
        with pytest.raises(subprocess.CalledProcessError) as caught:
            crictl("exec", "--transport", transport, container, "sh", "-c", "exit 7")
        assert "7" in caught.value.stderr

    @pytest.mark.parametrize("transport", ["spdy", "websocket"])
    def test_attach(self, pods: Pods, crictl: Callable[..., str], transport: str) -> None:
        sandbox = pods.run()
        container = pods.container(
            sandbox, "sh", "-c", "read line; echo got $line; sleep 0.2", stdin=True, stdin_once=True
        )
        assert crictl("attach", "--transport", transport, "-i", container, stdin="a word\n") == "got a word\n"
        assert pods.exited(container).exit_code == 0
        assert pods.log(container) == "got a word\n"

    def test_a_terminal(self, pods: Pods) -> None:
        script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal > /dev/tty; exec sleep 1000"
        container = pods.container(pods.run(), "sh", "-c", script, tty=True, stdin=True)
        assert until(lambda: pods.log_records(container)) == [("stdout", "terminal\r\n")]

    @pytest.mark.parametrize("host_network", [False, True])
    def test_port_forward(self, pods: Pods, node: Node, host_network: bool) -> None:
        require_crictl()
        config = pods.config()
        if host_network:
            config.linux.security_context.namespace_options.network = pb.NODE
        sandbox = pods.run(config)
        port = "18765" if host_network else "8765"
        pods.container(sandbox, "sh", "-c", f"while true; do echo served | nc -l -p {port}; done")
        with node.crictl_process("port-forward", sandbox, f"28765:{port}") as process:
            assert process.stdout is not None
            assert "Forwarding from" in process.stdout.readline()

            def served() -> bytes:
                with socket.create_connection(("127.0.0.1", 28765), timeout=10) as connection:
                    return connection.makefile("rb").readline()

            assert until(served) == b"served\n"
            process.terminate()
