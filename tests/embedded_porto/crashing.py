"""A daemon that kills itself at a chosen moment: ``python -m tests.embedded_porto.crashing FILE OPTION ...``.

Once FILE is there, calls of the daemon's own functions are counted, in all threads. FILE holds the number of the call
at which the process ends as by SIGKILL; 0 counts only, and the count is found in ``FILE.count`` when FILE is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = f"{os.sep}shim_embedded_porto{os.sep}"


class Countdown:
    """Counts calls while its file exists."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._count = 0
        self._limit = -1
        self._lock = threading.Lock()

    def profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        """What the interpreter calls for every call."""
        if event != "call" or _PACKAGE not in frame.f_code.co_filename:
            return
        with self._lock:
            if self._limit < 0:
                if not os.path.exists(self._file):
                    return
                self._limit = int(self._file.read_text())
            self._count += 1
            if self._count == self._limit:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._limit == 0 and not os.path.exists(self._file):
                Path(f"{self._file}.count").write_text(str(self._count))
                self._limit, self._count = -1, 0


def main() -> None:
    countdown = Countdown(Path(sys.argv.pop(1)))
    threading.setprofile(countdown.profile)
    sys.setprofile(countdown.profile)
    from shim_embedded_porto.__main__ import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
