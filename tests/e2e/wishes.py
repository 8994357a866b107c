"""Wishes: each changes a random container configuration and adds what is to be seen from inside then."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from hypothesis import strategies as st
from shim_porto_runtime import capabilities

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cgroups import InForce
from tests.e2e.view import BUSYBOX, View, mount_of

MIB = 1024 * 1024
COMMAND = (BUSYBOX, "sh", "-c", "exec sleep 1000", "argv0")
"""What a container runs; a script takes the place of the one in it."""

PODS = ("plain", "privileged", "node")
DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CDI_KIND = "vendor.example/any"


@dataclass(frozen=True)
class Surroundings:
    """What configurations may refer to on the node."""

    directory: Path
    """Of everything here."""
    image: str
    data_image: str
    cdi: Path
    """The node's directory of CDI files."""

    @property
    def sources(self) -> dict[str, Path]:
        """Host directories by kind, each with a file ``marker`` that says which one it is."""
        return {name: self.directory / name for name in ("plain", "shared", "strict", "nested", "odd name;\n\\é")}

    @property
    def file(self) -> Path:
        return self.directory / "plain" / "marker"

    @property
    def seccomp(self) -> Path:
        return self.directory / "seccomp.json"

    def make(self) -> None:
        for name, path in self.sources.items():
            path.mkdir()
            options = "mode=0777" + (",nosuid,nodev,noexec" if name == "strict" else "")
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "any", str(path)], check=True)
            subprocess.run(["mount", "--make-shared" if name == "shared" else "--make-private", str(path)], check=True)
            (path / "marker").write_text(name.partition(" ")[0] + "\n")
            below = path / "below"
            below.mkdir()
            if name == "nested":
                subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0777", "any", str(below)], check=True)
            (below / "here").mkdir()  # to be mounted over, where everything is read-only
        rule = {"names": ["chmod", "fchmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
        self.seccomp.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
        (self.directory / "broken.json").write_text("{")
        self.cdi.mkdir(exist_ok=True)
        devices = [
            {"name": "good", "containerEdits": {"env": ["CDI=yes"], "additionalGids": [4321]}},
            {"name": "bad", "containerEdits": {"hooks": [{"hookName": "poststop", "path": "/bin/true"}]}},
        ]
        (self.cdi / "any.json").write_text(json.dumps({"cdiVersion": "0.7.0", "kind": CDI_KIND, "devices": devices}))

    def clean(self) -> None:
        (self.cdi / "any.json").unlink(missing_ok=True)
        for path in self.sources.values():
            subprocess.run(["umount", "-R", "-l", str(path)], check=False)


@dataclass(frozen=True)
class Seen:
    """All that can be told of one container that runs."""

    view: View
    status: pb.ContainerStatus
    limits: InForce
    pod: View
    """Of a plain container of the same pod."""
    target: View
    """Of the container that others join."""

    is_exec: bool
    """``view`` is of a process that was run later on."""


@dataclass
class Case:
    """A configuration, and what is to become of it."""

    around: Surroundings
    pod: str
    config: pb.ContainerConfig = field(default_factory=pb.ContainerConfig)
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    """Field and status code of each."""
    checks: list[Callable[[Seen], None]] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    variables: dict[bytes, bytes] = field(default_factory=dict)
    """The environment beyond what every container has."""
    targets: set[str] = field(default_factory=set)
    """Where something is mounted, or a device made."""
    joins: bool = False
    """It joins the processes of a container that has to be there."""

    @property
    def security(self) -> pb.LinuxContainerSecurityContext:
        return self.config.linux.security_context

    @property
    def resources(self) -> pb.LinuxContainerResources:
        return self.config.linux.resources

    def probe(self, command: str, expected: Callable[[str, int], bool]) -> None:
        """Run a command inside and look at its output and its exit status."""
        number = len(self.probes)
        self.probes.append(command)

        def check(seen: Seen) -> None:
            output, code = seen.view.probes[number]
            assert expected(output, code), (command, output, code)

        self.checks.append(check)

    def __repr__(self) -> str:
        shown = text_format.MessageToString(self.config, as_utf8=True)
        return f"in a {self.pod} pod:\n{shown[:6000]}mistakes: {self.mistakes}"


Draw = Callable[[st.SearchStrategy[Any]], Any]
Wish = Callable[[Draw, Case], None]

WORDS = (
    "",
    "a",
    "a b",
    " ",
    "$(touch /x)",
    "`id`",
    "'",
    '"',
    "\\",
    "*",
    "é😀",
    "\n",
    "--",
    "-c",
    "a=b",
    "x" * 3000,
    "\x7f\x01",
)


# -- wishes: the process -----------------------------------------------------------------------------------------------


def arguments(draw: Draw, case: Case) -> None:
    wanted = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5))
    case.config.args.extend(wanted)


