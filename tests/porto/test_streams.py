"""Standard streams: stored, in the container's root, or descriptors of the client's."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
from pathlib import Path
from typing import Any

import pytest

from porto_api import Client, errors
from tests.porto.support import eventually, refused, result, run, shell, spec, start


def fd_path(fd: int) -> str:
    return f"/dev/fd/{fd}"


class TestDescriptors:
    def test_pipes(self, porto: Client) -> None:
        in_read, in_write = os.pipe()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        start(
            porto,
            "a",
            shell("cat; echo error >&2"),
            stdin_path=fd_path(in_read),
            stdout_path=fd_path(out_write),
            stderr_path=fd_path(err_write),
        )
        for fd in (in_read, out_write, err_write):
            os.close(fd)
        os.write(in_write, b"hello")
        os.close(in_write)
        with open(out_read, "rb") as out, open(err_read, "rb") as err:
            assert (out.read(), err.read()) == (b"hello", b"error\n")
        porto.wait(["a"], 60)
        with refused(errors.InvalidData, "Data not available"):
            porto.get_property("a", "stdout")

    def test_a_file_is_written_at_its_end(self, porto: Client, tmp_path: Path) -> None:
        path = tmp_path / "log"
        with path.open("w") as file:
            file.write("before\n")
            file.flush()
            run_with_output(porto, file.fileno())
        assert path.read_text() == "before\nhello\n"

    def test_updating_and_starting_in_one_call(self, porto: Client, tmp_path: Path) -> None:
        porto.create_from_spec(spec("a", ["echo", "hello"]))
        with (tmp_path / "log").open("w") as file:
            porto.update_from_spec(spec("a", stdout_path=fd_path(file.fileno())), start=True)
            porto.wait(["a"], 60)
        assert (tmp_path / "log").read_text() == "hello\n"

    def test_a_socket_cant_be_opened_again(self, porto: Client) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(errors.InvalidValue, match="No such device or address: open /proc/"):
            run_with_output(porto, theirs.fileno())

    def test_one_that_is_not_open(self, porto: Client) -> None:
        with pytest.raises(errors.Unknown, match=r"Can not make stat for /proc/\d+/fd/999: No such file or directory"):
            start(porto, "a", stdout_path=fd_path(999))

    def test_one_that_became_another(self, porto: Client, tmp_path: Path) -> None:
        with (tmp_path / "one").open("w") as one, (tmp_path / "other").open("w") as other:
            porto.create_from_spec(spec("a", "true", stdout_path=fd_path(one.fileno())))
            os.dup2(other.fileno(), one.fileno())
            with pytest.raises(errors.Permission, match="Inode of std stream changed"):
                porto.start("a")

    def test_a_terminal(self, porto: Client) -> None:
        controller, terminal = os.openpty()
        fcntl.ioctl(controller, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        path = fd_path(terminal)
        script = shell("test -t 0 && test -t 2 && stty size; read x < /dev/tty; echo got $x")
        start(porto, "a", script, stdin_path=path, stdout_path=path, stderr_path=path)
        os.close(terminal)
        os.write(controller, b"word\n")
        assert porto.wait(["a"], 60).state == "dead"
        found = b""
        while select.select([controller], [], [], 0)[0]:
            try:
                found += os.read(controller, 4096)
            except OSError:
                break  # the other end is closed
        os.close(controller)
        assert found.split(b"\r\n") == [b"24 80", b"word", b"got word", b""] or found.startswith(b"word\r\n24 80")

    def test_in_a_root_of_its_own(self, porto: Client, root: str, tmp_path: Path) -> None:
        with (tmp_path / "log").open("w") as file:
            run_with_output(porto, file.fileno(), root=root)
        assert (tmp_path / "log").read_text() == "hello\n"


def run_with_output(porto: Client, fd: int, **properties: Any) -> None:
    start(porto, "a", ["echo", "hello"], stdout_path=fd_path(fd), **properties)
    porto.wait(["a"], 60)


class TestStored:
    @pytest.mark.parametrize(
        ("window", "found"),
        [
            ("", "0123456789\n"),
            ("[0:5]", "01234"),
            ("[3]", "3456789\n"),
            ("[3:]", "3456789\n"),
            ("[:4]", "789\n"),
            ("[2:3]", "234"),
            ("[100]", ""),
            ("[100:5]", ""),
            ("[0:100]", "0123456789\n"),
        ],
    )
    def test_parts(self, porto: Client, window: str, found: str) -> None:
        start(porto, "a", ["echo", "0123456789"])
        porto.wait(["a"], 60)
        assert porto.get_property("a", f"stdout{window}") == found

    def test_parts_that_are_none(self, porto: Client) -> None:
        start(porto, "a", ["echo", "x"])
        porto.wait(["a"], 60)
        with pytest.raises(errors.InvalidValue, match="Bad uint64 value: x"):
            porto.get_property("a", "stdout[x]")

    def test_both_streams(self, porto: Client) -> None:
        found = run(porto, "a", shell("echo out; echo err >&2; exit 2"))
        assert (found.exit_code, found.stdout, found.stderr) == (2, "out\n", "err\n")

    def test_too_much_is_cut_off_at_the_beginning(self, porto: Client) -> None:
        script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; sleep 1000"
        start(porto, "a", shell(script), stdout_limit=1000)
        eventually(lambda: porto.get_property("a", "stdout").endswith("line 2999\n"))
        eventually(lambda: int(porto.get_property("a", "stdout_offset")) > 0)
        assert len(porto.get_property("a", "stdout")) <= 1000
        offset = porto.get_property("a", "stdout_offset")
        with refused(errors.InvalidData, f"Requested offset lower than current {offset}"):
            porto.get_property("a", "stdout[0]")

    def test_stopping_removes_it(self, porto: Client) -> None:
        start(porto, "a", ["echo", "x"])
        porto.wait(["a"], 60)
        porto.stop("a")
        with refused(errors.InvalidState, "stdout is not available in stopped state"):
            porto.get_property("a", "stdout")
        porto.start("a")
        assert result(porto, "a").stdout == "x\n"


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "cwd", "file"),
        [("/tmp/out", "", "tmp/out"), ("out", "", "out"), ("out", "/work", "work/out")],
    )
    def test_in_the_root(self, porto: Client, root: str, path: str, cwd: str, file: str) -> None:
        found = run(porto, "a", ["echo", "hello"], root=root, stdout_path=path, **({"cwd": cwd} if cwd else {}))
        assert found.stdout == "hello\n"
        assert Path(root, file).read_text() == "hello\n"
        assert Path(root, file).stat().st_mode & 0o777 == 0o660

    def test_there_is_no_way_out(self, porto: Client, root: str) -> None:
        start(porto, "a", ["echo", "hello"], root=root, stdout_path="../../out")
        porto.wait(["a"], 60)
        assert Path(root, "out").read_text() == "hello\n"

    def test_input(self, porto: Client, root: str) -> None:
        Path(root, "tmp/in").write_text("data")
        assert run(porto, "a", ["cat"], root=root, stdin_path="/tmp/in").stdout == "data"
        with refused(errors.InvalidValue, "No such file or directory: open /tmp/none"):
            start(porto, "a", ["cat"], root=root, stdin_path="/tmp/none")

    def test_a_directory_that_is_not_there(self, porto: Client, root: str) -> None:
        with refused(errors.InvalidValue, "No such file or directory: open /none/out"):
            start(porto, "a", "true", root=root, stdout_path="/none/out")

    @pytest.mark.parametrize("path", ["/dev/null", ""])
    def test_nowhere(self, porto: Client, path: str) -> None:
        start(porto, "a", ["echo", "x"], stdout_path=path)
        porto.wait(["a"], 60)
        assert porto.get_property("a", "exit_code") == "0"
        with refused(errors.InvalidData, "Data not available"):
            porto.get_property("a", "stdout")

    def test_a_pipe_without_a_reader_doesnt_hold_anything_up(self, porto: Client, root: str) -> None:
        os.mkfifo(Path(root, "tmp/pipe"))
        with refused(errors.InvalidValue, "No such device or address: open /tmp/pipe"):
            start(porto, "a", ["echo", "x"], root=root, stdout_path="/tmp/pipe")
