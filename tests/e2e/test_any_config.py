"""Any configuration: each is either honoured in all that it says, or refused by a field's name, and leaves nothing.

``PORTOSHIM_EXAMPLES=2000`` makes it a long run, of other examples every time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cases import COMMAND, DEFAULT_PATH, PODS, Case, Seen, Surroundings
from tests.e2e.cgroups import in_force
from tests.e2e.conftest import pull
from tests.e2e.mistakes import cases
from tests.e2e.pods import Pods, until
from tests.e2e.test_lifecycle import porto_socket
from tests.e2e.view import END, View, parse, script
from tests.e2e.wishes import check_capabilities, check_namespaces
from tools import images
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root

LONG_RUN = int(os.environ.get("PORTOSHIM_EXAMPLES", "0"))
REFUSALS = {"INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION"}


def examples(count: int) -> settings:
    """How many, and whether the same ones every time."""
    return settings(
        max_examples=LONG_RUN or count,
        derandomize=not LONG_RUN,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink] if LONG_RUN else [Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@dataclass
class World:
    """A node with pods of every kind to put containers into."""

    node: Node
    pods: Pods
    porto: Client
    around: Surroundings
    sandboxes: dict[str, str]
    targets: dict[str, str]
    """A container with its own processes in each pod."""
    plain: dict[str, View]
    joined: dict[str, View]

    def left(self) -> set[str]:
        """What containers leave behind while they are there, of every kind."""
        here = self.node.directory
        # Processes of ExecSync, which nobody waits for once they have ended, are not meant.
        found = {f"Porto: {name}" for name in self.porto.list_containers() if "/e-" not in name}
        found |= {f"volume: {volume.path}" for volume in self.porto.get_volumes()}
        for name in ("volumes", "state/containers"):
            found |= {str(path) for path in (here / name).iterdir()}
        # Anywhere on the node, one upon another too.
        lines = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
        found |= {f"mount: {fields[0]} {fields[4]}" for fields in lines}
        return found | {f"CRI: {c.id}" for c in self.node.cri.ListContainers(pb.ListContainersRequest()).containers}


@pytest.fixture(scope="module")
def world(
    node: Node, registry: LocalRegistry, busybox: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    files = [images.File("file", b"top\n"), images.File("dir/file", b"below\n")]
    images.push(images.build([images.layer(files)], {}), registry, "public/any", ["1"])
    data = pull(node, f"{registry.address}/public/any:1")
    directory = tmp_path_factory.mktemp("any")
    directory.chmod(0o755)
    around = Surroundings(directory, busybox, data, node.directory / "cdi")
    pods = Pods(node, busybox)
    around.make()
    try:
        with Client(porto_socket(node)) as porto:
            made = World(node, pods, porto, around, {}, {}, {}, {})
            for kind in PODS:
                _make_pod(made, kind)
            yield made
    finally:
        pods.remove_all()
        around.clean()


def _make_pod(world: World, kind: str) -> None:
    config = world.pods.config(hostname="" if kind == "node" else f"{kind}-host")
    security = config.linux.security_context
    security.privileged = kind != "plain"
    if kind == "node":
        options = security.namespace_options
        options.network = options.pid = options.ipc = pb.NODE
    sandbox = world.sandboxes[kind] = world.pods.run(config)
    plain = world.pods.container(sandbox)
    world.plain[kind] = parse(world.pods.shell(plain, script()))
    linux = pb.LinuxContainerConfig()
    linux.security_context.namespace_options.pid = pb.CONTAINER
    world.targets[kind] = world.pods.container(sandbox, linux=linux)
    world.joined[kind] = parse(world.pods.shell(world.targets[kind], script()))


def test_any_container(world: World) -> None:
    @examples(40)
    @given(case=cases(world.around))
    def run(case: Case) -> None:
        before = world.left()
        container = ""
        try:
            container = create(world, case)
            world.pods.start(container)
        except grpc.RpcError as err:
            check_refusal(case, err)
            if container:
                assert world.pods.status(container).reason == "StartError"
        else:
            assert not case.mistakes, f"not refused: {case.mistakes}"
            check_honoured(world, case, container)
        finally:
            if container:
                log = world.pods.status(container).log_path
                world.pods.remove(container)
                Path(log).unlink(missing_ok=True)  # kubelet's to remove
        after = world.left()
        assert after == before, after ^ before

    run()


def create(world: World, case: Case) -> str:
    """CreateContainer, with a script that tells what the container sees."""
    if not case.mistakes:
        case.config.command[3] = script(case.probes, "exec /bin/busybox sleep 1000")
    if case.joins:
        case.security.namespace_options.target_id = world.targets[case.pod]
    request = pb.CreateContainerRequest(pod_sandbox_id=world.sandboxes[case.pod], config=case.config)
    container: str = world.node.cri.CreateContainer(request).container_id
    return container


def check_refusal(case: Case, err: grpc.RpcError) -> None:
    """One of the mistakes is named, with its code, and there has to be one."""
    code, text = err.code().name, err.details() or ""
    assert code in REFUSALS, (code, text)
    assert case.mistakes, (code, text)
    assert any(name in text and code == expected for name, expected in case.mistakes), (code, text)


def check_honoured(world: World, case: Case, container: str) -> None:
    pods, sandbox = world.pods, world.sandboxes[case.pod]
    status = pods.status(container)
    assert status.state == pb.CONTAINER_RUNNING, status
    output = until(lambda: pods.log(container), lambda text: END in text)
    answer = pods.exec(container, *COMMAND[:3], script(case.probes), "argv0")
    assert answer.exit_code == 0, answer
    for is_exec, view in ((False, parse(output)), (True, parse(answer.stdout.decode()))):
        seen = Seen(
            view=view,
            status=status,
            limits=in_force(world.porto, f"{sandbox}/{container}"),
            pod=world.plain[case.pod],
            target=world.joined[case.pod],
            is_exec=is_exec,
        )
        check_always(case, seen)
        for check in case.checks:
            check(seen)


def check_always(case: Case, seen: Seen) -> None:
    """What is so whatever was wished."""
    view = seen.view
    base = {b"PATH": DEFAULT_PATH, b"HOME": b"/root", b"HOSTNAME": view.hostname.encode()}
    if case.config.tty:
        base[b"TERM"] = b"xterm"
    assert view.environment == base | case.variables
    if not seen.is_exec:
        assert [word.decode() for word in view.arguments] == [*case.config.command, *case.config.args]
    assert view.status["NoNewPrivs"] == str(int(case.security.no_new_privs))
    assert view.status["Umask"] == "0022"
    if not case.security.HasField("seccomp") and not case.security.seccomp_profile_path:
        assert view.status["Seccomp"] == "0"
    if not case.config.working_dir:
        assert view.cwd == "/"
    assert ("ro" in view.mount("/").options) == case.security.readonly_rootfs
    assert not any(
        "porto" in mount.root + mount.point.replace("/.portoshim", "")
        for mount in view.mounts[1:]
        if mount.kind == "tmpfs"
    )
    check_capabilities(case, seen)
    check_namespaces(case, seen)
