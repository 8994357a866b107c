"""What a pod's containers share with each other and with the node, and what they don't."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.pods import Pods, failure
from tests.e2e.view import parse, script
from tools.node import Node

pytestmark = pytest.mark.root

FIELD = "linux.security_context.namespace_options"


@pytest.fixture(scope="module")
def pods(node: Node, busybox: str) -> Iterator[Pods]:
    """One for all tests of this file: none of them minds the others' containers."""
    made = Pods(node, busybox)
    yield made
    made.remove_all()


@pytest.fixture(scope="module")
def sandbox(pods: Pods) -> str:
    return pods.run()


def pod(pods: Pods, sysctls: dict[str, str] | None = None, **options: Any) -> pb.PodSandboxConfig:
    """A pod with these namespace options."""
    config = pods.config()
    config.linux.security_context.namespace_options.MergeFrom(pb.NamespaceOption(**options))
    config.linux.sysctls.update(sysctls or {})
    return config


def linux(**options: Any) -> pb.LinuxContainerConfig:
    security = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(**options))
    return pb.LinuxContainerConfig(security_context=security)


def namespace(pods: Pods, container: str, kind: str) -> str:
    return pods.shell(container, f"readlink /proc/self/ns/{kind}").strip()


class TestProcesses:
    def test_of_its_own(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "sleep", "4711", linux=linux(pid=pb.CONTAINER))
        assert pods.shell(container, "tr '\\0' ' ' < /proc/1/cmdline") == "sleep 4711 "
        other = pods.container(sandbox, linux=linux(pid=pb.CONTAINER))
        assert namespace(pods, container, "pid") != namespace(pods, other, "pid")

    def test_of_the_pod(self, pods: Pods, sandbox: str) -> None:
        one = pods.container(sandbox, "sleep", "4712", linux=linux(pid=pb.POD))
        two = pods.container(sandbox, linux=linux(pid=pb.POD))
        assert namespace(pods, one, "pid") == namespace(pods, two, "pid")
        assert namespace(pods, one, "pid") != os.readlink("/proc/self/ns/pid")
        assert "sleep 4712" in pods.shell(two, "ps -o args")
        pods.shell(two, "kill $(ps -o pid,args | grep '[s]leep 4712' | awk '{print $1}')")
        assert pods.exited(one).exit_code == 143

    def test_of_the_node(self, pods: Pods) -> None:
        sandbox = pods.run(pod(pods, pid=pb.NODE))
        container = pods.container(sandbox, linux=linux(pid=pb.NODE))
        assert namespace(pods, container, "pid") == os.readlink("/proc/self/ns/pid")
        assert pods.shell(container, f"cat /proc/{os.getpid()}/comm").strip() != ""
        own = pods.container(sandbox, linux=linux(pid=pb.CONTAINER))
        assert namespace(pods, own, "pid") != os.readlink("/proc/self/ns/pid")

    def test_of_another_container(self, pods: Pods, sandbox: str) -> None:
        target = pods.container(sandbox, "sleep", "4713", linux=linux(pid=pb.CONTAINER))
        debugger = pods.container(sandbox, linux=linux(pid=pb.TARGET, target_id=target))
        assert namespace(pods, debugger, "pid") == namespace(pods, target, "pid")
        assert "sleep 4713" in pods.shell(debugger, "ps -o args")
        pods.shell(debugger, "ls /proc/1/root/bin/busybox")
        # What is protected in every container is so in the other one's /proc as well, and for whoever comes later.
        for _ in range(2):
            found = parse(pods.shell(debugger, script())).mounts
            assert [mount.point for mount in found].count("/proc") == 2, "Porto's and the target's"
            last = {mount.point: mount for mount in found}
            assert {"ro" in last[f"/proc/{name}"].options for name in ("sys", "irq", "bus")} == {True}
        # Its own exit status, and its signals, are as any other's.
        quick = pods.container(sandbox, "sh", "-c", "exit 7", linux=linux(pid=pb.TARGET, target_id=target))
        assert pods.exited(quick).exit_code == 7
        pods.stop(debugger, timeout=5)
        assert pods.status(debugger).exit_code in (137, 143)
        assert pods.status(target).state == pb.CONTAINER_RUNNING

    def test_of_another_container_without_what_is_masked(self, pods: Pods, sandbox: str) -> None:
        target = pods.container(sandbox, linux=linux(pid=pb.CONTAINER))
        wanted = linux(pid=pb.TARGET, target_id=target)
        wanted.security_context.masked_paths.extend(["/proc/bus", "/proc/cpuinfo"])
        wanted.security_context.readonly_paths.append("/proc/fs")
        debugger = pods.container(sandbox, linux=wanted)
        for _ in range(2):
            assert pods.shell(debugger, "ls /proc/bus | wc -l; wc -c < /proc/cpuinfo") == "0\n0\n"
        assert " /proc/fs ro," in pods.shell(debugger, "awk '{print \"\", $5, $6}' /proc/self/mountinfo")
        mount = pb.Mount(container_path="/proc/cpuinfo", host_path="/etc/hostname")
        code, text = failure(pods.create, sandbox, "true", linux=linux(pid=pb.TARGET, target_id=target), mounts=[mount])
        assert (code, "mounts[0].container_path" in text) == ("UNIMPLEMENTED", True)

    def test_of_one_that_cannot_be_joined(self, pods: Pods, sandbox: str) -> None:
        elsewhere = pods.container(pods.run())
        ended = pods.container(sandbox, "true")
        pods.exited(ended)
        for options, expected in (
            ({"pid": pb.TARGET}, ("INVALID_ARGUMENT", f"{FIELD}.target_id")),
            ({"pid": pb.POD, "target_id": elsewhere}, ("INVALID_ARGUMENT", f"{FIELD}.target_id")),
            ({"pid": pb.TARGET, "target_id": elsewhere}, ("INVALID_ARGUMENT", f"{FIELD}.target_id")),
            ({"pid": pb.TARGET, "target_id": ended}, ("FAILED_PRECONDITION", f"{FIELD}.target_id")),
            ({"pid": pb.TARGET, "target_id": "a" * 64}, ("NOT_FOUND", "container")),
            ({"pid": pb.NODE}, ("INVALID_ARGUMENT", f"{FIELD}.pid")),
            ({"pid": 9}, ("INVALID_ARGUMENT", f"{FIELD}.pid")),
        ):
            code, text = failure(pods.create, sandbox, "true", linux=linux(**options))
            assert (code, expected[1] in text) == (expected[0], True), text


