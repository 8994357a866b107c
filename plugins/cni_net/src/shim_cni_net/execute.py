"""Running one CNI plugin (CNI section 2): found, started without a shell, bounded in time and output."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from shim_cni_net import processes
from shim_cni_net.netconf import NetworkConfigError, check_type
from shim_core.context import CallContext

MAX_STDOUT_BYTES = 1024 * 1024
MAX_STDERR_BYTES = 16 * 1024
_PIPE_READS = 32
_MAX_TEXT = 1024
_BUSY_WAIT_S = 5.0
_BUSY_POLL_S = 0.05
_REAP_WAIT_S = 5.0
_CONTAINER_UNKNOWN = 3
"""CNI's error code for: nothing is left to clean up."""

# What belongs to the daemon and its service manager alone; all else is passed on, as libcni does.
_PRIVATE_VARIABLES = ("CNI_", "LISTEN_", "NOTIFY_SOCKET", "PYTHON", "WATCHDOG_")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Call:
    """What a plugin is asked to do: the parameters of CNI section 2, and the names for messages."""

    plugin: str
    network: str
    command: str
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: str = ""
    operation: str = ""
    """By what its processes are found if the daemon is killed, see :mod:`shim_cni_net.processes`."""

    def __str__(self) -> str:
        return f'plugin "{self.plugin}" of network "{self.network}" failed ({self.command})'


class PluginError(Exception):
    """A plugin has failed: the text names it, its network and the command, and tells what it said."""

    def __init__(self, call: Call, problem: str, *, started: bool, code: int | None = None) -> None:
        super().__init__(f"{call}: {problem}")
        self.call = call
        self.started = started
        """False when no process of it ever ran, so that it has done nothing."""
        self.code = code
        """The code of the plugin's error document, if it printed one."""

    @property
    def nothing_left(self) -> bool:
        """The plugin says that it knows no such container, so there is nothing to delete."""
        return self.code == _CONTAINER_UNKNOWN


