"""Layers that try to get out: each ends in an error, or inside of its own directory. Through a whole pull each.

The cases are of the kinds that other runtimes have been caught by: links out of the layer in every combination,
whiteouts of what isn't the layer's, names that lead elsewhere, entries that replace one another.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from shim_core import errors
from tests.images.support import Node
from tests.images.tars import BLK, CHR, FIFO, Item, d, f, h, s, tar
from tools import images
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root  # device nodes, owners, trusted attributes

OUT = "{canary}"  # an absolute path outside of the layer
UP = "../" * 12

Tree = dict[str, str]

CASES: dict[str, tuple[list[Item], str | Tree]] = {
    # names
    "dotdot name": ([f("../evil")], "holds '..'"),
    "dotdot inside": ([d("a"), f("a/../../evil")], "holds '..'"),
    "dotdot directory": ([d("..")], "holds '..'"),
    "absolute name": ([f("/etc/evil")], {"etc/evil": "x"}),
    "absolute name of a canary": ([f(OUT + "/file", "overwritten")], {"{canary_relative}/file": "overwritten"}),
    "many slashes": ([f("a//b///c")], {"a/b/c": "x"}),
    "dots": ([f("./a/./b")], {"a/b": "x"}),
    "the root is a file": ([f("./")], "name ends with a slash"),
    "the root is a symlink": ([s("./", OUT)], "root of a layer must be a directory"),
    "a name of 300 characters": ([f("n" * 300)], "too long"),
    "a path of 6000 characters": ([f("d/" * 3000 + "f")], "too long"),
    "a NUL in the name": ([f("a", pax={"path": "a\0b"})], "NUL"),
    "a newline in the name": ([f("a\nb")], {"a\nb": "x"}),
    # symlinks and what is written through them
    "through an absolute symlink": ([s("out", OUT), f("out/evil")], {"{canary_relative}/evil": "x"}),
    "through a relative symlink": ([s("out", UP + "tmp"), f("out/evil")], {"tmp/evil": "x"}),
    "through two symlinks": ([s("a", "b"), s("b", UP + "etc"), f("a/evil")], {"etc/evil": "x"}),
    "through a symlink in a directory": ([d("d"), s("d/out", "../../.."), f("d/out/evil")], {"evil": "x"}),
    "over an absolute symlink": ([s("out", OUT + "/file"), f("out")], {"out": "x"}),
    "over a relative symlink": ([s("out", UP + "{canary_relative}/file"), f("out")], {"out": "x"}),
    "a directory over a symlink": ([s("out", OUT), d("out"), f("out/file")], {"out/file": "x"}),
    "a symlink over a directory": ([d("out"), f("out/file"), s("out", OUT)], {"out": "-> {canary}"}),
    "a directory over a symlink to a directory": ([d("r"), s("l", "r"), d("l"), f("l/x")], {"l/x": "x", "r": "/"}),
    "a symlink to itself": ([s("me", "me"), f("me/evil")], "too many symlinks"),
    "two symlinks in a circle": ([s("a", "b"), s("b", "a"), f("a/evil")], "too many symlinks"),
    "an empty symlink": ([s("out", "")], "target is empty"),
    "through proc": ([s("p", "/proc/self/root"), f("p/tmp/evil")], {"proc/self/root/tmp/evil": "x"}),
    "a file's mode through a symlink": ([s("out", OUT + "/file"), f("out", mode=0o6777)], {"out": "x"}),
    "a directory's mode through a symlink": ([s("out", OUT), d("out/", mode=0o777)], {"out": "/"}),
    "a symlink changed under a path": (
        [d("r"), s("a", "r"), f("a/one"), s("a", OUT), f("a/two")],
        {"r/one": "x", "{canary_relative}/two": "x"},
    ),
    # hard links
    "an absolute hard link": ([h("in", OUT + "/file")], "no file of this layer|not in this layer"),
    "a relative hard link": ([h("in", UP + "{canary_relative}/file")], "holds '..'"),
    "a hard link down and out": ([d("a"), h("a/in", "a/../../file")], "holds '..'"),
    "a hard link through a symlink": ([s("out", OUT), h("in", "out/file")], "not in this layer"),
    "a hard link to a symlink out": ([s("out", OUT + "/file"), h("in", "out"), f("in")], {"in": "x"}),
    "a mode through a hard link to a symlink": (
        [s("out", OUT + "/file"), h("in", "out"), f("in", mode=0o777)],
        {"in": "x", "out": "-> {canary}/file"},
    ),
    "a hard link to a directory": ([d("dir"), h("in", "dir")], "no file of this layer"),
    "a hard link to the root": ([h("in", "/")], "hard link to the root"),
    "a hard link to itself": ([f("me"), h("me", "me")], "to itself"),
    "a hard link to what comes later": ([h("in", "later"), f("later")], "no file of this layer"),
    "a hard link over a symlink": ([f("real"), s("l", OUT + "/file"), h("l", "real")], {"l": "x", "real": "x"}),
    "an absolute hard link within": ([d("a"), f("a/f"), h("g", "/a/f")], {"g": "x"}),
    # whiteouts
    "a whiteout of nothing": ([f(".wh.")], "whiteout of no name"),
    "a whiteout of here": ([f(".wh..")], "whiteout of no name"),
    "a whiteout of the parent": ([f(".wh...")], "whiteout of no name"),
    "a whiteout of a parent inside": ([d("a"), f("a/.wh...")], "whiteout of no name"),
    "a whiteout through a symlink": ([s("out", OUT), f("out/.wh.file")], {"{canary_relative}/file": "whiteout"}),
    "a whiteout with dotdot": ([f("../.wh.canary")], "holds '..'"),
    "an opaque root": ([f(".wh..wh..opq"), f("f")], {"f": "x", ".": "opaque"}),
    "an opaque directory through a symlink": (
        [s("out", OUT), f("out/.wh..wh..opq")],
        {"{canary_relative}": "opaque"},
    ),
    "a whiteout that is a directory": ([d(".wh.gone")], {"gone": "whiteout"}),
    "a whiteout that is a symlink": ([s(".wh.gone", OUT)], {"gone": "whiteout"}),
    "aufs metadata": ([f(".wh..wh.plnk/42.17", "x"), f("f")], {"f": "x"}),
    # everything else
    "a device number out of range": ([Item("d", CHR, device=(0o7777777, 3))], "device number"),
    "a block device": ([Item("d", BLK, device=(7, 0))], {"d": "block 7:0"}),
    "a fifo": ([Item("p", FIFO)], {"p": "fifo"}),
    "an unknown type": ([Item("u", b"V")], "type b'V' is not supported"),
    "an owner out of range": ([f("a", uid=1 << 32)], "owner is out of range"),
    "overlayfs attributes": (
        [d("d", pax={"SCHILY.xattr.trusted.overlay.redirect": "/etc"}),
         f("f", pax={"SCHILY.xattr.trusted.overlay.metacopy": "", "SCHILY.xattr.user.kept": "yes"})],
        {"d": "/", "f": "x"},
    ),
    "a file as a directory": ([f("a"), f("a/b")], "leads through a file"),
}  # fmt: skip


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What must not change: a directory that the hostile layers know the way to."""
    directory = tmp_path / "canary"
    directory.mkdir()
    (directory / "file").write_text("untouched")
    return directory


