"""A daemon in which something is killed at a chosen moment: ``python -m tests.embedded_porto.crashing FILE ...``.

Calls of the package's own functions are counted in the daemon (FILE), in its keeper (``FILE.keeper``), and in every
process the keeper forks (``FILE.forked``), each by itself. Counting begins once the file is there. It holds the number
of the call at which something ends as by SIGKILL, and whose pid that is: 0 is the process that counts. At call 0
nothing ends, and ``FILE.count`` is kept up to date instead.
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
_BOOT = """
import sys
sys.path[:0] = [sys.argv.pop(), {tests!r}]
from tests.embedded_porto.crashing import be_keeper
be_keeper({file!r})
"""


class Countdown:
    """Counts calls while its file exists."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._count = 0
        self._limit = -1
        self._victim = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Count from now on, in all threads."""
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call" or _PACKAGE not in frame.f_code.co_filename:
            return
        with self._lock:
            try:
                armed = self._file.read_text()
            except FileNotFoundError:
                self._limit = -1
                return
            if self._limit < 0:
                self._limit, self._victim = map(int, armed.split())
                self._count = 0
            self._count += 1
            if self._limit == 0:
                # Whoever reads it does so at any time.
                count = Path(f"{self._file}.count")
                whole = Path(f"{count}.new")
                whole.write_text(str(self._count))
                whole.rename(count)
            elif self._count == self._limit:
                os.kill(self._victim or os.getpid(), signal.SIGKILL)


def boot(file: str) -> str:
    """What a keeper's interpreter is given to execute."""
    return _BOOT.format(tests=str(Path(__file__).parents[2]), file=file)


def be_keeper(file: str) -> None:
    """What the daemon's keeper executes instead of its own main function."""
    from shim_embedded_porto.keeper import main as run

    os.register_at_fork(after_in_child=lambda: Countdown(f"{file}.forked").begin())
    Countdown(f"{file}.keeper").begin()
    run()


def main() -> None:
    file = sys.argv.pop(1)
    Countdown(file).begin()
    from shim_embedded_porto import tasks
    from shim_embedded_porto.__main__ import main as run

    tasks._BOOT = boot(file)
    sys.exit(run())


if __name__ == "__main__":
    main()
