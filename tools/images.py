"""Small container images, made on the spot: no download, no Docker, no build daemon.

::

    image = images.busybox()
    images.push(image, registry, "library/busybox", ["latest"])
    images.write_oci_archive("busybox.tar", {"docker.io/library/busybox:latest": image})

An image is a list of layers (files in a tar, compressed) and a config. :func:`build` makes one of any layers; the
ready-made ones below are what demo, benchmark and tests use.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tools.registry import LocalRegistry

Compression = Literal["none", "gzip", "zstd"]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

BUSYBOX = Path("/bin/busybox")
MTIME = 1_700_000_000

_SUFFIX: dict[str, dict[Compression, str]] = {
    OCI_LAYER: {"none": "", "gzip": "+gzip", "zstd": "+zstd"},
    DOCKER_LAYER: {"none": "", "gzip": ".gzip", "zstd": ".zstd"},
}


# -- the parts of an image ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class File:
    """An entry of a layer. Without ``data``, ``link`` and ``hard_link`` it is a directory."""

    path: str
    data: bytes | None = None
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    link: str | None = None
    """The target of a symbolic link."""
    hard_link: str | None = None
    """The path of an earlier entry of the layer, which this one is another name of."""
    pax: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> tarfile.TarInfo:
        """The entry as tar has it."""
        info = tarfile.TarInfo(self.path)
        info.uid, info.gid, info.mtime = self.uid, self.gid, MTIME
        info.pax_headers = dict(self.pax)
        if self.link is not None:
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, self.link, 0o777
        elif self.hard_link is not None:
            info.type, info.linkname = tarfile.LNKTYPE, self.hard_link
            info.mode = 0o644 if self.mode is None else self.mode
        elif self.data is not None:
            info.size, info.mode = len(self.data), 0o644 if self.mode is None else self.mode
        else:
            info.type, info.mode = tarfile.DIRTYPE, 0o755 if self.mode is None else self.mode
        return info


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer, ready to be pushed."""

    blob: bytes = field(repr=False)
    diff_id: str
    compression: Compression

    @property
    def digest(self) -> str:
        return digest_of(self.blob)


@dataclass(frozen=True, slots=True)
class Image:
    """An image for one platform: a manifest and what it refers to."""

    manifest: bytes
    media_type: str
    config: bytes
    layers: tuple[Layer, ...] = field(repr=False)

    @property
    def id(self) -> str:
        """The config's digest: what the CRI calls the image's id."""
        return digest_of(self.config)

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return digest_of(self.manifest)

    def blobs(self) -> dict[str, bytes]:
        """Config and layers by digest."""
        return {self.id: self.config} | {layer.digest: layer.blob for layer in self.layers}

    def manifests(self) -> list[tuple[bytes, str]]:
        """Documents to be put into the registry, each with its media type, the image's own last."""
        return [(self.manifest, self.media_type)]


@dataclass(frozen=True, slots=True)
class Index:
    """One image for several platforms."""

    manifest: bytes
    media_type: str
    images: tuple[Image, ...] = field(repr=False)

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    def blobs(self) -> dict[str, bytes]:
        """Configs and layers of all platforms by digest."""
        return {digest: blob for image in self.images for digest, blob in image.blobs().items()}

    def manifests(self) -> list[tuple[bytes, str]]:
        """As :meth:`Image.manifests`."""
        return [(image.manifest, image.media_type) for image in self.images] + [(self.manifest, self.media_type)]


def digest_of(data: bytes) -> str:
    """``sha256:...`` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def pack(files: Iterable[File]) -> bytes:
    """An uncompressed tar of some files, the same for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            tar.addfile(file.header(), io.BytesIO(file.data or b""))
    return buffer.getvalue()


def layer(files: Iterable[File], compression: Compression = "gzip") -> Layer:
    """A layer of some files."""
    return layer_of_tar(pack(files), compression)


def layer_of_tar(tar: bytes, compression: Compression = "gzip") -> Layer:
    """A layer of a tar that exists already, whatever is in it."""
    return Layer(compress(tar, compression), digest_of(tar), compression)


def compress(data: bytes, compression: Compression) -> bytes:
    """The same bytes for the same data."""
    if compression == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress(data)
    return data


