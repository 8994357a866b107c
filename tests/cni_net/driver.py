"""Daemons in small, to be killed: the plugin alone, one sandbox attached and detached.

::

    python -m tests.cni_net.driver DIRECTORY

Forks a daemon for each line it reads, since an interpreter takes longer to start than all the rest. With
``line NUMBER`` it kills itself with SIGKILL before it executes that many lines of the plugin's code; with 0 it only
says how many there are. With ``start NUMBER`` it says when it is about to start that many processes. Otherwise it says
what it does.

:class:`Driver` is the other end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import shim_cni_net

from shim_core.types import PortMapping
from tests.cni_net.support import REAL_PLUGINS, Node, sandbox

POD = sandbox(
    7,
    port_mappings=(PortMapping("tcp", 80, 31080),),
    annotations={"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "10M"},
)
_ENDED = "ended"
_SOURCES = str(Path(shim_cni_net.__file__).parent)


class Executioner:
    """Counts the lines of the plugin that are executed, in all threads, and strikes at one of them."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.executed = 0

    def start(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_SOURCES):
            return None
        if event == "line":
            self.executed += 1
            if self.executed == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._trace


class Driver:
    """Has daemons started, one at a time, and hears what they say."""

    def __init__(self, directory: Path) -> None:
        argv = [sys.executable, "-m", __name__, str(directory)]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, bufsize=1
        )

    @contextmanager
    def daemon(self, how: str = "") -> Iterator[Daemon]:
        """A daemon that has ended when this does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{how}\n")
        daemon = Daemon(self._process.stdout)
        yield daemon
        daemon.wait()

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


class Daemon:
    """A daemon that a driver has started.

    :param output: what it says, and its driver when it has ended.
    """

    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self._status: int | None = None
        self._pid = int(self.hear())

    def hear(self) -> str:
        """The next thing it says."""
        line = self._line()
        assert self._status is None, f"it has ended, exit status {self._status}"
        return line

    def kill(self) -> None:
        try:
            os.kill(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has come to its end

    def wait(self) -> int:
        """Its exit status; a signal's number is negative."""
        while self._status is None:
            self._line()
        return self._status

    def _line(self) -> str:
        line = self._output.readline()
        assert line, "the driver has ended"
        if line.startswith(_ENDED):
            self._status = int(line.removeprefix(_ENDED))
        return line.rstrip("\n")


def node(directory: Path) -> Node:
    """The node that driver and test share."""
    return Node(directory, bin_dirs=[REAL_PLUGINS])


def main(directory: Path) -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(directory, line.split())
        _say(f"{_ENDED} {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


def _run(directory: Path, how: list[str]) -> None:
    """A daemon's life."""
    _say(str(os.getpid()))
    try:
        daemon = node(directory)
        match how:
            case ["line", number]:
                executioner = Executioner(int(number))
                executioner.start()
                _attach_and_detach(daemon)
                _say(str(executioner.executed))
            case ["start", number]:
                _announce(int(number))
                _attach_and_detach(daemon)
            case _:
                _attach_and_detach(daemon)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _attach_and_detach(daemon: Node) -> None:
    with daemon:
        _say("attach")
        daemon.attach(POD)
        _say("detach")
        daemon.detach(POD)
    _say("done")


def _announce(number: int) -> None:
    """Say ``start`` just before so many processes have been started."""
    started = 0

    def on_event(event: str, _arguments: Any) -> None:
        nonlocal started
        if event == "subprocess.Popen":
            started += 1
            if started == number:
                _say("start")

    sys.addaudithook(on_event)


def _say(line: str) -> None:
    """In one piece: another thread may strike at any time."""
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
