"""The CRI's six image calls, and the store behind them: lists, names, removal, space, and what survives a crash."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from shim_porto_runtime.images import ImageService, ImageSettings

from porto_api import Client
from shim_core import errors, testing
from shim_core.cri.v1 import api_pb2 as pb
from tests.images.support import MakeNode, Node, entry
from tools import images
from tools.images import File
from tools.registry import LocalRegistry

BASE = images.layer([File("base", b"b" * 10_000)])


def app(text: str, **config: object) -> images.Image:
    """An image of two layers, the lower one shared by all."""
    return images.build([BASE, images.layer([File("app", text.encode())])], config)


def spec(name: str) -> pb.ImageSpec:
    return pb.ImageSpec(image=name)


def remove(node: Node, name: str) -> None:
    node.service.remove_image(pb.RemoveImageRequest(image=spec(name)), testing.context())


def status(node: Node, name: str, *, verbose: bool = False) -> pb.ImageStatusResponse:
    return node.service.image_status(pb.ImageStatusRequest(image=spec(name), verbose=verbose), testing.context())


def listed(node: Node, name: str = "") -> list[pb.Image]:
    request = pb.ListImagesRequest()
    if name:
        request.filter.image.image = name
    return list(node.service.list_images(request, testing.context()).images)


# -- names and fields --------------------------------------------------------------------------------------------------


def test_pull_status_list_agree(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = app("x", User="1000", Entrypoint=["/x"])
    images.push(image, registry, repository, ["1"])
    name = f"{registry.address}/{repository}:1"
    request = pb.PullImageRequest(image=spec(name))
    assert node.service.pull_image(request, testing.context()).image_ref == image.id
    found = status(node, name).image
    assert found.id == image.id
    assert list(found.repo_tags) == [name]
    assert list(found.repo_digests) == [f"{registry.address}/{repository}@{image.digest}"]
    assert found.size >= 10_000
    assert (found.uid.value, found.HasField("uid"), found.username) == (1000, True, "")
    assert found.spec.image == image.id
    assert not found.pinned
    assert listed(node) == [found]
    for other in (image.id, image.id[7:], image.id[:20], f"{registry.address}/{repository}@{image.digest}"):
        assert status(node, other).image == found
        assert listed(node, other) == [found]


def test_what_is_not_there_is_no_error(node: Node) -> None:
    for name in ("nothing", "sha256:" + "0" * 64, "0" * 64, "NOT A NAME", "../../etc", "*", "***", "."):
        assert not status(node, name).HasField("image")
        assert listed(node, name) == []
        remove(node, name)
    with pytest.raises(errors.InvalidArgument, match="image: must not be empty"):
        status(node, "")
    with pytest.raises(errors.InvalidArgument, match="image: must not be empty"):
        remove(node, "")


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [("", 0, ""), ("0", 0, ""), ("1000", 1000, ""), ("1000:2000", 1000, ""), ("www", None, "www"),
     ("www:web", None, "www"), ("2147483647", 2147483647, ""), ("2147483648", None, "2147483648"),
     ("4294967296", None, "4294967296"), ("-1", None, "-1"), ("99999999999999999999", None, "99999999999999999999"),
     ("1e3", None, "1e3"), (":5", 0, "")],
)  # fmt: skip
def test_users(node: Node, registry: LocalRegistry, repository: str, user: str, uid: int | None, username: str) -> None:
    images.push(app("x", User=user), registry, repository)
    node.pull(f"{registry.address}/{repository}")
    found = status(node, f"{registry.address}/{repository}").image
    assert (found.uid.value if found.HasField("uid") else None, found.username) == (uid, username)


def test_verbose_status(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = app("x", Labels={"a": "b"})
    images.push(image, registry, repository)
    node.pull(f"{registry.address}/{repository}")
    info = json.loads(status(node, image.id, verbose=True).info["info"])
    assert info["imageSpec"] == json.loads(image.config)
    assert [layer["diffID"] for layer in info["layers"]] == [layer.diff_id for layer in image.layers]
    assert not status(node, image.id).info


def test_a_short_id_has_twelve_digits_and_one_meaning(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = app("x")
    images.push(image, registry, repository)
    node.pull(f"{registry.address}/{repository}")
    assert status(node, image.id[7:19]).image.id == image.id
    assert not status(node, image.id[7:18]).HasField("image")


@pytest.mark.parametrize(
    ("pinned", "expected"),
    [([], False), (["{name}:1"], True), (["{name}"], True), (["{registry}/*"], True), (["*"], True),
     (["{registry}/other*"], False), (["{id}"], True), (["docker.io/*"], False)],
)  # fmt: skip
def test_pinned(
    make_node: MakeNode, registry: LocalRegistry, repository: str, pinned: list[str], expected: bool
) -> None:
    image = app("x")
    images.push(image, registry, repository, ["1"])
    name = f"{registry.address}/{repository}"
    words = {"name": name, "registry": registry.address, "id": image.id}
    node = make_node({"Registries": [entry(registry)], "Pinned": [pattern.format(**words) for pattern in pinned]})
    node.pull(f"{name}:1")
    assert status(node, image.id).image.pinned is expected


def test_the_pause_image_is_pinned(make_node: MakeNode, registry: LocalRegistry, repository: str) -> None:
    images.push(images.pause(), registry, repository, ["3.7"])
    name = f"{registry.address}/{repository}:3.7"
    node = make_node({"Registries": [entry(registry)], "PauseImage": name})
    assert node.service.ensure(name, testing.context()).pinned
    asked = registry.requests("GET", repository)
    assert node.service.ensure(name, testing.context()).pinned
    assert registry.requests("GET", repository) == asked


def test_streaming_sends_each_image_once(
    node: Node, registry: LocalRegistry, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        images.push(app(str(number)), registry, repository, [str(number)])
        node.pull(f"{registry.address}/{repository}:{number}")
    monkeypatch.setattr("shim_porto_runtime.images.service._STREAM_BYTES", 600)
    batches = list(node.service.stream_images(pb.StreamImagesRequest(), testing.context()))
    assert len(batches) > 1
    assert all(batch.images for batch in batches)
    assert [image for batch in batches for image in batch.images] == listed(node)


# -- removal -----------------------------------------------------------------------------------------------------------


def test_removing_drops_all_tags_and_what_nobody_shares(node: Node, registry: LocalRegistry, repository: str) -> None:
    first, second = app("first"), app("second")
    images.push(first, registry, repository, ["1", "one"])
    images.push(second, registry, repository, ["2"])
    name = f"{registry.address}/{repository}"
    one = node.pull(f"{name}:1")
    node.pull(f"{name}:one")
    two = node.pull(f"{name}:2")
    remove(node, f"{name}:one")
    assert listed(node) == [status(node, two.id).image]
    assert not status(node, f"{name}:1").HasField("image")
    assert node.layer_names() == set(two.layers)
    remove(node, two.id)
    remove(node, two.id)
    assert listed(node) == []
    assert node.layer_names() == set()
    assert node.service._store.index().used_bytes == 0
    assert one.id != two.id


def test_a_layer_in_use_stays(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(app("used"), registry, repository)
    name = f"{registry.address}/{repository}"
    image = node.pull(name)
    node.layers_in_use.add(image.layers[0])
    remove(node, name)
    assert listed(node) == []
    assert node.layer_names() == {image.layers[0]}
    # Pulled again while it is still used: the same layer serves.
    again = node.pull(name)
    assert again.layers == image.layers
    remove(node, name)
    node.layers_in_use.clear()
    remove(node, "anything")
    assert node.layer_names() == set()


def test_a_layer_that_porto_finds_in_use_stays(node: Node, registry: LocalRegistry, repository: str) -> None:
    if node.fake is None:
        pytest.skip("needs the fake Porto")
    images.push(app("busy"), registry, repository)
    image = node.pull(f"{registry.address}/{repository}")
    node.fake.busy.add(image.layers[0])
    remove(node, image.id)
    assert node.layer_names() == {image.layers[0]}
    node.fake.busy.clear()
    remove(node, "anything")
    assert node.layer_names() == set()


def test_a_leased_layer_stays(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(app("leased"), registry, repository)
    image = node.pull(f"{registry.address}/{repository}")
    with node.service.lease(image):
        remove(node, image.id)
        assert node.layer_names() == set(image.layers)
    remove(node, "anything")
    assert node.layer_names() == set()


def test_parallel_removals(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(app("parallel"), registry, repository)
    image = node.pull(f"{registry.address}/{repository}")
    threads = [threading.Thread(target=remove, args=(node, image.id)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.layer_names() == set()


# -- space -------------------------------------------------------------------------------------------------------------


def test_used_bytes_count_shared_layers_once(node: Node, registry: LocalRegistry, repository: str) -> None:
    def used() -> tuple[int, int]:
        response = node.service.image_fs_info(pb.ImageFsInfoRequest(), testing.context())
        (filesystem,) = response.image_filesystems
        assert Path(filesystem.fs_id.mountpoint).is_dir()
        assert abs(filesystem.timestamp - time.time_ns()) < 60e9
        return filesystem.used_bytes.value, filesystem.inodes_used.value

    assert used() == (0, 0)
    for number in (1, 2):
        images.push(app(str(number)), registry, repository, [str(number)])
    node.pull(f"{registry.address}/{repository}:1")
    first_bytes, first_inodes = used()
    # Two directories, a file of three blocks, one of one.
    assert (first_bytes, first_inodes) == (4096 * 6, 4)
    node.pull(f"{registry.address}/{repository}:2")
    assert used() == (first_bytes + 4096 * 2, first_inodes + 2)


def test_container_filesystems_come_from_the_runtime(tmp_path: Path) -> None:
    own = pb.FilesystemUsage(timestamp=7, fs_id=pb.FilesystemIdentifier(mountpoint="/x"))
    service = ImageService(
        Client(str(tmp_path / "nothing")), testing.manager().hook, ImageSettings.model_validate({}), lambda: (),
        state_dir=tmp_path, container_filesystems=lambda: [own],
    )  # fmt: skip
    service.start()
    try:
        response = service.image_fs_info(pb.ImageFsInfoRequest(), testing.context())
        assert list(response.container_filesystems) == [own]
    finally:
        service.close()


# -- what outlives a process -------------------------------------------------------------------------------------------


def test_images_outlive_a_restart(make_node: MakeNode, registry: LocalRegistry, repository: str) -> None:
    images.push(app("kept"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    assert make_node().service.resolve(f"{registry.address}/{repository}") == image


def test_nothing_of_ours_is_open_to_others(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(app("private"), registry, repository)
    node.pull(f"{registry.address}/{repository}")
    assert [path for path in (node.state_dir / "images").rglob("*") if path.stat().st_mode & 0o077] == [
        path for path in (node.state_dir / "images").glob("images.db-*") if path.stat().st_mode & 0o077
    ]
    assert (node.state_dir / "images").stat().st_mode & 0o777 == 0o700


def test_a_layer_that_nobody_recorded_is_not_used(
    make_node: MakeNode, registry: LocalRegistry, repository: str
) -> None:
    """What a crash between Porto's import and our record leaves: it may be anything."""
    images.push(app("stray"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    with sqlite3.connect(first.state_dir / "images" / "images.db") as db:
        db.execute("DELETE FROM layers")
        db.execute("DELETE FROM images")
    db.close()
    (first.layer_dir(image, 1) / "app").write_text("half done")
    second = make_node({"Registries": [entry(registry)]})
    assert second.layer_names() == set()
    again = second.pull(f"{registry.address}/{repository}")
    assert (second.layer_dir(again, 1) / "app").read_text() == "stray"


def test_a_stray_that_appears_later_is_replaced(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = app("late stray")
    images.push(image, registry, repository)
    name = f"portoshim-{image.layers[1].diff_id[7:]}"
    private = f"portoshim {node.service._store.instance}"
    empty = node.state_dir / "empty.tar"
    empty.write_bytes(bytes(10240))
    node.client.import_layer(name, str(empty), private_value=private, compress="tar")
    pulled = node.pull(f"{registry.address}/{repository}")
    assert (node.layer_dir(pulled, 1) / "app").read_text() == "late stray"


def test_a_layer_of_somebody_else_is_left_alone(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = app("not mine")
    images.push(image, registry, repository)
    name = f"portoshim-{image.layers[1].diff_id[7:]}"
    empty = node.state_dir / "empty.tar"
    empty.write_bytes(bytes(10240))
    node.client.import_layer(name, str(empty), private_value="mine", compress="tar")
    pulled = node.pull(f"{registry.address}/{repository}")
    assert pulled.layers[0] == f"{name}.{node.service._store.instance}"
    remove(node, pulled.id)
    assert node.layer_names() == {name}
    node.client.remove_layer(name)


def test_any_number_of_shims_share_a_place(make_node: MakeNode, registry: LocalRegistry, repository: str) -> None:
    """Earlier ones whose state is gone are such shims as well."""
    images.push(app("shared"), registry, repository)
    shims = [make_node({"Registries": [entry(registry)]}, state=f"shim-{number}") for number in range(11)]
    pulled = [shim.pull(f"{registry.address}/{repository}") for shim in shims]
    assert len({image.layers[0] for image in pulled}) == 11


def test_a_layer_that_porto_has_lost(make_node: MakeNode, registry: LocalRegistry, repository: str) -> None:
    images.push(app("lost"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    first.client.remove_layer(image.layers[0])
    second = make_node({"Registries": [entry(registry)]})
    assert second.service.resolve(image.id) is None
    assert second.pull(f"{registry.address}/{repository}").id == image.id


def test_after_a_power_cut_what_was_not_on_disk_is_pulled_again(
    make_node: MakeNode, registry: LocalRegistry, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.push(app("unsure"), registry, repository)
    monkeypatch.setattr("shim_porto_runtime.images.layers.Layers.sync", lambda *_: None)
    first = make_node({"Registries": [entry(registry)]})
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    monkeypatch.undo()
    (first.layer_dir(image, 1) / "app").write_text(
        ""
    )  # as ext4 leaves files that were renamed before they were written
    assert make_node().service.resolve(image.id) is not None  # the machine was up all the time
    monkeypatch.setattr("shim_porto_runtime.images.layers.boot_id", lambda: "another boot")
    second = make_node({"Registries": [entry(registry)]}, state="state")
    assert second.service.resolve(image.id) is None
    again = second.pull(f"{registry.address}/{repository}")
    assert (second.layer_dir(again, 1) / "app").read_text() == "unsure"


def test_what_reached_the_disk_outlives_a_power_cut(
    make_node: MakeNode, registry: LocalRegistry, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.push(app("sure"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    monkeypatch.setattr("shim_porto_runtime.images.layers.boot_id", lambda: "another boot")
    assert make_node().service.resolve(image.id) == image


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other version"])
def test_a_broken_database_is_set_aside(
    make_node: MakeNode, registry: LocalRegistry, repository: str, damage: str
) -> None:
    images.push(app("db"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    path = first.state_dir / "images" / "images.db"
    if damage == "other version":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    else:
        data = path.read_bytes()
        path.write_bytes({"truncated": data[:5000], "garbage": b"x" * len(data), "empty": b""}[damage])
    second = make_node({"Registries": [entry(registry)]})
    assert second.service.resolve(image.id) is None
    assert second.layer_names() == set()
    assert second.pull(f"{registry.address}/{repository}").id == image.id


def test_portod_may_be_away_at_the_start(make_node: MakeNode, registry: LocalRegistry, repository: str) -> None:
    images.push(app("away"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    if first.fake is None:
        pytest.skip("needs the fake Porto")
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    stray = first.fake.layers_dir / "portoshim-stray"
    stray.mkdir()
    first.fake.private["portoshim-stray"] = f"portoshim {first.service._store.instance}"
    first.fake.stop()
    second = make_node({"Registries": [entry(registry)]})
    assert second.service.resolve(image.id) == image
    images.push(app("away, too"), registry, repository, ["2"])
    with pytest.raises(errors.Unavailable, match="importing layer sha256:"):
        second.pull(f"{registry.address}/{repository}:2")
    first.fake.start()
    second.pull(f"{registry.address}/{repository}:2")
    assert not stray.exists()  # what the start could not do was done then


def test_another_place_means_another_pull(
    make_node: MakeNode, registry: LocalRegistry, repository: str, tmp_path: Path
) -> None:
    images.push(app("moved"), registry, repository)
    first = make_node({"Registries": [entry(registry)]})
    if first.fake is None:
        pytest.skip("needs the fake Porto, which has one place for all names")
    image = first.pull(f"{registry.address}/{repository}")
    first.service.close()
    second = make_node({"Registries": [entry(registry)], "Place": str(tmp_path / "elsewhere")})
    assert second.service.resolve(image.id) is None
    assert second.layer_names() == set()


def test_no_space_for_records(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = app("full", Labels={"large": "x" * 200_000})
    images.push(image, registry, repository)
    node.service._store._db.execute("PRAGMA max_page_count = 1")  # as many as there are
    with pytest.raises(errors.ResourceExhausted, match=r"images\.db: database or disk is full"):
        node.pull(f"{registry.address}/{repository}")
    node.service._store._db.execute("PRAGMA max_page_count = 1000000")
    assert node.pull(f"{registry.address}/{repository}").id == image.id


@pytest.mark.parametrize(
    ("said", "error", "pattern"),
    [
        (
            "tar: f: Cannot write: No space left on device",
            errors.ResourceExhausted,
            "Porto: no space left in the place",
        ),
        ("tar: f: Cannot open: Disk quota exceeded", errors.ResourceExhausted, "Porto: no space left in the place"),
        ("tar: something else", errors.Internal, "importing layer sha256:.*: Porto: Unknown: .*something else"),
    ],
)
def test_porto_can_not_unpack(
    node: Node, registry: LocalRegistry, repository: str, said: str, error: type[errors.ShimError], pattern: str
) -> None:
    if node.fake is None:
        pytest.skip("needs the fake Porto")
    images.push(app("full place"), registry, repository)
    node.fake.tar_says = said
    with pytest.raises(error, match=pattern):
        node.pull(f"{registry.address}/{repository}")
    assert node.temporary_files() == []
    node.fake.tar_says = ""
    assert node.pull(f"{registry.address}/{repository}").id == app("full place").id
