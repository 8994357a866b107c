"""Values as Porto reads and writes them, where the wire tests don't look."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_embedded_porto import text
from shim_embedded_porto.errors import Fault

WORDS = st.text(string.ascii_letters + string.digits + " ;:\\\t=", min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.lists(WORDS, min_size=1), min_size=1))
def test_nested_lists_come_back(lines: list[list[str]]) -> None:
    assert text.split_nested(text.merge_nested(lines, " ", ";").replace(" ", "\x00"), "\x00", ";") or lines == []
    written = text.merge_nested(lines, ":", ";")
    assert text.split_nested(written, ":", ";") == lines


@given(st.lists(WORDS))
def test_lists_come_back(words: list[str]) -> None:
    assert text.split(text.merge(words, ";"), ";") == words


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), st.text(string.ascii_letters, min_size=1)))
def test_maps_come_back(values: dict[str, str]) -> None:
    assert text.parse_map(text.format_map(values)) == values


@given(st.frozensets(st.integers(0, 300)))
def test_sets_of_numbers_come_back(numbers: frozenset[int]) -> None:
    assert text.parse_bitmap(text.format_bitmap(numbers)) == numbers


@given(st.integers(0, (1 << 64) - 1))
def test_power_comes_back(power: int) -> None:
    assert text.parse_cpu_power(text.format_cpu_power(power), 4) == power


@given(st.text())
def test_junk_is_a_fault_and_nothing_else(junk: str) -> None:
    for parse in (
        text.parse_size,
        text.parse_nsec,
        text.parse_int,
        text.parse_octal,
        text.parse_bitmap,
        text.parse_map,
    ):
        try:
            parse(junk)
        except Fault:
            pass
    try:
        text.parse_cpu_power(junk, 2)
    except Fault:
        pass


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0B"), (1023, "1023B"), (1024, "1K"), (1536, "1.5K"), (1 << 30, "1G"), (1 << 60, "1E")]
)
def test_sizes_to_be_read(value: int, shown: str) -> None:
    assert text.format_size(value) == shown


@pytest.mark.parametrize(
    ("name", "mask", "wanted"),
    [
        ("a/b/c", "***", True),
        ("a/b/c", "a***", True),
        ("a/b/c", "***c", True),
        ("a/b/c", "a/*/c", True),
        ("a/b/c", "a/*", False),
        ("ab", "a?", True),
        ("a/", "a?", False),
        ("a1", "a[0-9]", True),
        ("ab", "a[!0-9]", True),
        ("a*", "a\\*", True),
        ("ab", "a\\*", False),
        ("a.b", "a.b", True),
        ("axb", "a.b", False),
        ("a(b", "a(b", True),
    ],
)
def test_masks(name: str, mask: str, wanted: bool) -> None:
    assert text.matches(name, mask) is wanted
