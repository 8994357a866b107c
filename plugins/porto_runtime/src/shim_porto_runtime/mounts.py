"""What is mounted into a container: from the CRI's mounts and the image's volumes to Porto's binds.

Targets are resolved inside the container's root by Porto, sources on the host by us. What Porto can't do is done by
portoshim-init (recursive read-only, writable /sys) or from outside while init waits (shared mounts).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from shim_porto_runtime import linux, rootfs
from shim_porto_runtime.process import HELPER_DIRECTORY

_PROC_MAGIC, _SYSFS_MAGIC = 0x9FA0, 0x62656572


@dataclass(frozen=True, slots=True)
class Shared:
    """A mount whose own mounts the host and the container see of each other (PROPAGATION_BIDIRECTIONAL)."""

    host_path: str
    container_path: str
    readonly: bool


@dataclass(frozen=True, slots=True)
class ImageMount:
    """An image mounted read-only as a volume."""

    image: str
    """Image id."""
    path: str
    """Host path of its volume."""
    sub_path: str
    container_path: str


@dataclass(slots=True)
class Plan:
    """All mounts of a container."""

    binds: list[rpc_pb2.TContainerBindMount] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    """Options of portoshim-init."""
    shared: list[Shared] = field(default_factory=list)
    images: list[ImageMount] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    """Image volumes: path inside the image, host directory that its content goes to."""

    def bind(self, source: str, target: str, *flags: str) -> None:
        self.binds.append(rpc_pb2.TContainerBindMount(source=source, target=target, flag=flags))


def check(mounts: Iterable[pb.Mount]) -> None:
    """Refuse mounts no container can have.

    :raises InvalidArgument: malformed.   :raises Unimplemented: nothing here can do it.
    """
    for index, mount in enumerate(mounts):
        name = f"mounts[{index}]"
        _absolute(mount.container_path, f"{name}.container_path")
        if not mount.container_path.strip("/"):
            raise InvalidArgument(f"{name}.container_path: can't be the root directory")
        if _clean(mount.container_path) == HELPER_DIRECTORY:
            raise InvalidArgument(f"{name}.container_path: {HELPER_DIRECTORY} is taken by the runtime")
        if mount.HasField("image"):
            _check_image(mount, name)
        else:
            _absolute(mount.host_path, f"{name}.host_path")
            if mount.image_sub_path:
                raise InvalidArgument(f"{name}.image_sub_path: needs an image beside it")
        if mount.propagation not in pb.MountPropagation.values():
            raise InvalidArgument(f"{name}.propagation: {mount.propagation} is none")
        if mount.recursive_read_only:
            if not mount.readonly:
                raise InvalidArgument(f"{name}.recursive_read_only: needs readonly")
            if mount.propagation != pb.PROPAGATION_PRIVATE:
                raise InvalidArgument(f"{name}.recursive_read_only: needs PROPAGATION_PRIVATE")
        for mappings in ("uidMappings", "gidMappings"):
            if getattr(mount, mappings):
                raise Unimplemented(f"{name}.{mappings}: Porto has no id-mapped mounts")
        if mount.mount_options:
            raise Unimplemented(f"{name}.mount_options: not supported; leave them out")


def _check_image(mount: pb.Mount, name: str) -> None:
    if mount.host_path:
        raise InvalidArgument(f"{name}.host_path: can't be given together with image")
    if not mount.image.image:
        raise InvalidArgument(f"{name}.image.image: must not be empty")
    if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
        raise InvalidArgument(f"{name}.propagation: an image has no mounts to share")
    sub_path = mount.image_sub_path
    if sub_path.startswith("/") or ".." in sub_path.split("/") or "\0" in sub_path:
        raise InvalidArgument(f"{name}.image_sub_path: {sub_path!r} must be a relative path without '..'")


def plan(
    config: pb.ContainerConfig,
    *,
    helper_directory: Path,
    sandbox_directory: Path,
    volumes_directory: Path,
    image_volumes: Iterable[str],
    resolve_image: Callable[[str], str],
    host_ipc: bool,
    sysfs: str,
) -> Plan:
    """The mounts of a container, in the order in which they are made.

    :param volumes_directory: host directory for what this container's volumes hold.
    :param resolve_image: image name → image id.
    :param sysfs: where the host's /sys is mounted once more: Porto refuses to bind a system directory.
    :raises InvalidArgument, FailedPrecondition, NotFound: a mount can't be made; the message names it.
    """
    result = Plan()
    targets = {_clean(mount.container_path) for mount in config.mounts}
    # With what is mounted in it: namespaces to join.
    result.bind(str(helper_directory), HELPER_DIRECTORY, "ro", "rec", "nosuid", "exec")
    if "/dev/shm" not in targets:
        result.bind("/dev/shm" if host_ipc else f"{sandbox_directory}/shm", "/dev/shm", "rw")
    for name in ("hosts", "hostname"):
        if f"/etc/{name}" not in targets:
            result.bind(f"{sandbox_directory}/{name}", f"/etc/{name}", "ro" if _readonly_root(config) else "rw")
    for number, path in enumerate(image_volumes):
        target = _clean(path)
        # CRI: a mount over an image's volume takes its place; the root or the system's own can't be a volume.
        if target in targets or target in ("/", "/proc", "/sys", "/dev", HELPER_DIRECTORY):
            continue
        source = str(volumes_directory / f"volume{number}")
        result.copies.append((target, source))
        result.bind(source, target, "rw")
    # A mount below another one comes after it.
    ordered = sorted(enumerate(config.mounts), key=lambda item: _clean(item[1].container_path).count("/"))
    for index, mount in ordered:
        _add(result, mount, f"mounts[{index}]", volumes_directory / f"image{index}", resolve_image, sysfs)
    return result


def _add(
    result: Plan, mount: pb.Mount, name: str, image_path: Path, resolve_image: Callable[[str], str], sysfs: str
) -> None:
    target = _clean(mount.container_path)
    if mount.HasField("image"):
        made = ImageMount(resolve_image(mount.image.image), str(image_path), mount.image_sub_path, target)
        result.images.append(made)
        return
    source = _source(mount.host_path, name)
    if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
        _check_shared(source, name)
        result.shared.append(Shared(source, target, mount.readonly))
        return
    flags = ["rec"]
    if mount.propagation == pb.PROPAGATION_PRIVATE:
        flags.append("private")
    if target == "/dev" or target.startswith("/dev/"):
        flags.append("dev")
    if _filesystem(source) in (_PROC_MAGIC, _SYSFS_MAGIC):
        # Porto binds these read-only or not at all.
        flags.append("ro")
        if not mount.readonly:
            result.options += ["-W", target]
        if source == "/sys" or source.startswith("/sys/"):
            source = sysfs + source.removeprefix("/sys")
    else:
        flags.append("rw")
        if mount.readonly:
            # Porto's own flag would reach the mounts below as well, which CRI leaves as they are.
            result.options += ["-V" if mount.recursive_read_only else "-r", target]
    result.bind(source, target, *flags)


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


def bind_images(result: Plan) -> None:
    """Add the binds of image mounts, once their volumes are there.

    :raises NotFound: no such sub path in the image.
    """
    for mount in result.images:
        source = mount.path
        if mount.sub_path:
            try:
                fd = rootfs.open_inside(mount.path, mount.sub_path, os.O_PATH)
            except OSError as err:
                message = f"ImageVolumeMountFailed: image_sub_path {mount.sub_path!r} of the image: {err.strerror}"
                raise NotFound(message) from err
            try:
                source = os.readlink(f"/proc/self/fd/{fd}")
            finally:
                os.close(fd)
        result.bind(source, mount.container_path, "rec", "ro", "private")


def resolve_targets(result: Plan, root: str) -> bool:
    """Make targets that lie behind symlinks of the image, as the container would; Porto refuses what dangles.

    :returns: whether any has changed.
    :raises InvalidArgument: a symlink that leads nowhere.
    """
    changed = False
    for bind in result.binds:
        resolved = rootfs.resolve(root, bind.target)
        if resolved != bind.target:
            try:
                rootfs.make_inside(root, resolved, directory=os.path.isdir(bind.source))
            except OSError as err:
                raise InvalidArgument(f"mounts: {bind.target} of the image can't be mounted over: {err}") from err
            bind.target = resolved
            changed = True
    return changed


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


def attach_shared(pid: int, mounts: Iterable[Shared]) -> None:
    """Put shared mounts into a container whose init is waiting.

    :param pid: its main process.
    :raises FailedPrecondition: one can't be made.
    """
    for mount in mounts:
        try:
            tree = linux.clone_mounts(mount.host_path, readonly=mount.readonly)
            try:
                is_directory = os.path.isdir(mount.host_path)
                linux.in_thread(partial(_attach, pid, tree, mount.container_path, is_directory))
            finally:
                os.close(tree)
        except OSError as err:
            raise FailedPrecondition(f"the shared mount {mount.container_path} can't be made: {err}") from err


def _attach(pid: int, tree: int, target: str, is_directory: bool) -> None:
    # setns(2) to a mount namespace asks for a root and working directory that no other thread shares.
    linux.unshare(linux.CLONE_FS)
    linux.setns(f"/proc/{pid}/ns/mnt", linux.CLONE_NEWNS)
    if not os.path.lexists(target):
        os.makedirs(target if is_directory else os.path.dirname(target), mode=0o755, exist_ok=True)
        if not is_directory:
            Path(target).touch()
    linux.attach_mounts(tree, target)


def _check_shared(source: str, name: str) -> None:
    """CRI: bidirectional propagation needs a shared mount on the host."""
    best, shared = "", False
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        point = fields[4].encode().decode("unicode_escape")
        if (source + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, shared = point, any(item.startswith("shared:") for item in fields[6 : fields.index("-")])
    if not shared:
        raise InvalidArgument(f"{name}.propagation: {source} is on {best}, which is not a shared mount of the node")


class _StatFs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 240))


def _filesystem(path: str) -> int:
    """The magic number of the filesystem that ``path`` is on (statfs(2))."""
    result = _StatFs()
    if ctypes.CDLL(None).statfs(os.fsencode(path), ctypes.byref(result)) != 0:
        return 0
    return int(result.f_type)


def _readonly_root(config: pb.ContainerConfig) -> bool:
    return config.linux.security_context.readonly_rootfs


def _clean(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _absolute(path: str, name: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidArgument(f"{name}: {path!r} must be an absolute path without '..'")
