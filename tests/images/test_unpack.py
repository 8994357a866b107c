"""Layers as they are rewritten for Porto: what tar makes of the result is what the layer says, and nothing else."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shim_porto_runtime.images import unpack
from shim_porto_runtime.images.tarread import BadLayer, TarReader
from shim_porto_runtime.images.tarwrite import TarWriter

from tests.images.tars import CHR, DIR, LNK, REG, SYM, Item, d, f, h, s, tar

LIMIT = 1 << 30


def rewrite(data: bytes, *, pieces: int = 1 << 20, limit: int = LIMIT) -> tuple[bytes, unpack.Usage]:
    """A layer's archive as Porto would get it."""

    def once(superseded: frozenset[int] | None) -> tuple[bytes, unpack.Usage]:
        read, write = os.memfd_create("in"), os.memfd_create("out")
        try:
            source = io.BytesIO(data)
            usage = unpack.sanitize(
                TarReader(lambda n: source.read(min(n, pieces))), TarWriter(write), limit, superseded
            )
            return Path(f"/proc/self/fd/{write}").read_bytes(), usage
        finally:
            os.close(read)
            os.close(write)

    try:
        return once(None)
    except unpack.Conflict:
        return once(unpack.find_superseded(TarReader(io.BytesIO(data).read), limit))


