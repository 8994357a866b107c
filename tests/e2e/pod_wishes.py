"""Random pod configurations: wishes, with what is to be seen of them, and mistakes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from hypothesis import strategies as st

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cgroups import InForce
from tests.e2e.view import View

MIB = 1024 * 1024
PORTOS_PROCESSES = 10000
"""Of a container at its top level, unless it is told otherwise."""
INVALID, NEVER = "INVALID_ARGUMENT", "UNIMPLEMENTED"
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class SeenPod:
    """All that can be told of a pod with a container in it."""

    view: View
    """Of the container: its probes are those of the case."""
    status: pb.PodSandboxStatus
    container: pb.ContainerStatus
    limits: InForce
    pause: dict[str, str]
    """``/proc/PID/status`` of its own process; ``root``: the options of its root directory; ``processes``: its PID
    namespace."""


@dataclass
class PodCase:
    """A configuration, and what is to become of it."""

    config: pb.PodSandboxConfig = field(default_factory=pb.PodSandboxConfig)
    handler: str = ""
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    checks: list[Callable[[SeenPod], None]] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    has_logs: bool = True

    @property
    def security(self) -> pb.LinuxSandboxSecurityContext:
        return self.config.linux.security_context

    @property
    def options(self) -> pb.NamespaceOption:
        return self.security.namespace_options

    def probe(self, command: str, expected: str) -> None:
        number = len(self.probes)
        self.probes.append(command)

        def check(seen: SeenPod) -> None:
            assert seen.view.probes[number][0] == expected, command

        self.checks.append(check)

    def __repr__(self) -> str:
        return f"{text_format.MessageToString(self.config, as_utf8=True)}mistakes: {self.mistakes}"


def namespaces(draw: Draw, case: PodCase) -> None:
    case.options.network = draw(st.sampled_from((pb.POD, pb.NODE)))
    case.options.ipc = draw(st.sampled_from((pb.POD, pb.NODE)))
    case.options.pid = draw(st.sampled_from((pb.POD, pb.CONTAINER, pb.NODE)))


def hostname(draw: Draw, case: PodCase) -> None:
    case.config.hostname = draw(st.sampled_from(("web-0", "A_b.c", "x" * 64)))
    case.probe("$B cat /etc/hostname", case.config.hostname)
    case.probe(f"$B grep -cw '{case.config.hostname}' /etc/hosts", "1")


def resolver(draw: Draw, case: PodCase) -> None:
    dns = case.config.dns_config
    dns.servers.extend(draw(st.lists(st.sampled_from(("10.0.0.10", "fd00::1")), max_size=2)))
    dns.searches.extend(draw(st.lists(st.sampled_from(("a.example", "b")), max_size=2)))
    dns.options.extend(draw(st.lists(st.sampled_from(("ndots:5", "edns0")), max_size=2)))
    lines = [f"nameserver {server}" for server in dns.servers]
    lines += ["search " + " ".join(dns.searches)] if dns.searches else []
    lines += ["options " + " ".join(dns.options)] if dns.options else []
    case.probe("$B cat /etc/resolv.conf", "\n".join(lines) or Path("/etc/resolv.conf").read_text().strip("\n"))


def no_logs(draw: Draw, case: PodCase) -> None:
    case.has_logs = False


def ports(draw: Draw, case: PodCase) -> None:
    for number in range(draw(st.integers(1, 2))):
        case.config.port_mappings.add(
            protocol=draw(st.sampled_from((pb.TCP, pb.UDP))),
            container_port=draw(st.sampled_from((1, 80, 65535))),
            host_port=draw(st.sampled_from((0, 20000 + number))),
            host_ip=draw(st.sampled_from(("", "127.0.0.1"))),
        )


def metadata(draw: Draw, case: PodCase) -> None:
    texts = st.text(st.characters(codec="utf-8"), max_size=20)
    for target in (case.config.labels, case.config.annotations):
        target.update(draw(st.dictionaries(texts, texts, max_size=3)))
    case.config.metadata.attempt = draw(st.sampled_from((0, 1, 2**32 - 1)))
    case.config.linux.cgroup_parent = draw(st.sampled_from(("", "/kubepods/burstable/pod1", "kubepods.slice")))


def sysctls(draw: Draw, case: PodCase) -> None:
    wanted = draw(
        st.dictionaries(
            st.sampled_from(("net.ipv4.ip_forward", "net/ipv4/tcp_syncookies", "kernel.msgmax", "fs.mqueue.msg_max")),
            st.sampled_from(("1", "100")),
            min_size=1,
        )
    )
    for name, value in wanted.items():
        if getattr(case.options, "network" if name.startswith("net") else "ipc") == pb.NODE:
            continue
        value = "1" if name.startswith("net") else value
        case.config.linux.sysctls[name] = value
        case.probe(f"$B cat /proc/sys/{name.replace('.', '/')}", value)


def limits(draw: Draw, case: PodCase) -> None:
    resources, overhead = case.config.linux.resources, case.config.linux.overhead
    memory = draw(st.sampled_from((0, 64 * MIB, 256 * MIB)))
    more = draw(st.sampled_from((0, 16 * MIB)))
    resources.memory_limit_in_bytes, overhead.memory_limit_in_bytes = memory, more
    resources.cpu_shares = draw(st.sampled_from((0, 2, 512, 4096)))
    resources.oom_score_adj = draw(st.sampled_from((0, 500)))
    resources.cpu_quota, resources.cpu_period = draw(st.sampled_from(((0, 0), (-1, 0), (60000, 0), (60000, 50000))))
    overhead.cpu_quota, overhead.cpu_period = draw(st.sampled_from(((0, 0), (10000, 0), (5000, 50000))))
    resources.cpuset_cpus = draw(st.sampled_from(("", "0")))
    resources.unified.update(draw(st.sampled_from(({}, {"pids.max": "200"}))))
    resources.hugepage_limits.extend(draw(st.sampled_from(([], [pb.HugepageLimit(page_size="2MB", limit=0)]))))

    def check(seen: SeenPod) -> None:
        limits = seen.limits
        assert limits.memory == (memory + more if memory else None)
        assert limits.shares == (resources.cpu_shares or 2)
        if resources.cpu_quota > 0:
            period = resources.cpu_period or 100000
            of_overhead = overhead.cpu_quota * period // (overhead.cpu_period or 100000)
            assert (limits.quota_us, limits.period_us) == (resources.cpu_quota + of_overhead, period), limits
        else:
            assert limits.quota_us is None
        assert limits.processes == (200 if resources.unified else PORTOS_PROCESSES)
        if resources.cpuset_cpus:
            assert limits.cpus == "0"
        if resources.hugepage_limits:
            assert limits.huge_pages in (0, None)  # None: not to be limited here

    case.checks.append(check)


def security(draw: Draw, case: PodCase) -> None:
    wanted = case.security
    wanted.privileged = draw(st.booleans())
    uid, gid = draw(st.sampled_from(((None, None), (0, None), (4242, None), (4242, 7), (2**31 - 1, 2**31 - 1))))
    if uid is not None:
        wanted.run_as_user.value = uid
    if gid is not None:
        wanted.run_as_group.value = gid
    wanted.supplemental_groups.extend(draw(st.lists(st.sampled_from((1, 5, 2**31 - 1)), max_size=2)))
    wanted.supplemental_groups_policy = draw(st.sampled_from((pb.Merge, pb.Strict)))
    wanted.readonly_rootfs = draw(st.booleans())
    confined = draw(st.sampled_from(("", "default", "none", "old default", "old none")))
    if confined.startswith("old"):
        wanted.seccomp_profile_path = "runtime/default" if confined == "old default" else "unconfined"
    elif confined:
        types = {"default": pb.SecurityProfile.RuntimeDefault, "none": pb.SecurityProfile.Unconfined}
        wanted.seccomp.profile_type = types[confined]
        wanted.seccomp.SetInParent()
    if draw(st.booleans()):
        # What there is without any.
        wanted.apparmor.profile_type = pb.SecurityProfile.RuntimeDefault
        wanted.apparmor.SetInParent()

    def check(seen: SeenPod) -> None:
        # The image says 65535:65535.
        user = 65535 if uid is None else uid
        group = (65535 if uid is None else 0) if gid is None else gid
        assert seen.pause["Uid"].split() == [str(user)] * 4
        assert seen.pause["Gid"].split() == [str(group)] * 4
        assert {int(word) for word in seen.pause["Groups"].split()} == {group, *wanted.supplemental_groups}
        assert seen.pause["Seccomp"] == ("2" if "default" in confined and not wanted.privileged else "0")
        assert ("ro" in seen.pause["root"].split(",")) == wanted.readonly_rootfs

    case.checks.append(check)


# In this order: what can be wished for of sysctls depends on the namespaces.
WISHES = (namespaces, hostname, resolver, no_logs, ports, metadata, sysctls, limits, security)


def check_always(case: PodCase, seen: SeenPod) -> None:
    """What is so whatever was wished."""
    config, status = case.config, seen.status
    assert status.metadata == config.metadata
    assert dict(status.labels) == dict(config.labels)
    assert dict(status.annotations) == dict(config.annotations)
    assert status.linux.namespaces.options == config.linux.security_context.namespace_options
    assert status.runtime_handler == case.handler
    assert bool(status.network.ip) == (case.options.network != pb.NODE)
    for kind, mode in (("net", case.options.network), ("ipc", case.options.ipc)):
        of_node = seen.view.namespaces[kind] == os.readlink(f"/proc/self/ns/{kind}")
        assert of_node == (mode == pb.NODE), kind
    # A container that asks for nothing is in the pod's.
    assert (seen.view.namespaces["pid"] == os.readlink("/proc/self/ns/pid")) == (case.options.pid == pb.NODE)
    assert seen.view.namespaces["pid"] == seen.pause["processes"]
    assert seen.view.hostname == (config.hostname or os.uname().nodename)
    assert seen.view.environment[b"HOSTNAME"].decode() == seen.view.hostname
    assert int(seen.pause["CapEff"], 16) == 0
    assert bool(seen.container.log_path) == case.has_logs
    assert seen.container.log_path.startswith(config.log_directory)


MISTAKES = (
    ("metadata.name", INVALID, r'metadata { name: "a\nb" }'),
    ("hostname", INVALID, 'hostname: "a b"'),
    ("hostname", INVALID, r'hostname: "\303\251"'),
    ("hostname", INVALID, f'hostname: "{"x" * 65}"'),
    ("log_directory", INVALID, 'log_directory: "relative"'),
    ("dns_config.servers", INVALID, r'dns_config { servers: "a\nb" }'),
    ("dns_config.searches", INVALID, 'dns_config { searches: "" }'),
    ("dns_config.options", INVALID, 'dns_config { options: "a b" }'),
    ("port_mappings", INVALID, "port_mappings { container_port: 70000 }"),
    ("port_mappings", INVALID, "port_mappings { container_port: 1 host_port: -1 }"),
    ("port_mappings", INVALID, "port_mappings { protocol: 7 container_port: 1 }"),
    ("port_mappings", INVALID, 'port_mappings { container_port: 1 host_ip: "localhost" }'),
    ("windows", NEVER, "windows { }"),
    ("linux.sysctls", INVALID, 'linux { sysctls { key: "vm.swappiness" value: "1" } }'),
    ("linux.sysctls", INVALID, 'linux { sysctls { key: "net.ipv4.none" value: "1" } }'),
    ("linux.resources.memory_limit_in_bytes", INVALID, "linux { resources { memory_limit_in_bytes: 1 } }"),
    ("linux.overhead.cpu_period", INVALID, "linux { overhead { cpu_period: 1 } }"),
    ("linux.resources.unified", NEVER, 'linux { resources { unified { key: "memory.low" value: "1" } } }'),
    *(
        (f"linux.security_context.{field}", code, f"linux {{ security_context {{ {change} }} }}")
        for field, code, change in (
            ("namespace_options.network", NEVER, "namespace_options { network: CONTAINER }"),
            ("namespace_options.ipc", NEVER, "namespace_options { ipc: CONTAINER }"),
            ("namespace_options", INVALID, "namespace_options { pid: TARGET }"),
            ("namespace_options.userns_options", NEVER, "namespace_options { userns_options { } }"),
            ("run_as_user", INVALID, "run_as_user { value: -1 }"),
            ("supplemental_groups", INVALID, "supplemental_groups: -1"),
            ("selinux_options", NEVER, 'selinux_options { user: "u" }'),
            ("apparmor", NEVER, 'apparmor { profile_type: Localhost localhost_ref: "x" }'),
            ("seccomp", INVALID, "seccomp { profile_type: 9 }"),
            ("seccomp", INVALID, 'seccomp { profile_type: RuntimeDefault localhost_ref: "x" }'),
        )
    ),
)


@st.composite
def pods(draw: Draw) -> PodCase:
    """A configuration, more often than not without a mistake. Its metadata and logs are the caller's."""
    case = PodCase(handler=draw(st.sampled_from(("", "porto"))))
    wanted = draw(st.lists(st.sampled_from(WISHES), unique=True, max_size=5))
    for wish in sorted(wanted, key=WISHES.index):
        wish(draw, case)
    if draw(st.integers(0, 2)) == 0:
        name, code, change = draw(st.sampled_from(MISTAKES))
        text_format.Merge(change, case.config)
        case.mistakes.append((name, code))
    return case