def variables(draw: Draw, case: Case) -> None:
    names = st.sampled_from(
        ("A", "a.b", "A B", "é", "1", "A-B", "PATH", "HOME", "HOSTNAME", "TERM", "LD_LIBRARY_PATH", "\n")
    )
    values = st.one_of(st.sampled_from(WORDS).map(str.encode), st.binary(max_size=20).filter(lambda v: b"\0" not in v))
    for name, value in draw(st.dictionaries(names, values, min_size=1, max_size=5)).items():
        case.config.envs.add(key=name, value=value)
        case.variables[name.encode()] = value


def directory(draw: Draw, case: Case) -> None:
    wanted = draw(st.sampled_from(("/", "/tmp", "/made/for/it", "relative/one", "/a//b/./c", "/é x", "/root")))
    case.config.working_dir = wanted
    expected = os.path.normpath("/" + wanted)
    case.checks.append(lambda seen: _equal(seen.view.cwd, "/" + expected.lstrip("/"), "cwd"))


def terminal(draw: Draw, case: Case) -> None:
    case.config.tty = draw(st.booleans())
    case.config.stdin = draw(st.booleans())
    case.config.stdin_once = case.config.stdin and draw(st.booleans())

    def check(seen: Seen) -> None:
        if seen.is_exec:
            return
        if case.config.tty:
            assert {"1", "2"} <= set(seen.view.terminals)
        else:
            assert seen.view.terminals == ()
            assert (seen.view.input == "/dev/null") is not case.config.stdin, seen.view.input

    case.checks.append(check)


def stop_signal(draw: Draw, case: Case) -> None:
    wanted = draw(st.sampled_from([value for value in pb.Signal.values() if value != pb.SIGNAL_RUNTIME_DEFAULT]))
    case.config.stop_signal = wanted
    case.checks.append(lambda seen: _equal(seen.status.stop_signal, wanted, "stop_signal"))


def metadata(draw: Draw, case: Case) -> None:
    texts = st.text(st.characters(codec="utf-8"), max_size=30)
    for target in (case.config.labels, case.config.annotations):
        target.update(
            draw(st.dictionaries(texts.filter(lambda key: not key.startswith("cdi.k8s.io/")), texts, max_size=4))
        )
    case.config.metadata.attempt = draw(st.sampled_from((0, 1, 2**32 - 1)))
    case.config.image.annotations.update(draw(st.dictionaries(texts, texts, max_size=2)))
    case.config.image.user_specified_image = draw(texts)
    case.config.image.runtime_handler = draw(st.sampled_from(("", "porto")))
    case.checks.append(lambda seen: _equal(seen.status.metadata, case.config.metadata, "metadata"))
    case.checks.append(lambda seen: _equal(dict(seen.status.labels), dict(case.config.labels), "labels"))
    case.checks.append(lambda seen: _equal(dict(seen.status.annotations), dict(case.config.annotations), "annotations"))
    case.checks.append(lambda seen: _equal(seen.status.image, case.config.image, "image"))