def build(
    layers: Sequence[Layer],
    config: Mapping[str, Any] | None = None,
    *,
    architecture: str | None = None,
    variant: str = "",
    system: str = "linux",
    docker: bool = False,
    annotations: Mapping[str, str] | None = None,
) -> Image:
    """An image of layers, the lowest first.

    :param config: the OCI config's own ``config``: ``Entrypoint``, ``Cmd``, ``Env``, ``User``, ...
    :param architecture: this machine's when None.
    :param docker: Docker's media types (schema 2) rather than OCI's.
    """
    document: dict[str, Any] = {
        "created": "2024-01-01T00:00:00Z",
        "architecture": architecture or machine_architecture(),
        "os": system,
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created_by": "portoshim test image"} for _ in layers],
    }
    if variant:
        document["variant"] = variant
    config_bytes = to_json(document)
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    layer_type = DOCKER_LAYER if docker else OCI_LAYER
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(config_bytes, DOCKER_CONFIG if docker else OCI_CONFIG),
        "layers": [descriptor(layer.blob, layer_type + _SUFFIX[layer_type][layer.compression]) for layer in layers],
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    return Image(to_json(manifest), media_type, config_bytes, tuple(layers))


def index(images: Sequence[Image], *, docker: bool = False) -> Index:
    """An index of images for several platforms, which it reads from their configs."""
    entries = []
    for image in images:
        config = json.loads(image.config)
        platform = {"architecture": config["architecture"], "os": config["os"]}
        if "variant" in config:
            platform["variant"] = config["variant"]
        entries.append(descriptor(image.manifest, image.media_type) | {"platform": platform})
    media_type = DOCKER_INDEX if docker else OCI_INDEX
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    return Index(to_json(document), media_type, tuple(images))


