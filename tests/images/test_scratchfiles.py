"""Files that are written again and again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from shim_porto_runtime.images.scratchfiles import ScratchFiles


def test_a_file_is_used_again_while_another_is_in_use(tmp_path: Path) -> None:
    files = ScratchFiles(tmp_path, ".x")
    with files.borrow() as kept:
        kept.write_text("kept")
        with files.borrow() as first:
            first.write_text("first")
        with files.borrow() as second:
            assert second == first
            assert second.read_text() == "first"
            with files.borrow() as third:
                assert third not in (kept, second)
        assert kept.read_text() == "kept"


def test_none_is_left_when_none_is_in_use(tmp_path: Path) -> None:
    files = ScratchFiles(tmp_path, ".x")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(files.borrow()).touch()
        assert len(list(tmp_path.iterdir())) == 3
    assert not list(tmp_path.iterdir())


def test_after_an_error_it_is_gone(tmp_path: Path) -> None:
    """Whoever was given its path may still be reading it."""
    files = ScratchFiles(tmp_path, ".x")
    used: list[Path] = []

    def fail() -> None:
        with files.borrow() as bad:
            bad.touch()
            used.append(bad)
            raise ValueError("no good")

    with files.borrow():
        with pytest.raises(ValueError, match="no good"):
            fail()
        assert not used[0].exists()
        with files.borrow() as other:
            assert other != used[0]


def test_a_file_that_was_moved_away(tmp_path: Path) -> None:
    files = ScratchFiles(tmp_path, ".x")
    with files.borrow(), files.borrow() as moved:
        moved.touch()
        moved.rename(tmp_path / "elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
