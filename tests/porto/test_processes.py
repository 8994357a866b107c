"""Finding the container of a process, taking processes in, and translating paths."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from porto_api import Client, errors
from tests.porto.support import refused, root_pid, start


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as made:
        yield made
        made.kill()


def test_locating(porto: Client, process: subprocess.Popen[bytes]) -> None:
    start(porto, "a")
    start(porto, "a/b")
    assert porto.locate_process(root_pid(porto, "a")) == "a"
    assert porto.locate_process(root_pid(porto, "a/b"), "sleep") == "a/b"
    assert porto.locate_process(os.getpid()) == "/"
    with pytest.raises(errors.PortoError):
        porto.locate_process(root_pid(porto, "a"), "other")
    with pytest.raises(errors.PortoError):
        porto.locate_process(1 << 22)


def test_taking_one_in(porto: Client, process: subprocess.Popen[bytes]) -> None:
    start(porto, "a", isolate=False)
    porto.attach_process("a", process.pid, "sleep")
    assert porto.locate_process(process.pid) == "a"
    start(porto, "a/b", isolate=False)
    porto.attach_process("a/b", process.pid, "sleep")
    assert porto.locate_process(process.pid) == "a/b"
    porto.destroy("a")
    assert process.wait(timeout=60) == -9


def test_one_that_is_another(porto: Client, process: subprocess.Popen[bytes]) -> None:
    start(porto, "a")
    for name, comm in (("a", "other"), ("nope", "sleep")):
        with pytest.raises(errors.PortoError):
            porto.attach_process(name, process.pid, comm)
    with refused(errors.InvalidState, "new container must be not isolated from current"):
        porto.attach_process("a", process.pid, "sleep")
    porto.create("stopped")
    with refused(errors.InvalidState):
        porto.attach_process("stopped", process.pid, "sleep")
    assert porto.locate_process(process.pid) == "/"


def test_paths(porto: Client, root: str) -> None:
    start(porto, "r", root=root)
    os.makedirs(f"{root}/inner/bin")
    os.link(f"{root}/bin/busybox", f"{root}/inner/bin/sleep")
    start(porto, "r/c", root="/inner")
    assert porto.convert_path("/tmp", "r", "/") == f"{root}/tmp"
    assert porto.convert_path(f"{root}/tmp", "/", "r") == "/tmp"
    assert porto.convert_path(root, "/", "r") == "/"
    assert porto.convert_path("/x", "r/c", "r") == "/inner/x"
    assert porto.convert_path("/x", "r/c", "/") == f"{root}/inner/x"
    assert porto.convert_path("/tmp", "r", "r") == "/tmp"
    assert porto.convert_path("/tmp", "r", "self") == f"{root}/tmp"
    with refused(errors.InvalidValue, "Path is unreachable"):
        porto.convert_path("/tmp", "/", "r")
    with refused(errors.ContainerDoesNotExist, "container nope not found"):
        porto.convert_path("/x", "nope", "/")
