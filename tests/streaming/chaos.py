"""One random session after the other: some end as they should, the others break off in every way a client can."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from typing import Any, Protocol

from tests.streaming import wire
from tests.streaming.forward_client import Forwarder
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand

CODES = sorted({*range(256)} - {165, 166, 167, 168, 169, 170, 173, 186, 187, 193})
"""Exit codes, but for those that Porto makes core dumps of."""


class Urls(Protocol):
    """Where sessions are asked for."""

    @property
    def base_url(self) -> str:
        """What all URLs begin with."""

    def exec_url(self, *command: str, **fields: Any) -> str: ...
    def forward_url(self) -> str: ...


class Chaos:
    """A client of every kind.

    :param port: of the pod, where what is sent comes back; ``closed_port`` is one where nobody listens.
    :param patience_s: how long a session that is to end may take.
    """

    def __init__(self, urls: Urls, port: int, closed_port: int, seed: int, patience_s: float = wire.TIMEOUT_S) -> None:
        self.urls = urls
        self.port = port
        self.closed_port = closed_port
        self.rng = random.Random(seed)
        self.patience_s = patience_s

    def command(self, *command: str, tty: bool = False) -> SpdyCommand | WebSocketCommand:
        url = self.urls.exec_url(*command, stdin=True, tty=tty)
        if self.rng.random() < 0.5:
            return WebSocketCommand(url, "v5.channel.k8s.io")
        return SpdyCommand(url, stdin=True, tty=tty)

    def check(self, client: SpdyCommand | WebSocketCommand, code: int, out: bytes) -> None:
        """A command has to end, with this exit code and this output."""
        status = client.finish(self.patience_s)
        if wire.exit_code(status) != code or client.out != out:
            got = f"{len(client.out)} bytes of output, {client.out[:100]!r}, errors {client.err!r}, and {status!r}"
            raise AssertionError(f"exit code {code} and {len(out)} bytes of output expected; {got}")

    def one(self) -> str:
        """One session; the name of its kind."""
        name = self.rng.choice(sorted(name for name in dir(self) if name.startswith("case_")))
        getattr(self, name)()
        return name

    def case_exit_code(self) -> None:
        code = self.rng.choice(CODES)
        client = self.command("sh", "-c", f"echo out; exit {code}")
        self.check(client, code, b"out\n")

    def case_half_close(self) -> None:
        code, data = self.rng.choice(CODES), self.rng.randbytes(self.rng.choice([0, 1, 100, 50_000, 400_000]))
        client = self.command("sh", "-c", f"cat; exit {code}")
        client.write(data)
        client.close_stdin()
        self.check(client, code, data)

    def case_terminal(self) -> None:
        code = self.rng.choice(CODES)
        client = self.command("sh", "-c", f"read line; echo $line; exit {code}", tty=True)
        client.resize(80, 24)
        client.write(b"typed\n")
        self.check(client, code, b"typed\r\ntyped\r\n")

    def case_slow_reader(self) -> None:
        code = self.rng.choice(CODES)
        client = self.command("sh", "-c", f"head -c 3000000 /dev/zero; exit {code}")
        client.stall()
        threading.Event().wait(self.rng.random() / 20)
        client.resume()
        self.check(client, code, bytes(3_000_000))

    def case_stalled_reader_that_goes(self) -> None:
        client = self.command("cat", "/dev/zero")
        client.stall()
        threading.Event().wait(self.rng.random() / 20)
        client.close()

    def case_disconnect(self) -> None:
        client = self.command("sh", "-c", "cat; sleep 60")
        client.write(bytes(self.rng.choice([0, 10, 100_000])))
        threading.Event().wait(self.rng.choice([0, 0.01]))
        client.close()

    def case_reset(self) -> None:
        client = self.command("sleep", "60")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    def case_unused_url(self) -> None:
        self.urls.exec_url("true")

    def case_connection_without_an_upgrade(self) -> None:
        wire.connect(self.urls.base_url).close()

    def case_too_few_streams(self) -> None:
        SpdyCommand(self.urls.exec_url("true", stdin=True)).close()

    def case_forward(self) -> None:
        forwarder = Forwarder(self.urls.forward_url(), tunnel=self.rng.random() < 0.5)
        connections = [forwarder.connect(self.port) for _ in range(self.rng.randrange(1, 4))]
        data = self.rng.randbytes(20_000)
        for connection in connections:
            connection.send(data)
            connection.end()
        for connection in connections:
            if (got := connection.wait_end(self.patience_s)) != data:
                reset, error = connection.data.reset, bytes(connection.error.data)
                raise AssertionError(f"{len(got)} bytes of {len(data)} came back, reset: {reset}, error: {error!r}")
        forwarder.close()

    def case_forward_that_goes(self) -> None:
        forwarder = Forwarder(self.urls.forward_url())
        forwarder.connect(self.port).send(b"x" * 1000)
        forwarder.connect(self.closed_port)
        forwarder.close()


def run(urls: Urls, port: int, closed_port: int, sessions: int, workers: int, patience_s: float) -> Counter[str]:
    """So many sessions, several at once; how many there were of each kind.

    :raises Exception: what one of them met that it should not have.
    """
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    problems: list[BaseException] = []
    done: Counter[str] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        chaos = Chaos(urls, port, closed_port, seed + number, patience_s)
        for _ in range(-(-sessions // workers)):
            if problems:
                return
            try:
                name = chaos.one()
            except BaseException as err:
                problems.append(err)
                return
            with lock:
                done[name] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return done
