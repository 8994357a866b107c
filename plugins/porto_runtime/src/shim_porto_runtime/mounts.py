"""What is mounted into a container: from the CRI's mounts and the image's volumes to Porto's binds.

A bind of Porto's does for most. It changes the flags of all mounts below its source alike, takes nothing from /proc and
/sys, and makes its own device nodes afterwards: where that matters, and where the host is to see what is mounted
inside, the mount is attached while portoshim-init waits (``late.py``).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, NotFound, Unimplemented
from shim_porto_runtime import linux, rootfs
from shim_porto_runtime.late import OPTIONS, LateMount
from shim_porto_runtime.process import HELPER_DIRECTORY

MAX_PATH_BYTES = 3072
"""Less than the kernel's limit, since paths are prefixed with that of the root volume."""
_MAX_NAME_BYTES = 255
_OWN_DIRECTORIES = ("/proc", "/sys", "/dev", HELPER_DIRECTORY)


@dataclass(frozen=True, slots=True)
class ImageMount:
    """An image mounted read-only as a volume."""

    image: str
    """Image id."""
    path: str
    """Host path of its volume."""
    sub_path: str


@dataclass(slots=True)
class Entry:
    """One mount."""

    field: str
    """Where the config has it: ``mounts[3]``; empty: it is the runtime's or the image's."""
    source: str
    target: str
    readonly: bool = False
    recursive_read_only: bool = False
    propagation: int = pb.PROPAGATION_PRIVATE
    options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Porto's, in place of those that the others stand for."""
    image: ImageMount | None = None
    late: bool = False


@dataclass(slots=True)
class Plan:
    """All mounts of a container, those above others first."""

    entries: list[Entry] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    """Image volumes: path inside the image, host directory that its content goes to."""

    def sort(self) -> None:
        """A mount below another one comes after it."""
        self.entries.sort(key=lambda entry: entry.target.count("/"))

    @property
    def images(self) -> list[ImageMount]:
        return [entry.image for entry in self.entries if entry.image is not None]

    @property
    def binds(self) -> list[rpc_pb2.TContainerBindMount]:
        """What Porto mounts."""
        return [_bind(entry) for entry in self.entries if not entry.late]

    @property
    def late(self) -> list[LateMount]:
        """What is attached while init waits."""
        return [
            LateMount(
                host_path=entry.source,
                container_path=entry.target,
                readonly=entry.readonly,
                recursive_read_only=entry.recursive_read_only,
                propagation=entry.propagation,
                options=entry.options,
            )
            for entry in self.entries
            if entry.late
        ]


def helper(directory: str) -> Entry:
    """The directory of portoshim-init, with what is mounted in it: namespaces to join."""
    return Entry("", directory, HELPER_DIRECTORY, flags=("ro", "rec", "nosuid", "exec"))


def check(mounts: Iterable[pb.Mount]) -> None:
    """Refuse mounts no container can have.

    :raises InvalidArgument: malformed.   :raises Unimplemented: nothing here can do it.
    """
    for index, mount in enumerate(mounts):
        name = f"mounts[{index}]"
        _absolute(mount.container_path, f"{name}.container_path")
        if not mount.container_path.strip("/"):
            raise InvalidArgument(f"{name}.container_path: can't be the root directory")
        if mount.HasField("image"):
            _check_image(mount, name)
        else:
            _absolute(mount.host_path, f"{name}.host_path")
            if mount.image_sub_path:
                raise InvalidArgument(f"{name}.image_sub_path: needs an image beside it")
        if mount.propagation not in pb.MountPropagation.values():
            raise InvalidArgument(f"{name}.propagation: {mount.propagation} is none")
        if mount.recursive_read_only:
            _check_recursive(mount, name)
        for mappings in ("uidMappings", "gidMappings"):
            if getattr(mount, mappings):
                raise Unimplemented(f"{name}.{mappings}: Porto has no id-mapped mounts")
        for option in mount.mount_options:
            if option not in OPTIONS:
                raise Unimplemented(f"{name}.mount_options: {option[:40]!r}: only {', '.join(OPTIONS)} are known")