# -- wishes: users and rights ------------------------------------------------------------------------------------------

# Of the image: name, uid, gid, groups that it is a member of, home.
_ACCOUNTS: dict[str, tuple[int, int, set[int], bytes]] = {
    "root": (0, 0, set(), b"/root"),
    "web": (1000, 100, {200}, b"/srv"),
}


def user(draw: Draw, case: Case) -> None:
    security = case.security
    name = draw(st.sampled_from(("root", "web", "", None)))
    if name == "":
        uid, gid, member, home = draw(st.sampled_from((1, 4242, 65534, 2**31 - 1))), 0, set[int](), b"/"
    else:
        uid, gid, member, home = _ACCOUNTS[name or "root"]
    if name and draw(st.booleans()):
        security.run_as_username = name
    elif name is not None:
        security.run_as_user.value = uid
    if name is not None and draw(st.booleans()):
        gid = draw(st.sampled_from((0, 7, 100, 2**31 - 1)))
        security.run_as_group.value = gid
    _groups(draw, case, gid, member)
    case.variables.setdefault(b"HOME", home)
    case.checks.append(lambda seen: _equal(seen.view.ids("Uid"), [uid] * 4, "uid"))
    case.checks.append(lambda seen: _equal(seen.status.user.linux.uid, uid, "status.user"))


def _groups(draw: Draw, case: Case, gid: int, member: set[int]) -> None:
    security = case.security
    more = draw(st.lists(st.sampled_from((0, 1, 5, 100, 999, 2**31 - 1)), max_size=4))
    del security.supplemental_groups[:]
    security.supplemental_groups.extend(more)
    security.supplemental_groups_policy = draw(st.sampled_from((pb.Merge, pb.Strict)))
    expected = {gid, *more, *(member if security.supplemental_groups_policy == pb.Merge else ())}

    def check(seen: Seen) -> None:
        cdi = {4321} if case.config.CDI_devices else set()
        _equal(seen.view.ids("Gid"), [gid] * 4, "gid")
        _equal(set(seen.view.ids("Groups")), expected | cdi, "groups")
        _equal(set(seen.status.user.linux.supplemental_groups), expected | cdi, "status.user")

    case.checks.append(check)


def capability(draw: Draw, case: Case) -> None:
    names = st.lists(st.sampled_from((*capabilities.NAMES, "ALL", "CAP_CHOWN", "cap_net_admin")), max_size=4)
    wanted = case.security.capabilities
    wanted.add_capabilities.extend(draw(names))
    wanted.drop_capabilities.extend(draw(names))
    ambient = draw(st.lists(st.sampled_from(capabilities.NAMES), max_size=3))
    wanted.add_ambient_capabilities.extend(ambient)


def check_capabilities(case: Case, seen: Seen) -> None:
    """Whatever the wish was, or none: CRI's rules."""

    def names(given: Any) -> set[str]:
        return {name.upper().removeprefix("CAP_") for name in given}

    wanted = case.security.capabilities
    add, drop, raised = (
        names(given) for given in (wanted.add_capabilities, wanted.drop_capabilities, wanted.add_ambient_capabilities)
    )
    if case.security.privileged:
        bounding, ambient = set(capabilities.NAMES), set[str]()
    else:
        bounding = set(capabilities.NAMES) if "ALL" in add else set(capabilities.DEFAULT)
        if "ALL" in drop:
            bounding = set()
        bounding = (bounding | add | raised) - {"ALL"} - drop
        ambient = raised & bounding
    node = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd"))
    own = int(node.split()[1], 16)
    root = seen.view.ids("Uid")[0] == 0
    _equal(seen.view.capabilities("Bnd"), capabilities.mask(bounding) & own, "bounding set")
    _equal(seen.view.capabilities("Amb"), capabilities.mask(ambient) & own, "ambient set")
    _equal(seen.view.capabilities("Eff"), capabilities.mask(bounding if root else ambient) & own, "effective set")


