"""Any pod configuration, and any update of limits: honoured, or refused by a field's name with nothing changed."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cgroups import in_force
from tests.e2e.pod_wishes import MIB, PodCase, SeenPod, check_always, pods
from tests.e2e.pods import Pods, failure
from tests.e2e.test_any_config import REFUSALS, examples
from tests.e2e.test_lifecycle import porto_socket
from tests.e2e.view import parse, script
from tools.node import Node

pytestmark = pytest.mark.root


def left(node: Node, porto: Client) -> set[str]:
    """What pods leave behind while they are there, of every kind."""
    here = node.directory
    found = {f"Porto: {name}" for name in porto.list_containers() if "/e-" not in name}
    found |= {f"volume: {volume.path}" for volume in porto.get_volumes()}
    for directory in (here / "volumes", here / "state/containers", here / "state/sandboxes", Path("/run/netns")):
        found |= {str(path) for path in directory.iterdir()}
    leases = here / "leases" / "pods"
    found |= {str(path) for path in leases.iterdir() if path.name[0].isdigit()} if leases.exists() else set()
    lines = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    found |= {f"mount: {fields[0]} {fields[4]}" for fields in lines}
    return found | {f"CRI: {s.id}" for s in node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items}


def test_any_pod(node: Node, busybox: str) -> None:
    made = Pods(node, busybox)
    # What is made for the first pod stays for the others.
    made.remove_sandbox(made.run())
    with Client(porto_socket(node)) as porto:

        @examples(15)
        @given(case=pods())
        def run(case: PodCase) -> None:
            before = left(node, porto)
            sandbox = ""
            try:
                sandbox = create(made, case)
            except grpc.RpcError as err:
                code, text = err.code().name, err.details() or ""
                assert code in REFUSALS, (code, text)
                assert case.mistakes, (code, text)
                assert any(name in text and code == expected for name, expected in case.mistakes), (code, text)
            else:
                assert not case.mistakes, f"not refused: {case.mistakes}"
                check_honoured(made, porto, case, sandbox)
            finally:
                if sandbox:
                    made.stop_sandbox(sandbox)
                    made.remove_sandbox(sandbox)
            after = left(node, porto)
            assert after == before, after ^ before

        run()


def create(made: Pods, case: PodCase) -> str:
    base = made.config()
    if not case.config.metadata.name:
        case.config.metadata.name = base.metadata.name
    case.config.metadata.namespace, case.config.metadata.uid = base.metadata.namespace, base.metadata.uid
    if not case.config.log_directory and case.has_logs:
        case.config.log_directory = base.log_directory
    request = pb.RunPodSandboxRequest(config=case.config, runtime_handler=case.handler)
    sandbox: str = made.cri.RunPodSandbox(request).pod_sandbox_id
    made.adopt(sandbox, case.config)
    return sandbox


def check_honoured(made: Pods, porto: Client, case: PodCase, sandbox: str) -> None:
    container = made.container(sandbox)
    check_privileged(made, case, sandbox)
    pid = porto.get_property(f"{sandbox}/pause", "root_pid")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pause = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    pause["root"] = next(words[3] for words in mounts if words[1] == "/")
    pause["processes"] = os.readlink(f"/proc/{pid}/ns/pid")
    seen = SeenPod(
        view=parse(made.shell(container, script(case.probes))),
        status=made.sandbox_status(sandbox),
        container=made.status(container),
        limits=in_force(porto, sandbox),
        pause=pause,
    )
    check_always(case, seen)
    for check in case.checks:
        check(seen)


def check_privileged(made: Pods, case: PodCase, sandbox: str) -> None:
    """Such a container is for such a pod."""
    security = pb.LinuxContainerSecurityContext(privileged=True)
    linux = pb.LinuxContainerConfig(security_context=security)
    if case.security.privileged:
        made.create(sandbox, "true", linux=linux)
    else:
        code, text = failure(made.create, sandbox, "true", linux=linux)
        assert (code, "linux.security_context.privileged" in text) == ("INVALID_ARGUMENT", True), text


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "memory_limit_in_bytes": st.sampled_from((-1, 64 * MIB, 128 * MIB, 4096, -3)),
        "cpu_quota": st.sampled_from((-1, 20000, 70000, 5)),
        "cpu_period": st.sampled_from((50000, 100000, 10)),
        "cpu_shares": st.sampled_from((2, 100, 5000, -1)),
        "cpuset_cpus": st.sampled_from(("0", "0-9999")),
        "unified": st.sampled_from(({"pids.max": "100"}, {"pids.max": "max"}, {"io.max": "x"}, {"memory.max": "no"})),
    },
)
"""Some that can be, and some that can't."""
_IMPOSSIBLE = (4096, -3, 5, 10, -1, "0-9999", {"io.max": "x"}, {"memory.max": "no"})


def impossible(wanted: dict[str, object]) -> bool:
    """Whether anything in it is: -1 is none for a limit, and no number of shares."""
    return any(
        value in _IMPOSSIBLE and not (value == -1 and name in ("memory_limit_in_bytes", "cpu_quota"))
        for name, value in wanted.items()
    )


def test_any_update(node: Node, busybox: str) -> None:
    made = Pods(node, busybox)
    sandbox = made.run()
    try:
        with Client(porto_socket(node)) as porto:

            @examples(15)
            @given(updates=st.lists(LIMITS, min_size=1, max_size=4))
            def run(updates: list[dict[str, object]]) -> None:
                container = made.container(sandbox)
                try:
                    check_updates(made, porto, f"{sandbox}/{container}", container, updates)
                finally:
                    made.remove(container)

            run()
    finally:
        made.remove_all()


def check_updates(made: Pods, porto: Client, name: str, container: str, updates: list[dict[str, object]]) -> None:
    expected = pb.LinuxContainerResources()
    for wanted in updates:
        change = pb.LinuxContainerResources(**wanted)  # type: ignore[arg-type]
        before = in_force(porto, name)
        try:
            made.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=change))
        except grpc.RpcError as err:
            assert err.code().name in REFUSALS, err
            assert impossible(wanted), (wanted, err)
            assert in_force(porto, name) == before
        else:
            assert not impossible(wanted), f"not refused: {wanted}"
            expected.MergeFrom(change)
        assert made.status(container).resources.linux == expected
    found = in_force(porto, name)
    assert found.memory == (expected.memory_limit_in_bytes if expected.memory_limit_in_bytes > 0 else None)
    assert found.quota_us == (expected.cpu_quota if expected.cpu_quota > 0 else None)
    assert found.shares == (expected.cpu_shares or 2)
    if expected.cpuset_cpus:
        assert found.cpus == expected.cpuset_cpus
    limit = expected.unified.get("pids.max", "max")
    assert found.processes == (None if limit == "max" else int(limit))