class TestTheRest:
    def test_of_the_pod(self, pods: Pods, sandbox: str) -> None:
        one, two = pods.container(sandbox), pods.container(sandbox)
        for kind in ("net", "ipc", "uts"):
            assert namespace(pods, one, kind) == namespace(pods, two, kind) != os.readlink(f"/proc/self/ns/{kind}")
        assert namespace(pods, one, "mnt") != namespace(pods, two, "mnt")
        assert namespace(pods, one, "user") == os.readlink("/proc/self/ns/user")

    def test_of_the_node(self, pods: Pods) -> None:
        sandbox = pods.run(pod(pods, network=pb.NODE, ipc=pb.NODE))
        container = pods.container(sandbox, linux=linux(network=pb.NODE, ipc=pb.NODE))
        for kind in ("net", "ipc"):
            assert namespace(pods, container, kind) == os.readlink(f"/proc/self/ns/{kind}")
        assert pods.shell(container, "hostname").strip() == os.uname().nodename
        assert pods.sandbox_status(sandbox).network.ip == ""
        options = pods.sandbox_status(sandbox).linux.namespaces.options
        assert (options.network, options.ipc, options.pid) == (pb.NODE, pb.NODE, pb.POD)

    @pytest.mark.parametrize(
        ("options", "code", "field"),
        [
            ({"network": pb.CONTAINER}, "UNIMPLEMENTED", "network"),
            ({"ipc": pb.CONTAINER}, "UNIMPLEMENTED", "ipc"),
            ({"network": pb.TARGET}, "INVALID_ARGUMENT", "namespace_options"),
            ({"ipc": 7}, "INVALID_ARGUMENT", "ipc"),
            ({"userns_options": pb.UserNamespace(mode=pb.POD)}, "UNIMPLEMENTED", "userns_options"),
            (
                {"userns_options": pb.UserNamespace(mode=pb.NODE, uids=[pb.IDMapping(length=1)])},
                "INVALID_ARGUMENT",
                "userns_options",
            ),
        ],
    )
    def test_what_cannot_be_had(self, pods: Pods, sandbox: str, options: dict[str, Any], code: str, field: str) -> None:
        for call, arguments in (
            (pods.run, (pod(pods, **options),)),
            (pods.create, (sandbox, "true")),
        ):
            extra = {"linux": linux(**options)} if call == pods.create else {}
            found, text = failure(call, *arguments, **extra)
            assert (found, FIELD in text, field in text) == (code, True, True), text

    def test_the_nodes_namespaces_are_for_pods_that_are_in_them(self, pods: Pods, sandbox: str) -> None:
        for field in ("network", "ipc"):
            code, text = failure(pods.create, sandbox, "true", linux=linux(**{field: pb.NODE}))
            assert (code, f"{FIELD}.{field}" in text) == ("INVALID_ARGUMENT", True)

    def test_a_handler_there_is_not(self, pods: Pods) -> None:
        request = pb.RunPodSandboxRequest(config=pods.config(), runtime_handler="kata")
        code, text = failure(pods.cri.RunPodSandbox, request)
        assert (code, "runtime_handler" in text) == ("INVALID_ARGUMENT", True)


