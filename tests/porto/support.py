"""What the tests say often: containers in few words, and errors to the letter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from porto_api import Client, errors, rpc_pb2


def spec(name: str, command: str | Sequence[str] = "", **properties: Any) -> rpc_pb2.TContainerSpec:
    """A container's spec.

    :param command: a line that Porto splits, or the words themselves; empty: a meta container.
    :param properties: fields of the message; ``env``, ``labels``, ``sysctl``, ``net``, ``bind``, ``controllers`` and
        ``capabilities`` may be plain Python.
    """
    made = rpc_pb2.TContainerSpec(name=name)
    if isinstance(command, str):
        if command:
            made.command = command
    else:
        made.command_argv.argv.extend(command)
    for key, value in properties.items():
        _set(made, key, value)
    return made


def _set(made: rpc_pb2.TContainerSpec, key: str, value: Any) -> None:
    if key == "env":
        for name, content in value.items():
            made.env.var.add(name=name, value=content)
    elif key in ("labels", "sysctl", "symlink") and isinstance(value, Mapping):
        field = getattr(made, key)
        field.SetInParent()
        for name, content in value.items():
            field.map.add(key=name, val=content)
    elif key == "net" and isinstance(value, str):
        option, *arguments = value.split()
        made.net.cfg.add(opt=option, arg=arguments)
    elif key == "bind" and isinstance(value, list):
        for line in value:
            source, target, *flags = line.split()
            made.bind.bind.add(source=source, target=target, flag=flags)
    elif key == "controllers" and isinstance(value, list):
        made.controllers.controller.extend(value)
    elif key in ("capabilities", "capabilities_ambient") and isinstance(value, list):
        getattr(made, key).SetInParent()
        getattr(made, key).cap.extend(value)
    elif key == "task_cred" and isinstance(value, tuple):
        uid, gid, *groups = value
        made.task_cred.uid, made.task_cred.gid = uid, gid
        made.task_cred.grp.extend(groups)
    elif isinstance(value, str | int | float | bool):
        setattr(made, key, value)
    else:
        getattr(made, key).CopyFrom(value)


def shell(script: str) -> list[str]:
    """The words of a command that runs a script."""
    return ["sh", "-c", script]


def start(porto: Client, name: str, command: str | Sequence[str] = "sleep 1000", **properties: Any) -> None:
    """Create and start a container."""
    porto.create_from_spec(spec(name, command, **properties), start=True)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()


def run(porto: Client, name: str, command: str | Sequence[str], **properties: Any) -> Result:
    """Run a command in a container of its own, which is gone afterwards."""
    start(porto, name, command, **properties)
    try:
        return result(porto, name)
    finally:
        porto.destroy(name)


def result(porto: Client, name: str) -> Result:
    """Wait for a command's end."""
    ended = porto.wait([name], 60)
    assert ended.state == "dead", f"{name} is {ended.state}"
    return Result(
        int(porto.get_property(name, "exit_code")),
        porto.get_property(name, "stdout"),
        porto.get_property(name, "stderr"),
    )


def state(porto: Client, name: str) -> str:
    return porto.get_property(name, "state")


def states(porto: Client) -> dict[str, str]:
    """The states of all containers."""
    return {name: value["state"] for name, value in porto.get(["***"], ["state"]).items()}  # type: ignore[misc]


def root_pid(porto: Client, name: str) -> int:
    return int(porto.get_property(name, "root_pid"))


def namespace(pid: int | str, kind: str) -> int:
    """What tells a process's namespace from others."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def cgroup_value(porto: Client, name: str, controller: str, *knobs: str) -> str:
    """What a file of a container's cgroup holds; the first of several names that is there.

    Skips the test where there is none: the machine has another version of cgroups.
    """
    directory = porto.get_property(name, f"cgroups[{controller}]")
    for knob in knobs:
        path = f"{directory}/{knob}"
        if os.path.exists(path):
            with open(path) as file:
                return file.read().strip()
    return pytest.skip(f"this machine has no {' or '.join(knobs)}")


def eventually(condition: Callable[[], object], timeout_s: float = 60.0, what: str = "it") -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} hasn't happened in time"
        time.sleep(0.01)


@contextmanager
def refused(kind: type[errors.PortoError], message: str | None = None) -> Iterator[None]:
    """What is done here has to fail with this error.

    :param message: its text, to the letter; None: any.
    """
    with pytest.raises(errors.PortoError) as caught:
        yield
    error = caught.value
    found, wanted = (
        (type(error).__name__, error.message),
        (kind.__name__, error.message if message is None else message),
    )
    assert found == wanted
