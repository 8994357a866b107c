"""exec over every protocol: what passes, how it ends, what the client is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import pytest

from shim_core.context import CallContext
from shim_core.errors import FailedPrecondition
from shim_core.types import ExecSession
from tests.streaming.harness import Harness, eventually, limits
from tests.streaming.local_runtime import CONTAINER
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand

Command = SpdyCommand | WebSocketCommand
Open = Callable[..., Command]

SPDY = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"]
WEBSOCKET = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "",
]
ALL = [f"spdy {name}" for name in SPDY] + [f"websocket {name}" for name in WEBSOCKET]
WITH_STATUS = [name for name in ALL if "v4" in name or "v5" in name]
WITH_END_OF_STDIN = [f"spdy {name}" for name in SPDY] + ["websocket v5.channel.k8s.io"]
BOTH = ["spdy v4.channel.k8s.io", "websocket v5.channel.k8s.io"]


def start(harness: Harness, protocol: str, *command: str, **fields: bool) -> Command:
    """Run a command over a protocol."""
    kind, _, name = protocol.partition(" ")
    url = harness.exec_url(*command, **fields)
    if kind == "websocket":
        return WebSocketCommand(url, *([name] if name else []))
    return SpdyCommand(url, name, stdin=fields.get("stdin", False), tty=fields.get("tty", False))


@pytest.mark.parametrize("protocol", ALL)
def test_output_and_errors_arrive_apart(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sh", "-c", "echo out; echo err >&2")
    assert client.protocol == protocol.partition(" ")[2]
    status = client.finish()
    assert (client.out, client.err) == (b"out\n", b"err\n")
    if protocol in WITH_STATUS:
        assert json.loads(status) == {"metadata": {}, "status": "Success"}
    else:
        assert status == b""


@pytest.mark.parametrize("protocol", WITH_STATUS)
@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("exit 255", 255)])
def test_exit_code(harness: Harness, protocol: str, command: str, code: int) -> None:
    assert start(harness, protocol, "sh", "-c", command).exit_code() == code


@pytest.mark.parametrize("protocol", [name for name in ALL if name not in WITH_STATUS])
def test_exit_code_as_text_before_version_4(harness: Harness, protocol: str) -> None:
    assert start(harness, protocol, "sh", "-c", "exit 3").finish() == b"command terminated with non-zero exit code: 3"


@pytest.mark.parametrize("code", [-1, 256, 70000])
def test_exit_codes_out_of_range_become_255(harness: Harness, code: int) -> None:
    harness.runtime.on_exec = lambda _session, _context: code
    assert start(harness, BOTH[0], "true").exit_code() == 255


@pytest.mark.parametrize("protocol", WITH_END_OF_STDIN)
def test_the_end_of_stdin_reaches_the_process(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sh", "-c", "cat; echo end", stdin=True)
    client.write(b"some input\n")
    client.wait_output(b"some input\n")
    client.close_stdin()
    client.finish()
    assert client.out == b"some input\nend\n"


@pytest.mark.parametrize("protocol", [name for name in ALL if name not in WITH_END_OF_STDIN])
def test_stdin_without_an_end(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sh", "-c", "read line; echo got $line", stdin=True)
    client.write(b"words\n")
    client.finish()
    assert client.out == b"got words\n"


@pytest.mark.parametrize("protocol", BOTH)
def test_stdin_ends_with_its_last_byte(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "cat", stdin=True)
    client.write(b"x")
    client.close_stdin()
    client.finish()
    assert client.out == b"x"


@pytest.mark.parametrize("protocol", ALL)
def test_binary_data_is_byte_exact(harness: Harness, protocol: str) -> None:
    data = bytes(range(256)) * 4096
    client = start(harness, protocol, "head", "-c", str(len(data)), stdin=True)
    client.write(data)
    client.finish()
    assert client.out == data


@pytest.mark.parametrize("protocol", BOTH)
def test_streams_that_were_not_asked_for(harness: Harness, protocol: str) -> None:
    url = harness.exec_url("sh", "-c", "echo out; echo err >&2; exit 4", stdout=False)
    client: Command
    if protocol.startswith("spdy"):
        client = SpdyCommand(url, stdout=False)
    else:
        client = WebSocketCommand(url, "v5.channel.k8s.io")
    assert client.exit_code() == 4
    assert (client.out, client.err) == (b"", b"err\n")


def test_websocket_tells_that_it_is_open(harness: Harness) -> None:
    client = WebSocketCommand(harness.exec_url("sleep", "60"), "v4.channel.k8s.io")
    client.channels.wait(lambda: client.channels.messages, "an empty message")
    assert client.channels.messages == [(1, b"")]
    client.close()


def test_version_1_closes_its_half_of_stdin_at_once(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("cat", stdin=True), "channel.k8s.io", stdin=True)
    stdin = client.stdin
    assert stdin
    client.spdy.wait(lambda: stdin.ended, "the end of stdin from the server")
    client.write(b"still read")
    client.wait_output(b"still read")
    client.close()


# -- terminals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", BOTH)
def test_terminal(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tty; exit 5", tty=True)
    assert client.exit_code() == 5
    assert client.out.startswith(b"/dev/pts/")
    assert client.out.endswith(b"\r\n")


def test_a_terminal_of_the_containers_own(harness: Harness) -> None:
    made: list[str] = []

    def open_one(session: ExecSession) -> tuple[int, int]:
        assert (session.container_id, session.command, session.tty) == (CONTAINER, ("tty",), True)
        master, slave = os.openpty()
        made.append(os.ttyname(slave))
        return master, slave

    harness.runtime.on_terminal = open_one
    client = start(harness, BOTH[0], "tty", tty=True)
    assert client.exit_code() == 0
    assert client.out.decode() == f"{made[0]}\r\n"


@pytest.mark.parametrize("problem", [FailedPrecondition("it has no terminals"), ValueError("a bug")])
def test_a_container_that_has_no_terminals(harness: Harness, problem: Exception) -> None:
    def refuse(_session: ExecSession) -> None:
        raise problem

    harness.runtime.on_terminal = refuse
    client = start(harness, BOTH[0], "tty", tty=True)
    assert client.exit_code() == 0
    assert client.out.startswith(b"/dev/pts/")


@pytest.mark.parametrize("protocol", BOTH)
def test_window_sizes(harness: Harness, protocol: str) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    client = start(harness, protocol, "sh", "-c", script, tty=True, stdin=True)
    client.wait_output(b"ready")
    client.resize(101, 41)
    client.wait_output(b"41 101")
    client.resize(80, 24)
    client.wait_output(b"24 80")
    client.close()


def test_window_size_before_the_process_starts(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("sh", "-c", "read x; stty size", tty=True, stdin=True), tty=True, stdin=True)
    client.resize(132, 50)
    client.write(b"\n")
    client.finish()
    assert b"50 132" in client.out


@pytest.mark.parametrize("protocol", BOTH)
def test_ctrl_c_reaches_the_process(harness: Harness, protocol: str) -> None:
    client = start(
        harness, protocol, "sh", "-c", "trap 'exit 42' INT; echo ready; sleep 30 & wait", tty=True, stdin=True
    )
    client.wait_output(b"ready")
    client.write(b"\x03")
    assert client.exit_code() == 42


@pytest.mark.parametrize("protocol", BOTH)
@pytest.mark.parametrize("typed", [b"", b"whole line\n", b"begun line"])
def test_the_end_of_stdin_on_a_terminal(harness: Harness, protocol: str, typed: bytes) -> None:
    client = start(harness, protocol, "sh", "-c", "stty -echo; echo ready; cat; echo; echo end", tty=True, stdin=True)
    client.wait_output(b"ready")
    client.write(typed)
    client.close_stdin()
    client.finish()
    assert typed.strip() in client.out
    assert client.out.endswith(b"end\r\n")


# -- what can't be done ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ALL)
def test_what_cannot_start_is_told(harness: Harness, protocol: str) -> None:
    def refuse(_session: ExecSession, _context: CallContext) -> int:
        raise FailedPrecondition("no such file: /nonexistent")

    harness.runtime.on_exec = refuse
    status = start(harness, protocol, "/nonexistent").finish()
    text = json.loads(status)["message"].encode() if protocol in WITH_STATUS else status
    assert b"no such file: /nonexistent" in text
    if protocol in WITH_STATUS:
        parsed = json.loads(status)
        assert (parsed["status"], parsed["reason"], parsed["code"]) == ("Failure", "InternalError", 500)


@pytest.mark.parametrize("protocol", BOTH)
def test_a_bug_of_the_runtime_stays_in_the_log(
    harness: Harness, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_session: ExecSession, _context: CallContext) -> int:
        raise RuntimeError("password=hunter2")

    harness.runtime.on_exec = fail
    status = start(harness, protocol, "true").finish()
    assert b"hunter2" not in status
    assert "the log of portoshim has it" in json.loads(status)["message"]
    assert "hunter2" in caplog.text


def test_nobody_answers(harness: Harness) -> None:
    harness.runtime.on_exec = lambda _session, _context: None
    status = json.loads(start(harness, BOTH[0], "true").finish())
    assert "no runtime plugin runs commands" in status["message"]


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", BOTH)
def test_a_child_in_the_background_does_not_hold_the_session(harness: Harness, protocol: str) -> None:
    started = time.monotonic()
    client = start(harness, protocol, "sh", "-c", "echo out; sleep 60 & exit 6")
    assert client.exit_code() == 6
    assert client.out == b"out\n"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("protocol", BOTH)
def test_a_chatty_child_in_the_background_does_not_hold_it_either(serve: Callable[..., Harness], protocol: str) -> None:
    harness = serve(limits=limits(drain_total_s=0.5))
    client = start(harness, protocol, "sh", "-c", "(while echo more; do sleep 0.05; done) & exit 6")
    assert client.exit_code(10) == 6


@pytest.mark.parametrize("protocol", BOTH)
def test_the_last_words_of_a_child_are_passed_on(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sh", "-c", "(sleep 0.1; echo late) & exit 6")
    assert client.exit_code() == 6
    assert client.out == b"late\n"


def test_output_of_a_process_that_ended_waits_for_a_slow_client(serve: Callable[..., Harness]) -> None:
    """What was written before the exit is never cut, though it takes longer than all the time a child is given."""
    harness = serve(limits=limits(drain_quiet_s=0.05, drain_total_s=0.1))
    written: list[int] = []

    def fill(session: ExecSession, _context: CallContext) -> int:
        """Write until nothing is taken any more, and exit."""
        assert session.stdout is not None
        os.set_blocking(session.stdout, False)
        total, full_since = 0, None
        while full_since is None or time.monotonic() - full_since < 0.3:
            try:
                total += os.write(session.stdout, bytes(65536))
                full_since = None
            except BlockingIOError:
                full_since = full_since or time.monotonic()
                time.sleep(0.01)
        written.append(total)
        return 9

    harness.runtime.on_exec = fill
    client = SpdyCommand(harness.exec_url("fill"))
    client.stall()
    eventually(lambda: written and harness.runtime.running == 0, "the command has ended")
    time.sleep(0.5)  # a client that is really slow
    client.resume()
    assert client.exit_code() == 9
    assert len(client.out) == written[0]


@pytest.mark.parametrize("protocol", BOTH)
def test_a_process_that_reads_no_input_ends_all_the_same(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sh", "-c", "exec 0<&-; echo closed; exit 8", stdin=True)
    try:
        client.write(bytes(4_000_000))
    except OSError:
        pass  # the session may end while this is being sent
    assert client.exit_code() == 8
    assert client.out == b"closed\n"


@pytest.mark.parametrize("protocol", BOTH)
def test_the_command_is_killed_when_the_client_goes(harness: Harness, protocol: str) -> None:
    client = start(harness, protocol, "sleep", "60", stdin=True)
    eventually(lambda: harness.runtime.running == 1, "the command runs")
    client.close()
    eventually(lambda: harness.runtime.running == 0, "the command is gone", 5)
    assert harness.runtime.killed == 1


@pytest.mark.parametrize("protocol", BOTH)
def test_input_sent_before_the_client_goes_is_delivered(harness: Harness, protocol: str, tmp_path: object) -> None:
    """Clients that send a script and leave: the process gets all of it, its end, and a moment to finish."""
    target = f"{tmp_path}/received"
    client = start(harness, protocol, "sh", "-c", f"cat > {target}; echo done >> {target}", stdin=True)
    client.write(b"x" * 300_000)
    client.close()
    eventually(lambda: harness.runtime.running == 0, "the command is gone", 5)
    with open(target, "rb") as file:
        assert file.read() == b"x" * 300_000 + b"done\n"
    assert harness.runtime.killed == 0


def test_a_terminal_hangs_up_when_the_client_goes(harness: Harness, tmp_path: object) -> None:
    script = f"trap 'echo hup > {tmp_path}/hup; exit' HUP; echo ready; while :; do sleep 0.05; done"
    client = SpdyCommand(harness.exec_url("sh", "-c", script, tty=True, stdin=True), tty=True, stdin=True)
    client.wait_output(b"ready")
    client.close()
    eventually(lambda: harness.runtime.running == 0, "the command is gone", 5)
    with open(f"{tmp_path}/hup") as file:
        assert file.read() == "hup\n"


def test_stop_of_the_daemon_ends_sessions(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("sleep", "60"))
    eventually(lambda: harness.runtime.running == 1, "the command runs")
    harness.close()
    assert "portoshim is stopping" in json.loads(client.finish())["message"]
    assert harness.runtime.running == 0


def test_streams_that_never_come(serve: Callable[..., Harness]) -> None:
    harness = serve(limits=limits(creation_timeout_s=0.3))
    client = SpdyCommand(harness.exec_url("true", stdin=True))  # doesn't open stdin
    status = json.loads(client.finish())
    assert "has not opened all of its streams" in status["message"]
    assert harness.runtime.running == 0


@pytest.mark.parametrize("protocol", BOTH)
def test_idle_sessions_are_closed(serve: Callable[..., Harness], protocol: str) -> None:
    harness = serve({"IdleTimeout": "300ms"})
    client = start(harness, protocol, "sleep", "60", stdin=True)
    status = json.loads(client.finish(5))
    assert "idle" in status["message"]
    eventually(lambda: harness.runtime.running == 0, "the command is gone", 5)


def test_pings_do_not_keep_a_session(serve: Callable[..., Harness]) -> None:
    harness = serve({"IdleTimeout": "500ms"})
    client = SpdyCommand(harness.exec_url("sleep", "60"))
    for number in range(1, 200, 2):
        client.spdy.ping(number)
        time.sleep(0.02)
        if client.error.ended:
            break
    assert b"idle" in client.finish(1)


def test_data_keeps_a_session(serve: Callable[..., Harness]) -> None:
    harness = serve({"IdleTimeout": "400ms"})
    client = SpdyCommand(harness.exec_url("cat", stdin=True), stdin=True)
    for _ in range(10):
        client.write(b".")
        time.sleep(0.1)
    client.close_stdin()
    assert client.exit_code() == 0
    assert client.out == b"." * 10