class TestSysctls:
    def test_those_of_the_pods_namespaces(self, pods: Pods) -> None:
        wanted = {
            "net.ipv4.ip_forward": "1",
            "net/ipv4/ip_unprivileged_port_start": "80",
            "net.ipv4.conf.lo.forwarding": "1",
            "kernel.shm_rmid_forced": "1",
            "kernel.msgmax": "65535",
            "fs.mqueue.msg_max": "100",
        }
        before = {name: Path("/proc/sys", name.replace(".", "/")).read_text() for name in wanted}
        container = pods.container(pods.run(pod(pods, wanted)))
        for name, value in wanted.items():
            assert pods.shell(container, f"cat /proc/sys/{name.replace('.', '/')}").strip() == value, name
        assert {name: Path("/proc/sys", name.replace(".", "/")).read_text() for name in wanted} == before
        plain = pods.container(pods.run())
        assert pods.shell(plain, "cat /proc/sys/kernel/msgmax") != "65535\n"
        assert pods.exec(container, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward").exit_code != 0

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("kernel.pid_max", "1000"),
            ("vm.swappiness", "1"),
            ("kernel.core_pattern", "|/bin/sh"),
            ("kernel.hostname", "x"),
            ("net.ipv4.no_such_thing", "1"),
            ("net.ipv4.ip_forward", "many"),
            ("net.ipv4.ip_forward", "1\n2"),
            ("net.../../kernel/core_pattern", "x"),
            ("net/../kernel/core_pattern", "x"),
            ("net", "1"),
            ("", "1"),
            ("net..ipv4", "1"),
        ],
    )
    def test_all_others_are_refused(self, pods: Pods, name: str, value: str) -> None:
        code, text = failure(pods.run, pod(pods, {name: value}))
        assert (code, "linux.sysctls" in text) == ("INVALID_ARGUMENT", True)

    def test_those_of_the_node_are_left_alone(self, pods: Pods) -> None:
        for options, name in (({"network": pb.NODE}, "net.ipv4.ip_forward"), ({"ipc": pb.NODE}, "kernel.msgmax")):
            code, text = failure(pods.run, pod(pods, {name: "1"}, **options))
            assert (code, "linux.sysctls" in text) == ("INVALID_ARGUMENT", True)