def _check_recursive(mount: pb.Mount, name: str) -> None:
    if not mount.readonly:
        raise InvalidArgument(f"{name}.recursive_read_only: needs readonly")
    if mount.propagation != pb.PROPAGATION_PRIVATE:
        raise InvalidArgument(f"{name}.recursive_read_only: needs PROPAGATION_PRIVATE")
    if not linux.has_mount_setattr():
        # kubelet knows this word.
        raise Unimplemented(f"RROUnsupported: {name}.recursive_read_only: needs Linux 5.12")


def _check_image(mount: pb.Mount, name: str) -> None:
    if mount.host_path:
        raise InvalidArgument(f"{name}.host_path: can't be given together with image")
    if not mount.readonly:
        raise InvalidArgument(f"{name}.readonly: must be true: an image can't be written to")
    if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
        raise InvalidArgument(f"{name}.propagation: an image has no mounts to share")
    sub_path = mount.image_sub_path
    if sub_path.startswith("/") or ".." in sub_path.split("/") or "\0" in sub_path:
        raise InvalidArgument(f"{name}.image_sub_path: {sub_path!r} must be a relative path without '..'")
    _check_length(sub_path, f"{name}.image_sub_path")


def named(mounts: Iterable[pb.Mount], others: Mapping[str, tuple[str, pb.Mount]]) -> list[tuple[str, pb.Mount]]:
    """The mounts of a config and what names them, with others in place of those at the same path in the container."""
    found = [(f"mounts[{index}]", mount) for index, mount in enumerate(mounts)]
    return [item for item in found if clean(item[1].container_path) not in others] + list(others.values())


def plan(
    wanted: Sequence[tuple[str, pb.Mount]],
    *,
    readonly_root: bool,
    helper_directory: Path,
    sandbox_directory: Path,
    volumes_directory: Path,
    image_volumes: Iterable[str],
    resolve_image: Callable[[str, str], str],
    host_ipc: bool,
) -> Plan:
    """The mounts of a container, as far as they are known before its root filesystem is.

    :param wanted: as :func:`named` gives them.
    :param volumes_directory: host directory for what this container's volumes hold.
    :param resolve_image: image name, and the field that has it → image id.
    :raises InvalidArgument, FailedPrecondition, NotFound: a mount can't be made; the message names it.
    """
    result = Plan([helper(str(helper_directory))])
    targets = {clean(mount.container_path) for _, mount in wanted}
    if "/dev/shm" not in targets:
        shm = "/dev/shm" if host_ipc else f"{sandbox_directory}/shm"
        result.entries.append(Entry("", shm, "/dev/shm", options=("nosuid", "nodev", "noexec")))
    for name in ("hosts", "hostname", "resolv.conf"):
        if f"/etc/{name}" not in targets:
            source = f"{sandbox_directory}/{name}"
            result.entries.append(Entry("", source, f"/etc/{name}", readonly=readonly_root))
    for number, path in enumerate(image_volumes):
        target = clean(path)
        # CRI: a mount over an image's volume takes its place; the root or the system's own can't be a volume.
        if target in targets or target == "/" or any(is_inside(target, own) for own in _OWN_DIRECTORIES):
            continue
        source = str(volumes_directory / f"volume{number}")
        result.copies.append((target, source))
        result.entries.append(Entry("", source, target))
    below = _Below()
    for index, (name, mount) in enumerate(wanted):
        image_path = str(volumes_directory / f"image{index}")
        result.entries.append(_entry(mount, name, image_path, resolve_image, below))
    result.sort()
    return result


def _entry(
    mount: pb.Mount, name: str, image_path: str, resolve_image: Callable[[str, str], str], below: _Below
) -> Entry:
    target = clean(mount.container_path)
    options = tuple(sorted(set(mount.mount_options)))
    if mount.HasField("image"):
        image = ImageMount(resolve_image(mount.image.image, f"{name}.image"), image_path, mount.image_sub_path)
        return Entry(name, image_path, target, readonly=True, options=options, image=image)
    source = _source(mount.host_path, name)
    bidirectional = mount.propagation == pb.PROPAGATION_BIDIRECTIONAL
    if bidirectional:
        _check_shared(source, name)
    return Entry(
        name,
        source,
        target,
        readonly=mount.readonly,
        recursive_read_only=mount.recursive_read_only,
        propagation=mount.propagation,
        options=options,
        late=bidirectional or below.has_mounts(source) or linux.is_kernels(source) or "ro" in linux.mount_flags(source),
    )


