"""The records by themselves: what another process has done meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shim_porto_runtime.images import digests, service
from shim_porto_runtime.images.model import Document, ImageRecord, Layer
from shim_porto_runtime.images.store import Store

from shim_core import errors
from tests.images.support import MakeNode, Node, entry
from tools import images
from tools.images import File
from tools.registry import LocalRegistry

IMAGE = images.build([images.layer([File("a", b"a")]), images.layer([File("b", b"b")])])
DIFF_IDS = tuple(layer.diff_id for layer in IMAGE.layers)


def open_store(directory: Path) -> Store:
    return Store(directory, lambda _id, _names: False)


def layer(diff_id: str) -> Layer:
    return Layer(diff_id, f"portoshim-{digests.hex_of(diff_id)}", "", 4096, 1, "boot", synced=True)


def add_image(store: Store) -> None:
    store.add_image(
        ImageRecord(IMAGE.id, IMAGE.config, IMAGE.digest, DIFF_IDS, from_file=False),
        [Document(IMAGE.digest, IMAGE.media_type, IMAGE.manifest)],
        {"docker.io/library/a:1": IMAGE.digest},
    )


def test_an_image_whose_layer_was_removed_is_not_added(tmp_path: Path) -> None:
    ours, other = open_store(tmp_path), open_store(tmp_path)
    for diff_id in DIFF_IDS:
        ours.add_layer(layer(diff_id))
    assert other.remove_unreferenced_layer(DIFF_IDS[0])
    with pytest.raises(errors.Aborted, match="removed meanwhile; try again"):
        add_image(ours)
    assert ours.image(IMAGE.id) is None
    assert ours.document(IMAGE.digest) is None
    assert [unused.diff_id for unused in ours.unreferenced_layers()] == [DIFF_IDS[1]]
    ours.add_layer(layer(DIFF_IDS[0]))
    add_image(ours)
    assert list(other.index().images) == [IMAGE.id]
    assert not other.remove_unreferenced_layer(DIFF_IDS[0])
    ours.close()
    other.close()


def test_what_a_failed_pull_left_goes_by_itself(
    make_node: MakeNode, registry: LocalRegistry, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has to happen for it; nor does it matter how long the machine is up."""
    monkeypatch.setattr(service, "_SPARE_S", 0.2)
    images.push(IMAGE, registry, repository)
    node: Node = make_node({"Registries": [entry(registry)]})
    fake = node.fake
    if fake is None:
        pytest.skip("needs a Porto that fails at will")

    def fail_second(name: str) -> None:
        if name.endswith(digests.hex_of(DIFF_IDS[1])):
            wait_until(lambda: DIFF_IDS[0] in node.service._store.layers())
            fake.tar_says = "Cannot open: broken"

    fake.before_import = fail_second
    with pytest.raises(errors.ShimError, match="broken"):
        node.pull(f"{registry.address}/{repository}")
    wait_until(lambda: not node.layer_names())
    assert node.service._store.layers() == {}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
