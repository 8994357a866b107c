"""Killing what has just ended by itself: portod answers in several ways, and all of them are fine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
from shim_porto_runtime import sandbox
from shim_porto_runtime.runtime import Runtime

from porto_api import errors
from shim_core.errors import Internal, Unavailable


@dataclass
class EndedPorto:
    """A portod whose containers have ended."""

    answer: errors.PortoError

    def kill(self, _name: str, _number: int) -> None:
        raise self.answer


@dataclass
class Parts:
    """Of a Runtime what this needs."""

    porto: EndedPorto


def kill(answer: errors.PortoError) -> None:
    sandbox.kill(cast("Runtime", Parts(EndedPorto(answer))), "a/b")


@pytest.mark.parametrize(
    "answer",
    [
        errors.InvalidState("invalid container state=dead"),
        errors.ContainerDoesNotExist("container a/b not found"),
        errors.Unknown("No such process: kill(17)"),
        errors.Unknown("Task is not running"),
    ],
)
def test_it_is_dead(answer: errors.PortoError) -> None:
    kill(answer)


def test_anything_else_is_told() -> None:
    with pytest.raises(Internal, match="signal 9"):
        kill(errors.Unknown("Operation not permitted: kill(17)"))
    with pytest.raises(Unavailable):
        kill(errors.SocketUnavailable("no portod"))
