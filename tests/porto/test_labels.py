"""Labels: what they may be called, counting with them, and finding containers by them."""

from __future__ import annotations

from typing import Any

import pytest

from porto_api import Client, errors
from tests.porto.support import refused, spec


@pytest.fixture(autouse=True)
def container(porto: Client) -> str:
    porto.create("a")
    return "a"


@pytest.mark.parametrize(
    ("label", "value"),
    [("TEST.x", "1"), ("TEST.a.b.c", "x"), ("TEST.x-y_z", "a@b-c:d.e_f"), ("TEST.-", "-5"), ("TEST.k", "v" * 60000)],
    ids=["plain", "dots", "characters", "minus", "long"],
)
def test_a_good_label(porto: Client, label: str, value: str) -> None:
    porto.set_label("a", label, value)
    assert porto.get_property("a", f"labels[{label}]") == value


@pytest.mark.parametrize("label", ["x", "TEST", "test.x", ".x", "TEST.a b", "TEST.é", "TEST." + "a" * 200])
def test_a_bad_label(porto: Client, label: str) -> None:
    with refused(errors.InvalidLabel):
        porto.set_label("a", label, "1")


@pytest.mark.parametrize("value", ["a b", "a/b", "é", "v" * 70000], ids=["blank", "slash", "accent", "long"])
def test_a_bad_value(porto: Client, value: str) -> None:
    with refused(errors.InvalidLabel):
        porto.set_label("a", "TEST.x", value)


def test_an_empty_value_removes_it(porto: Client) -> None:
    porto.set_label("a", "TEST.x", "1")
    porto.set_label("a", "TEST.x", "")
    with refused(errors.LabelNotFound, "Label TEST.x is not set"):
        porto.get_property("a", "labels[TEST.x]")
    assert porto.get_property("a", "labels") == ""


def test_setting_some_keeps_the_others(porto: Client) -> None:
    porto.set_property("a", "labels", "TEST.x: 1; TEST.y: 2")
    porto.set_property("a", "labels", "TEST.y: 3")
    assert porto.get_property("a", "labels") == "TEST.x: 1; TEST.y: 3"


def test_a_spec_replaces_them_unless_it_merges(porto: Client) -> None:
    porto.set_property("a", "labels", "TEST.x: 1; TEST.y: 2")
    merging = spec("a", labels={"TEST.y": "", "TEST.z": "3"})
    merging.labels.merge = True
    porto.update_from_spec(merging)
    assert porto.get_property("a", "labels") == "TEST.x: 1; TEST.z: 3"
    porto.update_from_spec(spec("a", labels={"NEW.x": "4"}))
    assert porto.get_property("a", "labels") == "NEW.x: 4"


def test_at_most_a_hundred(porto: Client) -> None:
    for number in range(100):
        porto.set_label("a", f"TEST.l{number}", "1")
    with refused(errors.ResourceNotAvailable, "Too many labels"):
        porto.set_label("a", "TEST.more", "1")
    with refused(errors.ResourceNotAvailable, "Too many labels"):
        porto.update_from_spec(spec("a", labels={"TEST.more": "1"}))


def test_children_see_those_of_their_parents(porto: Client) -> None:
    porto.create("a/b")
    porto.set_label("a", "TEST.x", "1")
    assert porto.get_property("a/b", "labels[.TEST.x]") == "1"
    assert porto.get_property("a/b", "labels") == ""


class TestConditions:
    def test_a_value_it_had(self, porto: Client) -> None:
        porto.set_label("a", "TEST.x", "1")
        porto.set_label("a", "TEST.x", "2", prev_value="1")
        with refused(errors.Busy, "Container a label TEST.x is 2 not 1"):
            porto.set_label("a", "TEST.x", "3", prev_value="1")
        with refused(errors.LabelNotFound, "Container a has no label TEST.y"):
            porto.set_label("a", "TEST.y", "3", prev_value="1")
        porto.set_label("a", "TEST.y", "new", prev_value="")
        assert porto.get_property("a", "labels") == "TEST.x: 2; TEST.y: new"

    def test_a_state_it_is_in(self, porto: Client) -> None:
        porto.set_label("a", "TEST.x", "1", state="stopped")
        with refused(errors.InvalidState):
            porto.set_label("a", "TEST.x", "2", state="running")
        assert porto.get_property("a", "labels[TEST.x]") == "1"


class TestCounting:
    def test_up_and_down(self, porto: Client) -> None:
        assert porto.inc_label("a", "TEST.n") == 1
        assert porto.inc_label("a", "TEST.n", 5) == 6
        assert porto.inc_label("a", "TEST.n", -10) == -4
        assert porto.get_property("a", "labels[TEST.n]") == "-4"

    def test_what_is_no_number(self, porto: Client) -> None:
        porto.set_label("a", "TEST.x", "abc")
        with refused(errors.InvalidValue, "Bad int64 value: abc"):
            porto.inc_label("a", "TEST.x")

    def test_a_container_that_is_not_there(self, porto: Client) -> None:
        with refused(errors.ContainerDoesNotExist, "container nope not found"):
            porto.inc_label("nope", "TEST.x")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"label": "TEST.x"}, {("a", "TEST.x"), ("b", "TEST.x")}),
        ({"label": "TEST.*"}, {("a", "TEST.x"), ("b", "TEST.x"), ("a/c", "TEST.y")}),
        ({"label": "***"}, {("a", "TEST.x"), ("b", "TEST.x"), ("a/c", "TEST.y"), ("a/c", "OTHER.x")}),
        ({"label": "TEST.x", "value": "2"}, {("b", "TEST.x")}),
        ({"label": "***", "mask": "a/*"}, {("a/c", "TEST.y"), ("a/c", "OTHER.x")}),
        ({"label": "TEST.*", "state": "meta"}, {("b", "TEST.x")}),
        ({"label": "NOPE.x"}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_finding(porto: Client, options: dict[str, Any], found: set[tuple[str, str]]) -> None:
    porto.create("b")
    porto.create("a/c")
    porto.start("b")
    for name, label, value in (
        ("a", "TEST.x", "1"),
        ("b", "TEST.x", "2"),
        ("a/c", "TEST.y", "1"),
        ("a/c", "OTHER.x", "1"),
    ):
        porto.set_label(name, label, value)
    assert {(entry.name, entry.label) for entry in porto.find_label(**options)} == found
