"""A daemon in small, to be killed: the plugin alone, one sandbox attached, confirmed, detached.

::

    python -m tests.cni_net.driver DIRECTORY
    python -m tests.cni_net.driver DIRECTORY --line NUMBER
    python -m tests.cni_net.driver DIRECTORY --start NUMBER

Says what it does. With ``--line`` it kills itself with SIGKILL before it executes that many lines of the plugin's
code; with 0 it only says how many there are. With ``--start`` it says when it is about to start that many processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import shim_cni_net

from shim_core.types import PortMapping
from tests.cni_net.support import REAL_PLUGINS, Node, sandbox

POD = sandbox(
    7,
    port_mappings=(PortMapping("tcp", 80, 31080),),
    annotations={"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "10M"},
)
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


def node(directory: Path) -> Node:
    """The node that driver and test share."""
    return Node(directory, bin_dirs=[REAL_PLUGINS])


def announce(number: int) -> None:
    """Say ``start`` just before so many processes have been started."""
    started = 0

    def on_event(event: str, _arguments: Any) -> None:
        nonlocal started
        if event == "subprocess.Popen":
            started += 1
            if started == number:
                os.write(1, b"start\n")

    sys.addaudithook(on_event)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--line", type=int)
    parser.add_argument("--start", type=int)
    options = parser.parse_args(argv)
    daemon = node(options.directory)
    executioner = Executioner(options.line or 0)
    if options.line is not None:
        executioner.start()
    if options.start is not None:
        announce(options.start)
    with daemon:
        print("attach", flush=True)
        daemon.attach(POD)
        print("detach", flush=True)
        daemon.detach(POD)
    print(executioner.executed, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
