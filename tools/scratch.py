"""A directory for nodes and their peers, removed at the end. What is mounted in it is not.

What a node mounts below its directory outlives it when it is killed. Whoever removes that directory as any other walks
through mounts: one of ``/sys``, say, would take every empty cgroup of the machine away.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x40000, 0x2
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def scratch(parent: str | None = None) -> Iterator[Path]:
    """A new directory below ``parent``. It stays if something in it can't be unmounted."""
    path = Path(tempfile.mkdtemp(prefix="portoshim-", dir=parent))
    try:
        yield path
    finally:
        left = unmount_below(path)
        if left:
            print(f"{path} is left: {left[0]} can't be unmounted", file=sys.stderr)
        else:
            shutil.rmtree(path, ignore_errors=True)


def unmount_below(path: Path) -> list[str]:
    """Detach what is mounted below a directory; what is still mounted there afterwards."""
    points = [os.fsencode(point) for point in mounts_below(path)]
    for point in points:
        # Shared with the tree it was bound from, it would take that tree's mounts along.
        _libc.mount(None, point, None, _MS_REC | _MS_PRIVATE, None)
    for point in reversed(points):
        _libc.umount2(point, _MNT_DETACH)
    return mounts_below(path)


def mounts_below(path: Path) -> list[str]:
    """Mount points below a directory, in the order in which they were mounted."""
    prefix = f"{path.resolve()}/"
    fields = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [field[4].encode().decode("unicode_escape") for field in fields]  # a space is \040 there
    return [point for point in points if point.startswith(prefix)]
