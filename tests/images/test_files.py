"""Images from files and to files: what goes out comes back the same, and other tools can read it."""

from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from shim_core import errors, testing
from shim_core.cri.v1 import api_pb2 as pb
from tests.images.support import MakeNode, Node, entry
from tests.images.tars import Item, f, s, tar
from tools import images
from tools.images import File
from tools.registry import LocalRegistry

NAME = "registry.example.org/team/app:1.0"


def app(text: str = "hello", *, docker: bool = False, architecture: str | None = None) -> images.Image:
    compression: images.Compression = "gzip" if docker else "zstd"
    layers = [images.layer([File("base", b"base" * 1000)]), images.layer([File("app", text.encode())], compression)]
    return images.build(layers, {"Cmd": ["/app"], "User": "1000"}, docker=docker, architecture=architecture)


def load(node: Node, path: Path) -> list[str]:
    return [image.id for image in node.service.load(path, testing.context())]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        files = {info.name: archive.extractfile(info) for info in archive if info.isreg()}
        return {name: file.read() for name, file in files.items() if file is not None}


# -- loading -----------------------------------------------------------------------------------------------------------


def test_an_oci_archive(make_node: MakeNode, tmp_path: Path) -> None:
    image = app()
    images.write_oci_archive(tmp_path / "a.tar", {NAME: image})
    node = make_node()
    assert load(node, tmp_path / "a.tar") == [image.id]
    found = node.service.resolve(NAME)
    assert found is not None
    assert found.repo_tags == (NAME,)
    assert found.repo_digests == (f"registry.example.org/team/app@{image.digest}",)
    assert (node.layer_dir(found, 1) / "app").read_text() == "hello"
    assert node.temporary_files() == []


def test_a_docker_archive(make_node: MakeNode, tmp_path: Path) -> None:
    image = app()
    images.write_docker_archive(tmp_path / "d.tar", {"busybox:1.36": image})
    node = make_node()
    assert load(node, tmp_path / "d.tar") == [image.id]
    found = node.service.resolve("busybox:1.36")
    assert found is not None
    assert found.repo_tags == ("docker.io/library/busybox:1.36",)
    assert found.repo_digests == ()
    assert found.config.user == "1000"


@pytest.mark.parametrize("kind", ["oci", "docker"])
def test_a_packed_archive(make_node: MakeNode, tmp_path: Path, kind: str) -> None:
    write = images.write_oci_archive if kind == "oci" else images.write_docker_archive
    write(tmp_path / "a.tar", {NAME: app()})
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert load(make_node(), tmp_path / "a.tar.gz") == [app().id]


def test_several_images_and_an_index(make_node: MakeNode, tmp_path: Path) -> None:
    index = images.index([app("s390x", architecture="s390x"), app("ours"), app("mips", architecture="mips")])
    images.write_oci_archive(tmp_path / "a.tar", {NAME: index, "busybox": app("other")})
    node = make_node()
    assert load(node, tmp_path / "a.tar") == [app("ours").id, app("other").id]
    found = node.service.resolve(f"registry.example.org/team/app@{index.digest}")
    assert found is not None
    assert found.repo_tags == (NAME,)


def test_layers_that_are_links_in_a_docker_archive(make_node: MakeNode, tmp_path: Path) -> None:
    layer = images.layer([File("a", b"a")])
    image = images.build([layer])
    config = f"{image.id[7:]}.json"
    listed = [{"Config": config, "RepoTags": None, "Layers": ["two/layer.tar"]}]
    items = [
        Item("one/layer.tar", data=images.decompress(layer)), s("two/layer.tar", "../one/layer.tar"),
        Item(config, data=image.config), f("manifest.json", json.dumps(listed)),
    ]  # fmt: skip
    (tmp_path / "d.tar").write_bytes(tar(items))
    node = make_node()
    assert load(node, tmp_path / "d.tar") == [image.id]
    assert node.service.resolve(image.id) is not None


def test_the_daemon_sees_what_another_process_loads(make_node: MakeNode, tmp_path: Path) -> None:
    images.write_oci_archive(tmp_path / "a.tar", {NAME: app()})
    daemon = make_node()
    assert daemon.service.resolve(NAME) is None
    other = make_node()  # the same state directory
    load(other, tmp_path / "a.tar")
    assert daemon.service.resolve(NAME) is not None