def _bind(entry: Entry) -> rpc_pb2.TContainerBindMount:
    flags = list(entry.flags)
    if not flags:
        flags = ["ro" if entry.readonly else "rw"]
        if entry.propagation == pb.PROPAGATION_PRIVATE:
            flags.append("private")
        # Porto takes set-uid away never, and devices always, unless it is told otherwise; the source's own flags stay.
        of_source = linux.mount_flags(entry.source)
        flags += [name for name in OPTIONS if name in entry.options or name in of_source]
        if "nodev" not in flags:
            flags.append("dev")
    return rpc_pb2.TContainerBindMount(source=entry.source, target=entry.target, flag=flags)


def _source(path: str, name: str) -> str:
    """The host's path without symlinks. As other runtimes do, a missing directory is made."""
    source = os.path.realpath(path)
    if not os.path.exists(source):
        try:
            os.makedirs(source, mode=0o755)
        except OSError as err:
            raise InvalidArgument(
                f"{name}.host_path: {path!r} doesn't exist and can't be made: {err.strerror}"
            ) from err
    return source


def find_images(result: Plan) -> None:
    """Find the sources of image mounts, once their volumes are there.

    :raises NotFound: no such sub path in the image.
    """
    for entry in result.entries:
        if entry.image is None or not entry.image.sub_path:
            continue
        try:
            fd = rootfs.open_inside(entry.image.path, entry.image.sub_path, os.O_PATH)
        except OSError as err:
            message = f"ImageVolumeMountFailed: {entry.field}.image_sub_path: {entry.image.sub_path!r}: {err.strerror}"
            raise NotFound(message) from err
        try:
            entry.source = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)


def copy_volumes(result: Plan, root: str) -> None:
    """Fill the image's volumes with what the image has at their paths.

    :raises InvalidArgument: the content can't be copied.
    """
    for path, directory in result.copies:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        try:
            fd = rootfs.open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # the image names a volume and has nothing there
        try:
            # Everything of it, links as links; the descriptor can't be led elsewhere.
            subprocess.run(
                ["cp", "-a", "--", f"/proc/self/fd/{fd}/.", directory],
                pass_fds=[fd], check=True, capture_output=True, timeout=600,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as err:
            raise InvalidArgument(f"the volume {path} of the image can't be filled: {err}") from err
        finally:
            os.close(fd)


def _check_shared(source: str, name: str) -> None:
    """CRI: bidirectional propagation needs a shared mount on the host."""
    best, shared = "", False
    for point, optional in linux.mount_points():
        if is_inside(source, point) and len(point) >= len(best):
            best, shared = point, any(item.startswith("shared:") for item in optional)
    if not shared:
        raise InvalidArgument(f"{name}.propagation: {source} is on {best}, which is not a shared mount of the node")


class _Below:
    """Whether anything is mounted below a path of the host; looked up once, and only if asked."""

    def __init__(self) -> None:
        self._points: list[str] | None = None

    def has_mounts(self, path: str) -> bool:
        if not os.path.isdir(path):
            return False
        if self._points is None:
            self._points = [point for point, _ in linux.mount_points()]
        return any(point != path and is_inside(point, path) for point in self._points)


def is_inside(path: str, directory: str) -> bool:
    """True for the directory itself and everything below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def clean(path: str) -> str:
    """An absolute path without empty parts and single dots."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _absolute(path: str, name: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidArgument(f"{name}: {path[:200]!r} must be an absolute path without '..'")
    _check_length(path, name)


def _check_length(path: str, name: str) -> None:
    too_long = len(path.encode()) > MAX_PATH_BYTES or any(len(p.encode()) > _MAX_NAME_BYTES for p in path.split("/"))
    if too_long:
        raise InvalidArgument(f"{name}: {path[:40]!r}...: too long for a path")
