"""Pulls from the real docker-registry: kinds of images, ways to name one, ways a registry is protected."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shim_core import errors
from shim_core.types import RegistryAuth
from tests.images.support import MakeNode, Node, entry
from tools import images
from tools.images import File
from tools.registry import LocalRegistry


def small(text: str = "hello", **config: object) -> images.Image:
    """An image of one small file."""
    return images.build([images.layer([File("file", text.encode())])], config)


# -- names -------------------------------------------------------------------------------------------------------------


def test_by_tag(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = small(Entrypoint=["/e"], Cmd=["c"], Env=["A=b"], User="1000:2000", WorkingDir="/w", StopSignal="SIGINT")
    images.push(image, registry, repository, ["v1"])
    pulled = node.pull(f"{registry.address}/{repository}:v1")
    assert pulled.id == image.id
    assert pulled.repo_tags == (f"{registry.address}/{repository}:v1",)
    assert pulled.repo_digests == (f"{registry.address}/{repository}@{image.digest}",)
    assert (pulled.config.entrypoint, pulled.config.cmd, pulled.config.env) == (("/e",), ("c",), ("A=b",))
    assert (pulled.config.user, pulled.config.working_dir, pulled.config.stop_signal) == ("1000:2000", "/w", "SIGINT")
    assert (pulled.uid, pulled.username) == (1000, "")
    assert (node.layer_dir(pulled) / "file").read_bytes() == b"hello"


def test_without_a_tag_it_is_latest(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(small(), registry, repository)
    assert node.pull(f"{registry.address}/{repository}").repo_tags == (f"{registry.address}/{repository}:latest",)


def test_by_digest(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = small()
    images.push(image, registry, repository)
    pulled = node.pull(f"{registry.address}/{repository}@{image.digest}")
    assert pulled.id == image.id
    assert pulled.repo_tags == ()
    assert pulled.repo_digests == (f"{registry.address}/{repository}@{image.digest}",)


def test_a_digest_outweighs_a_tag(node: Node, registry: LocalRegistry, repository: str) -> None:
    first, second = small("first"), small("second")
    images.push(first, registry, repository, ["v"])
    images.push(second, registry, repository, ["v"])
    assert node.pull(f"{registry.address}/{repository}:v@{first.digest}").id == first.id


def test_by_short_name(make_node: MakeNode, registry: LocalRegistry) -> None:
    image = small("by short name")
    images.push(image, registry, "library/shortname")
    node = make_node({"Registries": [{"Host": "docker.io", "Mirrors": [registry.url], "CA": str(registry.ca_path)}]})
    pulled = node.pull("shortname")
    assert pulled.id == image.id
    assert pulled.repo_tags == ("docker.io/library/shortname:latest",)
    for name in ("shortname", "docker.io/shortname", "index.docker.io/library/shortname:latest", pulled.id[7:20]):
        assert node.service.resolve(name) == pulled


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "a/../b", "x@sha256:../../etc/passwd", "-x", "x:", "a" * 300])
def test_a_name_that_is_none(node: Node, name: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="image"):
        node.pull(name)


def test_an_id_is_not_pulled(node: Node) -> None:
    with pytest.raises(errors.InvalidArgument, match="id can't be pulled"):
        node.pull("sha256:" + "0" * 64)


def test_a_tag_that_moves(node: Node, registry: LocalRegistry, repository: str) -> None:
    name = f"{registry.address}/{repository}:v"
    images.push(small("old"), registry, repository, ["v"])
    old = node.pull(name)
    images.push(small("new"), registry, repository, ["v"])
    new = node.pull(name)
    assert new.id != old.id
    assert new.repo_tags == (name,)
    still = node.service.resolve(old.id)
    assert still is not None
    assert still.repo_tags == ()
    assert len(still.repo_digests) == 1


def test_a_second_pull_fetches_nothing(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(small("once"), registry, repository)
    name = f"{registry.address}/{repository}"
    first = node.pull(name)
    assert node.pull(name) == first
    assert registry.requests("GET", f"{repository}/blobs/") == 2  # config and layer


# -- kinds of images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_media_types_and_compressions(
    node: Node, registry: LocalRegistry, repository: str, docker: bool, compression: images.Compression
) -> None:
    content = b"some text\n" * 100_000
    layers = [images.layer([File("big", content)], compression), images.layer([File("top", b"t")], compression)]
    image = images.build(layers, docker=docker)
    images.push(image, registry, repository)
    pulled = node.pull(f"{registry.address}/{repository}")
    assert pulled.id == image.id
    assert (node.layer_dir(pulled, 0) / "big").read_bytes() == content
    assert (node.layer_dir(pulled, 1) / "top").read_bytes() == b"t"


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
@pytest.mark.parametrize(
    ("platform", "number"),
    [("linux/amd64", 0), ("linux/arm64", 1), ("linux/arm64/v8", 1), ("linux/arm/v7", 2), ("linux/s390x", 3),
     ("linux/ppc64le", 4), ("linux/arm/v8", 2)],
)  # fmt: skip
def test_an_index_of_five_platforms(
    make_node: MakeNode, registry: LocalRegistry, docker: bool, platform: str, number: int
) -> None:
    platforms = [("amd64", ""), ("arm64", "v8"), ("arm", "v7"), ("s390x", ""), ("ppc64le", "")]
    made = [
        images.build([images.layer([File("is", arch.encode())])], architecture=arch, variant=variant, docker=docker)
        for arch, variant in platforms
    ]
    index = images.index(made, docker=docker)
    repository = f"five/{'docker' if docker else 'oci'}"
    images.push(index, registry, repository)
    node = make_node({"Registries": [entry(registry)], "Platform": platform})
    pulled = node.pull(f"{registry.address}/{repository}")
    assert pulled.id == made[number].id
    assert pulled.repo_digests == (f"{registry.address}/{repository}@{index.digest}",)


def test_an_index_without_our_platform(node: Node, registry: LocalRegistry, repository: str) -> None:
    index = images.index([images.build([], architecture="mips"), images.build([], architecture="s390x")])
    images.push(index, registry, repository)
    with pytest.raises(errors.UnknownError, match=r"not made for linux/\S+; it is there for linux/mips, linux/s390x"):
        node.pull(f"{registry.address}/{repository}")


def test_an_image_for_another_platform(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(images.build([], architecture="s390x"), registry, repository)
    with pytest.raises(errors.UnknownError, match=r"made for linux/s390x, and this machine is linux/"):
        node.pull(f"{registry.address}/{repository}")


def test_an_image_without_layers(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(images.build([], {"Cmd": ["x"]}), registry, repository)
    assert node.pull(f"{registry.address}/{repository}").layers == ()


def test_the_same_layer_twice(node: Node, registry: LocalRegistry, repository: str) -> None:
    one, two = images.layer([File("one", b"1")]), images.layer([File("two", b"2")])
    images.push(images.build([one, two, one]), registry, repository)
    pulled = node.pull(f"{registry.address}/{repository}")
    assert len(pulled.layers) == 2
    assert (node.layer_dir(pulled, 1) / "one").exists()  # the upper one of the two counts


def test_shared_layers_are_stored_once(node: Node, registry: LocalRegistry, repository: str) -> None:
    base = images.layer([File("base", b"b" * 100_000)])
    first = images.build([base, images.layer([File("a", b"a")])])
    second = images.build([base, images.layer([File("b", b"b")])])
    images.push(first, registry, f"{repository}-1")
    images.push(second, registry, f"{repository}-2")
    one, two = (node.pull(f"{registry.address}/{repository}-{number}") for number in (1, 2))
    assert len({*one.layers, *two.layers}) == 3
    assert registry.requests("GET", f"blobs/{base.digest}") == 1


def test_another_compression_of_a_layer_is_the_same_layer(node: Node, registry: LocalRegistry, repository: str) -> None:
    tar = images.pack([File("file", b"same content")])
    for compression in ("gzip", "zstd"):
        images.push(images.build([images.layer_of_tar(tar, compression)]), registry, f"{repository}-{compression}")
    assert (
        node.pull(f"{registry.address}/{repository}-gzip").layers
        == node.pull(f"{registry.address}/{repository}-zstd").layers
    )
    assert registry.requests("GET", f"{repository}-zstd/blobs/") == 0  # the config is the same document, too


# -- what is not there -------------------------------------------------------------------------------------------------


def test_an_unknown_tag(node: Node, registry: LocalRegistry, repository: str) -> None:
    images.push(small(), registry, repository)
    with pytest.raises(errors.UnknownError, match=r"answers 404: MANIFEST_UNKNOWN") as caught:
        node.pull(f"{registry.address}/{repository}:nope")
    assert not caught.value.message.startswith("RegistryUnavailable")


def test_an_unreachable_registry(make_node: MakeNode) -> None:
    node = make_node()
    with pytest.raises(errors.UnknownError, match=r"^RegistryUnavailable: localhost:1/x:latest: .*Connection refused"):
        node.pull("localhost:1/x")


def test_an_untrusted_certificate(make_node: MakeNode, registry: LocalRegistry) -> None:
    with pytest.raises(errors.UnknownError, match=r"^RegistryUnavailable: .*certificate isn't trusted"):
        make_node().pull(f"{registry.address}/x")


def test_insecure_is_a_decision(make_node: MakeNode, registry: LocalRegistry, repository: str) -> None:
    images.push(small(), registry, repository)
    node = make_node({"Registries": [{"Host": registry.address, "Insecure": True}]})
    assert node.pull(f"{registry.address}/{repository}").id == small().id


def test_a_registry_without_tls(make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str) -> None:
    registry = registries(tls=False)
    images.push(small(), registry, repository)
    with pytest.raises(errors.UnknownError, match="TLS"):
        make_node().pull(f"{registry.address}/{repository}")
    node = make_node({"Registries": [{"Host": registry.address, "Insecure": True}]}, state="insecure")
    assert node.pull(f"{registry.address}/{repository}").id == small().id


# -- who we are --------------------------------------------------------------------------------------------------------


def test_basic(make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str) -> None:
    registry = registries(auth="basic")
    assert registry.credentials is not None
    user, password = registry.credentials
    images.push(small(), registry, repository)
    node = make_node({"Registries": [entry(registry)]})
    name = f"{registry.address}/{repository}"
    with pytest.raises(errors.UnknownError, match=r"refuses: UNAUTHORIZED"):
        node.pull(name)
    with pytest.raises(errors.UnknownError, match="refuses") as caught:
        node.pull(name, RegistryAuth(username=user, password="wrong-" + password))
    assert password not in caught.value.message
    with pytest.raises(errors.UnknownError, match="refuses"):
        node.pull(name, RegistryAuth(username=user, password=password, server_address="other.example.org"))
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    for auth in (
        RegistryAuth(username=user, password=password),
        RegistryAuth(username=user, password=password, server_address=registry.address),
        RegistryAuth(username=user, password=password, server_address=f"https://{registry.address}/v2/"),
        RegistryAuth(auth=pair),
    ):
        assert node.pull(name, auth).id == small().id


@pytest.mark.parametrize("how", ["literal", "file", "auth_path", "docker_config"])
def test_credentials_of_the_node(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str, tmp_path: Path, how: str
) -> None:
    registry = registries(auth="basic")
    assert registry.credentials is not None
    user, password = registry.credentials
    images.push(small(), registry, repository)
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    keys, top = {}, {}
    if how == "literal":
        keys = {"AuthToken": f"Basic {pair}"}
    elif how == "file":
        (tmp_path / "token").write_text(f"Basic {pair}\n")
        keys = {"AuthToken": f"file:{tmp_path}/token"}
    elif how == "auth_path":
        keys = {"AuthPath": f"https://{user}:{password}@{registry.address}/token"}
    else:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": pair}}}))
        top = {"DockerConfig": str(tmp_path / "config.json")}
    node = make_node({"Registries": [entry(registry, **keys)], **top})
    assert node.pull(f"{registry.address}/{repository}").id == small().id


def test_tokens(make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str) -> None:
    registry = registries(auth="token", public=("public/*",))
    server = registry.token_server
    assert registry.credentials is not None
    assert server is not None
    user, password = registry.credentials
    images.push(small(), registry, f"private/{repository}")
    images.push(small(), registry, f"public/{repository}")
    node = make_node({"Registries": [entry(registry)]})
    assert node.pull(f"{registry.address}/public/{repository}").id == small().id
    private = f"{registry.address}/private/{repository}"
    with pytest.raises(errors.UnknownError, match="refuses") as caught:
        node.pull(private)
    assert not caught.value.message.startswith("RegistryUnavailable")
    with pytest.raises(errors.UnknownError, match=r"token server \S+ refuses these credentials \(401\)"):
        node.pull(private, RegistryAuth(username=user, password="wrong"))
    assert node.pull(private, RegistryAuth(username=user, password=password)).id == small().id
    asked = len(server.requests)
    assert node.pull(private, RegistryAuth(username=user, password=password)).id == small().id
    assert len(server.requests) == asked  # the token was kept
    assert node.pull(private, RegistryAuth(identity_token=server.new_refresh_token(user))).id == small().id
    assert server.requests[-1].method == "POST"
    scope = f"repository:private/{repository}:pull"
    token = server.answer("GET", user, scope)["token"]
    assert node.pull(private, RegistryAuth(registry_token=token)).id == small().id


def test_a_token_that_is_dead_before_its_time(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str
) -> None:
    registry = registries(auth="token")
    server = registry.token_server
    assert server is not None
    assert registry.credentials is not None
    auth = RegistryAuth(username=registry.credentials[0], password=registry.credentials[1])
    first, second = small("first"), small("second")
    images.push(first, registry, repository, ["1"])
    images.push(second, registry, repository, ["2"])
    node = make_node({"Registries": [entry(registry)]})
    try:
        # The registry takes it for expired, and the answer says it isn't.
        server.lifetime_s, server.claimed_lifetime_s = -120.0, 300.0
        with pytest.raises(errors.UnknownError, match="refuses"):
            node.pull(f"{registry.address}/{repository}:1", auth)
        asked = len(server.requests)
        server.lifetime_s, server.claimed_lifetime_s = 300.0, None
        # The dead one is still in the cache: refused once, then a new one is had.
        assert node.pull(f"{registry.address}/{repository}:1", auth).id == first.id
        assert len(server.requests) == asked + 1
        server.lifetime_s, server.claimed_lifetime_s = -120.0, 1.0
        assert node.pull(f"{registry.address}/{repository}:2", auth).id == second.id
        assert len(server.requests) == asked + 1
    finally:
        server.lifetime_s, server.claimed_lifetime_s = 300.0, None


def test_a_refresh_token_that_is_revoked(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str
) -> None:
    registry = registries(auth="token")
    server = registry.token_server
    assert server is not None
    images.push(small(), registry, repository)
    token = server.new_refresh_token("user")
    node = make_node({"Registries": [entry(registry)]})
    assert node.pull(f"{registry.address}/{repository}", RegistryAuth(identity_token=token)).id == small().id
    del server.refresh_tokens[token]
    fresh = make_node({"Registries": [entry(registry)]}, state="fresh")
    with pytest.raises(errors.UnknownError, match=r"refuses these credentials") as caught:
        fresh.pull(f"{registry.address}/{repository}", RegistryAuth(identity_token=token))
    assert token not in caught.value.message


def test_a_token_that_expires_in_the_middle(
    make_node: MakeNode,
    registries: Callable[..., LocalRegistry],
    repository: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = registries(auth="token")
    server = registry.token_server
    assert server is not None
    assert registry.credentials is not None
    image = images.build([images.layer([File(f"f{n}", bytes([n]) * 1000)]) for n in range(6)])
    images.push(image, registry, repository)
    node = make_node({"Registries": [entry(registry)], "MaxConcurrentDownloads": 1})
    good = server.sign
    given: list[str] = []

    def sign(claims: dict[str, Any]) -> str:
        # The first token is good for the manifest alone: blobs are refused with it until a new one is asked for.
        if not given:
            claims = {**claims, "exp": claims["iat"] + 1}
        given.append(good(claims))
        return given[-1]

    monkeypatch.setattr(server, "sign", sign)
    auth = RegistryAuth(username=registry.credentials[0], password=registry.credentials[1])
    assert node.pull(f"{registry.address}/{repository}", auth).id == image.id
    assert len(given) == 2


def test_client_certificates(make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str) -> None:
    registry = registries(client_auth=True)
    images.push(small(), registry, repository)
    name = f"{registry.address}/{repository}"
    with pytest.raises(errors.UnknownError, match=r"^RegistryUnavailable: .*TLS failed"):
        make_node({"Registries": [entry(registry)]}).pull(name)
    mine = registry.client_certificate()
    keys = {"ClientCert": str(mine.cert_path), "ClientKey": str(mine.key_path)}
    node = make_node({"Registries": [entry(registry, **keys)]}, state="known")
    assert node.pull(name).id == small().id


def test_a_certificate_file_that_is_missing(make_node: MakeNode, registry: LocalRegistry, tmp_path: Path) -> None:
    node = make_node({"Registries": [{"Host": registry.address, "CA": f"{tmp_path}/none.pem"}]})
    with pytest.raises(errors.InvalidArgument, match=r"none\.pem can't be used: No such file"):
        node.pull(f"{registry.address}/x")


# -- mirrors -----------------------------------------------------------------------------------------------------------


def test_a_mirror_comes_first(make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str) -> None:
    registry, mirror = registries(), registries(auth="none", names=("localhost", "127.0.0.1", "mirror"))
    images.push(small("of the mirror"), mirror, repository)
    images.push(small("of the registry"), registry, repository)
    node = make_node({"Registries": [entry(registry, Mirrors=[mirror.url]), entry(mirror)]})
    pulled = node.pull(f"{registry.address}/{repository}")
    assert pulled.id == small("of the mirror").id
    assert pulled.repo_tags == (f"{registry.address}/{repository}:latest",)
    assert registry.requests("GET", repository) == 0


@pytest.mark.parametrize("trouble", ["away", "empty", "untrusted"])
def test_the_registry_stands_in_for_its_mirror(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], trouble: str, repository: str
) -> None:
    registry, mirror = registries(), registries(auth="none", names=("localhost", "127.0.0.1", "mirror"))
    images.push(small(), registry, repository)
    address = "https://localhost:1" if trouble == "away" else mirror.url
    others = [entry(mirror)] if trouble == "empty" else []
    node = make_node({"Registries": [entry(registry, Mirrors=[address]), *others]})
    assert node.pull(f"{registry.address}/{repository}").id == small().id


def test_a_mirror_that_lacks_a_layer(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str
) -> None:
    registry, mirror = registries(), registries(auth="none", names=("localhost", "127.0.0.1", "mirror"))
    image = images.build([images.layer([File("a", b"1")]), images.layer([File("b", b"2")])])
    for one in (registry, mirror):
        images.push(image, one, repository)
    lost = image.layers[1].digest.removeprefix("sha256:")
    (mirror.directory / f"data/docker/registry/v2/blobs/sha256/{lost[:2]}/{lost}/data").unlink()
    node = make_node({"Registries": [entry(registry, Mirrors=[mirror.url]), entry(mirror)]})
    assert node.pull(f"{registry.address}/{repository}").id == image.id
    assert registry.requests("GET", f"{repository}/blobs/") == 1


def test_hosts_toml(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str, tmp_path: Path
) -> None:
    registry, mirror = registries(auth="basic"), registries(auth="none", names=("localhost", "127.0.0.1", "mirror"))
    images.push(small("private"), registry, repository)
    node = make_node({"ConfigPath": str(tmp_path / "certs.d")})
    name = f"{registry.address}/{repository}"
    assert registry.credentials is not None
    auth = RegistryAuth(username=registry.credentials[0], password=registry.credentials[1])
    with pytest.raises(errors.UnknownError, match="isn't trusted"):
        node.pull(name, auth)
    directory = tmp_path / "certs.d" / registry.address
    directory.mkdir(parents=True)
    (directory / "ca.pem").write_bytes(registry.ca_path.read_bytes())
    # No restart: the file is read for each pull.
    (directory / "hosts.toml").write_text(
        f'server = "{registry.url}"\nca = "ca.pem"\n'
        f'[host."{mirror.url}"]\n  capabilities = ["pull"]\n  ca = "{mirror.ca_path}"\n'
    )
    assert node.pull(name, auth).id == small("private").id
    images.push(small("of the mirror"), mirror, repository)
    assert node.pull(name, auth).id == small("private").id  # that mirror may not say what a tag is
    digest = small("of the mirror").digest
    assert node.pull(f"{registry.address}/{repository}@{digest}", auth).id == small("of the mirror").id


def test_a_wrong_hosts_toml(make_node: MakeNode, registry: LocalRegistry, tmp_path: Path) -> None:
    directory = tmp_path / "certs.d" / "_default"
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text('[host."https://x"]\n  skip_verfy = true\n')
    node = make_node({"ConfigPath": str(tmp_path / "certs.d")})
    with pytest.raises(errors.InvalidArgument, match=r"hosts\.toml: host.\"https://x\": unknown key skip_verfy"):
        node.pull(f"{registry.address}/x")


def test_layers_are_named_by_their_content(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = small("named")
    images.push(image, registry, repository)
    pulled = node.pull(f"{registry.address}/{repository}")
    tar = images.decompress(image.layers[0])
    assert pulled.layers == (f"portoshim-{hashlib.sha256(tar).hexdigest()}",)
    assert node.layer_names() == set(pulled.layers)
