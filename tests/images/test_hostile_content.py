"""A registry whose documents and layers are made to harm: each is refused and leaves nothing."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard

from tests.images.hostile import HostileRegistry
from tests.images.tars import f, tar
from tests.images.victim import MIB, Victim, image, refused
from tools import images
from tools.images import File

# -- documents ---------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = json.loads(image().manifest)
DIGEST = "sha256:" + "a" * 64


def with_layer(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "layers": [{**GOOD["layers"][0], **changes}]}


@pytest.mark.parametrize(
    ("document", "pattern"),
    [
        ({**GOOD, "manifests": []}, "a manifest and an index at once"),
        ({"schemaVersion": 2, "manifests": [], "config": GOOD["config"]}, "a manifest and an index at once"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1 manifests are not supported"),
        ({**GOOD, "mediaType": images.OCI_INDEX}, "is an image manifest, and is called"),
        ({**GOOD, "mediaType": images.DOCKER_MANIFEST}, "by the server and .* by itself"),
        ({**GOOD, "mediaType": "text/html"}, "is called 'text/html'"),
        ({**GOOD, "config": {**GOOD["config"], "mediaType": "application/vnd.cncf.helm.config.v1+json"}},
         "not a container image"),
        (with_layer(mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "not supported"),
        (with_layer(mediaType="application/x-evil"), "not supported"),
        (with_layer(size=-1), "size is not a number"),
        (with_layer(size="12"), "size is not a number"),
        (with_layer(size=1 << 63), "size is not a number"),
        (with_layer(size=True), "size is not a number"),
        *[(with_layer(digest=digest), "the digest must be sha256:") for digest in
          ("sha256:../../etc/x", "", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 65,
           "md5:" + "a" * 32, "sha256:" + "a" * 63 + "\0", "sha512:" + "a" * 128, None, 7, ["x"])],
        ({**GOOD, "layers": GOOD["layers"] * 300}, "300 entries, and 256 is the limit"),
        ({**GOOD, "layers": {}}, "layers: not a list"),
        ({**GOOD, "layers": [1]}, "not a descriptor"),
        ({**GOOD, "config": None}, "not a descriptor"),
        ({}, "neither a manifest nor an index"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schemaVersion": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)  # fmt: skip
def test_manifests_that_break_a_rule(victim: Victim, hostile: HostileRegistry, document: Any, pattern: str) -> None:
    hostile.put_document(document)
    refused(victim(), hostile, pattern)


@pytest.mark.parametrize("kind", ["v1+json", "v1+prettyjws"])
def test_schema_1_by_its_type(victim: Victim, hostile: HostileRegistry, kind: str) -> None:
    hostile.put_document(GOOD, f"application/vnd.docker.distribution.manifest.{kind}")
    refused(victim(), hostile, "schema 1 manifests are not supported: push the image again")


def test_an_index_of_many(victim: Victim, hostile: HostileRegistry) -> None:
    entry = {"mediaType": images.OCI_MANIFEST, "digest": DIGEST, "size": 1}
    hostile.put_document({"schemaVersion": 2, "manifests": [entry] * 5000}, images.OCI_INDEX)
    refused(victim(), hostile, "5000 entries, and 4096 is the limit")


def test_an_index_in_an_index_in_an_index(victim: Victim, hostile: HostileRegistry) -> None:
    document: Any = images.index([image()])
    hostile.put(document)
    data = document.manifest
    for depth in range(4):
        platform = {"os": "linux", "architecture": images.machine_architecture()}
        inner = {**images.descriptor(data, images.OCI_INDEX), "platform": platform}
        data = json.dumps(
            {"schemaVersion": 2, "mediaType": images.OCI_INDEX, "manifests": [inner], "n": depth}
        ).encode()
        hostile.put_document(data, images.OCI_INDEX)
    refused(victim(), hostile, "nested more than 3 deep")


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (b"{}", "no rootfs"),
        (b'{"rootfs": {"type": "layers", "diff_ids": ["sha256:../x"]}}', "diff_ids: the digest must be"),
        (b'{"rootfs": {"type": "layers", "diff_ids": []}}', "the manifest has 1 layers, and the config 0"),
        (b'{"rootfs": {"type": "layers"}, "config": {"Env": "\\u0000"}}', "not a list of texts"),
        (b'{"rootfs": {"type": "layers"}, "config": {"User": "a\\u0000b"}}', "NUL"),
        (b'{"rootfs": {"type": "layers"}, "config": {"Cmd": [1]}}', "config.Cmd: not a list of texts"),
        (b'{"rootfs": {"type": "layers"}, "config": {"Labels": {"a": 1}}}', "config.Labels"),
        (b'{"rootfs": {"type": "layers"}, "config": []}', "config: not an object"),
        (b"nonsense", "not valid JSON"),
    ],
)
def test_configs_that_break_a_rule(victim: Victim, hostile: HostileRegistry, config: bytes, pattern: str) -> None:
    manifest = {**GOOD, "config": images.descriptor(config, images.OCI_CONFIG)}
    hostile.blobs[images.digest_of(config)] = config
    hostile.blobs |= image().blobs()
    hostile.put_document(manifest)
    refused(victim(), hostile, pattern)


# -- bombs -------------------------------------------------------------------------------------------------------------


def zeros(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(MIB)


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
@pytest.mark.parametrize("where", ["in a file", "after the end", "in a header"])
def test_a_decompression_bomb(victim: Victim, hostile: HostileRegistry, packer: images.Compression, where: str) -> None:
    """A few hundred kilobytes that are 300 MiB: given up at the limit, whatever they are to be."""
    packed = io.BytesIO()
    file: Any = gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) if packer == "gzip" else (
        zstandard.ZstdCompressor(level=1).stream_writer(packed, closefd=False)
    )  # fmt: skip
    with file:
        if where == "after the end":
            file.write(tar([f("small")]))
        else:
            info = f("bomb").info()
            info.size = 300 * MIB
            info.type = b"g" if where == "in a header" else info.type
            file.write(info.tobuf())
        for piece in zeros(300):
            file.write(piece)
    blob = packed.getvalue()
    assert len(blob) < 2 * MIB
    hostile.put(images.build([images.Layer(blob, DIGEST, packer)]))
    node = victim(None, MaxLayerSize="20MiB")
    refused(node, hostile, r"is refused: .*larger than \d+ bytes")
    assert node.layer_names() == set()


def test_a_zstd_window_of_gigabytes(victim: Victim, hostile: HostileRegistry) -> None:
    # Magic, frame header without size, window descriptor: 2^(10+21) = 2 GiB. One raw block, the last one.
    blob = b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00"
    hostile.put(images.build([images.Layer(blob, DIGEST, "zstd")]))
    refused(victim(), hostile, "zstd data are corrupt, or need too much memory")


@pytest.mark.parametrize(
    ("blob", "pattern"),
    [
        (gzip.compress(tar([f("a")]), mtime=0)[:-20], "gzip data end too early|gzip data are corrupt"),
        (b"\x1f\x8b\x08" + b"garbage" * 10, "gzip data are corrupt|gzip data end too early"),
        (b"\x28\xb5\x2f\xfd" + b"garbage" * 10, "zstd data are corrupt"),
        (b"BZh91AY&SY", "packed with bzip2"),
        (b"\xfd7zXZ\x00", "packed with xz"),
        (b"not a tar at all" * 100, "no tar archive"),
    ],
)
def test_layers_that_can_not_be_unpacked(victim: Victim, hostile: HostileRegistry, blob: bytes, pattern: str) -> None:
    hostile.put(images.build([images.Layer(blob, DIGEST, "gzip")]))
    refused(victim(), hostile, pattern)


def test_an_image_larger_than_allowed(victim: Victim, hostile: HostileRegistry) -> None:
    layers = [images.layer([File(f"f{n}", bytes([n]) * 3 * MIB)], "gzip") for n in range(4)]
    hostile.put(images.build(layers))
    refused(victim(None, MaxImageSize="10MiB"), hostile, r"larger than 10485760 bytes \(Images.MaxImageSize\)")


def test_a_layer_that_says_it_is_too_large(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.blobs |= image().blobs()
    hostile.put_document(with_layer(size=1 << 40))
    refused(victim(None, MaxImageSize="4TiB"), hostile, "Images.MaxLayerSize allows")
    refused(victim(), hostile, "Images.MaxImageSize allows")
    assert hostile.requests(GOOD["layers"][0]["digest"]) == []


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip, gzip, gzip, gzip, gzip", "br", "deflate"])
def test_content_encoding_unpacks_nothing(victim: Victim, hostile: HostileRegistry, encoding: str) -> None:
    packed = gzip.compress(bytes(50 * MIB), 9)
    headers = {"Content-Type": images.OCI_MANIFEST, "Content-Encoding": encoding}
    hostile.on("/manifests/", lambda x: x.answer(200, packed, headers))
    refused(victim(), hostile, "not valid JSON")
    assert all(seen.headers["accept-encoding"] == "identity" for seen in hostile.seen)