def new_privileges(draw: Draw, case: Case) -> None:
    case.security.no_new_privs = draw(st.booleans())


def seccomp(draw: Draw, case: Case) -> None:
    kind = draw(st.sampled_from(("default", "node", "none", "old default", "old node", "old none")))
    types = {"default": pb.SecurityProfile.RuntimeDefault, "none": pb.SecurityProfile.Unconfined}
    if kind in types:
        case.security.seccomp.profile_type = types[kind]
        case.security.seccomp.SetInParent()
    elif kind == "node":
        case.security.seccomp.profile_type = pb.SecurityProfile.Localhost
        case.security.seccomp.localhost_ref = str(case.around.seccomp)
    else:
        old = {
            "old default": "runtime/default",
            "old node": f"localhost/{case.around.seccomp}",
            "old none": "unconfined",
        }
        case.security.seccomp_profile_path = old[kind]
    confined = "none" not in kind
    case.checks.append(
        lambda seen: _equal(
            seen.view.status["Seccomp"], "2" if confined and not case.security.privileged else "0", "seccomp"
        )
    )
    if kind.endswith("node"):
        case.probe(
            "$B chmod 755 $B",
            lambda output, _: case.security.privileged or "Function not implemented" in output,
        )


def apparmor(draw: Draw, case: Case) -> None:
    """What there is without it."""
    if draw(st.booleans()):
        case.security.apparmor.profile_type = draw(
            st.sampled_from((pb.SecurityProfile.RuntimeDefault, pb.SecurityProfile.Unconfined))
        )
        case.security.apparmor.SetInParent()
    else:
        case.security.apparmor_profile = draw(st.sampled_from(("unconfined", "runtime/default")))


def readonly_root(draw: Draw, case: Case) -> None:
    case.security.readonly_rootfs = True
    case.checks.append(lambda seen: _in("ro", seen.view.mount("/").options, "/"))
    case.probe("$B touch /probe", lambda output, _: "Read-only" in output or "denied" in output)


def paths(draw: Draw, case: Case) -> None:
    for path in draw(st.lists(st.sampled_from(("/etc/passwd", "/var/log", "/proc/bus", "/not/there")), unique=True)):
        case.security.masked_paths.append(path)
        command = "$B wc -c < /etc/passwd" if path == "/etc/passwd" else f"$B ls {path} | $B wc -l"
        if path != "/not/there":
            case.probe(command, lambda output, _: case.security.privileged or output == "0")

    for path in draw(st.lists(st.sampled_from(("/etc", "/usr/bin", "/etc/passwd", "/also/not/there")), unique=True)):
        case.security.readonly_paths.append(path)
        if path != "/also/not/there" and path not in case.security.masked_paths:
            case.checks.append(partial(_check_readonly, case, path))


def _check_readonly(case: Case, path: str, seen: Seen) -> None:
    if not case.security.privileged:
        assert "ro" in seen.view.mount(path).options, path


def privileged(draw: Draw, case: Case) -> None:
    """What would be masked, read-only or filtered isn't, then."""
    if case.pod == "plain":
        return
    case.security.privileged = True
    case.probe("[ -c /dev/kmsg ]", lambda _, code: code == 0)
    case.checks.append(lambda seen: _equal(seen.view.status["Seccomp"], "0", "seccomp"))


# -- wishes: namespaces ------------------------------------------------------------------------------------------------


def processes(draw: Draw, case: Case) -> None:
    options = case.security.namespace_options
    options.pid = draw(st.sampled_from((pb.POD, pb.CONTAINER, pb.TARGET, *((pb.NODE,) if case.pod == "node" else ()))))
    if options.pid == pb.TARGET:
        case.joins = True
    if case.pod == "node" and draw(st.booleans()):
        options.network = options.ipc = pb.NODE