class Plugins:
    """The installed plugins.

    :param directories: where they are searched, in this order.   :param environment: the daemon's own.
    """

    def __init__(self, directories: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.directories = directories
        self._environment = {
            "PATH": _DEFAULT_PATH,
            **{key: value for key, value in environment.items() if not key.startswith(_PRIVATE_VARIABLES)},
            "CNI_PATH": ":".join(directories),
        }
        self._spent_s = 0.0
        self._lock = threading.Lock()

    @property
    def spent_s(self) -> float:
        """Seconds that all plugin processes have taken so far, from start to end."""
        return self._spent_s

    def find(self, name: str) -> str:
        """The path of a plugin's executable.

        :raises LookupError: there is none; the text names it and where it was searched.
        """
        try:
            check_type(name, "type")
        except NetworkConfigError as err:
            raise LookupError(str(err)) from None
        problem = "is not in"
        for directory in self.directories:
            path = os.path.join(directory, name)
            try:
                is_file = stat.S_ISREG(os.stat(path).st_mode)
            except OSError:
                continue
            if is_file and os.access(path, os.X_OK):
                return path
            problem = "is not executable in" if is_file else "is not a file in"
        raise LookupError(f'the plugin "{name}" {problem} {" or ".join(self.directories)}')

    def run(self, call: Call, stdin: bytes, timeout_s: float, context: CallContext) -> bytes:
        """Run a plugin to its end.

        :param timeout_s: then its process group is killed; likewise when the context is cancelled.
        :returns: what it printed on standard output.
        :raises PluginError: it couldn't be started, failed, took too long, printed too much.
        """
        deadline = time.monotonic() + timeout_s
        try:
            path = self.find(call.plugin)
        except LookupError as err:
            raise PluginError(call, str(err), started=False) from None
        if timeout_s <= 0:
            raise PluginError(call, "no time was left to run it", started=False)
        started, since_ticks = time.monotonic(), processes.now_ticks()
        try:
            process = self._spawn(call, path, stdin, deadline, context)
            return _Process(call, process, since_ticks).communicate(deadline, context)
        finally:
            with self._lock:
                self._spent_s += time.monotonic() - started

    def _spawn(
        self, call: Call, path: str, stdin: bytes, deadline: float, context: CallContext
    ) -> subprocess.Popen[bytes]:
        environment = {
            **self._environment,
            "CNI_COMMAND": call.command,
            "CNI_CONTAINERID": call.container_id,
            "CNI_NETNS": call.netns,
            "CNI_IFNAME": call.ifname,
            "CNI_ARGS": call.args,
            **processes.environment(call.operation),
        }
        busy_until = min(deadline, time.monotonic() + _BUSY_WAIT_S)
        # A file in memory, not a pipe: a plugin that doesn't read its input can't hold us up.
        try:
            memory = os.memfd_create(processes.configuration_name(call.operation))
        except OSError as err:
            raise PluginError(call, f"its configuration can't be handed over: {err.strerror}", started=False) from None
        with open(memory, "wb", buffering=0) as config:
            config.write(stdin)
            while True:
                config.seek(0)
                try:
                    return subprocess.Popen(
                        [path],
                        stdin=config,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        bufsize=0,
                        env=environment,
                        start_new_session=True,
                    )
                except OSError as err:
                    # The plugin is being replaced at this moment.
                    if err.errno == errno.ETXTBSY and time.monotonic() < busy_until and not context.wait(_BUSY_POLL_S):
                        continue
                    raise PluginError(call, f"{path} can't be executed: {err.strerror}", started=False) from None


class _Process:
    """A plugin that has been started.

    :param since_ticks: a time before its start, see :mod:`shim_cni_net.processes`.
    """

    def __init__(self, call: Call, process: subprocess.Popen[bytes], since_ticks: int) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._call = call
        self._process = process
        self._pipes = (process.stdout, process.stderr)
        self._since_ticks = since_ticks
        self._stdout = bytearray()
        self._stderr = bytearray()

    def communicate(self, deadline: float, context: CallContext) -> bytes:
        """Read what it prints until it ends, or until it has to be ended.

        :raises PluginError: it failed, or had to be ended.
        """
        problem = "it was given up"
        pidfd = -1
        try:
            pidfd = os.pidfd_open(self._process.pid)
            with _Waker(context) as waker:
                problem = self._wait(pidfd, waker.fd, deadline, context)
        except OSError as err:
            problem = f"it was killed because it can't be watched: {err.strerror}"
        finally:
            if pidfd >= 0:
                os.close(pidfd)
            for pipe in self._pipes:
                pipe.close()
            if problem:
                self._kill_group()
            else:
                self._process.wait()
        if problem:
            raise PluginError(self._call, self._explain(problem), started=True, code=self._code())
        return bytes(self._stdout)

    def _wait(self, pidfd: int, waker: int, deadline: float, context: CallContext) -> str:
        """Read until the process has ended. Returns what went wrong, or nothing.

        Its end counts, not that of its output: a daemon it has started may hold the pipes open for ever.
        """
        out, err = (pipe.fileno() for pipe in self._pipes)
        poller = select.poll()
        for fd in (pidfd, waker, out, err):
            poller.register(fd, select.POLLIN)
        for fd in (out, err):
            os.set_blocking(fd, False)
        ended = False
        while not ended:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return "it took too long and was killed"
            ready = {fd for fd, _ in poller.poll(left_s * 1000 + 1)}
            if waker in ready and context.cancelled:
                return "it was killed because the call was cancelled"
            ended = pidfd in ready
            # A part at a time, since the clock has to be looked at; after its end all that the pipes can hold.
            for fd in (out, err) if ended else ready & {out, err}:
                for _ in range(_PIPE_READS if ended else 1):
                    chunk = _read(fd)
                    if chunk:
                        self._keep(chunk, stdout=fd == out)
                    elif chunk == b"" and not ended:
                        poller.unregister(fd)
                    if not chunk:
                        break
            if len(self._stdout) > MAX_STDOUT_BYTES:
                return f"it printed more than {MAX_STDOUT_BYTES} bytes and was killed"
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        if status.si_code == os.CLD_EXITED:
            return f"exit status {status.si_status}" if status.si_status else ""
        return f"it was killed by signal {status.si_status}"

    def _kill_group(self) -> None:
        """End everything the plugin has started. It is not reaped yet, so its process id can't be another's."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            self._process.wait(_REAP_WAIT_S)
        except subprocess.TimeoutExpired:
            return  # stuck in the kernel
        if self._call.operation:
            # What it started may have left the group, and the group may end after its leader.
            processes.end_leftovers(self._call.operation, self._since_ticks, grace_s=0.0)

    def _keep(self, chunk: bytes, *, stdout: bool) -> None:
        if stdout:
            self._stdout.extend(chunk)
        else:
            self._stderr.extend(chunk)
            del self._stderr[:-MAX_STDERR_BYTES]

    def _document(self) -> Mapping[str, object]:
        """The error document on standard output (CNI section 5, Error); empty if there is none."""
        try:
            tree = json.loads(self._stdout[:MAX_STDOUT_BYTES])
        except (ValueError, RecursionError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def _code(self) -> int | None:
        code = self._document().get("code")
        return code if type(code) is int else None

    def _explain(self, problem: str) -> str:
        document = self._document()
        said = [str(document[key]) for key in ("msg", "details") if document.get(key)]
        if document.get("code"):
            said.append(f"code {document['code']}")
        if not document and self._stdout:
            said.append(self._stdout[:_MAX_TEXT].decode(errors="replace"))
        text = f"{one_line('; '.join(said))} ({problem})" if said else problem
        stderr = one_line(self._stderr[-_MAX_TEXT:].decode(errors="replace"))
        return f"{text}; standard error: {stderr}" if stderr else text


class _Waker:
    """A descriptor that becomes readable when the context is cancelled."""

    def __init__(self, context: CallContext) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._open = True
        self._forget = context.on_cancel(self._wake)

    def __enter__(self) -> _Waker:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        with self._lock:  # a callback may be under way
            self._open = False
            os.close(self.fd)

    def _wake(self) -> None:
        with self._lock:
            if self._open:
                os.eventfd_write(self.fd, 1)


def one_line(text: str) -> str:
    """Text from outside, fit for a message: printable, on one line, not too long."""
    printable = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return printable if len(printable) <= _MAX_TEXT else f"{printable[:_MAX_TEXT]}..."


def _read(fd: int) -> bytes | None:
    """What is there to be read; empty at the end of file, None if nothing is there yet."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None
