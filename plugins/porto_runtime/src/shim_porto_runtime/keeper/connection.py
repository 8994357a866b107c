"""Reaches the keeper for :class:`~shim_porto_runtime.keeper.client.KeeperClient`, and starts it."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shim_core import errors
from shim_porto_runtime.keeper import protocol

logger = logging.getLogger("shim.porto_runtime.keeper")

_RETRY_PAUSE_S = 0.02
_START_PAUSE_S = 0.1


class Connector:
    """Connects to the keeper of a directory. To be used from any thread.

    :param idle_exit_s: how long a keeper started here stays with nothing to do.
    :param log_file: where a keeper started here writes its messages.
    """

    def __init__(self, directory: str, idle_exit_s: float, log_file: str) -> None:
        self.log_file = log_file
        self._directory = directory
        self._idle_exit_s = idle_exit_s
        self._starting = threading.Lock()

    def call(self, request: dict[str, Any], timeout_s: float, *, start: bool) -> tuple[dict[str, Any], Sequence[int]]:
        """One request and its answer; asked again while the keeper restarts.

        :param start: start the keeper if there is none.
        :raises NotFound: there is none.   :raises Unavailable: it can't be reached.
        :raises DeadlineExceeded: it hasn't answered in time.   :raises ShimError: what it answered.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self.connect(deadline, start=start) as connection:
                try:
                    protocol.send(connection, {"v": protocol.VERSION, **request})
                    packet = protocol.receive(connection)
                except TimeoutError:
                    raise errors.DeadlineExceeded(
                        f"the stream keeper hasn't answered {request['op']} in time"
                    ) from None
                except (OSError, protocol.ProtocolError):
                    packet = None
            if packet is not None:
                check(packet[0])
                return packet
            pause(deadline, f"the stream keeper has ended in the middle of {request['op']}")

    @contextmanager
    def connect(self, deadline: float, *, start: bool) -> Iterator[socket.socket]:
        """A connection, which times out at the deadline (of ``time.monotonic``).

        :raises NotFound: no keeper runs, and none shall be started.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            while True:
                try:
                    with protocol.Address(self._directory) as path:
                        connection.settimeout(remaining(deadline))
                        connection.connect(path)
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    if not start:
                        raise errors.NotFound("no stream keeper runs: no container has streams") from None
                    self._start(deadline)
                except BlockingIOError:
                    pause(deadline, "the stream keeper is busy: too many wait for it")
                except TimeoutError:
                    raise errors.DeadlineExceeded("the stream keeper hasn't answered in time") from None
                except OSError as err:
                    raise errors.Unavailable(f"the stream keeper can't be reached: {err.strerror}") from err
            connection.settimeout(remaining(deadline))
            yield connection

    def run(self, mode: str, timeout_s: float) -> int:
        """Run the keeper's program, which goes into the background by itself; its exit status.

        :raises Unavailable: it can't be run, or isn't ready in time.
        """
        try:
            done = subprocess.run(
                keeper_command(self._directory, self.log_file, self._idle_exit_s, mode),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": os.defpath, "LC_ALL": "C"},  # no secret of ours shall live on in it
                start_new_session=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as err:
            raise errors.Unavailable(f"the stream keeper isn't ready in time (see {self.log_file})") from err
        except OSError as err:
            raise errors.Unavailable(f"the stream keeper can't be started: {err}") from err
        if done.returncode != 0 and done.stderr:
            logger.warning("the stream keeper: %s", done.stderr.decode(errors="replace").strip()[-500:])
        return done.returncode

    def _start(self, deadline: float) -> None:
        """Start the keeper, unless another thread just has."""
        if not self._starting.acquire(timeout=remaining(deadline)):
            raise errors.Unavailable("the stream keeper isn't started in time")
        try:
            if self._is_listening():
                return
            status = self.run("start", remaining(deadline))
        finally:
            self._starting.release()
        if status != 0:  # another shim was faster, and its keeper is about to listen; or it can't start
            pause(deadline, f"the stream keeper doesn't start (see {self.log_file})", _START_PAUSE_S)

    def _is_listening(self) -> bool:
        try:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
                protocol.Address(self._directory) as path,
            ):
                connection.setblocking(False)
                connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            pass  # whatever it is, somebody is there
        return True


def keeper_command(directory: str, log_file: str, idle_exit_s: float, mode: str) -> list[str]:
    """The command line of the keeper's program: isolated, so that it has nothing in memory but itself."""
    main = str(Path(__file__).resolve().with_name("__main__.py"))
    return [sys.executable, "-I", "-S", main, directory, log_file, str(idle_exit_s), source_digest(), mode]


def source_digest() -> str:
    """Says which code of the keeper is installed: a digest of its files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check(answer: dict[str, Any]) -> None:
    """Raise what the keeper has refused a request with."""
    if answer.get("ok") is False:
        kinds = {kind.code.name: kind for kind in errors.ShimError.__subclasses__()}
        raise kinds.get(answer.get("code", ""), errors.Internal)(answer.get("message", "the stream keeper failed"))


def remaining(deadline: float) -> float:
    """Seconds left; never 0, which a socket would take for "don't wait"."""
    return max(deadline - time.monotonic(), 0.001)


def pause(deadline: float, why: str, pause_s: float = _RETRY_PAUSE_S) -> None:
    """Wait a moment before asking again.

    :raises Unavailable: the time is up.
    """
    if time.monotonic() >= deadline:
        raise errors.Unavailable(why)
    time.sleep(pause_s)
