"""Pulls through a whole daemon: what its clients, its logs, its processes and its disk show of them."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.images.hostile import Behaviour, Exchange, HostileRegistry
from tests.images.support import entry
from tools import images
from tools.certificates import CertificateAuthority
from tools.images import File
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root

MIB = 1024 * 1024
PASSWORD, REFRESH, TOKEN, STATIC = "S3CR3T-password", "S3CR3T-refresh", "S3CR3T-token", "S3CR3T-static"
HELPER, SIGNATURE = "S3CR3T-helper", "S3CR3T-signature"
PACKED = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
SECRETS = ("S3CR3T", PACKED, PACKED[:16], base64.b64encode(f"helper:{HELPER}".encode()).decode())
AUTHS = {
    "password": pb.AuthConfig(username="user", password=PASSWORD),
    "auth": pb.AuthConfig(auth=PACKED),
    "identity": pb.AuthConfig(identity_token=REFRESH),
    "token": pb.AuthConfig(registry_token=TOKEN),
    "configured": pb.AuthConfig(),
}


STEPS = ("manifest-403", "manifest-500", "config-404", "another-layer", "truncated", "foreign-host", "no-host")


def node_of(directory: Path, registries: list[dict[str, Any]], **keys: Any) -> Node:
    config: dict[str, dict[str, Any]] = {"Images": {"PauseImage": "none", "Registries": registries, **keys}}
    if "PORTO_SOCKET" in os.environ:
        config["Plugins"] = {"Disabled": ["embedded_porto"]}
    return Node(directory, config=config, debug=True)


def pull(node: Node, name: str, auth: pb.AuthConfig | None = None) -> str:
    request = pb.PullImageRequest(image=pb.ImageSpec(image=name), auth=auth)
    return str(node.cri.PullImage(request, timeout=120).image_ref)


def remove(node: Node, name: str) -> None:
    node.cri.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))


def remove_all(node: Node) -> None:
    for image in node.cri.ListImages(pb.ListImagesRequest()).images:
        remove(node, image.id)


def random_image(seed: int, layers: int, size: int) -> images.Image:
    source = random.Random(seed)
    return images.build([images.layer([File(f"f{n}", source.randbytes(size))]) for n in range(layers)])


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority(tmp_path / "ca")


@pytest.fixture
def hostile(authority: CertificateAuthority) -> Iterator[HostileRegistry]:
    registry = HostileRegistry(authority.issue("hostile", ["localhost"]))
    yield registry
    registry.stop()


@pytest.fixture
def foreign(authority: CertificateAuthority) -> Iterator[HostileRegistry]:
    """Another host: it wants credentials, and must not get any."""
    registry = HostileRegistry(authority.issue("foreign", ["127.0.0.1"]), host="127.0.0.1")
    registry.on(".", lambda x: x.answer(401, b"", {"WWW-Authenticate": 'Basic realm="all of it"'}))
    yield registry
    registry.stop()


@contextmanager
def watched_processes() -> Iterator[list[str]]:
    """What the command lines and environments of all processes have shown meanwhile that they must not."""
    found: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                for name in ("cmdline", "environ"):
                    try:
                        text = Path("/proc", pid, name).read_text(errors="replace")
                    except OSError:
                        continue
                    found.extend(f"{name} of {pid}: {text}" for secret in SECRETS if secret in text)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def failures(image: images.Image, tag: str, foreign: HostileRegistry) -> dict[str, tuple[str, Behaviour]]:
    """Ways for a pull to fail once the registry knows who we are, telling all it knows; path and behaviour."""
    layer = f"/blobs/{image.layers[0].digest}"

    def break_off(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(image.layers[0].blob)), "X-Signed": SIGNATURE})
        x.hang_up()

    def tell(status: int) -> Behaviour:
        return lambda x: x.error(status, "DENIED", f"you are {json.dumps(x.seen.headers)} {x.seen.path}")

    away = {"Location": f"{foreign.url}/blob/{SIGNATURE}?sig={SIGNATURE}"}
    nowhere = {"Location": f"https://localhost:1/{SIGNATURE}?sig={SIGNATURE}"}
    return {
        "manifest-403": (f"/manifests/{tag}$", tell(403)),
        "manifest-500": (f"/manifests/{tag}$", tell(500)),
        "config-404": (f"/blobs/{image.id}", tell(404)),
        "another-layer": (layer, lambda x: x.answer(200, SIGNATURE.encode() * 100)),
        "truncated": (layer, break_off),
        "foreign-host": (layer, lambda x: x.answer(307, b"", away)),
        "no-host": (layer, lambda x: x.answer(307, b"", nowhere)),
    }


def demand_token(hostile: HostileRegistry, behave: dict[str, Behaviour]) -> None:
    """Have the registry know nobody without a token; give one to all who show a secret; misbehave to those alone."""

    def give(x: Exchange) -> None:
        told = f"{x.seen.headers.get('authorization', '')} {x.seen.body}"
        if PACKED in told or REFRESH in told:
            x.answer(200, json.dumps({"token": TOKEN}).encode())
        else:
            x.error(401, "DENIED", told)

    def check(x: Exchange) -> None:
        if x.seen.headers.get("authorization", "").removeprefix("Bearer ") in (TOKEN, STATIC):
            behaviours = [behaviour for path, behaviour in behave.items() if re.search(path, x.seen.path)]
            (behaviours or [hostile.serve])[0](x)
        else:
            realm = f'Bearer realm="{hostile.url}/token",service="{SIGNATURE}"'
            x.error(401, "UNAUTHORIZED", x.seen.headers.get("authorization", ""), {"WWW-Authenticate": realm})

    hostile.on("^/v2/", check)
    hostile.on("^/token", give)


def test_no_secret_gets_out(
    hostile: HostileRegistry,
    foreign: HostileRegistry,
    authority: CertificateAuthority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    behave: dict[str, Behaviour] = {}
    cases: dict[str, pb.AuthConfig] = {}
    for kind, auth in AUTHS.items():
        for step in (*STEPS, "none"):
            tag = f"{kind}-{step}"
            image = images.build([images.layer([File(tag, tag.encode())])])
            hostile.put(image, tag)
            behave |= [failures(image, tag, foreign)[step]] if step in STEPS else []
            cases[f"{hostile.address}/x:{tag}"] = auth
    demand_token(hostile, behave)
    (tmp_path / "static").write_text(f"Bearer {STATIC}")
    helper = tmp_path / "bin" / "docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(f'#!/bin/sh\nread host\nsleep 0.05\necho \'{{"Username": "helper", "Secret": "{HELPER}"}}\'\n')
    helper.chmod(0o755)
    (tmp_path / "docker.json").write_text(json.dumps({"credHelpers": {foreign.address: "test"}}))
    monkeypatch.setenv("PATH", str(helper.parent), prepend=":")
    registries = [
        {"Host": hostile.address, "CA": str(authority.path), "AuthToken": f"file:{tmp_path / 'static'}"},
        {"Host": foreign.address, "CA": str(authority.path)},
    ]
    node = node_of(tmp_path / "node", registries, DockerConfig=str(tmp_path / "docker.json"))

    def told_by(name: str, auth: pb.AuthConfig) -> str:
        try:
            return pull(node, name, auth)
        except grpc.RpcError as err:
            return f"{err.details()} {err.debug_error_string()} {err.trailing_metadata()}"

    with watched_processes() as shown, node:
        with ThreadPoolExecutor(10) as pool:
            told = dict(zip(cases, pool.map(told_by, cases, cases.values()), strict=True))
        seen_by_foreign = list(foreign.seen)
        told["helped"] = told_by(f"{foreign.address}/helped", pb.AuthConfig())
        wrong = pb.AuthConfig(username="user", password=f"wrong {PASSWORD}", server_address="elsewhere.example.org")
        told["other"] = told_by(f"{foreign.address}/other", wrong)
        pulled = node.cri.ListImages(pb.ListImagesRequest()).images
        remove_all(node)
    assert {name for image in pulled for name in image.repo_tags} == {name for name in cases if name.endswith("-none")}
    assert seen_by_foreign, "the redirect was not followed at all"
    assert shown == []
    for text in told.values():
        assert not [secret for secret in SECRETS if secret in text], text
    # The path and query of a redirect are for the foreign host; nothing else is.
    for seen in seen_by_foreign:
        assert "authorization" not in seen.headers
        assert not [secret for secret in SECRETS if secret in seen.body + json.dumps(seen.headers)]
    helped = base64.b64encode(f"helper:{HELPER}".encode()).decode()
    assert {seen.headers.get("authorization", "") for seen in foreign.seen} == {"", f"Basic {helped}"}
    searched = list(files_below(tmp_path / "node"))
    assert any(path.name == "portoshim.log" for path in searched)
    for path in searched:
        data = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in data], path


def files_below(directory: Path) -> Iterator[Path]:
    """Regular files, but for those in what is mounted there."""
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not os.path.ismount(f"{parent}/{name}")]
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


# -- many, and the end at any moment -----------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path, registry: LocalRegistry) -> Iterator[Node]:
    with node_of(tmp_path / "node", [entry(registry)]) as made:
        yield made
        remove_all(made)  # a Porto that isn't ours would keep them


def test_twenty_clients_one_download(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = random_image(1, layers=4, size=MIB)
    images.push(image, registry, repository)
    name = f"{registry.address}/{repository}"
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda _: pull(node, name), range(20))) == [image.id] * 20
    assert registry.requests("GET", f"{repository}/manifests/") == 1
    assert registry.requests("GET", f"{repository}/blobs/") == 1 + len(image.layers)


ROUNDS = 50 if os.environ.get("SHIM_TEST_LONG") else 4


@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_kill_9_of_the_daemon(node: Node, registry: LocalRegistry, repository: str) -> None:
    """Whatever a pull had got to: the next daemon pulls, shows what is whole, and leaves nothing."""
    source = random.Random(os.environ.get("SHIM_TEST_SEED", "7"))
    name = f"{registry.address}/{repository}"
    before = layers_of(node)
    broken = 0
    for number in range(ROUNDS):
        image = random_image(source.randrange(1 << 30), layers=6, size=MIB)
        images.push(image, registry, repository)
        with ThreadPoolExecutor(1) as pool:
            pulling = pool.submit(pull, node, name)
            time.sleep(source.uniform(0, 0.5))
            node.kill()
            broken += isinstance(pulling.exception(), grpc.RpcError)
        node.start()
        status = node.cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name), verbose=True))
        assert status.image.id in ("", image.id)
        assert pull(node, name) == image.id
        status = node.cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name), verbose=True))
        for layer, found in zip(image.layers, json.loads(status.info["info"])["layers"], strict=True):
            assert found["diffID"] == layer.diff_id
        remove(node, name)
        assert not node.cri.ListImages(pb.ListImagesRequest()).images, f"round {number}"
        assert not list((node.directory / "state" / "images" / "tmp").glob("*/*")), f"round {number}"
        usage = node.cri.ImageFsInfo(pb.ImageFsInfoRequest()).image_filesystems[0]
        assert (usage.used_bytes.value, usage.inodes_used.value) == (0, 0), f"round {number}"
        assert layers_of(node) == before, f"round {number}"
        assert not half_done(node), f"round {number}"
    assert broken, "no pull was killed: the delays are too long"


def layers_of(node: Node) -> set[str]:
    """The layers of ours that Porto has."""
    with Client(node.porto_socket or str(node.directory / "porto.sock")) as porto:
        return {layer.name for layer in porto.list_layers(mask="portoshim-*")}


def half_done(node: Node) -> list[str]:
    """What Porto has begun in the place of layers, to unpack or to remove."""
    place = Path("/place") if node.porto_socket else node.directory / "place"
    return [name for name in os.listdir(place / "porto_layers") if name.startswith(("_import_", "_remove_"))]
