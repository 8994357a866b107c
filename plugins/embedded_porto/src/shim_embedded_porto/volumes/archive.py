"""Packing and unpacking trees: tar as Porto runs it, and whiteouts turned into what overlayfs knows."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
from functools import lru_cache

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.errors import Fault, invalid_value, not_supported, system
from shim_embedded_porto.removal import remove_tree

logger = logging.getLogger("shim.embedded_porto.archive")

_MAGIC = {b"\xfd7zXZ\0": "--xz", b"\x1f\x8b\x08": "--gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "--bzip2"}
_NAMES = {
    **dict.fromkeys(("txz", "tar.xz"), "--xz"),
    **dict.fromkeys(("tgz", "tar.gz"), "--gzip"),
    **dict.fromkeys(("tzst", "tar.zst"), "zstd"),
    **dict.fromkeys(("tbz2", "tar.bz2"), "--bzip2"),
    "tar": "--no-auto-compress",
}
_SUFFIXES = {
    **dict.fromkeys((".xz", ".txz"), "--xz"),
    **dict.fromkeys((".gz", ".tgz"), "--gzip"),
    **dict.fromkeys((".zst", ".tzst"), "zstd"),
    **dict.fromkeys((".bz2", ".tbz2"), "--bzip2"),
}
_XATTRS = ("--xattrs", *(f"--xattrs-include={name}" for name in ("security.capability", "trusted.overlay.*", "user.*")))
_ERROR_BYTES = 4096
_WHITEOUT, _OPAQUE, _METADATA = ".wh.", ".wh..wh..opq", ".wh..wh."


def compression_of(fd: int, archive: str, named: str) -> str:
    """tar's option for an archive that is there.

    :param named: what the client says; empty: look at the archive.
    :raises Fault: InvalidValue.
    """
    if named:
        return _by_name(archive, named)
    head = os.pread(fd, 512, 0)
    for magic, option in _MAGIC.items():
        if head.startswith(magic):
            return _available(option)
    if head.startswith(b"hsqs"):
        raise not_supported("the embedded Porto doesn't unpack squashfs")
    if head[257:262] == b"ustar":
        return "--no-auto-compress"
    raise invalid_value(f"Cannot detect archive {archive} compression by magic")


def compression_for(archive: str, named: str) -> str:
    """tar's option for an archive that is to be made."""
    if named:
        return _by_name(archive, named)
    name = os.path.basename(archive)
    option = next((option for suffix, option in _SUFFIXES.items() if name.endswith(suffix)), "--no-auto-compress")
    if name.endswith((".squash", ".squashfs")):
        raise not_supported("the embedded Porto doesn't pack squashfs")
    return _available(option)


def _by_name(archive: str, named: str) -> str:
    if named.endswith("squashfs"):
        raise not_supported("the embedded Porto knows no squashfs")
    if named not in _NAMES:
        raise invalid_value(f"Unknown archive {archive} compression {named}")
    return _available(_NAMES[named])


def _available(option: str) -> str:
    if option != "zstd":
        return option
    if shutil.which("zstd") is None:
        raise not_supported("Compression: Can not find /usr/bin/zstd binary")
    return "--use-compress-program=zstd"


@lru_cache(maxsize=1)
def _xattr_options() -> tuple[str, ...]:
    command = ["tar", "--create", "--xattrs", "--files-from", "/dev/null"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return _XATTRS if done.returncode == 0 else ()


def unpack(fd: int, directory: str, option: str, memory_cgroup: str, *, verbose_error: bool) -> None:
    """Extract the archive that ``fd`` is open on into a directory.

    :param memory_cgroup: the file to write tar's pid to, so that its memory is somebody's; empty: ours.
    :param verbose_error: tell a failure of tar's from others by its code.
    :raises Fault: tar has failed: Unknown; with ``verbose_error`` HelperError, or HelperFatalError for broken data.
    """
    command = ["tar", "--numeric-owner", "--preserve-permissions", *_xattr_options(), option, "--extract"]
    os.lseek(fd, 0, os.SEEK_SET)
    _run(command, directory, stdin=fd, memory_cgroup=memory_cgroup, verbose_error=verbose_error)


def pack(directory: str, fd: int, option: str) -> None:
    """Write the content of a directory to the archive that ``fd`` is open on.

    :raises Fault: Unknown: tar has failed.
    """
    xattrs = ("--xattrs",) if _xattr_options() else ()
    command = ["tar", "--one-file-system", "--numeric-owner", "--preserve-permissions", *xattrs, "--sparse"]
    command += ["--transform", "s:^./::", option, "--create", "-C", directory, "."]
    _run(command, "/", stdout=fd)


def _run(
    command: list[str],
    directory: str,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    memory_cgroup: str = "",
    verbose_error: bool = False,
) -> None:
    try:
        # As portod's helpers: what an archive doesn't say the mode of gets all rights.
        process = subprocess.Popen(command, cwd=directory, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, umask=0)
    except OSError as err:
        raise system(err, f"cannot run {command[0]}") from err
    if memory_cgroup:
        try:
            with open(memory_cgroup, "w") as file:
                file.write(str(process.pid))
        except OSError as err:
            logger.warning("can't account tar's memory to %s: %s", memory_cgroup, err)
    assert process.stderr is not None
    tail = b""
    with process.stderr:
        while chunk := process.stderr.read(_ERROR_BYTES):
            tail = (tail + chunk)[-_ERROR_BYTES:]
    if process.wait() != 0:
        status = f"exit code: {process.returncode}" if process.returncode > 0 else f"signal: {-process.returncode}"
        details = tail.decode(errors="replace")
        code: int = pb.Unknown
        if verbose_error:
            code = pb.HelperFatalError if "not recoverable" in details else pb.HelperError
        raise Fault(code, f"helper: {' '.join(command)}  stderr: {details}: {status}")


def sanitize(directory: str) -> None:
    """Turn the whiteouts of aufs, which OCI layers use, into those of overlayfs.

    :raises Fault: Unknown: a whiteout of a directory itself, or of the one above.
    """
    for _, directories, files, dir_fd in os.fwalk(directory, topdown=True, follow_symlinks=False):
        whiteouts = [name for name in (*directories, *files) if name.startswith(_WHITEOUT)]
        for name in whiteouts:
            remove_tree(name, dir_fd)
            if name == _OPAQUE:
                os.setxattr(f"/proc/self/fd/{dir_fd}", "trusted.overlay.opaque", b"y")
            if name.startswith(_METADATA):
                continue
            hidden = name[len(_WHITEOUT) :]
            if not hidden or "/" in hidden or hidden in (".", ".."):
                raise Fault(pb.Unknown, "unlinkat", errno.EINVAL)
            remove_tree(hidden, dir_fd)
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=dir_fd)
        directories[:] = [
            name for name in directories if not name.startswith(_WHITEOUT) and f"{_WHITEOUT}{name}" not in whiteouts
        ]


def copy_tree(source: str, target: str) -> None:
    """Copy the content of a directory over that of another.

    :raises Fault: Unknown: cp has failed.
    """
    _run(["cp", "--archive", "--force", "--one-file-system", "--no-target-directory", source, target], "/")
