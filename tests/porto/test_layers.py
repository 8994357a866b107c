"""Layers and storages: unpacking and packing archives, whiteouts, names, and what is kept with them."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from porto_api import Client, errors
from tests.porto.support import refused
from tools.images import File, compress, pack

Make = Callable[..., str]


@pytest.fixture
def archive(tmp_path: Path) -> Make:
    """Writes an archive; its path."""

    def make(*files: File, name: str = "layer.tar") -> str:
        path = tmp_path / name
        path.write_bytes(pack(files))
        return str(path)

    return make


def layer_path(porto: Client, name: str) -> Path:
    return Path(porto.get_property("/", "place").split(";")[0], "porto_layers", name)


class TestImport:
    @pytest.mark.parametrize(
        ("suffix", "command"), [("tar", "cat"), ("tar.gz", "gzip"), ("tar.xz", "xz"), ("tar.bz2", "bzip2")]
    )
    def test_compressions_are_found_by_content(
        self, porto: Client, tmp_path: Path, archive: Make, suffix: str, command: str
    ) -> None:
        plain = archive(File("file", b"hello"))
        if command != "cat" and subprocess.run(["which", command], capture_output=True).returncode:
            pytest.skip(f"no {command}")
        packed = tmp_path / "anything"
        with open(plain, "rb") as source, packed.open("wb") as target:
            subprocess.run([command], stdin=source, stdout=target, check=True)
        porto.import_layer("l", str(packed))
        assert (layer_path(porto, "l") / "file").read_bytes() == b"hello"

    def test_owners_modes_links_and_attributes(self, porto: Client, archive: Make) -> None:
        source = archive(
            File("d", mode=0o1777, uid=5, gid=6),
            File("d/file", b"x", mode=0o4750, uid=1234, gid=99, pax={"SCHILY.xattr.user.foo": "bar"}),
            File("link", link="/etc/passwd"),
            File("hard", hard_link="d/file"),
        )
        porto.import_layer("l", source)
        root = layer_path(porto, "l")
        directory, file = os.stat(root / "d"), os.stat(root / "d/file")
        assert (stat.S_IMODE(directory.st_mode), directory.st_uid, directory.st_gid) == (0o1777, 5, 6)
        assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid, file.st_nlink) == (0o4750, 1234, 99, 2)
        assert os.getxattr(root / "d/file", "user.foo") == b"bar"
        assert os.readlink(root / "link") == "/etc/passwd"

    def test_devices(self, porto: Client, tmp_path: Path) -> None:
        path = tmp_path / "devices.tar"
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("null")
            info.type, info.devmajor, info.devminor, info.mode = tarfile.CHRTYPE, 1, 3, 0o666
            tar.addfile(info, BytesIO())
        porto.import_layer("l", str(path))
        assert os.stat(layer_path(porto, "l") / "null").st_rdev == os.makedev(1, 3)

    def test_directories_the_archive_doesnt_name(self, porto: Client, archive: Make) -> None:
        """They get all rights: portod has no umask."""
        porto.import_layer("l", archive(File("d/file", b"x")))
        assert stat.S_IMODE(os.stat(layer_path(porto, "l") / "d").st_mode) == 0o777

    def test_whiteouts(self, porto: Client, archive: Make) -> None:
        porto.import_layer("below", archive(*(File(f"d/{name}", b"x") for name in "abc"), File("e/f", b"x")))
        porto.import_layer(
            "above",
            archive(
                File("d/.wh.a", b""),
                File("d/new", b""),
                File("e/.wh..wh..opq", b""),
                File("e/g", b"x"),
                File("d/.wh..wh.aufs", b""),
            ),
        )
        hidden = os.lstat(layer_path(porto, "above") / "d/a")
        assert stat.S_ISCHR(hidden.st_mode)
        assert hidden.st_rdev == 0
        assert os.getxattr(layer_path(porto, "above") / "e", "trusted.overlay.opaque") == b"y"
        root = porto.create_volume(None, {"layers": "above;below"}).path
        assert sorted(os.listdir(f"{root}/d")) == ["b", "c", "new"]
        assert os.listdir(f"{root}/e") == ["g"]

    def test_merging(self, porto: Client, archive: Make) -> None:
        porto.import_layer("l", archive(File("a", b"1"), File("b", b"1")))
        with refused(errors.LayerAlreadyExists, "Layer already exists"):
            porto.import_layer("l", archive(File("b", b"2")))
        porto.import_layer("l", archive(File("b", b"2")), merge=True)
        root = layer_path(porto, "l")
        assert (root / "b").read_bytes() == b"2"
        assert (root / "a").read_bytes() == b"1"

    @pytest.mark.parametrize("name", ["../outside", "/absolute", "d/../../outside"])
    def test_nothing_gets_outside(self, porto: Client, archive: Make, name: str) -> None:
        outside = layer_path(porto, "l").parent
        before = set(os.listdir(outside))
        try:
            porto.import_layer("l", archive(File(name, b"x")))
        except errors.PortoError:
            pass
        assert set(os.listdir(outside)) - before <= {"l", "_private_l"}
        assert not os.path.exists("/absolute")

    def test_nor_through_a_link(self, porto: Client, archive: Make, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        with pytest.raises(errors.Unknown, match=r"(?s)^Unknown: helper: tar .* stderr: .*: exit code: 2$"):
            porto.import_layer("l", archive(File("link", link=str(target)), File("link/x", b"x")))
        assert os.listdir(target) == []
        assert [layer.name for layer in porto.list_layers() if layer.name == "l"] == []

    def test_broken_ones(self, porto: Client, archive: Make, tmp_path: Path) -> None:
        whole = compress(pack([File("file", os.urandom(100_000))]), "gzip")
        for name, content in (("cut", whole[:50_000]), ("junk", b"junk" * 500), ("empty", b"")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(errors.PortoError):
                porto.import_layer("l", str(tmp_path / name))
        assert "l" not in [layer.name for layer in porto.list_layers()]
        assert not any("l" in name for name in os.listdir(layer_path(porto, "l").parent) if name.startswith("_"))

    @pytest.mark.parametrize(
        ("path", "kind"),
        [("/not/there.tar", errors.PortoError), ("relative.tar", errors.PortoError), ("/etc", errors.PortoError)],
    )
    def test_no_archive(self, porto: Client, path: str, kind: type[errors.PortoError]) -> None:
        with pytest.raises(kind):
            porto.import_layer("l", path)

    def test_an_unknown_compression(self, porto: Client, archive: Make) -> None:
        source = archive(File("x", b""))
        with refused(errors.InvalidValue, f"Unknown archive {source} compression bla"):
            porto.import_layer("l", source, compress="bla")

    @pytest.mark.parametrize("name", ["a.b-c_d", "a:b", "sha256:abc", "A" * 98])
    def test_good_names(self, porto: Client, archive: Make, name: str) -> None:
        porto.import_layer(name, archive(File("x", b"")))
        assert name in [layer.name for layer in porto.list_layers()]

    @pytest.mark.parametrize("name", ["", "a b", ".", "..", "*", "a\n", "ü", "_import_x", "_remove_x"])
    def test_bad_names(self, porto: Client, archive: Make, name: str) -> None:
        with pytest.raises(errors.PortoError):
            porto.import_layer(name, archive(File("x", b"")))


class TestLayers:
    def test_listing(self, porto: Client, archive: Make) -> None:
        for name in ("one", "other"):
            porto.import_layer(name, archive(File("x", b"")), private_value=f"of {name}")
        found = {layer.name: layer for layer in porto.list_layers(mask="o*")}
        assert set(found) == {"one", "other"}
        assert (found["one"].owner_user, found["one"].owner_group) == ("root", "root")
        assert found["one"].private_value == "of one"
        assert found["one"].last_usage < 100

    def test_a_note(self, porto: Client, archive: Make) -> None:
        porto.import_layer("l", archive(File("x", b"")))
        assert porto.get_layer_private("l") == ""
        porto.set_layer_private("l", "note")
        assert porto.get_layer_private("l") == "note"
        for call in (porto.get_layer_private, porto.remove_layer, lambda name: porto.set_layer_private(name, "x")):
            with pytest.raises(errors.LayerNotFound):
                call("nope")

    def test_removing(self, porto: Client, archive: Make) -> None:
        porto.import_layer("l", archive(File("d/x", b"")))
        path = porto.create_volume(None, {"layers": "l"}).path
        with refused(errors.Busy):
            porto.remove_layer("l")
        porto.unlink_volume(path)
        porto.remove_layer("l")
        assert not layer_path(porto, "l").exists()

    def test_packing_what_was_changed(self, porto: Client, archive: Make, tmp_path: Path) -> None:
        porto.import_layer("l", archive(File("d/a", b"1"), File("d/b", b"1")))
        path = porto.create_volume(None, {"layers": "l"}).path
        Path(path, "d/new").write_bytes(b"2")
        os.unlink(f"{path}/d/a")
        target = tmp_path / "changes.tar.gz"
        porto.export_layer(path, str(target))
        with tarfile.open(target, "r:gz") as tar:
            entries = {info.name.removeprefix("./"): info for info in tar.getmembers()}
        assert {name for name, info in entries.items() if not info.isdir()} == {"d/a", "d/new"}
        assert entries["d/a"].ischr()
        with refused(errors.InvalidValue, "archive already exists"):
            porto.export_layer(path, str(target))

    def test_packing_a_layer(self, porto: Client, archive: Make, tmp_path: Path) -> None:
        porto.import_layer("l", archive(File("d/a", b"1", uid=5)))
        porto.export_layer("", str(tmp_path / "l.tar"), layer="l")
        with tarfile.open(tmp_path / "l.tar") as tar:
            (info,) = [info for info in tar.getmembers() if info.isfile()]
        assert (info.name.removeprefix("./"), info.uid) == ("d/a", 5)
        with refused(errors.VolumeNotFound, "Volume /nope not found"):
            porto.export_layer("/nope", str(tmp_path / "x.tar"))

    def test_another_place(self, porto: Client, archive: Make, tmp_path: Path) -> None:
        place = tmp_path / "place"
        place.mkdir()
        source = archive(File("x", b"hello"))
        porto.import_layer("l", source, place=str(place))
        try:
            assert (place / "porto_layers/l/x").read_bytes() == b"hello"
            assert [layer.name for layer in porto.list_layers(place=str(place))] == ["l"]
            path = porto.create_volume(None, {"layers": "l", "place": str(place)}).path
            assert Path(path, "x").read_bytes() == b"hello"
            assert path.startswith(f"{place}/porto_volumes/")
            porto.unlink_volume(path)
        finally:
            porto.remove_layer("l", place=str(place))
        with pytest.raises(errors.PortoError):
            porto.import_layer("l", source, place="relative")


class TestStorages:
    def test_unpacking_and_packing(self, porto: Client, archive: Make, tmp_path: Path) -> None:
        porto.import_storage("s", archive(File("x", b"hello")), private_value="note")
        (found,) = porto.list_storages()
        assert (found.name, found.private_value) == ("s", "note")
        path = porto.create_volume(None, {"storage": "s"}).path
        assert Path(path, "x").read_bytes() == b"hello"
        porto.unlink_volume(path)
        porto.export_storage("s", str(tmp_path / "s.tar"))
        with tarfile.open(tmp_path / "s.tar") as tar:
            assert "x" in [name.removeprefix("./") for name in tar.getnames()]
        porto.remove_storage("s")
        assert porto.list_storages() == []

    def test_errors(self, porto: Client, archive: Make) -> None:
        source = archive(File("x", b""))
        porto.import_storage("s", source)
        with pytest.raises(errors.PortoError):
            porto.import_storage("s", source)
        for call in (porto.remove_storage, lambda name: porto.export_storage(name, "/tmp/none.tar")):
            with pytest.raises(errors.PortoError):
                call("nope")
        with pytest.raises(errors.PortoError):
            porto.create_volume(None, {"storage": "a b"})

    def test_tidying_up(self, porto: Client) -> None:
        place = porto.get_property("/", "place").split(";")[0]
        left = Path(place, "porto_layers/_remove_left")
        left.mkdir()
        porto.cleanup_place(place)
        assert not left.exists()
        with pytest.raises(errors.PortoError):
            porto.cleanup_place("/not/there")