def descriptor(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def machine_architecture() -> str:
    """This machine's architecture by Go's name."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}.get(machine, machine)


# -- ready-made images -------------------------------------------------------------------------------------------------


def busybox_files(*, hard_links: bool = False) -> list[File]:
    """A small system: busybox under all its names, users, and the directories programs expect.

    :param hard_links: make the names hard links, as most images have them: what is mounted over one leaves the others.
    """
    names = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    directories = ("bin", "dev", "etc", "home", "proc", "root", "run", "sys", "usr", "usr/bin", "var", "var/log")
    files = [File(path) for path in directories]
    files += [File("tmp", mode=0o1777), File("bin/busybox", BUSYBOX.read_bytes(), 0o755)]
    for name in names:
        if name != "busybox":
            path = f"bin/{name}"
            files.append(File(path, hard_link="bin/busybox", mode=0o755) if hard_links else File(path, link="busybox"))
    files += [
        File("usr/bin/env", link="../../bin/env"),
        File("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nwww:x:1000:1000:www:/home:/bin/sh\n"
             b"nobody:x:65534:65534:nobody:/:/bin/false\n"),
        File("etc/group", b"root:x:0:\nwww:x:1000:\nextra:x:2000:www\nnobody:x:65534:\n"),
        File("etc/os-release", b'ID=busybox\nPRETTY_NAME="busybox for tests"\n'),
    ]  # fmt: skip
    return files


@functools.cache
def busybox_layer(compression: Compression = "gzip") -> Layer:
    return layer(busybox_files(), compression)


def busybox(
    config: Mapping[str, Any] | None = None,
    extra: Sequence[Layer] = (),
    *,
    compression: Compression = "gzip",
    **options: Any,
) -> Image:
    """busybox with a shell as its command.

    :param config: on top of what it has: ``{"User": "www"}``.
    :param extra: layers above it. :param options: as of :func:`build`.
    """
    base = {"Cmd": ["sh"], "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
    return build([busybox_layer(compression), *extra], {**base, **(config or {})}, **options)


_PAUSE_C = r"""
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void reap(int number) { (void)number; while (waitpid(-1, 0, WNOHANG) > 0); }
static void leave(int number) { (void)number; _exit(0); }

int main(void) {
    struct sigaction action = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    sigaction(SIGCHLD, &action, 0);
    action.sa_handler = leave;
    sigaction(SIGTERM, &action, 0);
    sigaction(SIGINT, &action, 0);
    for (;;) pause();
}
"""


def pause() -> Image:
    """The image of a sandbox: one static program that waits, and reaps what is orphaned.

    Without a C compiler the program is busybox's ``sleep``.
    """
    program = compile_c(_PAUSE_C)
    if program is None:
        return busybox({"Entrypoint": ["/bin/busybox", "sleep", "2147483647"], "Cmd": None})
    return build([layer([File("pause", program, 0o755)])], {"Entrypoint": ["/pause"], "User": "65535:65535"})


@functools.cache
def compile_c(source: str) -> bytes | None:
    """A C program as a static executable; None when this machine has no compiler."""
    if shutil.which("gcc") is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "program"
        command = ["gcc", "-x", "c", "-Os", "-static", "-s", "-Wall", "-Werror", "-o", str(path), "-"]
        subprocess.run(command, input=source.encode(), check=True)
        return path.read_bytes()


def big(
    size_bytes: int,
    layers: int,
    *,
    compression: Compression = "gzip",
    files_per_layer: int = 64,
    random_part: float = 0.5,
    seed: int = 0,
) -> Image:
    """An image of about that many unpacked bytes, for measuring.

    :param random_part: how much of the content can't be compressed; the rest is text.
    """
    source = random.Random(seed)  # noqa: S311 - content for a benchmark
    size = size_bytes // layers // files_per_layer
    text = (b"The quick brown fox jumps over the lazy dog, line %d.\n" * (size // 40 + 1))[:size]
    made = []
    for number in range(layers):
        files = [File(f"layer{number}")]
        for part in range(files_per_layer):
            cut = round(size * random_part)
            files.append(File(f"layer{number}/file{part}", source.randbytes(cut) + text[cut:]))
        made.append(layer(files, compression))
    return build(made, {"Cmd": ["/bin/true"]})


# -- where they go -----------------------------------------------------------------------------------------------------


def push(
    image: Image | Index,
    registry: LocalRegistry,
    repository: str,
    tags: Sequence[str] = ("latest",),
) -> str:
    """Push to a registry that runs here; the digest of what was pushed."""
    certificate = registry.push_certificate
    return push_to(
        registry.url,
        repository,
        image,
        tags,
        credentials=registry.credentials,
        ca_path=str(registry.ca_path) if registry.authority is not None else None,
        client=(str(certificate.cert_path), str(certificate.key_path)) if certificate is not None else None,
    )


def push_to(
    url: str,
    repository: str,
    image: Image | Index,
    tags: Sequence[str] = ("latest",),
    *,
    credentials: tuple[str, str] | None = None,
    ca_path: str | None = None,
    client: tuple[str, str] | None = None,
) -> str:
    """Push by the distribution API.

    :param url: the registry: ``https://localhost:5000``. :param client: certificate and key of the client, PEM.
    :raises requests.RequestException: the registry refuses.
    """
    from tools.distribution import Distribution

    with Distribution(url, repository, credentials, ca_path, client) as remote:
        for digest, blob in image.blobs().items():
            remote.put_blob(digest, blob)
        for document, media_type in image.manifests():
            remote.put_manifest(digest_of(document), document, media_type)
        document, media_type = image.manifests()[-1]
        for tag in tags:
            remote.put_manifest(tag, document, media_type)
    return digest_of(document)


def write_oci_archive(path: Path | str, images: Mapping[str, Image | Index]) -> None:
    """Write an OCI image layout as a tar.

    :param images: by full reference, which goes into the annotations that containerd and skopeo read.
    """
    blobs: dict[str, bytes] = {}
    entries = []
    for reference, image in images.items():
        blobs |= image.blobs()
        blobs |= {digest_of(document): document for document, _ in image.manifests()}
        document, media_type = image.manifests()[-1]
        names = {
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
        }
        entries.append(descriptor(document, media_type) | {"annotations": names})
    top = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    files = [File("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), File("index.json", to_json(top))]
    files += [File("blobs"), File("blobs/sha256")]
    files += [File(f"blobs/sha256/{digest.removeprefix('sha256:')}", blob) for digest, blob in blobs.items()]
    Path(path).write_bytes(pack(files))


def write_docker_archive(path: Path | str, images: Mapping[str, Image]) -> None:
    """Write what ``docker save`` writes: layers are uncompressed, there are no manifests' digests."""
    files: dict[str, File] = {}
    entries = []
    for reference, image in images.items():
        config = f"{image.id.removeprefix('sha256:')}.json"
        files[config] = File(config, image.config)
        names = []
        for one in image.layers:
            name = f"{one.diff_id.removeprefix('sha256:')}/layer.tar"
            files[name] = File(name, decompress(one))
            names.append(name)
        entries.append({"Config": config, "RepoTags": [reference], "Layers": names})
    files["manifest.json"] = File("manifest.json", to_json(entries))
    Path(path).write_bytes(pack(files.values()))


def decompress(one: Layer) -> bytes:
    """A layer's tar."""
    if one.compression == "gzip":
        return gzip.decompress(one.blob)
    if one.compression == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().decompress(one.blob)
    return one.blob
