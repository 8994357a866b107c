"""What containers may be called, and what masks and relative names find."""

from __future__ import annotations

import pytest

from porto_api import Client, errors
from tests.porto.support import refused, start


@pytest.mark.parametrize("name", ["a", "a.b", "a_b", "a-b", "a@b", "a:b", "0", "-a", "_", "porto", "..", "A" * 128])
def test_a_good_name(porto: Client, name: str) -> None:
    porto.create(name)
    assert porto.list_containers() == [name]
    assert porto.get_property(name, "absolute_name") == f"/porto/{name}"


@pytest.mark.parametrize("character", " *?#+ü\n\t;,'\"\\=[]{}|&%$!()<>^~`")
def test_a_forbidden_character(porto: Client, character: str) -> None:
    with refused(errors.InvalidValue, f"forbidden character {character.encode()[0]:#x}"):
        porto.create(f"a{character}b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "container path too short"),
        ("/a", "container path starts with '/': /a"),
        ("A" * 129, f"container name component too long, limit is 128: '{'A' * 129}'"),
    ],
    ids=["empty", "slash", "long"],
)
def test_a_bad_name(porto: Client, name: str, message: str) -> None:
    with refused(errors.InvalidValue, message):
        porto.create(name)


def test_a_parent_has_to_be_there(porto: Client) -> None:
    with refused(errors.ContainerDoesNotExist, "parent container not found for a/b"):
        porto.create("a/b")


def test_at_most_sixteen_levels(porto: Client) -> None:
    for level in range(1, 17):
        porto.create("/".join("a" * level))
    with refused(errors.InvalidValue, "You shall not go deeper! Maximum level is 16"):
        porto.create("/".join("a" * 17))


def test_a_path_has_a_length_too(porto: Client) -> None:
    name = "b" * 100
    porto.create(name)
    porto.create(f"{name}/{name}")
    with pytest.raises(errors.InvalidValue, match="container path too long, limit is 220"):
        porto.create(f"{name}/{name}/{name}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("self/x", "x"), ("./x", "x"), ("/porto/x", "x"), ("a/../x", "x"), ("x/", "x"), ("a//y", "a/y")],
)
def test_other_ways_to_name_one(porto: Client, name: str, meant: str) -> None:
    porto.create("a")
    porto.create(name)
    assert porto.list_containers() == sorted(["a", meant])
    assert porto.get_property(name, "absolute_name") == f"/porto/{meant}"


@pytest.mark.parametrize("name", ["/", "self", "."])
def test_names_of_the_root_container(porto: Client, name: str) -> None:
    assert porto.get_property(name, "absolute_name") == "/"
    assert porto.get_property(name, "state") == "meta"


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        ("*", ["a", "ab", "x-1", "x-2"]),
        ("***", ["a", "a/b", "a/b/c", "ab", "x-1", "x-2"]),
        ("a*", ["a", "ab"]),
        ("a***", ["a", "a/b", "a/b/c", "ab"]),
        ("a/*", ["a/b"]),
        ("a/***", ["a/b", "a/b/c"]),
        ("***b", ["a/b", "ab"]),
        ("*/*", ["a/b"]),
        ("x-?", ["x-1", "x-2"]),
        ("x-[12]", ["x-1", "x-2"]),
        ("a", ["a"]),
        ("nothing*", []),
        ("nothing", []),
    ],
)
def test_masks(porto: Client, mask: str, found: list[str]) -> None:
    for name in ("a", "a/b", "a/b/c", "ab", "x-1", "x-2"):
        porto.create(name)
    assert porto.list_containers(mask) == found


def test_get_takes_names_and_masks(porto: Client) -> None:
    for name in ("a", "a/b", "x"):
        porto.create(name)
    assert sorted(porto.get(["***"], ["state"])) == ["a", "a/b", "x"]
    assert sorted(porto.get(["a*", "x"], ["state"])) == ["a", "x"]
    answer = porto.get(["x", "nope"], ["level", "nonsense"])
    assert answer["x"]["level"] == "1"
    error = answer["x"]["nonsense"]
    assert isinstance(error, errors.InvalidProperty)
    assert error.message == "Unknown container property: nonsense"
    for error in answer["nope"].values():
        assert isinstance(error, errors.ContainerDoesNotExist)


def test_a_list_of_what_has_changed(porto: Client) -> None:
    start(porto, "a")
    changed = int(porto.get_property("a", "change_time[raw]"))
    assert porto.list_containers("*", changed_since=changed) == ["a"]
    assert porto.list_containers("*", changed_since=changed + 1000) == []