def check_namespaces(case: Case, seen: Seen) -> None:
    mode = case.security.namespace_options.pid
    for kind in ("net", "ipc", "uts", "user"):
        _equal(seen.view.namespaces[kind], seen.pod.namespaces[kind], kind)
    same = seen.view.namespaces["pid"] == seen.pod.namespaces["pid"]
    _equal(same, mode in (pb.POD, pb.NODE), "shares its processes with the pod's container")
    if mode == pb.TARGET:
        _equal(seen.view.namespaces["pid"], seen.target.namespaces["pid"], "pid")

    if case.pod == "node" and mode in (pb.POD, pb.NODE):
        _equal(seen.view.namespaces["pid"], os.readlink("/proc/self/ns/pid"), "pid")
    for kind in ("net", "ipc"):
        of_node = seen.view.namespaces[kind] == os.readlink(f"/proc/self/ns/{kind}")
        _equal(of_node, case.pod == "node", f"is in the node's {kind}")
    _equal(seen.view.hostname, seen.pod.hostname, "hostname")


# -- wishes: mounts and devices ----------------------------------------------------------------------------------------

_TARGETS = (
    "/data",
    "/data/below/here",
    "/new/place",
    "/a b;\\é",
    "/opt/x/y",
    "/run/x",
    "/tmp/x",
    "/dev/x/dir",
)


def mounts(draw: Draw, case: Case) -> None:
    for target in draw(st.lists(st.sampled_from(_TARGETS), unique=True, min_size=1, max_size=3)):
        if target in case.targets:
            continue
        case.targets.add(target)
        name = draw(st.sampled_from(tuple(case.around.sources)))
        mount = case.config.mounts.add(container_path=target, host_path=str(case.around.sources[name]))
        mount.readonly = draw(st.booleans())
        mount.selinux_relabel = draw(st.booleans())
        modes = [pb.PROPAGATION_PRIVATE, pb.PROPAGATION_HOST_TO_CONTAINER]
        mount.propagation = draw(st.sampled_from([*modes, pb.PROPAGATION_BIDIRECTIONAL] if name == "shared" else modes))
        private = mount.propagation == pb.PROPAGATION_PRIVATE
        mount.recursive_read_only = mount.readonly and private and draw(st.booleans())
        mount.mount_options.extend(draw(st.lists(st.sampled_from(("noexec", "nosuid", "nodev")), unique=True)))
        _check_mount(case, mount, name)


def _check_mount(case: Case, mount: pb.Mount, name: str) -> None:
    target = mount.container_path
    options = set(mount.mount_options) | ({"noexec", "nosuid", "nodev"} if name == "strict" else set())

    def check(seen: Seen) -> None:
        found = seen.view.mount(target)
        _equal(set(found.options) & {"noexec", "nosuid", "nodev"}, options, f"options of {target}")
        _equal("ro" in found.options, mount.readonly, f"{target} is read-only")
        if name == "nested":
            below = seen.view.mount(f"{target}/below")
            _equal("ro" in below.options, mount.recursive_read_only, f"{target}/below is read-only")
            _equal("nosuid" in below.options, False, f"{target}/below is nosuid")
        if name == "shared":
            group = next(m for m in _host_mounts() if m.point == str(case.around.sources["shared"])).propagation[
                "shared"
            ]
            if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
                _equal(found.propagation.get("shared"), group, "peer group")
            elif mount.propagation == pb.PROPAGATION_HOST_TO_CONTAINER:
                # Of the host's mount, or of a slave of it: the runtime has a mount namespace of its own.
                assert "master" in found.propagation
            else:
                assert group not in found.propagation.values()

    case.checks.append(check)
    quoted = "'" + target + "'"
    case.probe(f"$B cat {quoted}/marker", lambda output, _: output == name.partition(" ")[0])
    case.probe(
        f"$B touch {quoted}/written && $B rm {quoted}/written",
        lambda _, code: (code == 0) is not mount.readonly,
    )


