"""A container as the keeper sees it: the keeper's ends of its streams, its log, and who is attached."""

from __future__ import annotations

import fcntl
import os
import select

from shim_porto_runtime.keeper.logfile import LogFile
from shim_porto_runtime.keeper.pump import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from shim_porto_runtime.keeper.attach import Client, Input
    from shim_porto_runtime.keeper.journal import Journal
    from shim_porto_runtime.keeper.loop import Loop

PIPE_BYTES = 256 * 1024
"""What a container can write before it has to wait for the keeper: its memory in the kernel, at most."""
_F_SETPIPE_SZ = 1031


class Container:
    """One container.

    :param stdin: a pipe's write end, or a descriptor of its own of the terminal's master; non-blocking; None when there
        is none (any more).
    """

    __slots__ = ("clients", "id", "inputs", "log", "log_directory", "log_path", "outputs", "stdin", "stdin_once", "tty")

    def __init__(
        self,
        container_id: str,
        log_directory: str,
        log_path: str,
        outputs: list[Output],
        *,
        log: LogFile | None,
        stdin: int | None,
        stdin_once: bool,
        tty: bool,
    ) -> None:
        self.id = container_id
        self.log_directory = log_directory
        self.log_path = log_path
        self.outputs = outputs
        self.log = log
        self.stdin = stdin
        self.stdin_once = stdin_once
        self.tty = tty
        self.clients: list[Client] = []
        self.inputs: list[Input] = []
        """Attached clients that wait until stdin takes more."""

    @property
    def running(self) -> bool:
        """Whether anybody has the container's output open."""
        return any(output.fd is not None for output in self.outputs)

    def watch_stdin(self, loop: Loop) -> None:
        """Wake :attr:`inputs` when stdin takes more."""
        assert self.stdin is not None
        loop.watch(self.stdin, select.EPOLLOUT, lambda _events: self._wake_inputs(loop))

    def close_stdin(self, loop: Loop) -> bool:
        """Let the container read end-of-file; False if it has no stdin (any more)."""
        if self.stdin is None:
            return False
        stdin, self.stdin = self.stdin, None
        loop.forget(stdin)
        os.close(stdin)
        self._wake_inputs(loop)
        return True

    def _wake_inputs(self, loop: Loop) -> None:
        if self.stdin is not None:
            loop.forget(self.stdin)
        waiting, self.inputs = self.inputs, []
        for item in waiting:
            item.move()

    def entry(self) -> tuple[dict[str, Any], list[int]]:
        """What the holder keeps: a description, and the descriptors in the order of its ``fds``."""
        fds: dict[str, int] = {output.name: output.fd for output in self.outputs if output.fd is not None}
        if self.log is not None:
            fds["log"] = self.log.fd
        if self.stdin is not None:
            fds["stdin"] = self.stdin
        description = {
            "id": self.id,
            "log_directory": self.log_directory,
            "log_path": self.log_path,
            "tty": self.tty,
            "stdin_once": self.stdin_once,
            "cells": {output.name: output.cell for output in self.outputs},
            "fds": list(fds),
        }
        return description, list(fds.values())

    @classmethod
    def from_entry(cls, description: dict[str, Any], fds: Sequence[int]) -> Container:
        """The container of an :meth:`entry`."""
        by_name = dict(zip(description["fds"], fds, strict=True))
        container_id, tty = description["id"], description["tty"]
        return cls(
            container_id,
            description["log_directory"],
            description["log_path"],
            [
                Output(f"{container_id}/{name}", name, by_name.get(name), cell, terminal=tty)
                for name, cell in description["cells"].items()
            ],
            log=LogFile(by_name["log"]) if "log" in by_name else None,
            stdin=by_name.get("stdin"),
            stdin_once=description["stdin_once"],
            tty=tty,
        )


def make_streams(
    container_id: str,
    log_directory: str,
    log_path: str,
    log: LogFile | None,
    journal: Journal,
    *,
    tty: bool,
    stdin: bool,
    stdin_once: bool,
) -> tuple[Container, dict[str, int]]:
    """New pipes, or a new terminal.

    :returns: the container with the keeper's ends, and the container's ends by name (one ``terminal``, or ``stdin``,
        ``stdout``, ``stderr``), which belong to the caller.
    :raises OSError: there are no descriptors or no memory left; nothing has been made.
    """
    theirs: dict[str, int] = {}
    ours: dict[str, int] = {}
    cells: list[int] = []
    try:
        if tty:
            ours["stdout"], theirs["terminal"] = os.openpty()
            os.set_blocking(ours["stdout"], False)
            if stdin:
                ours["stdin"] = os.dup(ours["stdout"])
            names = ["stdout"]
        else:
            names = ["stdout", "stderr"]
            for name in names:
                ours[name], theirs[name] = os.pipe2(os.O_CLOEXEC)
                _enlarge(ours[name])
            if stdin:
                theirs["stdin"], ours["stdin"] = os.pipe2(os.O_CLOEXEC)
            for fd in ours.values():
                os.set_blocking(fd, False)  # our ends alone: the container's are descriptions of their own
        cells = [journal.allocate() for _ in names]
    except BaseException:
        for fd in (*ours.values(), *theirs.values()):
            os.close(fd)
        for cell in cells:
            journal.release(cell)
        raise
    outputs = [
        Output(f"{container_id}/{name}", name, ours[name], cell, terminal=tty)
        for name, cell in zip(names, cells, strict=True)
    ]
    container = Container(
        container_id, log_directory, log_path, outputs, log=log, stdin=ours.get("stdin"), stdin_once=stdin_once, tty=tty
    )
    return container, theirs


def _enlarge(fd: int) -> None:
    try:
        fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # the system's limit is lower: it works with 64 KiB, too
