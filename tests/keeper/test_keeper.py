"""The keeper as the runtime uses it: real processes write into its pipes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from shim_porto_runtime.keeper import KeeperClient

from shim_core import errors
from tests.keeper.conftest import Node, eventually, is_gone

# -- logs --------------------------------------------------------------------------------------------------------------


def test_output_is_in_the_log_after_a_flush(node: Node) -> None:
    process = node.run(node.open(), "sh", "-c", "echo out; echo err >&2; printf unfinished")
    assert node.finished(process) == 0
    assert node.read() == {"stdout": b"out\nunfinished", "stderr": b"err\n"}


def test_an_unfinished_line_is_written_at_the_end(node: Node) -> None:
    node.run(node.open(), "printf", "no newline")
    eventually(lambda: not node.client.list()[0].running)
    assert node.log().read_bytes().split(b" ", 2)[2] == b"P no newline\n"


def test_a_background_child_that_holds_the_pipe_does_not_hang_a_flush(node: Node) -> None:
    process = node.run(node.open(), "sh", "-c", "sleep 60 & printf 'from the '; printf parent")
    assert process.wait() == 0
    node.client.flush("c", timeout_s=2.0)
    assert node.read()["stdout"] == b"from the parent"
    assert node.client.list()[0].running


def test_a_flush_of_a_process_that_never_stops_writing_returns(node: Node) -> None:
    node.run(node.open(), "yes")
    for _ in range(20):
        node.client.flush("c", timeout_s=5.0)
    assert node.log().stat().st_size > 0


def test_bytes_stay_as_they_are(node: Node) -> None:
    data = os.urandom(300_000) + b"\0\0\r\n" + b"x" * 16383 + b"\r\n" + b"y" * 16384 + b"\n" + b"\xff\xfe no newline"
    file = node.path / "data"
    file.write_bytes(data)
    assert node.finished(node.run(node.open(), "cat", str(file))) == 0
    assert node.read()["stdout"] == data


def test_a_very_long_line(node: Node) -> None:
    size = 64 * 1024 * 1024
    process = node.run(node.open(), "sh", "-c", f"head -c {size} /dev/zero; echo end")
    assert node.finished(process) == 0
    text = node.read()["stdout"]
    assert len(text) == size + 4
    assert text.endswith(b"\0\0end\n")
    assert text.count(b"\0") == size
    assert node.stats.resident_bytes < 20_000_000


def test_a_line_of_a_gigabyte(node: Node) -> None:
    size = 1024 * 1024 * 1024
    process = node.run(node.open(), "sh", "-c", f"head -c {size} /dev/zero; echo end")
    assert node.finished(process) == 0
    assert node.stats.resident_bytes < 20_000_000
    payload = 0
    with node.log().open("rb") as log:
        for record in log:
            assert len(record) <= 40 + 16384 + 1
            payload += len(record) - 41
    assert payload == size + 3


def test_without_a_log_path_there_is_no_log(node: Node) -> None:
    process = node.run(node.client.open("c"), "sh", "-c", "yes | head -c 1000000")
    assert node.finished(process) == 0
    assert not node.logs.exists()


def test_the_time_of_a_record_is_utc(node: Node) -> None:
    assert node.finished(node.run(node.open(), "echo", "now")) == 0
    stamp = node.log().read_text()[:19]
    assert abs(time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime())) < 60


# -- rotation ----------------------------------------------------------------------------------------------------------


def test_after_reopen_output_goes_to_a_new_file(node: Node) -> None:
    with node.open() as streams:
        os.write(streams.stdout, b"old\nbegun")
        node.client.flush("c")
        node.rotate()
        os.write(streams.stdout, b" and ended\nnew\n")
        node.client.flush("c")
    assert b"new" not in (node.logs / "c/0.log.1").read_bytes()
    assert node.read()["stdout"] == b"old\nbegun and ended\nnew\n"


def test_until_reopen_output_goes_to_the_renamed_file(node: Node) -> None:
    with node.open() as streams:
        node.log().rename(node.logs / "c/0.log.1")
        os.write(streams.stdout, b"still there\n")
        node.kill_worker()
        node.client.flush("c")
        assert not node.log().exists()
        node.client.reopen("c")
    assert node.read()["stdout"] == b"still there\n"


def test_a_log_that_cannot_be_reopened_goes_on_as_it_was(node: Node) -> None:
    with node.open() as streams:
        node.log().rename(node.logs / "c/0.log.1")
        node.log().symlink_to("/etc/passwd")
        with pytest.raises(errors.InvalidArgument, match="symlink"):
            node.client.reopen("c")
        node.log().unlink()
        os.write(streams.stdout, b"goes on\n")
        node.client.flush("c")
        assert b"goes on" in (node.logs / "c/0.log.1").read_bytes()
        assert not node.log().exists()


def test_a_stopped_container_has_no_log_to_reopen(node: Node) -> None:
    node.finished(node.run(node.open(), "echo", "bye"))
    eventually(lambda: not node.client.list()[0].running)
    node.log().rename(node.logs / "c/0.log.1")
    with pytest.raises(errors.FailedPrecondition, match="ended"):
        node.client.reopen("c")
    assert not node.log().exists()


def test_what_is_unknown_is_not_found(node: Node) -> None:
    for running in (False, True):
        if running:
            node.client.ensure_running()
        for call in (node.client.reopen, node.client.flush, node.client.attach, node.client.close_stdin):
            with pytest.raises(errors.NotFound):
                call("nobody")
        with pytest.raises(errors.NotFound):
            node.client.resize("nobody", 80, 25)
        node.client.close("nobody")
        assert not node.client.list()


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_bad_log_path_is_refused_and_nothing_is_left(node: Node) -> None:
    node.client.ensure_running()
    before = node.stats.descriptors
    with pytest.raises(errors.InvalidArgument, match="log_path"):
        node.client.open("c", log_directory=str(node.logs), log_path="../../x.log")
    with pytest.raises(errors.InvalidArgument, match="log_directory"):
        node.client.open("c", log_directory="", log_path="x.log")
    assert not node.client.list()
    assert node.stats.descriptors == before


def test_opening_again_gives_up_the_earlier_streams(node: Node) -> None:
    first = node.open()
    os.write(first.stdout, b"from the first try\n")
    with node.open() as second:
        os.write(second.stdout, b"from the second\n")
        node.client.flush("c")
        eventually(lambda: nobody_reads(first.stdout))
    first.close()
    assert len(node.client.list()) == 1
    assert node.read()["stdout"] == b"from the first try\nfrom the second\n"


def test_the_container_has_blocking_ends_as_porto_opens_them(node: Node) -> None:
    """Porto opens ``/proc/PID/fd/N`` of the process that starts the container, and that process closes its own."""
    streams = node.open(stdin=True)
    ends = [os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND) for fd in (streams.stdout, streams.stderr)]
    stdin = os.open(f"/proc/self/fd/{streams.stdin}", os.O_RDONLY)
    streams.close()
    assert all(os.get_blocking(fd) for fd in (*ends, stdin))
    subprocess.run(["sh", "-c", "echo through; echo proc >&2"], stdout=ends[0], stderr=ends[1], check=True)
    node.client.flush("c")
    assert node.read() == {"stdout": b"through\n", "stderr": b"proc\n"}
    assert node.client.list()[0].running
    for fd in (*ends, stdin):
        os.close(fd)
    eventually(lambda: not node.client.list()[0].running)


def test_a_shim_that_dies_before_the_start_leaves_nothing_running(node: Node) -> None:
    node.open().close()
    eventually(lambda: not node.client.list()[0].running)


def test_close_writes_what_is_left_and_forgets(node: Node) -> None:
    streams = node.open()
    before = node.stats.descriptors
    os.write(streams.stdout, b"last words")
    node.client.close("c")
    assert node.read()["stdout"] == b"last words"
    assert not node.client.list()
    assert node.stats.descriptors < before
    eventually(lambda: nobody_reads(streams.stdout))
    streams.close()


def nobody_reads(fd: int) -> bool:
    """The holder lets go of a pipe a moment after the worker."""
    try:
        os.write(fd, b"x")
    except BrokenPipeError:
        return True
    return False


def test_stdin_reaches_the_container_and_ends(node: Node) -> None:
    process = node.run(node.open(stdin=True), "cat")
    node.client.close_stdin("c")
    assert node.finished(process) == 0
    assert not node.client.list()[0].stdin
    node.client.close_stdin("c")


def test_without_stdin_there_is_no_descriptor(node: Node) -> None:
    with node.open() as streams:
        assert streams.stdin is None


def test_a_terminal_is_one_descriptor_and_can_be_resized(node: Node) -> None:
    streams = node.open(tty=True, stdin=True)
    assert streams.stdin == streams.stdout == streams.stderr
    assert os.isatty(streams.stdout)
    node.client.resize("c", 132, 50)
    process = node.run(streams, "sh", "-c", "stty size; tty >/dev/null && echo terminal; printf end")
    assert node.finished(process) == 0
    assert node.read()["stdout"] == b"50 132\r\nterminal\r\nend"
    eventually(lambda: not node.client.list()[0].running)
    with pytest.raises(errors.FailedPrecondition):
        node.client.resize("c", 80, 25)


def test_only_a_terminal_has_a_size(node: Node) -> None:
    with node.open(), pytest.raises(errors.FailedPrecondition, match="terminal"):
        node.client.resize("c", 80, 25)
    with node.open("t", tty=True), pytest.raises(errors.InvalidArgument):
        node.client.resize("t", 0, 25)


def test_a_terminal_survives_a_killed_worker(node: Node) -> None:
    process = node.python(
        node.open(tty=True),
        "import time\nfor n in range(3000):\n    print(n, flush=True)\n    time.sleep(0.0005)",
    )
    for _ in range(5):
        node.kill_worker()
    assert node.finished(process) == 0
    assert node.read()["stdout"] == b"".join(b"%d\r\n" % n for n in range(3000))


# -- the keeper itself -------------------------------------------------------------------------------------------------


def test_it_outlives_who_started_it(node: Node) -> None:
    program = (
        "import sys; from shim_porto_runtime.keeper import KeeperClient as K; K(sys.argv[1]).ensure_running();"
        "import os; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(node.directory)], check=False)
    stats = node.stats
    assert os.getsid(stats.pid) not in (os.getsid(0), stats.pid)
    for pid in (stats.pid, stats.holder_pid):
        assert Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_nobody_else_can_reach_it(node: Node) -> None:
    node.client.ensure_running()
    assert node.directory.stat().st_mode & 0o777 == 0o700
    assert (node.directory / "keeper.sock").stat().st_mode & 0o777 == 0o600


def test_nothing_of_the_shims_environment_lives_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_PASSWORD", "S3CR3T")
    node.client.ensure_running()
    for pid in (node.stats.pid, node.stats.holder_pid):
        assert b"S3CR3T" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_many_start_it_at_once_and_there_is_one(node: Node) -> None:
    clients = [KeeperClient(node.directory, idle_exit_s=30.0) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(lambda pair: pair[1].open(f"c{pair[0]}"), enumerate(clients)))
    assert len(node.client.list()) == 8
    for stream in streams:
        stream.close()


def test_with_nothing_to_do_it_ends(node: Node) -> None:
    client = KeeperClient(node.directory, idle_exit_s=0.2)
    client.ensure_running()
    pids = (node.stats.pid, node.stats.holder_pid)
    for pid in pids:
        eventually(partial(is_gone, pid))
    assert client.stats() is None
    assert not (node.directory / "keeper.sock").exists()
    with client.open("c"):
        assert client.stats() is not None


def test_it_ends_without_its_directory(node: Node) -> None:
    KeeperClient(node.directory, idle_exit_s=0.2).ensure_running()
    pids = (node.stats.pid, node.stats.holder_pid)
    shutil.rmtree(node.directory)
    for pid in pids:
        eventually(partial(is_gone, pid))


def test_with_a_container_it_stays(node: Node) -> None:
    client = KeeperClient(node.directory, idle_exit_s=0.1)
    with client.open("c") as streams:
        pid = node.stats.pid
        time.sleep(0.5)
        os.write(streams.stdout, b"x")
        assert node.stats.pid == pid


def test_asked_to_end_it_waits_for_the_containers(node: Node) -> None:
    streams = node.open()
    stats = node.stats
    os.kill(stats.holder_pid, signal.SIGTERM)
    os.kill(stats.pid, signal.SIGTERM)
    os.write(streams.stdout, b"still logged\n")
    node.client.flush("c")
    streams.close()
    eventually(lambda: node.client.stats() is None)
    assert node.read()["stdout"] == b"still logged\n"


def test_it_is_not_stopped_under_a_container(node: Node) -> None:
    with node.open():
        with pytest.raises(errors.FailedPrecondition, match="1 containers"):
            node.client.stop()
        assert node.client.stats() is not None


def test_the_socket_may_be_deep(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 50] * 4)
    deep.mkdir(parents=True)
    client = KeeperClient(deep / "keeper")
    client.ensure_running()
    client.stop()


def test_a_keeper_that_does_not_answer_is_not_waited_for_longer_than_asked(node: Node) -> None:
    node.client.ensure_running()
    pid = node.stats.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            KeeperClient(node.directory, timeout_s=0.3).list()
        assert time.monotonic() - started < 2.0
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_keeper_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    client = KeeperClient(tmp_path / "file/keeper", timeout_s=1.0, log_file=tmp_path / "log")
    with pytest.raises(errors.Unavailable):
        client.open("c")


def test_lists_of_any_length(node: Node) -> None:
    streams = [node.client.open(f"{'c' * 200}-{number}") for number in range(150)]
    assert {status.id for status in node.client.list()} == {f"{'c' * 200}-{number}" for number in range(150)}
    for stream in streams:
        stream.close()


def test_nonsense_on_the_socket_harms_nobody(node: Node) -> None:
    with node.open() as streams:
        for packet in (b"", b"\0\xff", b"[]", b"{}", b'{"v":1,"op":"open"}', b'{"v":99,"op":"list"}', b"[" * 100_000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
                peer.connect(str(node.directory / "keeper.sock"))
                peer.send(packet)
                peer.shutdown(socket.SHUT_WR)
                peer.recv(65536)
        os.write(streams.stdout, b"unharmed\n")
        node.client.flush("c")
    assert node.read()["stdout"] == b"unharmed\n"


def test_an_older_keeper_says_what_to_do(node: Node) -> None:
    node.client.ensure_running()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(node.directory / "keeper.sock"))
        peer.send(json.dumps({"v": 2, "op": "list", "after": ""}).encode())
        answer = json.loads(peer.recv(65536))
    assert answer["code"] == "UNIMPLEMENTED"
    assert "version 1" in answer["message"]


def test_memory_and_descriptors_come_back(node: Node) -> None:
    node.open("first").close()
    eventually(lambda: not node.client.list()[0].running)
    node.client.close("first")
    before = node.stats
    for round_number in range(3):
        for number in range(30):
            with node.open(f"c{number}", stdin=True, tty=bool(round_number % 2)) as streams:
                os.write(streams.stdout, b"x" * 3000)
        for number in range(30):
            node.client.close(f"c{number}")
    after = node.stats
    assert after.descriptors == before.descriptors
    assert after.resident_bytes - before.resident_bytes < 1_000_000
    holder = Path(f"/proc/{after.holder_pid}/fd")
    eventually(lambda: len(list(holder.iterdir())) < 15)  # it is told, and not waited for


def test_a_keeper_without_descriptors_refuses_and_goes_on(node: Node) -> None:
    node.open("first").close()
    resource.prlimit(node.stats.pid, resource.RLIMIT_NOFILE, (40, 40))
    with pytest.raises(errors.ResourceExhausted, match="no streams"):
        open_and_close_containers(node, 20)
    for status in node.client.list():
        node.client.close(status.id)
    open_and_close_containers(node, 3)


def open_and_close_containers(node: Node, count: int) -> None:
    held = [node.client.open(f"c{number}") for number in range(count)]
    for streams in held:
        streams.close()