def _host_mounts() -> list[Any]:
    return [mount_of(line) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def single_file(draw: Draw, case: Case) -> None:
    target = draw(st.sampled_from(("/etc/hosts", "/etc/resolv.conf", "/etc/new/file", "/dev/termination-log", "/one")))
    if target in case.targets:
        return
    case.targets.add(target)
    case.config.mounts.add(container_path=target, host_path=str(case.around.file), readonly=draw(st.booleans()))
    case.probe(f"$B cat {target}", lambda output, _: output == "plain")


def image_mount(draw: Draw, case: Case) -> None:
    if "/image" in case.targets:
        return
    case.targets.add("/image")
    sub_path = draw(st.sampled_from(("", "dir")))
    mount = case.config.mounts.add(container_path="/image", image_sub_path=sub_path, readonly=True)
    mount.image.image = case.around.data_image
    mount.mount_options.extend(draw(st.lists(st.sampled_from(("noexec", "nosuid", "nodev")), unique=True)))
    case.probe("$B cat /image/file", lambda output, _: output == ("below" if sub_path else "top"))
    case.checks.append(lambda seen: _in("ro", seen.view.mount("/image").options, "/image"))
    case.checks.append(
        lambda seen: _equal(set(mount.mount_options) - set(seen.view.mount("/image").options), set(), "options")
    )


def devices(draw: Draw, case: Case) -> None:
    for target in draw(st.lists(st.sampled_from(("/dev/fuse", "/dev/a/b", "/dev/né w")), unique=True, min_size=1)):
        source = draw(st.sampled_from(("/dev/fuse", "/dev/loop7", "/dev/loop-control")))
        if target in case.targets:
            continue
        case.targets.add(target)
        permissions = draw(st.sampled_from(("", "r", "w", "rw", "rwm", "mrw")))
        case.config.devices.add(host_path=source, container_path=target, permissions=permissions)
        number = os.stat(source).st_rdev
        expected = f"{os.major(number):x} {os.minor(number):x}"
        case.probe(f"$B stat -c '%t %T' '{target}'", partial(_is, expected))
        for access, command in (("r", f": < '{target}'"), ("w", f": >> '{target}'")):
            case.probe(command, partial(_is_allowed, case, source, access))


def _is_allowed(case: Case, source: str, access: str, output: str, code: int) -> bool:
    """Permissions are those of a device, by whatever path; the file's own come on top for all but root."""
    named = [device for device in case.config.devices if device.host_path == source]
    allowed = case.security.privileged or any(access in (device.permissions or "rwm") for device in named)
    if not allowed:
        return code != 0
    root = case.security.run_as_user.value == 0 and case.security.run_as_username in ("", "root")
    return code == 0 or (not root and "Permission denied" in output)


def cdi(draw: Draw, case: Case) -> None:
    if draw(st.booleans()):
        case.config.CDI_devices.add(name=f"{CDI_KIND}=good")
    else:
        case.config.annotations["cdi.k8s.io/x"] = f"{CDI_KIND}=good"
        case.config.CDI_devices.add(name=f"{CDI_KIND}=good")
    case.variables[b"CDI"] = b"yes"


# -- wishes: resources and the log -------------------------------------------------------------------------------------


def limits(draw: Draw, case: Case) -> None:
    resources = case.resources
    expected: dict[str, Any] = {}
    for name in draw(
        st.lists(st.sampled_from(("memory", "quota", "shares", "cpus", "pids", "oom", "huge")), unique=True)
    ):
        # Each can be said by the field, or in the words of cgroup v2.
        by_knob = draw(st.booleans())
        if name == "memory":
            limit = expected["memory"] = draw(st.sampled_from((64, 100, 4096))) * MIB
            if by_knob:
                resources.unified["memory.max"] = str(limit)
            else:
                resources.memory_limit_in_bytes = limit
                resources.memory_swap_limit_in_bytes = draw(st.sampled_from((0, limit)))
            case.checks.append(partial(_check_swap, limit))
        elif name == "quota":
            period = draw(st.sampled_from((1000, 50000, 100000, 1000000)))
            quota = draw(st.sampled_from((1000, 12345, 100000)))
            # More than there is would be what there is; with hardly any the container would tell us too late.
            if period // 4 <= quota <= period * (os.cpu_count() or 1):
                if by_knob:
                    resources.unified["cpu.max"] = f"{quota} {period}"
                else:
                    resources.cpu_quota, resources.cpu_period = quota, period
                expected["quota_us"], expected["period_us"] = quota, period
        elif name == "shares" and by_knob:
            weight, expected["shares"] = draw(st.sampled_from(((1, 10), (50, 512), (100, 1024), (10000, 102400))))
            resources.unified["cpu.weight"] = str(weight)
        elif name == "shares":
            resources.cpu_shares = expected["shares"] = draw(st.sampled_from((2, 3, 102, 1024, 2047, 262144)))
        elif name == "cpus" and by_knob:
            resources.unified["cpuset.cpus"], expected["cpus"] = "0", "0"
        elif name == "cpus":
            resources.cpuset_cpus, expected["cpus"] = "0", "0"
            resources.cpuset_mems = draw(st.sampled_from(("", "0"))) if _has_one_memory_node() else ""
        elif name == "pids":
            resources.unified["pids.max"] = "50"
            expected["processes"] = 50
        elif name == "oom":
            score = draw(st.sampled_from((1, 500, 1000)))
            resources.oom_score_adj = score
            case.checks.append(partial(_check_oom, score))

        else:
            if by_knob:
                resources.unified["hugetlb.2MB.max"] = "0"
            resources.hugepage_limits.add(page_size="2MB", limit=0)
            resources.hugepage_limits.add(page_size="1GB", limit=0)
            # None is where Porto can't limit them: nobody is given any there.
            case.checks.append(lambda seen: _in(seen.limits.huge_pages, (0, None), "huge pages"))
    if draw(st.booleans()):
        resources.unified["memory.oom.group"] = draw(st.sampled_from(("0", "1")))
    wanted = pb.LinuxContainerResources()
    wanted.CopyFrom(resources)

    def check(seen: Seen) -> None:
        found = dataclasses.asdict(seen.limits)
        _equal({name: found[name] for name in expected}, expected, "limits")
        _equal(seen.status.resources.linux, wanted, "status.resources")

    case.checks.append(check)


def _has_one_memory_node() -> bool:
    path = Path("/sys/devices/system/node/has_memory")
    return not path.exists() or path.read_text().strip() == "0"


def log(draw: Draw, case: Case) -> None:
    wanted = draw(st.sampled_from(("a.log", "dir/below/b.log", "é ü.log", "x" * 200)))
    case.config.log_path = wanted
    case.checks.append(lambda seen: _equal(seen.status.log_path.endswith(f"/{wanted}"), True, seen.status.log_path))


WISHES: tuple[Wish, ...] = (
    arguments, variables, directory, terminal, stop_signal, metadata, user, capability, new_privileges, seccomp,
    apparmor, readonly_root, paths, processes, mounts, single_file, image_mount, devices, cdi, limits, log, privileged,
)  # fmt: skip


def _is(expected: str, output: str, _code: int) -> bool:
    return output == expected


def _check_swap(limit: int, seen: Seen) -> None:
    _in(seen.limits.memory_and_swap, (limit, None), "memory and swap")


def _check_oom(score: int, seen: Seen) -> None:
    assert seen.view.oom_score_adj == score


def _equal(found: object, expected: object, what: str) -> None:
    assert found == expected, (what, found, expected)


def _in(item: object, container: Any, what: str) -> None:
    assert item in container, (what, item, container)
