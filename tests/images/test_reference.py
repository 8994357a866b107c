"""The grammar of references, and the names that are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_porto_runtime.images import reference

from shim_core.errors import InvalidArgument

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("index.docker.io/team/app", "docker.io/team/app:latest", "team/app:latest"),
        ("registry-1.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("team/app", "docker.io/team/app:latest", "team/app:latest"),
        ("library/library", "docker.io/library/library:latest", "library:latest"),
        ("localhost", "docker.io/library/localhost:latest", "localhost:latest"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
        ("registry.k8s.io/pause:3.7", "registry.k8s.io/pause:3.7", "registry.k8s.io/pause:3.7"),
        ("127.0.0.1:5000/a/b/c:T_a.g-1", "127.0.0.1:5000/a/b/c:T_a.g-1", "127.0.0.1:5000/a/b/c:T_a.g-1"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("[fe80::1]/x:y", "[fe80::1]/x:y", "[fe80::1]/x:y"),
        ("UPPER/x", "UPPER/x:latest", "UPPER/x:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}", f"busybox@{DIGEST}"),
        (f"busybox:1.36@{DIGEST}", f"docker.io/library/busybox@{DIGEST}", f"busybox@{DIGEST}"),
        ("a__b/c-d/e---f.g", "docker.io/a__b/c-d/e---f.g:latest", "a__b/c-d/e---f.g:latest"),
        ("x.y/z", "x.y/z:latest", "x.y/z:latest"),
        ("a:" + "t" * 128, "docker.io/library/a:" + "t" * 128, "a:" + "t" * 128),
    ],
)
def test_names(text: str, full: str, familiar: str) -> None:
    parsed = reference.parse(text)
    assert str(parsed) == full
    assert reference.familiar(parsed) == familiar
    assert reference.parse(full) == parsed
    assert reference.parse(familiar) == parsed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "repository's name is missing"),
        ("docker.io/", "repository's name is missing"),
        (":tag", "repository's name is missing"),
        ("/", "lower-case letters and digits"),
        ("/x", "lower-case"),
        ("x/", "lower-case"),
        ("x//y", "lower-case"),
        ("a/../b", "lower-case"),
        ("..", "lower-case"),
        ("a/./b", "lower-case"),
        ("-x", "lower-case"),
        ("x-", "lower-case"),
        ("a___b", "lower-case"),
        ("a..b", "lower-case"),
        ("x y", "lower-case"),
        ("x\n", "lower-case"),
        ("x\0y", "lower-case"),
        ("ä", "lower-case"),
        ("x/Y", "must be in lower case"),
        ("Busybox", "must be in lower case"),
        ("x:", "the tag must be"),
        ("x:-a", "the tag must be"),
        ("x:a b", "the tag must be"),
        ("x:" + "t" * 129, "the tag must be"),
        ("x:a\n", "the tag must be"),
        ("x@", "the digest must be"),
        ("x@sha256:abc", "the digest must be"),
        ("x@" + DIGEST.upper(), "the digest must be"),
        ("x@md5:" + "a" * 32, "the digest must be"),
        ("x@" + DIGEST + "\n", "the digest must be"),
        (f"x@{DIGEST}@{DIGEST}", "the digest must be"),
        ("https://x/y", "the registry must be"),
        ("user:pw@host/x", "the digest must be"),
        ("a_b:5000/x", "the registry must be"),
        ("host:port/x", "the registry must be"),
        ("host:/x", "the registry must be"),
        ("host:0/x", "the registry must be"),
        ("host:65536/x", "the registry must be"),
        ("host:999999999/x", "the registry must be"),
        ("-host.example.org/x", "the registry must be"),
        ("host..example.org/x", "the registry must be"),
        ("a" * 64, "64 hex digits are an image id"),
        ("a/" * 200 + "b", "longer than 255"),
        ("a" * 100_000, "longer than 255"),
    ],
)
def test_what_is_none(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        reference.parse(text)
    assert len(caught.value.message) < 500


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    try:
        parsed = reference.parse(text)
    except InvalidArgument:
        return
    assert reference.parse(str(parsed)) == parsed
    assert ".." not in str(parsed).split("/")
    assert not set(str(parsed)) & set(" \n\0*?$;'\"\\<>|&")


@pytest.mark.parametrize(
    ("text", "digits"),
    [("a" * 12, "a" * 12), ("sha256:" + "a" * 64, "a" * 64), ("a" * 11, None), ("A" * 12, None), ("a" * 65, None),
     ("sha512:" + "a" * 64, None), ("g" * 12, None), ("", None), ("*", None)],
)  # fmt: skip
def test_short_ids(text: str, digits: str | None) -> None:
    assert reference.id_prefix(text) == digits
