"""An image layer made into a tar that Porto may be given.

portod hands a layer's archive to GNU tar, and afterwards resolves whiteouts by itself, as root, outside of tar's mount
namespace: a file named ``.wh...`` has it remove the directory that holds all layers. It also deletes files that the
same layer adds beside their whiteout, and believes ``trusted.overlay.*`` attributes. So no archive from outside gets
there. Each layer is read by :mod:`tarread`, and what is written instead is a tar in one dialect in which

- every path is relative, has no ``..``, and leads through directories of this very layer, never through a symlink;
- every directory exists before what is in it, and hard links lead to files of this layer;
- whiteouts have overlayfs's own form (a character device 0:0, ``trusted.overlay.opaque``) and never hide what the
  layer itself holds;
- of the extended attributes only ``security.capability`` and ``user.*`` are left.

Symlinks keep their targets: those are resolved inside of containers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from shim_porto_runtime.images import entrynames as names
from shim_porto_runtime.images import tarread, tarwrite
from shim_porto_runtime.images.tarread import BadLayer, Entry, TarReader
from shim_porto_runtime.images.tarwrite import TarWriter

MAX_ENTRIES = 1_000_000
_MAX_SYMLINKS = 40
_MAX_ID = (1 << 32) - 2
_MAX_MAJOR, _MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
_MAX_XATTR_BYTES = 65536
_MAX_CONFLICTS = 100
_MAX_PATHS_BYTES = 128 * 1024 * 1024
"""All paths of a layer together: what has to be remembered of it."""
_MAX_KNOWN_PARENTS = 10_000
_BLOCK = 4096

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."
_OVERLAY_OPAQUE = {b"trusted.overlay.opaque": b"y"}

# A directory is a dict of its entries, a symlink is its target, all else is this.
_FILE = 1
_Node = Any


class Conflict(Exception):
    """An entry replaces one that tar can't be told to remove: :func:`find_superseded` has to look at all of them."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a layer takes up once it is unpacked."""

    size_bytes: int
    """In blocks of 4 KiB."""
    inodes: int


def sanitize(reader: TarReader, writer: TarWriter, limit_bytes: int, superseded: frozenset[int] | None = None) -> Usage:
    """Copy a layer, made safe.

    :param limit_bytes: of all files together, unpacked.
    :param superseded: the answer of :func:`find_superseded`; None as long as it hasn't been asked.
    :raises BadLayer: it breaks a rule; the message names the entry and the rule.
    :raises Conflict: :func:`find_superseded` has to be asked.
    """
    return _Sanitizer(reader, writer, limit_bytes, superseded).run()


def find_superseded(reader: TarReader, limit_bytes: int) -> frozenset[int]:
    """Numbers of the entries that later ones replace, when either is a directory or a symlink.

    An archive can't say "remove this first", and GNU tar makes some symlinks only when all else is done. So what is
    replaced is left out from the start.

    :raises BadLayer: as :func:`sanitize`.
    """
    scan = _Scan(reader, None, limit_bytes, None)
    scan.run()
    return frozenset(scan.found)


