"""Keeping the daemon running: start it, wait until it answers, start it again should it end.

The daemon ends with the shim, also when that is killed; the containers don't: what owns them outlives both, and the
next daemon finds them again.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time

from shim_core.errors import StartupError

logger = logging.getLogger("shim.embedded_porto")

_START_S = 30.0
_STOP_S = 20.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 10.0
_STEADY_S = 60.0
"""After this long a daemon's end is no sequel of the one before."""


class Supervisor:
    """One daemon.

    :param socket: where it is to serve.
    :param arguments: of ``python -m shim_embedded_porto``, besides the socket.
    """

    def __init__(self, socket: str, arguments: list[str]) -> None:
        # -P: nothing is imported from the directory portoshim was started in.
        self._command = [sys.executable, "-P", "-m", "shim_embedded_porto", "--socket", socket, *arguments]
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._failed = ""
        self._process: subprocess.Popen[bytes] | None = None
        # The daemon asks to be told when the thread that started it has ended: so it is one that lasts.
        self._thread = threading.Thread(target=self._run, name="embedded-porto", daemon=True)
        self.restarts = 0

    @property
    def pid(self) -> int:
        """The daemon's process; 0 while there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def start(self) -> None:
        """Start the daemon; it answers when this returns.

        :raises StartupError: it doesn't, with what it said.
        """
        self._thread.start()
        self._up.wait()
        if self._failed:
            self._thread.join()
            raise StartupError(f"--embedded: the embedded Porto doesn't start: {self._failed}")

    def stop(self) -> None:
        """End the daemon. Its containers go on."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()
        self._thread.join()

    def _run(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._stopping.is_set():
            began = time.monotonic()
            status, said = self._run_once()
            if self._stopping.is_set():
                return
            if not self._up.is_set():
                self._failed = f"status {status}: {said}"
                self._up.set()
                return
            logger.error("the embedded Porto has ended, status %d; it is started again. %s", status, said)
            if time.monotonic() - began > _STEADY_S:
                delay_s = _FIRST_DELAY_S
            self._stopping.wait(delay_s)
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
            self.restarts += 1

    def _run_once(self) -> tuple[int, str]:
        """Start the daemon and see it end: its exit status, and the last of what it printed."""
        ready, written = os.pipe()
        with tempfile.TemporaryFile() as output, open(ready, "rb", buffering=0) as pipe:
            try:
                process = subprocess.Popen(
                    [*self._command, "--parent", str(os.getpid()), "--ready", str(written)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[written],
                    start_new_session=True,
                )
            finally:
                os.close(written)
            self._process = process
            if self._stopping.is_set():
                process.terminate()
            try:
                # The pipe also ends with the process.
                if select.select([pipe], [], [], _START_S)[0] and pipe.read(1):
                    self._up.set()
                elif process.poll() is None:
                    process.kill()
                status = self._wait_for_end(process)
            finally:
                self._process = None
            output.seek(max(output.seek(0, os.SEEK_END) - 2000, 0))
            return status, output.read().decode(errors="replace").strip()

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                if self._stopping.is_set():
                    logger.error("the embedded Porto did not end within %.0f s, and is killed", _STOP_S)
                    process.kill()
