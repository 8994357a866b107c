"""Volumes and containers: who holds which, and where they are mounted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import eventually, refused, result, run, shell, spec, start


def holders(porto: Client, path: str) -> list[str]:
    """The containers a volume is linked to."""
    return sorted(next((list(volume.containers) for volume in porto.list_volumes() if volume.path == path), []))


class TestHolding:
    def test_whoever_made_it(self, porto: Client) -> None:
        path = porto.create_volume(None, {}).path
        assert holders(porto, path) == ["/"]
        porto.unlink_volume(path)
        assert porto.list_volumes() == []
        with pytest.raises(errors.VolumeNotFound):
            porto.unlink_volume(path)

    def test_the_last_one_takes_it_along(self, porto: Client) -> None:
        path = porto.create_volume(None, {}).path
        for name in ("a", "b"):
            porto.create(name)
            porto.link_volume(path, name)
        assert porto.get_property("a", "volumes_linked") == path
        porto.unlink_volume(path, "/")
        assert holders(porto, path) == ["a", "b"]
        porto.destroy("a")
        assert holders(porto, path) == ["b"]
        porto.destroy("b")
        assert porto.list_volumes() == []
        assert not os.path.exists(path)

    def test_named_when_it_is_made(self, porto: Client) -> None:
        porto.create("a")
        porto.create("b")
        path = porto.create_volume(None, {"containers": "a;b"}).path
        assert holders(porto, path) == ["a", "b"]
        with refused(errors.Busy):
            porto.unlink_volume(path, "a", strict=True)
        porto.unlink_volume(path, "***")
        assert porto.list_volumes() == []

    def test_in_a_root_that_isnt_there(self, porto: Client) -> None:
        made = rpc_pb2.TVolumeSpec(backend="plain")
        made.links.add(container="a", target="/mnt")
        with refused(errors.Unknown, "No such file or directory: Cannot open /not/there"):
            porto.create_from_spec(spec("a", "true", root="/not/there"), [made])
        assert porto.list_volumes() == []

    def test_errors(self, porto: Client) -> None:
        path = porto.create_volume(None, {}).path
        porto.create("a")
        porto.link_volume(path, "a")
        with refused(errors.VolumeAlreadyLinked, "Volume already linked"):
            porto.link_volume(path, "a")
        with refused(errors.ContainerDoesNotExist, "container nope not found"):
            porto.link_volume(path, "nope")
        with refused(errors.VolumeNotFound, "Volume /nope not found"):
            porto.link_volume("/nope", "a")
        porto.create("b")
        with refused(errors.VolumeNotLinked, f"Container b is not linked with volume {path}"):
            porto.unlink_volume(path, "b")

    def test_owners_of_others(self, porto: Client) -> None:
        porto.create("a")
        path = porto.create_volume(None, {"owner_container": "a"}).path
        assert porto.get_property("a", "volumes_owned") == path

    def test_required_ones_have_to_be_there(self, porto: Client) -> None:
        porto.create_from_spec(spec("a", "true"))
        porto.set_property("a", "volumes_required", "/nope")
        with refused(errors.VolumeNotFound, "Required volume /nope not found"):
            porto.start("a")


@pytest.fixture
def volume(porto: Client) -> str:
    path = porto.create_volume(None, {}).path
    Path(path, "file").write_text("hello\n")
    return path


@pytest.fixture
def inside(porto: Client, root: str) -> Callable[[str], list[str]]:
    """Runs a script in a container ``a`` that has a root of its own."""
    start(porto, "a", root=root)
    return lambda script: run(porto, "a/x", shell(f"{script} 2>&1"), isolate=False).lines


class TestTargets:
    def test_of_a_running_container(self, porto: Client, volume: str, inside: Callable[[str], list[str]]) -> None:
        porto.link_volume(volume, "a", target="/new/here")
        assert inside("cat /new/here/file; touch /new/here/more") == ["hello"]
        assert sorted(os.listdir(volume)) == ["file", "more"]
        assert porto.get_property("a", "volumes_linked").endswith("/new/here /new/here")
        porto.unlink_volume(volume, "a", target="/new/here")
        assert inside("ls /new/here") == []

    def test_read_only(self, porto: Client, volume: str, inside: Callable[[str], list[str]]) -> None:
        porto.link_volume(volume, "a", target="/mnt", read_only=True)
        (found,) = inside("touch /mnt/x")
        assert "Read-only file system" in found

    def test_two_of_one(self, porto: Client, volume: str, inside: Callable[[str], list[str]]) -> None:
        porto.link_volume(volume, "a", target="/mnt")
        porto.link_volume(volume, "a", target="/work")
        assert inside("ls /mnt /work") == ["/mnt:", "file", "", "/work:", "file"]
        with refused(errors.VolumeAlreadyLinked, "Volume already linked"):
            porto.link_volume(volume, "a", target="/mnt")

    def test_they_come_back(self, porto: Client, volume: str, inside: Callable[[str], list[str]]) -> None:
        porto.link_volume(volume, "a", target="/mnt")
        porto.stop("a")
        porto.start("a")
        assert inside("cat /mnt/file") == ["hello"]

    def test_of_a_container_that_doesnt_run_yet(self, porto: Client, root: str, volume: str) -> None:
        porto.create_from_spec(spec("a", ["cat", "/mnt/file"], root=root))
        porto.link_volume(volume, "a", target="/mnt")
        porto.start("a")
        assert result(porto, "a").stdout == "hello\n"

    @pytest.mark.parametrize(("target", "reason"), [("mnt", "must be absolute"), ("/mnt/../x", "must be normalized")])
    def test_bad_paths(
        self, porto: Client, volume: str, inside: Callable[[str], list[str]], target: str, reason: str
    ) -> None:
        with refused(errors.InvalidPath, f"Volume {volume} link path {target} {reason}"):
            porto.link_volume(volume, "a", target=target)

    def test_links_in_the_root_lead_nowhere_else(
        self, porto: Client, root: str, volume: str, inside: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        os.symlink(tmp_path, f"{root}/link")
        try:
            porto.link_volume(volume, "a", target="/link/x")
        except errors.PortoError:
            pass  # to refuse is as good
        assert os.listdir(tmp_path) == []

    def test_it_goes_with_the_container(self, porto: Client, volume: str, inside: Callable[[str], list[str]]) -> None:
        porto.link_volume(volume, "a", target="/mnt")
        porto.unlink_volume(volume, "/")
        porto.destroy("a")
        assert [entry.path for entry in porto.list_volumes() if entry.path == volume] == []


class TestInOneCall:
    """A container and its volumes by CreateFromSpec."""

    def _volume(self, base_layer: str, container: str, **link: object) -> rpc_pb2.TVolumeSpec:
        made = rpc_pb2.TVolumeSpec(backend="overlay", layers=[base_layer])
        made.links.add(container=container, **link)
        return made

    def test_a_root(self, porto: Client, base_layer: str) -> None:
        start(porto, "pod", "")
        volume = self._volume(base_layer, "pod/a", container_root=True)
        porto.create_from_spec(spec("pod/a", ["ls", "/"]), [volume], start=True)
        assert "bin" in result(porto, "pod/a").lines
        (made,) = porto.get_volumes()
        assert porto.get_property("pod/a", "root") == made.path
        assert porto.get_property("pod/a", "root_path") == made.path
        assert [link.container for link in made.links] == ["pod/a"]
        with refused(errors.Busy):
            porto.remove_layer(base_layer)
        porto.destroy("pod/a")
        assert porto.get_volumes() == []

    def test_a_root_and_more(self, porto: Client, base_layer: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("bound\n")
        bind = rpc_pb2.TVolumeSpec(backend="bind", storage=str(tmp_path), read_only=True)
        bind.links.add(container="a", target="/data", read_only=True)
        root = self._volume(base_layer, "a", container_root=True)
        porto.create_from_spec(spec("a", shell("cat /data/file; touch /data/x")), [root, bind], start=True)
        found = result(porto, "a")
        assert found.stdout == "bound\n"
        assert "Read-only file system" in found.stderr
        porto.destroy("a")
        assert porto.get_volumes() == []
        assert os.listdir(tmp_path) == ["file"]

    def test_a_volume_that_cant_be_leaves_nothing(self, porto: Client, base_layer: str) -> None:
        good = self._volume(base_layer, "a", container_root=True)
        bad = rpc_pb2.TVolumeSpec(backend="overlay", layers=["nope"])
        with refused(errors.LayerNotFound):
            porto.create_from_spec(spec("a", "true"), [good, bad], start=True)
        assert porto.list_containers() == []
        eventually(lambda: porto.list_volumes() == [])

    def test_a_start_that_fails_leaves_nothing(self, porto: Client, base_layer: str) -> None:
        volume = self._volume(base_layer, "a", container_root=True)
        with refused(errors.InvalidCommand, "No such file or directory: cannot exec nope"):
            porto.create_from_spec(spec("a", ["nope"]), [volume], start=True)
        assert porto.list_containers() == []
        assert porto.list_volumes() == []

    def test_somebody_elses(self, porto: Client, base_layer: str) -> None:
        with refused(errors.ContainerDoesNotExist, "container nope not found"):
            porto.create_from_spec(spec("a", "true"), [self._volume(base_layer, "nope")], start=True)
        assert porto.list_containers() == []
