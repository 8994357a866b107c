"""Every test gets servers of its own, and none may leave threads, descriptors or processes behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shim_streaming.loop import Loop

from tests.streaming.harness import Harness, eventually
from tests.streaming.pods import Answer, Pod

Serve = Callable[..., Harness]


def streaming_threads() -> list[str]:
    """Names of the threads that belong to streaming."""
    prefixes = ("streaming", "exec-", "attach-", "portforward-")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefixes)]


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers: ``serve(keys=..., limits=..., runtime=...)``."""
    before = open_descriptors()
    started: list[Harness] = []

    def start(*args: Any, **kwargs: Any) -> Harness:
        started.append(Harness(*args, **kwargs))
        return started[-1]

    yield start
    for harness in started:
        harness.close()
        assert harness.sessions() == 0
    for harness in started:
        for container in harness.runtime.containers.values():
            container.close()
    eventually(lambda: not streaming_threads(), f"threads ended: {streaming_threads()}")
    eventually(lambda: open_descriptors() <= before, "descriptors closed")


@pytest.fixture
def harness(serve: Serve) -> Harness:
    """A server with the usual settings."""
    return serve()


@pytest.fixture
def pods() -> Iterator[Callable[[Answer], Pod]]:
    made: list[Pod] = []

    def make(answer: Answer) -> Pod:
        made.append(Pod(answer))
        return made[-1]

    yield make
    for pod in made:
        pod.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An event loop of the server's."""
    made = Loop()
    yield made
    made.close()