def test_loading_twice_changes_nothing(make_node: MakeNode, tmp_path: Path) -> None:
    images.write_oci_archive(tmp_path / "a.tar", {NAME: app()})
    node = make_node()
    load(node, tmp_path / "a.tar")
    before = node.service.resolve(NAME)
    load(node, tmp_path / "a.tar")
    assert node.service.resolve(NAME) == before


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["manifest", "config", "layer"])
@pytest.mark.parametrize("what", ["changed", "missing"])
def test_a_damaged_oci_archive(make_node: MakeNode, tmp_path: Path, part: str, what: str) -> None:
    image = app()
    images.write_oci_archive(tmp_path / "good.tar", {NAME: image})
    digest = {"manifest": image.digest, "config": image.id, "layer": image.layers[1].digest}[part]
    files = members(tmp_path / "good.tar")
    name = f"blobs/sha256/{digest[7:]}"
    if what == "missing":
        del files[name]
    else:
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    (tmp_path / "bad.tar").write_bytes(tar([Item(path, data=data) for path, data in files.items()]))
    node = make_node()
    with pytest.raises(errors.ShimError, match=r"is missing in it|^SignatureValidationFailed: "):
        load(node, tmp_path / "bad.tar")
    assert node.service.resolve(NAME) is None
    assert node.temporary_files() == []


def test_a_docker_archive_whose_layer_is_another(make_node: MakeNode, tmp_path: Path) -> None:
    images.write_docker_archive(tmp_path / "good.tar", {NAME: app()})
    files = members(tmp_path / "good.tar")
    name = next(name for name in files if name.endswith("layer.tar"))
    files[name] = tar([f("evil")])
    (tmp_path / "bad.tar").write_bytes(tar([Item(path, data=data) for path, data in files.items()]))
    node = make_node()
    with pytest.raises(errors.UnknownError, match=r"^SignatureValidationFailed: the config says that a layer is"):
        load(node, tmp_path / "bad.tar")
    assert node.service.resolve(NAME) is None


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is no tar archive"),
        (b"no tar" * 200, "is no tar archive"),
        (gzip.compress(b"x" * 5000, mtime=0), "is no tar archive"),
        (b"BZh91AY&SY", "packed with bzip2"),
        (tar([f("some", "file")]), "neither an OCI archive"),
        (tar([f("oci-layout", "{}"), f("index.json", "[]")]), "not a JSON object"),
        (tar([f("oci-layout", "{}"), f("index.json", "{}")]), "lists no images"),
        (tar([f("oci-layout", "{}"), f("index.json", '{"manifests": [{"digest": "sha256:../x"}]}')]), "index.json: "),
        (tar([f("manifest.json", "{")]), "not valid JSON"),
        (tar([f("manifest.json", "[{}]")]), "manifest.json is malformed"),
        (tar([f("manifest.json", '[{"Config": "/etc/passwd", "Layers": []}]')]), "etc/passwd is missing in it"),
        (tar([s("manifest.json", "manifest.json")]), "neither an OCI archive"),
        (tar([s("manifest.json", "/etc/passwd")]), "neither an OCI archive"),
    ],
)
def test_files_that_are_something_else(make_node: MakeNode, tmp_path: Path, content: bytes, pattern: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(errors.InvalidArgument, match=pattern):
        load(make_node(), tmp_path / "x")


def test_a_file_that_is_not_there(make_node: MakeNode, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"none: can't be read: No such file"):
        load(make_node(), tmp_path / "none")


# -- saving ------------------------------------------------------------------------------------------------------------


def save(node: Node, path: Path, *names: str, docker: bool = False) -> None:
    node.service.save(names, path, testing.context(), docker=docker)


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
def test_what_was_loaded_can_be_saved_without_a_registry(make_node: MakeNode, tmp_path: Path, docker: bool) -> None:
    images.write_oci_archive(tmp_path / "in.tar", {NAME: app()})
    first = make_node(state="first")
    load(first, tmp_path / "in.tar")
    save(first, tmp_path / "out.tar", NAME, docker=docker)
    second = make_node(state="second")
    assert load(second, tmp_path / "out.tar") == [app().id]
    one, two = first.service.resolve(NAME), second.service.resolve(NAME)
    assert one is not None
    assert two is not None
    assert (one.repo_tags, one.diff_ids, one.config) == (two.repo_tags, two.diff_ids, two.config)
    if not docker:
        assert one.repo_digests == two.repo_digests
        assert {k: v for k, v in members(tmp_path / "in.tar").items() if k.startswith("blobs")} == {
            k: v for k, v in members(tmp_path / "out.tar").items() if k.startswith("blobs")
        }
    assert (tmp_path / "out.tar").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_layers_are_fetched_again_for_saving(
    make_node: MakeNode, registry: LocalRegistry, repository: str, tmp_path: Path
) -> None:
    index = images.index([app("other", architecture="s390x"), app()])
    images.push(index, registry, repository, ["1"])
    name = f"{registry.address}/{repository}:1"
    node = make_node({"Registries": [entry(registry)]})
    node.pull(name)
    assert list((node.state_dir / "images" / "blobs").iterdir()) == []
    save(node, tmp_path / "out.tar", name)
    offline = make_node(state="offline")
    load(offline, tmp_path / "out.tar")
    found = offline.service.resolve(f"{registry.address}/{repository}@{index.digest}")
    assert found is not None
    assert found.id == app().id


def test_blobs_can_be_kept(make_node: MakeNode, registry: LocalRegistry, repository: str, tmp_path: Path) -> None:
    images.push(app(), registry, repository, ["1"])
    name = f"{registry.address}/{repository}:1"
    node = make_node({"Registries": [entry(registry)], "KeepBlobs": "all"})
    node.pull(name)
    node.service.close()
    again = make_node()  # it doesn't know the registry's CA any more
    save(again, tmp_path / "out.tar", name)
    found = again.service.resolve(name)
    assert found is not None
    assert sum(path.stat().st_size for path in (again.state_dir / "images" / "blobs").iterdir()) > 0
    again.service.remove_image(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)), testing.context())
    assert list((again.state_dir / "images" / "blobs").iterdir()) == []