class _Sanitizer:
    def __init__(
        self, reader: TarReader, writer: TarWriter | None, limit_bytes: int, superseded: frozenset[int] | None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._limit = limit_bytes
        self._superseded = superseded
        self._number = -1
        self._left_out = False
        """The current entry is superseded: it counts for the paths after it, and isn't written."""
        self._root: dict[bytes, _Node] = {}
        self._parents: dict[bytes, tuple[dict[bytes, _Node], bytes]] = {}
        """Directories by the path they were asked for: node, and real path with a slash at its end."""
        self._ghosts: set[bytes] = set()
        """What was left out and not replaced yet."""
        self._directories: dict[bytes, Entry] = {}
        """Explicit entries of directories, for those that turn out to be opaque."""
        self._whiteouts: list[bytes] = []
        self._opaque: list[bytes] = []
        self._total = 0
        self._size = _BLOCK
        self._inodes = 1
        self._paths_bytes = 0

    def run(self) -> Usage:
        self._emit(tarwrite.directory(), b"./", b"")
        while (entry := self._reader.next()) is not None:
            self._number += 1
            if self._number >= MAX_ENTRIES or self._inodes > MAX_ENTRIES or self._paths_bytes > _MAX_PATHS_BYTES:
                raise BadLayer(f"the layer has too many entries; {MAX_ENTRIES} is the limit")
            self._left_out = self._superseded is not None and self._number in self._superseded
            try:
                self._take(entry)
            except BadLayer as err:
                raise BadLayer(f"entry {names.show(entry.name)}: {err.message}") from None
        self._left_out = False
        self._reader.drain()
        self._emit_whiteouts()
        if self._writer is not None:
            self._writer.finish()
        return Usage(self._size, self._inodes)

    def _take(self, entry: Entry) -> None:
        parts = names.split(entry.name)
        if entry.kind not in tarread.KINDS:
            raise BadLayer(f"its type {entry.kind!r} is not supported")
        if entry.uid > _MAX_ID or entry.gid > _MAX_ID:
            raise BadLayer("its owner is out of range")
        if not parts:
            if entry.kind != tarread.DIRECTORY:
                raise BadLayer("the root of a layer must be a directory")
            self._directories[b""] = entry
            self._emit(entry, b"./", b"")
            return
        name = parts[-1]
        if name.startswith(_WHITEOUT):
            self._whiteout(parts, name)
            return
        siblings, above = self._parent(parts[:-1])
        path = above + name
        if entry.kind == tarread.DIRECTORY:
            self._directory(entry, siblings, name, path)
        else:
            self._file(entry, siblings, name, path)

    # -- kinds of entries ------------------------------------------------------------------------------------------

    def _directory(self, entry: Entry, siblings: dict[bytes, _Node], name: bytes, path: bytes) -> None:
        existing = siblings.get(name)
        if not isinstance(existing, dict):
            if existing is not None:
                self._replace(path)
            siblings[name] = {}
            self._count(0)
        self._note(path)
        if self._left_out:
            self._ghosts.add(path)
            return
        self._ghosts.discard(path)
        self._directories[path] = entry
        self._emit(entry, path, b"")

    def _file(self, entry: Entry, siblings: dict[bytes, _Node], name: bytes, path: bytes) -> None:
        link = b""
        node: _Node = _FILE
        if entry.kind == tarread.HARD_LINK:
            link, node = self._hard_link(entry.link, path)
        elif entry.kind == tarread.SYMLINK:
            link = node = names.check_target(entry.link)
        elif entry.kind != tarread.REGULAR and not (entry.device[0] <= _MAX_MAJOR and entry.device[1] <= _MAX_MINOR):
            raise BadLayer("its device number is out of range")
        existing = siblings.get(name)
        if existing is not None and (existing != _FILE or node != _FILE):
            self._replace(path)
        siblings[name] = node
        self._note(path)
        self._total += entry.size
        if self._total > self._limit:
            raise BadLayer(f"the layer is larger than {self._limit} bytes (Images.MaxLayerSize, Images.MaxImageSize)")
        if self._left_out:
            self._ghosts.add(path)
            return
        self._ghosts.discard(path)
        if entry.kind != tarread.HARD_LINK:
            self._count(entry.size)
        self._emit(entry, path, link)

    def _hard_link(self, target: bytes, path: bytes) -> tuple[bytes, _Node]:
        parts = names.split(target)
        if not parts:
            raise BadLayer("it is a hard link to the root")
        siblings, above = self._parent(parts[:-1], create=False)
        node = siblings.get(parts[-1])
        if node is None or isinstance(node, dict):
            raise BadLayer(f"it is a hard link to {names.show(target)}, which is no file of this layer")
        real = above + parts[-1]
        if real == path:
            raise BadLayer("it is a hard link to itself")
        if real in self._ghosts:
            raise BadLayer(f"it is a hard link to {names.show(target)}, which is replaced by something else")
        return real, node

    def _whiteout(self, parts: list[bytes], name: bytes) -> None:
        if name == _OPAQUE:
            _, above = self._parent(parts[:-1])
            self._note(above + name)
            if not self._left_out:
                self._opaque.append(above)
        elif not name.startswith(_AUFS):
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in (b"", b".", b".."):
                raise BadLayer("it is a whiteout of no name")
            _, above = self._parent(parts[:-1])
            self._note(above + name)
            if not self._left_out:
                self._whiteouts.append(above + hidden)

    def _emit_whiteouts(self) -> None:
        """Last of all, since only now it is known what the layer itself holds."""
        opaque = set(self._opaque)
        for path in dict.fromkeys(self._whiteouts):
            siblings, _ = self._parent(names.split(path)[:-1])
            node = siblings.get(path.rpartition(b"/")[2])
            if isinstance(node, dict):
                opaque.add(path + b"/")  # the directory is new: nothing of the old one shows through
            elif node is None or path in self._ghosts:
                self._count(0)
                self._emit(Entry(b"", tarread.CHAR_DEVICE, 0, 0, 0, 0, 0, b"", (0, 0)), path, b"")
        for path in sorted(opaque):
            entry = copy.copy(self._directories.get(path.rstrip(b"/"), tarwrite.directory()))
            self._emit(entry, path or b"./", b"", opaque=True)

    # -- the layer as it stands ------------------------------------------------------------------------------------

    def _parent(self, parts: list[bytes], *, create: bool = True) -> tuple[dict[bytes, _Node], bytes]:
        """The directory that a path leads to, symlinks of this layer followed inside of it; made if it is missing."""
        asked = b"/".join(parts)
        if (known := self._parents.get(asked)) is not None:
            return known
        stack: list[tuple[dict[bytes, _Node], bytes]] = [(self._root, b"")]
        waiting = list(reversed(parts))
        followed = 0
        while waiting:
            part = waiting.pop()
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            siblings, above = stack[-1]
            node = siblings.get(part)
            if isinstance(node, bytes):
                followed += 1
                if followed > _MAX_SYMLINKS:
                    raise BadLayer("its path leads through too many symlinks")
                if node.startswith(b"/"):
                    del stack[1:]
                waiting += reversed([step for step in node.split(b"/") if step not in (b"", b".")])
                continue
            if node is None:
                if not create:
                    raise BadLayer("it is a hard link to something that is not in this layer")
                names.check_part(part)
                node = siblings[part] = {}
                self._count(0)
                self._paths_bytes += len(above) + len(part)
                self._ghosts.add(above + part)
            elif not isinstance(node, dict):
                raise BadLayer("its path leads through a file")
            if not self._left_out and above + part in self._ghosts:
                self._ghosts.discard(above + part)
                self._emit(tarwrite.directory(), above + part, b"")
            stack.append((node, above + part + b"/"))
            if len(stack[-1][1]) > names.MAX_PATH_BYTES:
                raise BadLayer("its path is too long")
        found = stack[-1]
        if not self._left_out:  # all of it is written, then
            if len(self._parents) >= _MAX_KNOWN_PARENTS:
                self._parents.clear()
            self._parents[asked] = found
        return found

    def _replace(self, path: bytes) -> None:
        """An entry takes the place of another, and one of them is a directory or a symlink."""
        if self._superseded is None:
            raise Conflict
        # Paths that led through what is replaced lead elsewhere now.
        self._parents.clear()

    def _note(self, path: bytes) -> None:
        """An entry stands at ``path`` now."""
        self._paths_bytes += len(path)

    # -- output ----------------------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        self._inodes += 1
        self._size += (size + _BLOCK - 1) // _BLOCK * _BLOCK or _BLOCK

    def _emit(self, entry: Entry, path: bytes, link: bytes, *, opaque: bool = False) -> None:
        writer = self._writer
        if writer is None:
            return
        xattrs = {key: value for key, value in entry.xattrs.items() if names.is_harmless(key)} if entry.xattrs else {}
        if any(len(value) > _MAX_XATTR_BYTES or len(key) > names.MAX_NAME_BYTES for key, value in xattrs.items()):
            raise BadLayer("its extended attributes are too large")
        writer.header(entry, path, link, {**xattrs, **_OVERLAY_OPAQUE} if opaque else xattrs)
        if entry.kind != tarread.REGULAR:
            return
        if entry.sparse is None:
            for piece in self._reader.payload():
                writer.put(piece)
        else:
            self._fill_holes(entry, writer)
        writer.pad()

    def _fill_holes(self, entry: Entry, writer: TarWriter) -> None:
        assert entry.sparse is not None
        parts = iter(entry.sparse)
        end = left = 0
        for piece in self._reader.payload():
            rest = memoryview(piece)
            while rest:
                while not left:
                    offset, left = next(parts)
                    writer.zeros(offset - end)
                    end = offset + left
                writer.put(rest[:left])
                step = min(left, len(rest))
                left -= step
                rest = rest[step:]
        writer.zeros(entry.size - end)


class _Scan(_Sanitizer):
    """Writes nothing; finds out which entries are replaced by one of another kind."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._entries: dict[bytes, list[int]] = {}
        self._conflicts = 0
        self.found: set[int] = set()

    def _note(self, path: bytes) -> None:
        super()._note(path)
        self._entries.setdefault(path, []).append(self._number)

    def _replace(self, path: bytes) -> None:
        self._conflicts += 1
        if self._conflicts > _MAX_CONFLICTS:
            raise BadLayer("it replaces an entry of another kind, as too many others do")
        below = path + b"/"
        gone = [known for known in self._entries if known == path or known.startswith(below)]
        for known in gone:
            self.found.update(self._entries.pop(known))
        self._parents.clear()
