"""Volumes: the ways to make one, where they are, and what is told of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import refused, start

MIB = 1 << 20


def properties(porto: Client, path: str) -> dict[str, str]:
    (found,) = porto.list_volumes(path)
    return {prop.name: prop.value for prop in found.properties}


class TestBackends:
    @pytest.mark.parametrize("backend", ["", "plain", "native"])
    def test_a_directory(self, porto: Client, backend: str) -> None:
        path = porto.create_volume(None, {"backend": backend} if backend else {}).path
        found = os.stat(path)
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o775, 0, 0)
        assert os.listdir(path) == []
        assert properties(porto, path)["backend"] == (backend or "plain")
        Path(path, "file").touch()
        porto.unlink_volume(path)
        assert not os.path.exists(path)

    def test_memory(self, porto: Client) -> None:
        path = porto.create_volume(None, {"backend": "tmpfs", "space_limit": "1M", "inode_limit": "50"}).path
        space = os.statvfs(path)
        assert (space.f_blocks * space.f_frsize, space.f_files) == (MIB, 50)
        with pytest.raises(OSError, match="No space left"), open(f"{path}/file", "wb") as file:
            file.write(bytes(2 * MIB))
        porto.unlink_volume(path)
        with refused(errors.InvalidProperty, "tmpfs backend requires space_limit"):
            porto.create_volume(None, {"backend": "tmpfs"})

    @pytest.mark.parametrize("backend", ["bind", "rbind"])
    def test_what_is_there(self, porto: Client, backend: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("hello")
        path = porto.create_volume(None, {"backend": backend, "storage": str(tmp_path)}).path
        assert Path(path, "file").read_text() == "hello"
        Path(path, "other").touch()
        porto.unlink_volume(path)
        assert sorted(os.listdir(tmp_path)) == ["file", "other"]
        read_only = {"backend": backend, "storage": str(tmp_path), "read_only": "true"}
        path = porto.create_volume(None, read_only).path
        with pytest.raises(OSError, match="Read-only file system"):
            Path(path, "third").touch()
        with refused(errors.InvalidProperty, f"{backend} backed require storage"):
            porto.create_volume(None, {"backend": backend})

    def test_a_place_of_ones_own(self, porto: Client, tmp_path: Path) -> None:
        path = str(tmp_path / "volume")
        with refused(errors.InvalidProperty, "Dir backend requires path"):
            porto.create_volume(None, {"backend": "dir"})
        os.mkdir(path)
        assert porto.create_volume(path, {"backend": "dir"}).path == path
        Path(path, "file").touch()
        porto.unlink_volume(path)
        assert os.listdir(path) == ["file"]

    def test_layers(self, porto: Client, base_layer: str) -> None:
        path = porto.create_volume(None, {"backend": "overlay", "layers": base_layer}).path
        assert os.path.exists(f"{path}/bin/busybox")
        os.unlink(f"{path}/bin/busybox")
        Path(path, "new").touch()
        other = porto.create_volume(None, {"backend": "overlay", "layers": base_layer}).path
        assert os.path.exists(f"{other}/bin/busybox")
        assert not os.path.exists(f"{other}/new")
        with refused(errors.InvalidProperty, "overlay require layers"):
            porto.create_volume(None, {"backend": "overlay"})
        with pytest.raises(errors.LayerNotFound, match=r"Layer not found .*/porto_layers/nope"):
            porto.create_volume(None, {"backend": "overlay", "layers": "nope"})

    def test_layers_are_the_default_when_there_are_any(self, porto: Client, base_layer: str) -> None:
        assert properties(porto, porto.create_volume(None, {"layers": base_layer}).path)["backend"] == "overlay"

    def test_layers_copied(self, porto: Client, base_layer: str) -> None:
        path = porto.create_volume(None, {"backend": "plain", "layers": base_layer}).path
        assert os.path.exists(f"{path}/bin/busybox")

    def test_read_only_layers(self, porto: Client, base_layer: str) -> None:
        path = porto.create_volume(None, {"layers": base_layer, "read_only": "true"}).path
        with pytest.raises(OSError, match="Read-only file system"):
            Path(path, "new").touch()

    def test_a_storage_that_stays(self, porto: Client, base_layer: str) -> None:
        for _ in range(2):
            path = porto.create_volume(None, {"layers": base_layer, "storage": "kept"}).path
            with open(f"{path}/file", "a") as file:
                file.write("x")
            content = Path(path, "file").read_text()
            with refused(errors.Busy):
                porto.remove_storage("kept")
            porto.unlink_volume(path)
        assert content == "xx"
        assert [storage.name for storage in porto.list_storages()] == ["kept"]

    def test_quotas_of_a_directory(self, porto: Client, base_layer: str, tmp_path: Path) -> None:
        settings = {"backend": "quota", "space_limit": "1M"}
        for path, more, message in (
            (None, {}, "Quota backend requires path"),
            (str(tmp_path), {"space_limit": "0"}, "Quota backend requires space_limit"),
            (str(tmp_path), {"read_only": "true"}, "Quota backed doesn't support read_only"),
            (str(tmp_path), {"storage": "x"}, "Quota backed doesn't support storage"),
            (str(tmp_path), {"layers": base_layer}, "Quota backed doesn't support layers"),
        ):
            with refused(errors.InvalidProperty, message):
                porto.create_volume(path, {**settings, **more})

    def test_none_of_them(self, porto: Client) -> None:
        with refused(errors.NotSupported, "Unknown volume backend: bla"):
            porto.create_volume(None, {"backend": "bla"})

    @pytest.mark.parametrize("backend", ["loop", "lvm", "rbd", "squash"])
    def test_more_of_the_real_one(self, porto: Client, backend: str, embedded: bool) -> None:
        if not embedded:
            pytest.skip("the real one has more")
        with refused(errors.NotSupported, f"the embedded Porto has no volume backend {backend}"):
            porto.create_volume(None, {"backend": backend})


class TestSettings:
    def test_permissions_and_owner(self, porto: Client) -> None:
        path = porto.create_volume(None, {"permissions": "0700", "user": "nobody", "group": "nogroup"}).path
        found = os.stat(path)
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o700, 65534, 65534)

    @pytest.mark.parametrize(
        ("settings", "kind", "message"),
        [
            ({"user": "nosuchuser"}, errors.InvalidValue, "Cannot find user: nosuchuser"),
            ({"permissions": "8"}, errors.InvalidValue, "Bad base-8 value: 8"),
            ({"nope": "x"}, errors.InvalidProperty, "Unknown property: nope"),
            ({"read_only": "bla"}, errors.Unknown, "Bad boolean value: bla"),
            ({"owner_container": "nope"}, errors.ContainerDoesNotExist, "container nope not found"),
            ({"containers": "nope"}, errors.ContainerDoesNotExist, "container nope not found"),
        ],
        ids=str,
    )
    def test_wrong_ones(
        self, porto: Client, settings: dict[str, str], kind: type[errors.PortoError], message: str
    ) -> None:
        with refused(kind, message):
            porto.create_volume(None, settings)
        assert porto.list_volumes() == []

    def test_what_is_told(self, porto: Client, base_layer: str) -> None:
        place = porto.get_property("/", "place").split(";")[0]
        description = porto.create_volume(None, {"layers": base_layer, "private": "own"})
        assert description.path.startswith(f"{place}/porto_volumes/")
        found = properties(porto, description.path)
        expected = {
            "backend": "overlay",
            "layers": base_layer,
            "private": "own",
            "state": "ready",
            "ready": "true",
            "read_only": "false",
            "user": "root",
            "group": "root",
            "permissions": "0775",
            "owner_user": "root",
            "owner_container": "/",
            "creator": "/ root root",
            "place": place,
        }
        assert {name: found[name] for name in expected} == expected
        assert list(description.containers) == ["/"]

    def test_as_a_message(self, porto: Client, base_layer: str) -> None:
        spec = rpc_pb2.TVolumeSpec(backend="overlay", layers=[base_layer], permissions=0o700, private_value="own")
        spec.cred.uid, spec.cred.gid = 5, 6
        made = porto.new_volume(spec)
        assert (made.state, made.backend, made.permissions, made.auto_path) == ("ready", "overlay", 0o700, True)
        assert [link.container for link in made.links] == ["/"]
        found = os.stat(made.path)
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o700, 5, 6)
        assert porto.get_volumes([made.path])[0].id == made.id
        with refused(errors.VolumeNotFound, "Volume /nope not found"):
            porto.list_volumes("/nope")

    def test_directories_and_links_in_it(self, porto: Client, base_layer: str) -> None:
        spec = rpc_pb2.TVolumeSpec(backend="overlay", layers=[base_layer])
        spec.directories.add(path="a/b", permissions=0o700)
        spec.symlinks.add(path="c/d", target_path="/etc/passwd")
        path = porto.new_volume(spec).path
        assert os.stat(f"{path}/a/b").st_mode & 0o7777 == 0o700
        assert os.readlink(f"{path}/c/d") == "/etc/passwd"

    def test_directories_in_a_read_only_one(self, porto: Client, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir(mode=0o700)
        spec = rpc_pb2.TVolumeSpec(backend="bind", storage=str(tmp_path), read_only=True)
        for directory in ("old/new", "old"):
            spec.directories.add(path=directory, permissions=0o750)
        path = porto.new_volume(spec).path
        # What is there stays as it is.
        assert [os.stat(f"{path}/{name}").st_mode & 0o7777 for name in ("old", "old/new")] == [0o700, 0o750]
        memory = rpc_pb2.TVolumeSpec(backend="tmpfs", space=rpc_pb2.TVolumeResource(limit=MIB), read_only=True)
        memory.directories.add(path="new")
        with pytest.raises(errors.Unknown, match=r"Read-only file system: Cannot mkdirat /.*/volume new"):
            porto.new_volume(memory)

    def test_changes(self, porto: Client) -> None:
        path = porto.create_volume(None, {"backend": "tmpfs", "space_limit": "1M"}).path
        porto.tune_volume(path, {"space_limit": "2M"})
        space = os.statvfs(path)
        assert space.f_blocks * space.f_frsize == 2 * MIB
        with pytest.raises(errors.PortoError):
            porto.tune_volume(path, {"backend": "plain"})
        with refused(errors.VolumeNotFound, "Volume /nope not found"):
            porto.tune_volume("/nope", {"space_limit": "1M"})


class TestPaths:
    @pytest.mark.parametrize("content", [[], ["file"]], ids=["empty", "full"])
    def test_one_that_was_chosen(self, porto: Client, tmp_path: Path, content: list[str]) -> None:
        path = tmp_path / "here"
        path.mkdir()
        for name in content:
            (path / name).touch()
        assert porto.create_volume(str(path), {}).path == str(path)
        assert os.listdir(path) == []
        with refused(errors.VolumeAlreadyExists, "Volume already exists"):
            porto.create_volume(str(path), {})
        porto.unlink_volume(str(path))
        assert sorted(os.listdir(path)) == content

    def test_one_that_cant_be(self, porto: Client, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/tmp")
        for path in ("relative", "/", "/etc", f"{tmp_path}/link", f"{tmp_path}/../x"):
            with pytest.raises(errors.PortoError):
                porto.create_volume(path, {})
        assert porto.list_volumes() == []

    def test_one_in_another(self, porto: Client, tmp_path: Path) -> None:
        outer = str(tmp_path / "outer")
        os.mkdir(outer)
        porto.create_volume(outer, {})
        os.mkdir(f"{outer}/inner")
        porto.create_volume(f"{outer}/inner", {})
        assert sorted(volume.path for volume in porto.list_volumes()) == [outer, f"{outer}/inner"]
        porto.unlink_volume(outer)
        assert porto.list_volumes() == []

    def test_nothing_is_left(self, porto: Client, base_layer: str) -> None:
        place = porto.get_property("/", "place").split(";")[0]
        path = porto.create_volume(None, {"layers": base_layer}).path
        start(porto, "a", root=path)
        porto.destroy("a")
        porto.unlink_volume(path)
        assert os.listdir(f"{place}/porto_volumes") == []
        with open("/proc/self/mountinfo") as file:
            assert path not in file.read()
