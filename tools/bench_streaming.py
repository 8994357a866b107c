"""Bytes through exec and port-forward: crictl against this shim and against containerd, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from typing import TYPE_CHECKING, BinaryIO

from tools.node import crictl_path

if TYPE_CHECKING:
    from tools.bench import Pods, Table

MIB = 1024 * 1024
PORT = 9000
_CHUNK = MIB


def measure_streaming(table: Table, sides: list[Pods], mib: int, rounds: int) -> None:
    """Throughput there and back again, byte for byte; both transports where the server knows both."""
    program = crictl_path()
    if program is None:
        return
    block = os.urandom(MIB)
    with tempfile.TemporaryFile() as data:
        for _ in range(mib):
            data.write(block)
        for pods in sides:
            sandbox, config = pods.run()
            container = pods.create(sandbox, config, command=["sh", "-c", f"exec nc -ll -p {PORT} -e cat"])
            pods.start(container)
            crictl = [program, "--runtime-endpoint", f"unix://{pods.side.socket}"]
            for _ in range(rounds):
                for transport in ("spdy", "websocket"):
                    rate = _exec([*crictl, "exec", "-r", transport, "-i", container, "cat"], data, mib)
                    if rate is None:
                        continue
                    table.row(f"exec, {mib} MiB through cat, {transport}", "MiB/s").add(pods.name, rate)
                    rate = _forward([*crictl, "port-forward", "-r", transport, sandbox], data, mib)
                    row = table.row(f"port-forward, {mib} MiB there and back, {transport}", "MiB/s")
                    row.add(pods.name, rate)
            pods.remove(sandbox)


def _exec(command: list[str], data: BinaryIO, mib: int) -> float | None:
    """MiB/s; None when the server doesn't speak the transport."""
    data.seek(0)
    began = time.perf_counter()
    digest, length = hashlib.sha256(), 0
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=data, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        while chunk := process.stdout.read(_CHUNK):
            digest.update(chunk)
            length += len(chunk)
        if process.wait():
            errors.seek(0)
            said = errors.read().decode()
            if "websocket: bad handshake" in said or "unable to upgrade" in said:
                return None
            raise AssertionError(f"{' '.join(command)}: {said}")
    _check(digest, length, data, mib, command)
    return mib / (time.perf_counter() - began)


def _forward(command: list[str], data: BinaryIO, mib: int) -> float:
    """MiB/s."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([*command, f"{port}:{PORT}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert b"Forwarding from" in line, (command, line)
            return _echo(port, data, mib, command)
        finally:
            process.terminate()


def _echo(port: int, data: BinaryIO, mib: int, command: list[str]) -> float:
    data.seek(0)
    digest, length = hashlib.sha256(), 0
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:

        def send() -> None:
            with contextlib.suppress(OSError):  # seen by what comes back
                connection.sendfile(data)
                connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while length < mib * MIB and (chunk := connection.recv(_CHUNK)):
            digest.update(chunk)
            length += len(chunk)
        sender.join()
    took_s = time.perf_counter() - began
    _check(digest, length, data, mib, command)
    return mib / took_s


def _check(digest: hashlib._Hash, length: int, data: BinaryIO, mib: int, command: list[str]) -> None:
    data.seek(0)
    expected = hashlib.sha256()
    while chunk := data.read(_CHUNK):
        expected.update(chunk)
    if length != mib * MIB or digest.digest() != expected.digest():
        raise AssertionError(f"{' '.join(command)}: {length} bytes came back, and not the same")
