"""The lock on the directory of images."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from shim_porto_runtime.images.guard import Guard


def test_alone_and_not_alone(tmp_path: Path) -> None:
    first = Guard(tmp_path)
    with first.alone() as alone:
        assert alone
    second = Guard(tmp_path)
    with first.alone() as alone:
        assert not alone
    second.close()
    with first.alone() as alone:
        assert alone
    first.close()


def test_who_asks_in_vain_keeps_what_it_has(tmp_path: Path) -> None:
    """Two that both want to be alone are never alone, at no moment."""
    guards = [Guard(tmp_path), Guard(tmp_path)]
    until = time.monotonic() + 0.5
    found: list[bool] = []

    def ask(guard: Guard) -> None:
        while time.monotonic() < until:
            with guard.alone() as alone:
                if alone:
                    found.append(alone)

    threads = [threading.Thread(target=ask, args=(guard,)) for guard in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == []
    for guard in guards:
        guard.close()


def test_nobody_enters_while_one_is_alone(tmp_path: Path) -> None:
    first = Guard(tmp_path)
    entered = threading.Event()

    def enter() -> None:
        Guard(tmp_path).close()
        entered.set()

    thread = threading.Thread(target=enter)
    with first.alone() as alone:
        assert alone
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(60)
    thread.join()
    first.close()


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    first = Guard(tmp_path)
    with pytest.raises(OSError, match="inside"), first.alone():
        raise OSError("inside")
    Guard(tmp_path).close()
    first.close()


def test_the_end_of_a_process_frees_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom shim_porto_runtime.images.guard import Guard\n"
        "guard = Guard(Path(sys.argv[1]))\nprint('here', flush=True)\ntime.sleep(100)\n"
    )
    first = Guard(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with first.alone() as alone:
            assert not alone
        other.kill()
    with first.alone() as alone:
        assert alone
    first.close()
