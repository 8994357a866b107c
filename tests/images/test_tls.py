"""TLS contexts are kept between pulls, and certificates may change under us."""

from __future__ import annotations

from pathlib import Path

import pytest
from shim_porto_runtime.images.tls import Tls, TlsContexts

from shim_core import errors
from tests.images.support import MakeNode, entry
from tools import images
from tools.certificates import CertificateAuthority
from tools.images import File
from tools.registry import LocalRegistry


def test_a_context_is_made_once(tmp_path: Path) -> None:
    path = CertificateAuthority(tmp_path / "ca").path
    contexts = TlsContexts()
    made = contexts.get(Tls((str(path),)))
    assert contexts.get(Tls((str(path),))) is made
    assert contexts.get(Tls()) is not made
    assert contexts.get(Tls((str(path),), insecure=True)) is not made


def test_only_a_few_are_kept(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path / "ca").path.read_bytes()
    contexts = TlsContexts()
    first = contexts.get(Tls())
    for number in range(6):
        path = tmp_path / f"{number}.pem"
        path.write_bytes(authority)
        contexts.get(Tls((str(path),)))
        assert contexts.get(Tls()) is first  # what is used stays
    assert len(contexts._contexts) <= 4


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"none\.pem can't be used: No such file"):
        TlsContexts().get(Tls((str(tmp_path / "none.pem"),)))


def test_a_new_ca_counts_from_the_next_pull_on(
    make_node: MakeNode, registry: LocalRegistry, repository: str, tmp_path: Path
) -> None:
    image = images.build([images.layer([File("a", b"a")])])
    images.push(image, registry, repository)
    path = tmp_path / "ca.pem"
    path.write_bytes(CertificateAuthority(tmp_path / "other").path.read_bytes())
    node = make_node({"Registries": [entry(registry, CA=str(path))]})
    name = f"{registry.address}/{repository}"
    for _ in range(2):
        with pytest.raises(errors.UnknownError, match="its certificate isn't trusted"):
            node.pull(name)
    path.write_bytes(registry.ca_path.read_bytes())
    assert node.pull(name).id == image.id
