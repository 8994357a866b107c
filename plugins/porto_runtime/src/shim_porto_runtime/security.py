"""Seccomp, AppArmor, SELinux, masked paths: what a container asks for, and what can be had on Porto."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented
from shim_porto_runtime.seccomp import Profile, default_profile, parse
from shim_porto_runtime.seccomp.profile import MAX_PROFILE_BYTES

_FIELD = "linux.security_context"
_LOCALHOST = "localhost/"
_SYSTEM_MOUNTS = ("/proc/sys", "/proc/irq", "/proc/bus", "/sys")
"""What Porto mounts read-only in every container: writable again in a privileged one."""


Security = pb.LinuxContainerSecurityContext | pb.LinuxSandboxSecurityContext


def check(security: Security) -> None:
    """Refuse what Porto has no means for.

    :raises Unimplemented: a SELinux label or an AppArmor profile.   :raises InvalidArgument: a malformed profile.
    """
    if any(getattr(security.selinux_options, name) for name in ("user", "role", "type", "level")):
        raise Unimplemented(f"{_FIELD}.selinux_options: Porto has no SELinux; leave them out")
    for name in ("seccomp", "apparmor"):
        profile = getattr(security, name)
        if profile.profile_type not in pb.SecurityProfile.ProfileType.values():
            raise InvalidArgument(f"{_FIELD}.{name}.profile_type: {profile.profile_type} is none")
        if profile.localhost_ref and profile.profile_type != pb.SecurityProfile.Localhost:
            raise InvalidArgument(f"{_FIELD}.{name}.localhost_ref: is for the profile type Localhost alone")
    if security.HasField("apparmor") and security.apparmor.profile_type == pb.SecurityProfile.Localhost:
        raise Unimplemented(f"{_FIELD}.apparmor: Porto has no AppArmor; leave the profile out, or make it Unconfined")
    old = getattr(security, "apparmor_profile", "")
    if old.startswith(_LOCALHOST):
        raise Unimplemented(f"{_FIELD}.apparmor_profile: Porto has no AppArmor; leave it out")
    if old not in ("", "unconfined", "runtime/default"):
        raise InvalidArgument(f"{_FIELD}.apparmor_profile: {old[:80]!r}: no such profile")


def seccomp(security: Security, capabilities: Iterable[str]) -> Profile | None:
    """The seccomp profile of a container or a sandbox; None: unconfined.

    :param capabilities: what the process may have: the default profile allows some system calls by them.
    :raises InvalidArgument: a profile that can't be read or used.
    """
    kind, path = _profile_of(security)
    if security.privileged or kind == pb.SecurityProfile.Unconfined:
        return None
    if kind == pb.SecurityProfile.RuntimeDefault:
        return default_profile(frozenset(capabilities))
    field = f"{_FIELD}.seccomp.localhost_ref {path!r}"
    return parse(_read(path, field), field)


def _profile_of(security: Security) -> tuple[int, str]:
    if security.HasField("seccomp"):
        return security.seccomp.profile_type, security.seccomp.localhost_ref.removeprefix(_LOCALHOST)
    old = security.seccomp_profile_path
    if old in ("", "unconfined"):
        return pb.SecurityProfile.Unconfined, ""
    if old in ("runtime/default", "docker/default"):
        return pb.SecurityProfile.RuntimeDefault, ""
    if old.startswith(_LOCALHOST):
        return pb.SecurityProfile.Localhost, old.removeprefix(_LOCALHOST)
    raise InvalidArgument(f"{_FIELD}.seccomp_profile_path: {old[:80]!r}: no such profile")


def _read(path: str, field: str) -> bytes:
    if not path.startswith("/"):
        raise InvalidArgument(f"{field}: must be an absolute path")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as err:
        raise InvalidArgument(f"{field}: {getattr(err, 'strerror', None) or err}") from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgument(f"{field}: no regular file")
    with os.fdopen(fd, "rb") as file:
        return file.read(MAX_PROFILE_BYTES + 1)


def path_options(security: pb.LinuxContainerSecurityContext) -> list[str]:
    """Options of portoshim-init that mask paths or change whether they can be written.

    :raises InvalidArgument: a path that isn't absolute.
    """
    options: list[str] = []
    for path in _paths(security.masked_paths, "masked_paths"):
        options += ["-M", path]
    for path in _paths(security.readonly_paths, "readonly_paths"):
        options += ["-R", path]
    if security.privileged:
        return [word for path in _SYSTEM_MOUNTS for word in ("-W", path)]
    return options


def _paths(given: Iterable[str], name: str) -> list[str]:
    paths = list(given)
    for path in paths:
        if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise InvalidArgument(f"{_FIELD}.{name}: {path!r} must be an absolute path without '..'")
    return paths