@pytest.mark.parametrize("case", CASES)
def test_stays_inside(node: Node, registry: LocalRegistry, case: str, canary: Path, tmp_path: Path) -> None:
    items, expected = CASES[case]
    words = {"canary": str(canary), "canary_relative": str(canary).lstrip("/")}
    hostile = images.layer_of_tar(tar([_filled(item, words) for item in items]))
    victim = images.layer([images.File("victim", b"victim")])
    name = f"{registry.address}/breakouts/{list(CASES).index(case)}"
    images.push(images.build([victim]), registry, "breakouts/victim")
    images.push(images.build([victim, hostile]), registry, name.removeprefix(f"{registry.address}/"))
    other = node.layer_dir(node.pull(f"{registry.address}/breakouts/victim"))
    before = _snapshot(canary, other)

    if isinstance(expected, str):
        with pytest.raises(errors.UnknownError, match=expected) as caught:
            node.pull(name)
        assert caught.value.message.startswith(f"{name}:latest: layer {hostile.diff_id} is refused: ")
        assert node.service.resolve(name) is None
        assert node.layer_names() == {other.name}
    else:
        layer = node.layer_dir(node.pull(name), 1)
        for path, what in expected.items():
            assert _what_is(layer / path.format(**words)) == what.format(**words), path
    assert _snapshot(canary, other) == before
    assert {path.name for path in other.parent.iterdir()} - node.layer_names() - {
        f"_private_{name}" for name in node.layer_names()
    } == set()
    assert not [
        path for path in (Path("/evil"), Path("/etc/evil"), Path("/tmp/evil"), tmp_path / "evil") if path.exists()
    ]
    assert node.temporary_files() == []


def test_no_attribute_for_overlayfs_gets_in(node: Node, registry: LocalRegistry) -> None:
    keys = ("trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.overlay.opaque", "user.overlay.opaque",
            "security.selinux", "trusted.evil", "user.kept")  # fmt: skip
    item = d("dir", pax={f"SCHILY.xattr.{key}": "y" for key in keys})
    images.push(images.build([images.layer_of_tar(tar([item]))]), registry, "breakouts/attributes")
    layer = node.layer_dir(node.pull(f"{registry.address}/breakouts/attributes"))
    assert set(os.listxattr(layer / "dir")) - {"security.selinux"} == {"user.kept"}


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50


def _filled(item: Item, words: dict[str, str]) -> Item:
    return replace(item, name=_format(item.name, words), link=_format(item.link, words))


def _format(text: str, words: dict[str, str]) -> str:
    return text.format(**words) if "{" in text else text


def _what_is(path: Path) -> str:
    """A file's content, a symlink's target, or what else it is."""
    status = path.lstat()
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return f"-> {path.readlink()}"
    if stat.S_ISDIR(mode):
        return "opaque" if "trusted.overlay.opaque" in os.listxattr(path) else "/"
    if stat.S_ISCHR(mode) and status.st_rdev == 0:
        return "whiteout"
    if stat.S_ISBLK(mode):
        return f"block {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return "fifo" if stat.S_ISFIFO(mode) else path.read_text()


def _snapshot(*tops: Path) -> dict[str, tuple[object, ...]]:
    """What is in some directories, down to inodes and times."""
    found: dict[str, tuple[object, ...]] = {}
    for top in tops:
        for directory, names, files in os.walk(top):
            for path in (Path(directory, name) for name in [".", *names, *files]):
                status = path.lstat()
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
                attributes = tuple(os.listxattr(path, follow_symlinks=False))
                found[str(path)] = (
                    status.st_ino, status.st_mode, status.st_nlink, status.st_mtime_ns, status.st_ctime_ns, content,
                    attributes,
                )  # fmt: skip
    return found
