"""The directory of nodes and benchmarks: removing it must not reach what is mounted in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.scratch import mounts_below, scratch

pytestmark = pytest.mark.root


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def test_what_is_mounted_stays(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    run("mount", "-t", "tmpfs", "x", tree)
    run("mount", "--make-shared", tree)
    (tree / "inner").mkdir()
    run("mount", "-t", "tmpfs", "x", tree / "inner")
    (tree / "outer file").touch()
    (tree / "inner" / "file").touch()
    with scratch(str(tmp_path)) as directory:
        (directory / "a space").mkdir()
        run("mount", "--rbind", tree, directory / "a space")
        (directory / "own").touch()
        assert len(mounts_below(directory)) == 2
    assert not directory.exists()
    assert (tree / "outer file").exists()
    assert (tree / "inner" / "file").exists()
    assert mounts_below(tmp_path) == [str(tree), str(tree / "inner")]
    run("umount", "-R", tree)