def tree(data: bytes) -> dict[str, tuple[object, ...]]:
    """What Python's tar reader finds, the last entry of each name; ``.`` left out."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for info in archive:
            name = os.path.normpath(info.name)
            if name != ".":
                file = archive.extractfile(info) if info.isreg() else None
                content = file.read() if file else b""
                found[name] = (info.type, info.mode, info.uid, info.gid, int(info.mtime), info.linkname, content)
    return found


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keeps_what_is_good(dialect: int) -> None:
    items = [
        d("bin", mode=0o711), f("bin/su", "binary", mode=0o4755), s("bin/sh", "su"), h("bin/hard", "bin/su"),
        d("tmp", mode=0o1777), f("bin/empty", ""), Item("null", CHR, device=(1, 3)), s("abs", "/etc/passwd"),
        f("x" * 99), f("d" * 60 + "/" + "e" * 60), f("big", "y" * 100_000, uid=65534),
    ]  # fmt: skip
    data = tar(items, dialect)
    out, _ = rewrite(data)
    expected = tree(data)
    expected["d" * 60] = (DIR, 0o755, 0, 0, 0, "", b"")
    assert tree(out) == expected


def test_long_names_and_large_numbers() -> None:
    long = "/".join(["n" * 200] * 3)
    items = [f(long, uid=5_000_000), s("link", "t" * 300), h("hard", long)]
    data = tar(items)
    out, _ = rewrite(data)
    found = tree(out)
    assert found[long][2] == 5_000_000
    assert found["link"][5] == "t" * 300
    assert found["hard"][5] == long


def test_parents_come_first_and_are_0755() -> None:
    out, _ = rewrite(tar([f("a/b/c")]))
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        assert [(info.name, info.mode) for info in archive] == [
            (".", 0o755), ("a", 0o755), ("a/b", 0o755), ("a/b/c", 0o644),
        ]  # fmt: skip


def test_the_root_keeps_its_own_mode() -> None:
    out, _ = rewrite(tar([d("./", mode=0o700), f("a")]))
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        assert [info.mode for info in archive if info.name == "."] == [0o755, 0o700]


def test_whiteouts_become_overlayfs_ones() -> None:
    out, _ = rewrite(tar([d("d"), f("d/.wh..wh..opq", ""), f("d/new"), f(".wh.gone", ""), d("e"), f("e/.wh.x", "")]))
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        infos = {info.name: info for info in archive}
    assert {name for name in infos if ".wh." in name} == set()
    for name in ("gone", "e/x"):
        assert (infos[name].type, infos[name].devmajor, infos[name].devminor) == (CHR, 0, 0)
    assert infos["d"].pax_headers["SCHILY.xattr.trusted.overlay.opaque"] == "y"
    assert "SCHILY.xattr.trusted.overlay.opaque" not in infos["e"].pax_headers


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_never_hides_what_the_same_layer_brings(first: bool) -> None:
    whiteouts = [f(".wh.file", ""), f(".wh.dir", "")]
    content = [f("file", "new"), d("dir", mode=0o700), f("dir/inside", "new")]
    out, _ = rewrite(tar([*whiteouts, *content] if first else [*content, *whiteouts]))
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        infos = {info.name: info for info in archive}
        kinds = [info.type for info in archive]
    assert CHR not in kinds
    assert infos["file"].isreg()
    # A directory that replaces one below shows nothing of it.
    assert infos["dir"].pax_headers["SCHILY.xattr.trusted.overlay.opaque"] == "y"
    assert infos["dir"].mode == 0o700


def test_attributes_with_any_bytes() -> None:
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    record = b"SCHILY.xattr.security.capability=" + capability + b"\n"
    # tarfile can't write bytes that are no UTF-8: the header is put together by hand.
    length = len(record) + 3
    pax = b"%d %b" % (length, record)
    head = tarfile.TarInfo("h")
    head.type, head.size = tarfile.XHDTYPE, len(pax)
    data = head.tobuf() + pax.ljust(512, b"\0") + tar([f("bin/ping")])
    out, _ = rewrite(data)
    assert record in out


def test_sizes_are_counted() -> None:
    _, usage = rewrite(tar([f("a", "x" * 5000), f("b", ""), d("c"), h("hard", "a")]))
    assert usage == unpack.Usage(size_bytes=4096 + 8192 + 4096 + 4096, inodes=4)


@pytest.mark.parametrize("dialect", ["gnu", "posix"])
def test_sparse_files_are_filled_in(tmp_path: Path, dialect: str) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(40):
            file.seek(number * 100_000)
            file.write(bytes([number + 1]) * 5000)
        file.truncate(5_000_000)
    packed = tmp_path / "sparse.tar"
    subprocess.run(["tar", "-S", f"--format={dialect}", "-cf", packed, "-C", tmp_path, "sparse"], check=True)
    assert packed.stat().st_size < 1_000_000, "this filesystem has no holes"
    out, _ = rewrite(packed.read_bytes())
    assert tree(out)["sparse"][-1] == (tmp_path / "sparse").read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_limits() -> None:
    rewrite(tar([f("a", "x" * 1000)]), limit=1000)
    with pytest.raises(BadLayer, match="larger than 999 bytes"):
        rewrite(tar([f("a", "x" * 1000)]), limit=999)


def test_a_size_is_refused_before_it_is_read() -> None:
    info = tarfile.TarInfo("a")
    info.size = 1 << 50
    with pytest.raises(BadLayer, match="larger than"):
        rewrite(info.tobuf(tarfile.GNU_FORMAT))


def test_too_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_ENTRIES", 100)
    rewrite(tar([f(f"{n}", "") for n in range(98)]))
    with pytest.raises(BadLayer, match="too many entries; 100"):
        rewrite(tar([f(f"{n}", "") for n in range(101)]))
    with pytest.raises(BadLayer, match="too many entries; 100"):
        rewrite(tar([f("d/" * 120 + "f", ""), f("g", "")]))  # directories that nobody named count too


def test_paths_that_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "_MAX_PATHS_BYTES", 10_000)
    with pytest.raises(BadLayer, match="too many entries"):
        rewrite(tar([f(f"{n:03}" * 80, "") for n in range(60)]))


@pytest.mark.parametrize("number", ["-1", "99999999999999999999", "1e5", "0x10", " 1"])
def test_numbers_in_pax_headers(number: str) -> None:
    with pytest.raises(BadLayer, match="not a number"):
        rewrite(tar([f("a", pax={"size": number})]))


def test_a_negative_size() -> None:
    block = bytearray(tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    with pytest.raises(BadLayer, match="size is negative"):
        rewrite(bytes(block))


@pytest.mark.parametrize("map_", [[(0, 10), (5, 10)], [(90, 20)], [(0, 50)], [(50, 10), (0, 10)], [(2**61, 2**61)]])
def test_sparse_maps_that_lie(map_: list[tuple[int, int]]) -> None:
    text = "\n".join([str(len(map_)), *(f"{a}\n{b}" for a, b in map_)]) + "\n"
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100", "GNU.sparse.name": "s"}
    item = Item("GNUSparseFile.0/s", REG, data=text.encode().ljust(512, b"\0") + b"x" * 20, pax=pax)
    with pytest.raises(BadLayer, match="sparse file's map"):
        rewrite(tar([item]))


def test_a_sparse_map_without_end() -> None:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}
    item = Item("s", REG, data=b"10000000\n".ljust(512, b"\0"), pax=pax)
    with pytest.raises(BadLayer, match="too many parts"):
        rewrite(tar([item]))


def test_a_sparse_file_larger_than_the_limit() -> None:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    item = Item("s", REG, data=b"0\n".ljust(512, b"\0"), pax=pax)
    with pytest.raises(BadLayer, match="larger than"):
        rewrite(tar([item]))


def test_every_cut_of_an_archive_ends_in_our_error() -> None:
    data = tar([f("a", "x" * 700), d("b"), f("n" * 150), s("l", "t" * 150), f("c", pax={"SCHILY.xattr.user.a": "b"})])
    for end in range(0, len(data) - 1024, 256):
        try:
            rewrite(data[:end])
        except BadLayer:
            continue


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_mutations_end_in_our_error_or_in_a_sound_archive(source: random.Random, count: int) -> None:
    data = bytearray(SEED)
    for _ in range(count):
        position = source.randrange(len(data))
        data[position] = source.choice((0, 0x2E, 0x2F, 0x30, 0x37, 0x80, 0xFF, source.randrange(256)))
    # Headers with a wrong checksum would end most of these at once.
    for start in range(0, len(data), 512):
        block = data[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    try:
        out, _ = rewrite(bytes(data), limit=1 << 20)
    except BadLayer:
        return
    check_sound(out)


KINDS = (REG, DIR, SYM, LNK)
NAMES = st.sampled_from(
    ["a", "b", "a/b", "a/c", "a/b/c", "b/a", "./a", "/b", "c/", ".wh.a", "a/.wh.b", "b/.wh..wh..opq"]
)
TARGETS = st.sampled_from(["a", "b", "/", "..", "a/b", "../../x", "/a", "c"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from(KINDS), TARGETS), max_size=8), st.sampled_from([1, 7, 512, 1 << 20]))
def test_any_sequence_of_entries_is_sound(entries: list[tuple[str, bytes, str]], pieces: int) -> None:
    items = [
        Item(name, kind, target if kind in (SYM, LNK) else "", b"" if kind != REG or name.endswith("/") else b"data")
        for name, kind, target in entries
    ]
    try:
        out, _ = rewrite(tar(items), pieces=pieces)
    except BadLayer:
        return
    check_sound(out)


def check_sound(out: bytes) -> None:
    """No path leaves the root or leads through a symlink; parents and targets of hard links come before."""
    kinds: dict[str, bytes] = {".": DIR}
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        for info in archive:
            name = info.name
            assert not name.startswith("/")
            assert ".." not in name.split("/")
            assert not os.path.basename(name).startswith(".wh.")
            parent = os.path.dirname(name) or "."
            assert kinds.get(parent) == DIR, f"{name} comes before its directory"
            if info.type == LNK:
                assert kinds.get(info.linkname) not in (None, DIR)
            before = kinds.get(name)
            if before is not None:
                assert SYM not in (before, info.type), f"{name} is a symlink and something else"
                assert (before == DIR) <= (info.type in (DIR, SYM, REG, LNK))
            assert not {key for key in info.pax_headers if "trusted" in key and not key.endswith("overlay.opaque")}
            kinds[name] = info.type


SEED = tar(
    [d("dir"), f("dir/file", "x" * 700), s("link", "dir"), h("hard", "dir/file"), f("n" * 150, "y" * 100),
     Item("dev", CHR, device=(1, 3)), f("attr", pax={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}), f(".wh.z", "")]
)  # fmt: skip


@pytest.mark.root
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from(KINDS), TARGETS), max_size=8))
def test_gnu_tar_makes_of_it_what_the_layer_says(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, bytes, str]]
) -> None:
    """The last entry of each path wins, whatever came before; tar agrees."""
    items = [
        Item(name, kind, target if kind in (SYM, LNK) else "", b"" if kind != REG or name.endswith("/") else b"data")
        for name, kind, target in entries
    ]
    try:
        out, usage = rewrite(tar(items))
    except BadLayer:
        return
    top = tmp_path_factory.mktemp("layer")
    subprocess.run(["tar", "--xattrs", "--xattrs-include=trusted.overlay.*", "-x"], input=out, cwd=top, check=True)
    expected: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        for info in archive:
            kind = {DIR: stat.S_IFDIR, SYM: stat.S_IFLNK, CHR: stat.S_IFCHR}.get(info.type, stat.S_IFREG)
            if info.type == LNK:
                kind = expected[info.linkname]
            for known in [name for name in expected if name.startswith(f"{info.name}/") and kind != stat.S_IFDIR]:
                del expected[known]
            if info.name != ".":
                expected[info.name] = kind
    actual = {
        os.path.relpath(os.path.join(where, name), top): stat.S_IFMT(os.lstat(os.path.join(where, name)).st_mode)
        for where, names, files in os.walk(top)
        for name in [*names, *files]
    }
    assert actual == expected
    assert usage.inodes >= len({os.lstat(os.path.join(top, name)).st_ino for name in actual}) + 1
