"""Wishes: each changes a random container configuration and adds what is to be seen from inside then."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from shim_porto_runtime import capabilities

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cases import Case, Draw, Seen, Wish, contained, equal
from tests.e2e.wishes_outside import cdi, devices, image_mount, limits, log, mounts, single_file

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
    case.checks.append(lambda seen: equal(seen.view.cwd, "/" + expected.lstrip("/"), "cwd"))


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
    case.checks.append(lambda seen: equal(seen.status.stop_signal, wanted, "stop_signal"))


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
    case.checks.append(lambda seen: equal(seen.status.metadata, case.config.metadata, "metadata"))
    case.checks.append(lambda seen: equal(dict(seen.status.labels), dict(case.config.labels), "labels"))
    case.checks.append(lambda seen: equal(dict(seen.status.annotations), dict(case.config.annotations), "annotations"))
    case.checks.append(lambda seen: equal(seen.status.image, case.config.image, "image"))


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
    case.checks.append(lambda seen: equal(seen.view.ids("Uid"), [uid] * 4, "uid"))
    case.checks.append(lambda seen: equal(seen.status.user.linux.uid, uid, "status.user"))


def _groups(draw: Draw, case: Case, gid: int, member: set[int]) -> None:
    security = case.security
    more = draw(st.lists(st.sampled_from((0, 1, 5, 100, 999, 2**31 - 1)), max_size=4))
    del security.supplemental_groups[:]
    security.supplemental_groups.extend(more)
    security.supplemental_groups_policy = draw(st.sampled_from((pb.Merge, pb.Strict)))
    expected = {gid, *more, *(member if security.supplemental_groups_policy == pb.Merge else ())}

    def check(seen: Seen) -> None:
        cdi = {4321} if case.config.CDI_devices else set()
        equal(seen.view.ids("Gid"), [gid] * 4, "gid")
        equal(set(seen.view.ids("Groups")), expected | cdi, "groups")
        equal(set(seen.status.user.linux.supplemental_groups), expected | cdi, "status.user")

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
    equal(seen.view.capabilities("Bnd"), capabilities.mask(bounding) & own, "bounding set")
    equal(seen.view.capabilities("Amb"), capabilities.mask(ambient) & own, "ambient set")
    equal(seen.view.capabilities("Eff"), capabilities.mask(bounding if root else ambient) & own, "effective set")


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
        lambda seen: equal(
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
    case.checks.append(lambda seen: contained("ro", seen.view.mount("/").options, "/"))
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
    case.checks.append(lambda seen: equal(seen.view.status["Seccomp"], "0", "seccomp"))


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
        equal(seen.view.namespaces[kind], seen.pod.namespaces[kind], kind)
    same = seen.view.namespaces["pid"] == seen.pod.namespaces["pid"]
    equal(same, mode in (pb.POD, pb.NODE), "shares its processes with the pod's container")
    if mode == pb.TARGET:
        equal(seen.view.namespaces["pid"], seen.target.namespaces["pid"], "pid")

    if case.pod == "node" and mode in (pb.POD, pb.NODE):
        equal(seen.view.namespaces["pid"], os.readlink("/proc/self/ns/pid"), "pid")
    for kind in ("net", "ipc"):
        of_node = seen.view.namespaces[kind] == os.readlink(f"/proc/self/ns/{kind}")
        equal(of_node, case.pod == "node", f"is in the node's {kind}")
    equal(seen.view.hostname, seen.pod.hostname, "hostname")


WISHES: tuple[Wish, ...] = (
    arguments, variables, directory, terminal, stop_signal, metadata, user, capability, new_privileges, seccomp,
    apparmor, readonly_root, paths, processes, mounts, single_file, image_mount, devices, cdi, limits, log, privileged,
)  # fmt: skip