def test_what_can_not_be_saved(make_node: MakeNode, tmp_path: Path) -> None:
    images.write_docker_archive(tmp_path / "in.tar", {NAME: app()})
    node = make_node({"KeepBlobs": "none"})
    load(node, tmp_path / "in.tar")
    with pytest.raises(errors.NotFound, match="nothing: no such image"):
        save(node, tmp_path / "out.tar", "nothing")
    with pytest.raises(errors.UnknownError, match=r"^RegistryUnavailable: registry\.example\.org/team/app"):
        save(node, tmp_path / "out.tar", NAME)
    with pytest.raises(errors.ResourceExhausted, match="can't be written: No such file"):
        save(node, tmp_path / "none" / "out.tar", NAME)
    assert not (tmp_path / "out.tar").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
def test_skopeo_reads_what_we_write(make_node: MakeNode, tmp_path: Path, docker: bool) -> None:
    images.write_oci_archive(tmp_path / "in.tar", {NAME: app()})
    node = make_node()
    load(node, tmp_path / "in.tar")
    save(node, tmp_path / "out.tar", NAME, docker=docker)
    kind = "docker-archive" if docker else "oci-archive"
    subprocess.run(
        ["skopeo", "copy", "-q", f"{kind}:{tmp_path}/out.tar", f"oci:{tmp_path}/layout:x"], check=True, timeout=60
    )
    inspected = subprocess.run(
        ["skopeo", "inspect", "--config", "--raw", f"{kind}:{tmp_path}/out.tar"], check=True, capture_output=True
    )
    assert images.digest_of(inspected.stdout) == app().id


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_we_read_what_skopeo_writes(make_node: MakeNode, tmp_path: Path, kind: str) -> None:
    image = app(docker=True) if kind == "docker-archive" else app()
    images.write_oci_archive(tmp_path / "in.tar", {NAME: image})
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci-archive:{tmp_path}/in.tar", f"{kind}:{tmp_path}/out.tar:{NAME}"],
        check=True,
        timeout=60,
    )
    node = make_node()
    assert len(load(node, tmp_path / "out.tar")) == 1
    found = node.service.resolve(NAME)
    assert found is not None
    assert (node.layer_dir(found, 1) / "app").read_text() == "hello"
