"""Running a plugin: what it sees, what it may cost, and that it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from shim_cni_net import execute, processes
from shim_cni_net.execute import MAX_STDOUT_BYTES, Call, PluginError, Plugins, one_line

from shim_core import testing
from tests.cni_net.support import until

CALL = Call("p", "net", "ADD", "c" * 64, "/run/netns/x", "eth0", "A=1;B=2", operation="c" * 64)


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    path = tmp_path / "bin"
    path.mkdir()
    return path


def write(directory: Path, shell: str, name: str = "p", mode: int = 0o755) -> Path:
    path = directory / name
    temporary = directory / f".{name}"
    temporary.write_text(f"#!/bin/sh\n{shell}\n")
    temporary.chmod(mode)
    temporary.rename(path)
    return path


def run(bin_dir: Path, shell: str, stdin: bytes = b"{}", timeout_s: float = 10.0, **environment: str) -> bytes:
    write(bin_dir, shell)
    plugins = Plugins((str(bin_dir),), environment)
    return plugins.run(CALL, stdin, timeout_s, testing.context())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_environment_input_and_output(bin_dir: Path) -> None:
    output = run(
        bin_dir,
        "env -0 | tr '\\0' '\\n' | sort; cat",
        b'{"a": 1}',
        PATH="/bin:/usr/bin",
        HTTPS_PROXY="proxy",
        CNI_ARGS="EVIL=1",
        CNI_OTHER="x",
        NOTIFY_SOCKET="/run/systemd/notify",
        LISTEN_FDS="3",
        PYTHONPATH="/x",
    ).decode()
    variables = dict(line.split("=", 1) for line in output.splitlines()[:-1])
    variables.pop("PWD")
    assert variables == {
        "PATH": "/bin:/usr/bin",
        "HTTPS_PROXY": "proxy",
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c" * 64,
        "PORTOSHIM_CNI_OPERATION": "c" * 64,
        "CNI_NETNS": "/run/netns/x",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "A=1;B=2",
        "CNI_PATH": str(bin_dir),
    }
    assert output.endswith('{"a": 1}')


def test_a_path_is_always_there(bin_dir: Path) -> None:
    assert b"/usr/sbin" in run(bin_dir, 'printf %s "$PATH"')


def test_no_descriptor_of_ours_is_seen(bin_dir: Path) -> None:
    own = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(own, True)
    try:
        assert run(bin_dir, "ls /proc/$$/fd").split() in ([b"0", b"1", b"2"], [b"0", b"1", b"10", b"2"])
    finally:
        os.close(own)


def test_input_that_is_not_read_holds_nobody_up(bin_dir: Path) -> None:
    assert run(bin_dir, "echo done", b"x" * 10_000_000) == b"done\n"
    assert len(run(bin_dir, "cat", b"x" * MAX_STDOUT_BYTES)) == MAX_STDOUT_BYTES, "and it may be large"


def test_output_just_within_the_limit(bin_dir: Path) -> None:
    assert len(run(bin_dir, f"head -c {MAX_STDOUT_BYTES} /dev/zero")) == MAX_STDOUT_BYTES
    with pytest.raises(PluginError, match=r"printed more than"):
        run(bin_dir, f"head -c {MAX_STDOUT_BYTES + 1} /dev/zero")


def test_a_gigabyte_costs_no_memory(bin_dir: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(PluginError, match=r"printed more than"):
        run(bin_dir, "head -c 1G /dev/zero")
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024, "KiB"


def test_the_end_of_the_plugin_counts_not_that_of_its_output(bin_dir: Path) -> None:
    started = time.monotonic()
    for shell in ("sleep 1000 & echo $!", "setsid sleep 1000 & echo $!"):
        pid = int(run(bin_dir, shell))
        assert Path(f"/proc/{pid}").exists(), "a daemon that a plugin has started on purpose lives on"
        os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - started < 5
    assert until(lambda: processes._find(CALL.container_id, 0) == {})


def test_output_written_long_before_the_end_is_kept(bin_dir: Path) -> None:
    assert run(bin_dir, "printf first; exec >&-; sleep 0.2") == b"first"


@pytest.mark.parametrize(
    "shell", ["sleep 1000", "sleep 1000 & wait", "while :; do :; done", "yes >&2", "setsid sleep 1000 & sleep 1000"]
)
def test_time_is_bounded_and_the_group_is_ended(bin_dir: Path, shell: str) -> None:
    started = time.monotonic()
    with pytest.raises(PluginError, match=r"it took too long and was killed") as caught:
        run(bin_dir, shell, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started < 3
    assert caught.value.started
    assert processes._find(CALL.container_id, 0) == {}


def test_cancelling_ends_it_at_once(bin_dir: Path) -> None:
    context = testing.context()
    write(bin_dir, "touch $0.running; sleep 1000")

    def cancel() -> None:
        if until((bin_dir / "p.running").exists):
            context.cancel()

    timer = threading.Thread(target=cancel)
    timer.start()
    started = time.monotonic()
    with pytest.raises(PluginError, match=r"cancelled"):
        Plugins((str(bin_dir),), {}).run(CALL, b"", 60, context)
    assert time.monotonic() - started < 5
    timer.join()
    with pytest.raises(PluginError, match=r"cancelled"):
        Plugins((str(bin_dir),), {}).run(CALL, b"", 60, context)


@pytest.mark.parametrize(
    ("shell", "message", "code"),
    [
        ("exit 3", "exit status 3", None),
        ("echo why >&2; exit 1", "exit status 1; standard error: why", None),
        ("echo plain; exit 1", "plain (exit status 1)", None),
        ("""echo '{"code": 11, "msg": "later"}'; exit 1""", "later; code 11 (exit status 1)", 11),
        ("""echo '{"code": 7, "msg": "bad", "details": "very"}'; echo log >&2; exit 2""",
         "bad; very; code 7 (exit status 2); standard error: log", 7),
        ("""echo '{"code": "7", "msg": ["x"]}'; exit 1""", "['x']; code 7 (exit status 1)", None),
        ("""printf '\\033[31mred\\n\\nlines\\0' >&2; exit 1""", "exit status 1; standard error: [31mred lines", None),
        ("kill -TERM $$", "it was killed by signal 15", None),
        ("kill -34 $$", "it was killed by signal 34", None),
    ],
)  # fmt: skip
def test_errors_say_what_the_plugin_said(bin_dir: Path, shell: str, message: str, code: int | None) -> None:
    with pytest.raises(PluginError) as caught:
        run(bin_dir, shell)
    assert str(caught.value) == f'plugin "p" of network "net" failed (ADD): {message}'
    assert caught.value.code == code
    assert caught.value.started
    assert caught.value.nothing_left is False


def test_messages_are_bounded(bin_dir: Path) -> None:
    with pytest.raises(PluginError) as caught:
        run(bin_dir, "head -c 100000 /dev/zero | tr '\\0' a; head -c 100000 /dev/zero | tr '\\0' b >&2; exit 1")
    assert len(str(caught.value)) < 4096
    assert one_line("a\u2028b\x1b[0m\u202ec") == "a b [0m c"


def test_success_may_be_noisy(bin_dir: Path) -> None:
    assert run(bin_dir, "head -c 10M /dev/zero >&2; echo ok") == b"ok\n"


def test_search(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for directory in (one, two):
        directory.mkdir()
    plugins = Plugins((str(three), str(one), str(two)), {})
    write(two, "", "p")
    assert plugins.find("p") == str(two / "p")
    write(one, "", "p", mode=0o644)
    assert plugins.find("p") == str(two / "p"), "one that can't be run is passed by"
    (one / "p").chmod(0o755)
    assert plugins.find("p") == str(one / "p"), "the first directory wins"
    (one / "q").mkdir()
    (two / "r").symlink_to(two / "p")
    assert plugins.find("r") == str(two / "r")
    for name, problem in (("q", "is not a file in"), ("x", "is not in"), ("../two/p", "no path"), ("", "must name")):
        with pytest.raises(LookupError, match=problem):
            plugins.find(name)
    with pytest.raises(LookupError, match=f'the plugin "x" is not in {three} or {one} or {two}'):
        plugins.find("x")


@pytest.mark.parametrize(("content", "message"), [("#!/no/such\n", "No such file"), ("", "Exec format error")])
def test_what_can_not_be_executed_has_not_run(bin_dir: Path, content: str, message: str) -> None:
    (bin_dir / "p").write_text(content)
    (bin_dir / "p").chmod(0o755)
    with pytest.raises(PluginError, match=f"{bin_dir}/p can't be executed: {message}") as caught:
        Plugins((str(bin_dir),), {}).run(CALL, b"", 10, testing.context())
    assert not caught.value.started


def test_without_time_nothing_is_started(bin_dir: Path) -> None:
    with pytest.raises(PluginError, match=r"no time was left") as caught:
        run(bin_dir, "touch $0.ran", timeout_s=0)
    assert not caught.value.started
    assert not (bin_dir / "p.ran").exists()


def test_a_plugin_that_is_being_replaced_is_waited_for(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bin_dir / "p"
    path.write_bytes(Path("/bin/true").read_bytes())
    path.chmod(0o755)
    plugins = Plugins((str(bin_dir),), {})
    writer = path.open("ab")
    closer = threading.Timer(0.3, writer.close)
    closer.start()
    started = time.monotonic()
    assert plugins.run(CALL, b"", 10, testing.context()) == b""
    assert time.monotonic() - started >= 0.2
    closer.join()
    monkeypatch.setattr(execute, "_BUSY_WAIT_S", 0.2)
    with path.open("ab"), pytest.raises(PluginError, match=r"Text file busy") as caught:
        plugins.run(CALL, b"", 10, testing.context())
    assert not caught.value.started


@pytest.mark.parametrize(
    ("function", "started"), [("memfd_create", False), ("pipe", False), ("eventfd", True), ("pidfd_open", True)]
)
def test_too_many_open_files(bin_dir: Path, monkeypatch: pytest.MonkeyPatch, function: str, started: bool) -> None:
    """At this moment: later there may be some again, to end what has been started."""
    refusals = iter([OSError(24, "Too many open files")])
    real = getattr(os, function)

    def refuse_once(*arguments: Any) -> Any:
        for err in refusals:
            raise err
        return real(*arguments)

    write(bin_dir, "sleep 1000")
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse_once)
        with pytest.raises(PluginError, match=r"Too many open files") as caught:
            Plugins((str(bin_dir),), {}).run(CALL, b"", 10, testing.context())
    assert caught.value.started is started
    assert descriptors() == before
    assert processes._find(CALL.container_id, 0) == {}


def test_nothing_is_left_behind(bin_dir: Path) -> None:
    run(bin_dir, "cat")
    before = descriptors(), threading.active_count(), children()
    for shell in ("cat", "exit 1", "sleep 1000", "head -c 2M /dev/zero", "kill -9 $$"):
        try:
            run(bin_dir, shell, timeout_s=0.2)
        except PluginError:
            pass
    assert (descriptors(), threading.active_count(), children()) == before


def children() -> set[str]:
    """This process's children, those that haven't been waited for too."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_many_at_once(bin_dir: Path) -> None:
    write(bin_dir, "cat")
    plugins = Plugins((str(bin_dir),), {})
    answers: dict[int, bytes] = {}

    def ask(number: int) -> None:
        for _ in range(5):
            answers[number] = plugins.run(CALL, json.dumps(number).encode(), 30, testing.context())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: json.dumps(number).encode() for number in range(20)}
    assert plugins.spent_s > 0


def test_the_configuration_is_a_file_of_its_own(bin_dir: Path) -> None:
    assert stat.S_ISREG(os.fstat(os.memfd_create("x")).st_mode)
    assert run(bin_dir, "cat; cat", b"once") == b"once"
