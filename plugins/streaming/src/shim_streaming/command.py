"""Exec and attach: the runtime's hook in a thread of its own, and the copying between its streams and the client."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from shim_core.context import CallContext
from shim_core.errors import ShimError
from shim_core.types import AttachSession, ExecSession
from shim_streaming import plumbing, status
from shim_streaming.channels import CommandChannels, Role, SpdyChannels, WebSocketChannels
from shim_streaming.handshake import CommandProtocol
from shim_streaming.pipes import Sink, Source
from shim_streaming.plumbing import Ends, SizeReader
from shim_streaming.session import Environment, Session
from shim_streaming.status import Status
from shim_streaming.tickets import CommandTicket

logger = logging.getLogger("shim.streaming.command")

Resizer = Callable[[int, int], None]

_DOING = {"exec": "executing command in container", "attach": "attaching to container"}


class _Output:
    """Where the process's output comes from, and what of it must still be passed on once the process has ended."""

    __slots__ = ("fd", "left_bytes", "role", "source")

    def __init__(self, role: Role, fd: int) -> None:
        self.role = role
        self.fd = fd
        self.source: Source | None = None
        self.left_bytes = 0

    @property
    def ended(self) -> bool:
        return self.source is None or self.source.closed


class CommandSession(Session):
    """One exec or attach.

    The client opens its streams; then pipes or a terminal are made, the hook is called, and bytes flow until it
    returns. Output written before that is passed on to the end, however slow the client. What a process left in the
    background writes afterwards is passed on while it comes, for a limited time: it may hold the pipe open for ever.
    """

    def __init__(
        self, environment: Environment, context: CallContext, ticket: CommandTicket, protocol: CommandProtocol
    ) -> None:
        super().__init__(environment, context, ticket.kind)
        self._ticket = ticket
        self._protocol = protocol
        self._channels: CommandChannels
        self._stdin: Sink
        self._started_at = 0.0
        self._ours = Ends()
        self._outputs: list[_Output] = []
        self._sizes = SizeReader()
        self._size: tuple[int, int] | None = None
        self._resizer: Resizer | None = None
        self._last_input = b"\n"
        self._launched = False
        self._outcome: Status | None = None
        self._concluded = False
        self._draining = False
        self._last_output_at = 0.0

    # -- the client ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._stdin = Sink(self.loop, self.pressure, self._stdin_finished)
        if not self._ticket.stdin:
            self._stdin.close()
        make = WebSocketChannels if self._protocol.websocket else SpdyChannels
        self._channels = make(self._ticket, self._protocol, self.transport.write)
        if self._channels.ready:
            self._launch()
        else:
            self.loop.call_later(self.environment.limits.creation_timeout_s, self._too_slow)

    def consume(self, data: bytes) -> None:
        try:
            for role, payload in self._channels.receive(data):
                self.active()
                if role is Role.RESIZE:
                    self._resized(payload)
                else:
                    self._input(payload)
        finally:
            self._stdin.flush()
        if self._channels.ready and not self._launched and not self._concluded:
            self._launch()

    def _input(self, payload: memoryview | None) -> None:
        if payload is None:
            self._end_input()
        elif payload:
            if self._on_terminal:
                self._last_input = bytes(payload[-1:])
            self._stdin.write(payload)

    def _end_input(self) -> None:
        if self._on_terminal:
            # A terminal has no end of its own. The first character only pushes out a line that was begun.
            begun = self._last_input not in (b"\n", b"\r", plumbing.END_OF_INPUT)
            self._stdin.write(memoryview(plumbing.END_OF_INPUT * (2 if begun else 1)))
            self._last_input = plumbing.END_OF_INPUT
            self._stdin.flush()
        else:
            self._stdin.end()

    @property
    def _on_terminal(self) -> bool:
        return self._ticket.tty and self._ticket.kind == "exec"

    def _too_slow(self) -> None:
        if not self._launched:
            limit_s = self.environment.limits.creation_timeout_s
            logger.warning("[%s] %s: closed: streams missing", self.context.request_id, self.name)
            self.give_up(f"the client has not opened all of its streams within {limit_s:g} seconds")
            self.end_after(self.environment.limits.linger_s)

    def client_gone(self) -> None:
        if not self._launched or self._outcome is not None:
            self.loop.stop()
            return
        if self._on_terminal:
            # As when a modem hangs up: the processes on the terminal get SIGHUP.
            self._close_ours()
        else:
            self._stdin.end()
            self._stop_if_detached()

    def probe(self) -> None:
        self._channels.probe()

    def abandon(self, err: Exception) -> None:
        self._concluded = True
        self._channels.abandon(err)

    def give_up(self, reason: str) -> None:
        self._conclude(status.failed(reason))

    # -- the hook ------------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        ticket = self._ticket
        self._launched = True
        self._started_at = time.monotonic()
        try:
            if self._on_terminal:
                self._ours, theirs = self._open_terminal()
            else:
                self._ours, theirs = plumbing.open_pipes(stdin=ticket.stdin, stdout=ticket.stdout, stderr=ticket.stderr)
        except OSError as err:
            self._conclude(status.failed(f"no streams can be opened on the node: {err.strerror}"))
            return
        try:
            self.environment.threads.start(f"{self.name}-{self.context.request_id}", lambda: self._call_hook(theirs))
        except RuntimeError:
            theirs.close()
            self._conclude(status.failed("the node has no more threads to give"))
            return
        logger.info("[%s] %s started in %s", self.context.request_id, self.name, ticket.container_id[:13])
        if self._ours.stdin is not None and ticket.stdin:
            self._stdin.open(self._ours.stdin)
        for role, fd in ((Role.STDOUT, self._ours.stdout), (Role.STDERR, self._ours.stderr)):
            if fd is not None:
                self._read_output(_Output(role, fd))

    def _open_terminal(self) -> tuple[Ends, Ends]:
        session = ExecSession(self._ticket.container_id, self._ticket.command, tty=True)
        try:
            made = self.environment.hooks.stream_terminal(session=session, context=self.context)
        except ShimError:
            made = None  # it will say so again when it is to run the command
        except Exception:
            logger.exception("[%s] exec: no terminal in the container", self.context.request_id)
            made = None
        return plumbing.open_terminal() if made is None else plumbing.ends_of_terminal(*made)

    def _read_output(self, output: _Output) -> None:
        wanted = output.role is not Role.STDOUT or self._ticket.stdout
        output.source = Source(
            self.loop,
            output.fd,
            self.transport,
            lambda data: self._output(output, data if wanted else b"", len(data)),
            lambda _err: self._output_ended(),
        )
        self._outputs.append(output)

    def _call_hook(self, theirs: Ends) -> None:
        """In a thread of its own: have the runtime do it."""
        request_id = self.context.request_id
        outcome = status.failed(f"error {_DOING[self.name]}: the log of portoshim has it under [{request_id}]")
        try:
            outcome = self._ask_runtime(theirs)
        except ShimError as err:
            outcome = status.failed(f"error {_DOING[self.name]}: {err.message}")
        except Exception:
            # Its text may hold anything: it goes to the log, and never to a client.
            logger.exception("[%s] %s: the runtime failed", request_id, self.name)
        finally:
            theirs.close()
            self.loop.call_threadsafe(lambda: self._returned(outcome))

    def _ask_runtime(self, theirs: Ends) -> Status:
        ticket, hooks = self._ticket, self.environment.hooks
        if ticket.kind == "exec":
            exec_session = ExecSession(
                ticket.container_id, ticket.command, ticket.tty, theirs.stdin, theirs.stdout, theirs.stderr
            )
            code = hooks.stream_exec(session=exec_session, context=self.context)
            return status.failed("no runtime plugin runs commands") if code is None else status.exited(code)
        attach_session = AttachSession(
            ticket.container_id, ticket.tty, theirs.stdin, theirs.stdout, theirs.stderr, self._on_resize
        )
        done = hooks.stream_attach(session=attach_session, context=self.context)
        return status.failed("no runtime plugin attaches") if done is None else status.success()

    def _returned(self, outcome: Status) -> None:
        self._outcome = outcome
        took_s = time.monotonic() - self._started_at
        logger.info("[%s] %s ended: %s, %.1f s", self.context.request_id, self.name, outcome.summary, took_s)
        if self.client_is_gone:
            self.loop.stop()
            return
        self._stdin.close()
        for output in self._outputs:
            output.left_bytes = 0 if output.ended else plumbing.unread_bytes(output.fd)
        self._drain()

    # -- window sizes --------------------------------------------------------------------------------------------------

    def _resized(self, payload: memoryview | None) -> None:
        if payload is None or not self._ticket.tty:
            return
        for size in self._sizes.feed(payload):
            self._size = size
            self._apply_size()

    def _on_resize(self, resizer: Resizer) -> None:
        """The runtime wants to know sizes. From any thread."""
        self.loop.call_threadsafe(lambda: self._set_resizer(resizer))

    def _set_resizer(self, resizer: Resizer) -> None:
        self._resizer = resizer
        self._apply_size()

    def _apply_size(self) -> None:
        if self._size is None:
            return
        columns, rows = self._size
        try:
            if self._on_terminal and self._ours.stdout is not None:
                plumbing.set_window_size(self._ours.stdout, columns, rows)
            elif self._resizer is not None:
                self._resizer(columns, rows)
        except Exception:
            self._resizer = None  # once is enough for the log
            logger.exception("[%s] %s: the window's size can't be set", self.context.request_id, self.name)

    # -- output, and its end -------------------------------------------------------------------------------------------

    def _output(self, output: _Output, data: bytes, size_bytes: int) -> None:
        self.active()
        if data and not self.client_is_gone:
            self._channels.send(output.role, data)
        if self._outcome is not None:
            self._last_output_at = time.monotonic()
            output.left_bytes -= size_bytes
            self._drain()

    def _output_ended(self) -> None:
        if self._outcome is not None:
            self._drain()

    def _drain(self) -> None:
        """The process has ended: conclude once its output is passed on."""
        if self._concluded or self._outcome is None:
            return
        open_outputs = [output for output in self._outputs if not output.ended]
        if not open_outputs:
            self._conclude(self._outcome)
        elif not self._draining and all(output.left_bytes <= 0 for output in open_outputs):
            # What comes from here on is written by something that the process has left behind.
            self._draining = True
            self._last_output_at = time.monotonic()
            self.loop.call_later(self.environment.limits.drain_total_s, self._stop_draining)
            self._await_silence()

    def _await_silence(self) -> None:
        now, quiet_s = time.monotonic(), self.environment.limits.drain_quiet_s
        if any(output.source is not None and output.source.resting for output in self._outputs):
            self._last_output_at = now  # it isn't silent, the client is slow
        if now < self._last_output_at + quiet_s:
            self.loop.call_at(self._last_output_at + quiet_s, self._await_silence)
        else:
            self._stop_draining()

    def _stop_draining(self) -> None:
        if self._outcome is not None:
            self._conclude(self._outcome)

    def _conclude(self, outcome: Status) -> None:
        if self._concluded:
            return
        self._concluded = True
        for output in self._outputs:
            if output.source is not None:
                output.source.close()
        self._channels.conclude(outcome)
        self.finish()

    def _stdin_finished(self) -> None:
        if self._stop_if_detached():
            return
        if self._ours.stdin is not None and not self._on_terminal:
            fd, self._ours = self._ours.stdin, Ends(None, self._ours.stdout, self._ours.stderr)
            self.loop.forget(fd)
            os.close(fd)

    def _stop_if_detached(self) -> bool:
        """An attach whose client is gone is over once the last input has been passed on.

        It is cancelled before stdin is closed, so that the runtime can tell it from a client that has ended its input.
        """
        detached = self.client_is_gone and self.name == "attach" and self._stdin.finished
        if detached:
            self.loop.stop()
        return detached

    def clean_up(self) -> None:
        self._close_ours()

    def _close_ours(self) -> None:
        self._stdin.close()
        for output in self._outputs:
            if output.source is not None:
                output.source.close()
        ours, self._ours = self._ours, Ends()
        for fd in {ours.stdin, ours.stdout, ours.stderr} - {None}:
            if fd is not None:
                self.loop.forget(fd)
        ours.close()
