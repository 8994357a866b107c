"""Network namespaces: made without a process, pinned to a file, taken away again (network_namespaces(7))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1

PREFIX = "portoshim-"


class NetnsError(Exception):
    """A step failed: the text says which, and on what file."""


class Namespaces:
    """The network namespaces of one shim.

    Their names begin with a tag of its own, so that two shims on a node never touch each other's.

    :param directory: where they are pinned.   :param owner: what tells this shim from others: its state directory.
    """

    def __init__(self, directory: str, owner: str) -> None:
        self.directory = directory
        self.tag = hashlib.sha256(os.path.realpath(owner).encode()).hexdigest()[:8]
        self._prefix = f"{PREFIX}{self.tag}-"
        self._libc = ctypes.CDLL(None, use_errno=True)

    def path(self, sandbox_id: str) -> str:
        """Where the namespace of a sandbox is, or would be. The whole id: a part of it might be another's as well."""
        return os.path.join(self.directory, self._prefix + sandbox_id)

    def create(self, path: str) -> None:
        """Make a namespace with its loopback interface up, and pin it to ``path``. What was there before goes.

        :raises NetnsError: nothing is left behind.
        """
        self.begin(path)()

    def begin(self, path: str) -> Callable[[], None]:
        """As :meth:`create`, in the background: the kernel takes a millisecond for it that others can use.

        :returns: a function that waits until it is made; it has to be called.
        :raises NetnsError: nothing is left behind; likewise from the function that is returned.
        """
        self.remove(path)
        try:
            os.makedirs(self.directory, mode=0o755, exist_ok=True)
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        except OSError as err:
            raise NetnsError(f"{path}: can't be created: {err.strerror}") from err
        failure: list[str] = []
        # A thread of its own enters the namespace and ends there: no other ever sees it.
        thread = threading.Thread(target=self._unshare_and_pin, args=(path, failure), name="cni-netns")
        thread.start()

        def wait() -> None:
            thread.join()
            if failure:
                self.remove(path)
                raise NetnsError(f"{path}: {failure[0]}")

        return wait

    def remove(self, path: str) -> None:
        """Unpin a namespace; it ends with its last process. A missing one, or a plain file in its place, is fine.

        :raises NetnsError: the file can't be removed.
        """
        if not os.path.lexists(path):
            return
        # As often as something was mounted here; EINVAL says nothing is.
        while self._libc.umount2(path.encode(), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
            pass
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOENT):
            raise NetnsError(f"{path}: can't be unmounted: {os.strerror(code)}")
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as err:
            raise NetnsError(f"{path}: can't be removed: {err.strerror}") from err

    def exists(self, path: str) -> bool:
        """Whether a network namespace is pinned there: after a reboot or an umount a plain file may be left."""
        try:
            status = os.lstat(path)
            # Every namespace file lives on the one nsfs of the kernel.
            return stat.S_ISREG(status.st_mode) and status.st_dev == os.stat("/proc/self/ns/net").st_dev
        except OSError:
            return False

    def pinned(self) -> list[str]:
        """Paths of all namespaces of this shim."""
        try:
            names = os.listdir(self.directory)
        except OSError:
            return []
        return [os.path.join(self.directory, name) for name in sorted(names) if name.startswith(self._prefix)]

    def in_use(self, path: str) -> bool:
        """Whether a process lives in the namespace."""
        if not self.exists(path):
            return False
        inode = os.stat(path).st_ino
        return any(_netns_inode(entry) == inode for entry in os.listdir("/proc") if entry.isdecimal())

    def _unshare_and_pin(self, path: str, failure: list[str]) -> None:
        if self._libc.unshare(_CLONE_NEWNET) != 0:
            failure.append(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
            return
        try:
            _bring_loopback_up()
        except OSError as err:
            failure.append(f"the loopback interface can't be brought up: {err.strerror}")
            return
        if self._libc.mount(b"/proc/thread-self/ns/net", path.encode(), None, _MS_BIND, None) != 0:
            failure.append(f"the network namespace can't be mounted there: {os.strerror(ctypes.get_errno())}")


def _bring_loopback_up() -> None:
    """What the loopback plugin does (netdevice(7)); the kernel adds 127.0.0.1 and ::1 by itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack("16sh22x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def _netns_inode(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None
