"""Undoing the steps of a call that failed half-way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger("shim.porto_runtime.undo")


class Undo:
    """Steps to be taken back in reverse when the block ends with an error.

    ::

        with Undo("RunPodSandbox 4f1c") as undo:
            undo.add("detach the network", detach)   # before the step that may half-succeed
            attach()
            undo.keep()                               # all went well

    A step that can't be undone is logged and kept in ``failed``; it neither stops the others nor hides the first error.
    """

    def __init__(self, what: str) -> None:
        self.failed: list[str] = []
        self._what = what
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, step: Callable[[], object]) -> None:
        self._steps.append((name, step))

    def keep(self) -> None:
        """What was done stays."""
        self._steps.clear()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if err is None:
            return
        while self._steps:
            name, step = self._steps.pop()
            try:
                step()
            except Exception as failure:
                self.failed.append(name)
                logger.warning("%s: undoing failed: %s: %s", self._what, name, failure)
