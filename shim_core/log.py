"""Where the log goes: a file that may be rotated at any time, and standard error."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import WatchedFileHandler
from pathlib import Path

from shim_core.errors import StartupError

FILE_NAME = "portoshim.log"
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


def set_up(logs_dir: str, *, debug: bool) -> None:
    """Log to ``logs_dir``/portoshim.log, which may be renamed under us, and to standard error.

    :raises StartupError: the directory can't be made or written.
    """
    directory = Path(logs_dir)
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        # The mode holds whatever the umask: requests name what runs on the node.
        fd = os.open(directory / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        os.close(fd)
        to_file = WatchedFileHandler(directory / FILE_NAME, encoding="utf-8", errors="backslashreplace")
    except OSError as err:
        raise StartupError(f"{err.filename or logs_dir}: {err.strerror}; set Portoshim.LogsDir elsewhere") from err
    set_up_stderr(debug=debug)
    to_file.setFormatter(_formatter())
    logging.getLogger("shim").addHandler(to_file)


def set_up_stderr(*, debug: bool) -> None:
    """Log to standard error alone: until the configuration is read, and for commands that don't serve."""
    root = logging.getLogger("shim")
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(_formatter())
    root.addHandler(to_stderr)


def _formatter() -> logging.Formatter:
    return _OneLine(_FORMAT, _TIME)


class _OneLine(logging.Formatter):
    """Keeps a message on one line (a traceback follows on its own): text from outside can't forge a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")
