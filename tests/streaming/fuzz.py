"""Mutated frames for everything that reads what clients send: no crash, no growth.

::

    python -m tests.streaming.fuzz [--cases 1000000] [--seed N]

A case is a stream of valid frames, some of them damaged, fed in random pieces to one of the readers. The readers may
raise what they say they raise and nothing else, and may keep no more than their bounds. ``test_fuzz`` runs a few.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import resource
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator

import wsproto.events as ws
from shim_streaming.channels import ClientLeft, SpdyChannels, WebSocketChannels
from shim_streaming.forward_streams import SpdyForwardStreams, WebSocketForwardStreams
from shim_streaming.handshake import CommandProtocol
from shim_streaming.plumbing import SizeReader
from shim_streaming.spdy import DICTIONARY, MAX_CONTROL_BYTES, SpdyError
from shim_streaming.tickets import CommandTicket
from shim_streaming.websocket import WebSocketError
from wsproto.connection import Connection, ConnectionType

GROWTH_LIMIT_KIB = 50 * 1024
CASE_LIMIT_S = 2.0

TICKET = CommandTicket("exec", "r", "c", ("true",), tty=True, stdin=True, stdout=True)
V4_SPDY = CommandProtocol("v4.channel.k8s.io", 4, websocket=False)
V5 = CommandProtocol("v5.channel.k8s.io", 5, websocket=True)
V4_BASE64 = CommandProtocol("v4.base64.channel.k8s.io", 4, websocket=True, base64=True)

Feed = Callable[[bytes], object]


class Failure(Exception):
    """A case that went wrong: how to run it again, and what happened."""


def _discard(*_buffers: object) -> None:
    """What the reader answers."""


def _drained(receive: Callable[[bytes], Iterator[object]]) -> Feed:
    return lambda data: [None for _ in receive(data)]


def _sizes() -> Feed:
    reader = SizeReader()
    return lambda data: reader.feed(memoryview(data))


READERS: dict[str, tuple[str, Callable[[], Feed]]] = {
    "exec over SPDY": ("spdy", lambda: _drained(SpdyChannels(TICKET, V4_SPDY, _discard).receive)),
    "port-forward over SPDY": ("spdy", lambda: _drained(SpdyForwardStreams(_discard, 16, tunnel=False).receive)),
    "exec over WebSocket": ("websocket", lambda: _drained(WebSocketChannels(TICKET, V5, _discard).receive)),
    "exec over base64": ("base64", lambda: _drained(WebSocketChannels(TICKET, V4_BASE64, _discard).receive)),
    "port-forward over WebSocket": (
        "websocket",
        lambda: _drained(WebSocketForwardStreams(_discard, (80, 81), encoded=False).receive),
    ),
    "port-forward in a tunnel": ("tunnel", lambda: _drained(SpdyForwardStreams(_discard, 16, tunnel=True).receive)),
    "window sizes": ("sizes", _sizes),
}


# -- streams -----------------------------------------------------------------------------------------------------------


def _spdy_frames(rng: random.Random) -> list[bytes]:
    """Frames of a client, in an order that makes sense."""
    deflate = zlib.compressobj(rng.randrange(10), zdict=DICTIONARY)
    frames, stream_id = [], 1

    def control(kind: int, payload: bytes, flags: int = 0) -> bytes:
        return struct.pack("!HHI", 0x8003, kind, flags << 24 | len(payload)) + payload

    def block(headers: dict[str, str]) -> bytes:
        plain = struct.pack("!I", len(headers))
        for pair in headers.items():
            for text in pair:
                plain += struct.pack("!I", len(text)) + text.encode("latin-1")
        if rng.random() < 0.1:
            plain = _damaged(rng, plain)
        return deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)

    for _ in range(rng.randrange(1, 8)):
        kind = rng.randrange(8)
        if kind < 3:
            role = rng.choice(["error", "stdin", "stdout", "stderr", "resize", "data", "other"])
            headers = {"streamtype": role, "port": str(rng.randrange(-1, 65540)), "requestid": str(rng.randrange(3))}
            fin = 1 if rng.random() < 0.2 else 0
            frames.append(control(1, struct.pack("!IIH", stream_id, 0, 0) + block(headers), fin))
            stream_id += 2
        elif kind < 5:
            data = rng.randbytes(rng.choice([0, 1, 7, 100, 5000]))
            to, fin = rng.randrange(1, stream_id + 2), 1 if rng.random() < 0.2 else 0
            frames.append(struct.pack("!II", to, fin << 24 | len(data)) + data)
        elif kind == 5:
            frames.append(control(3, struct.pack("!II", rng.randrange(1, stream_id + 2), 5)))
        elif kind == 6:
            frames.append(control(6, struct.pack("!I", rng.randrange(1, 9))))
        else:
            count = rng.randrange(3)
            frames.append(control(4, struct.pack("!I", count) + bytes(8 * count)))
    return frames


def _websocket_frames(rng: random.Random, payloads: list[bytes | str]) -> list[bytes]:
    client = Connection(ConnectionType.CLIENT)
    frames = []
    for payload in payloads:
        last = rng.random() < 0.9
        event: ws.Event
        if isinstance(payload, str):
            event = ws.TextMessage(data=payload, message_finished=last)
        else:
            event = ws.BytesMessage(data=payload, message_finished=last)
        try:
            frames.append(bytes(client.send(event)))
        except TypeError:
            pass  # text inside of a binary message, which wsproto doesn't write
        if rng.random() < 0.1:
            frames.append(bytes(client.send(ws.Ping(payload=rng.randbytes(5)))))
    if rng.random() < 0.2:
        frames.append(bytes(client.send(ws.CloseConnection(code=1000))))
    return frames


def _frames(rng: random.Random, kind: str) -> list[bytes]:
    if kind == "spdy":
        return _spdy_frames(rng)
    if kind == "tunnel":
        inner = b"".join(_spdy_frames(rng))
        cuts = sorted(rng.randrange(len(inner) + 1) for _ in range(rng.randrange(3)))
        pieces = [inner[a:b] for a, b in zip([0, *cuts], [*cuts, len(inner)], strict=True)]
        return _websocket_frames(rng, list(pieces))
    if kind == "sizes":
        return [json.dumps({"Width": rng.randrange(70000), "Height": rng.randrange(100)}).encode() for _ in range(3)]
    payloads: list[bytes | str] = []
    for _ in range(rng.randrange(1, 6)):
        channel, data = rng.choice([0, 1, 2, 3, 4, 5, 255]), rng.randbytes(rng.choice([0, 1, 2, 50, 3000]))
        if kind == "base64":
            payloads.append(chr(48 + channel % 10) + base64.b64encode(data).decode())
        else:
            payloads.append(bytes((channel,)) + data)
    return _websocket_frames(rng, payloads)


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """Something like ``data``."""
    damaged = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(damaged) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at : at + rng.randrange(9)] = b""
        elif kind == 2:
            damaged[at:at] = rng.randbytes(rng.randrange(9))
        elif kind == 3 and at + 4 <= len(damaged):
            damaged[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\xff\xff"])
        else:
            del damaged[at:]
    return bytes(damaged)


# -- cases -------------------------------------------------------------------------------------------------------------


def run_case(seed: int) -> None:
    """One case.

    :raises Failure: it went wrong.
    """
    rng = random.Random(seed)
    name = rng.choice(list(READERS))
    kind, make = READERS[name]
    frames = _frames(rng, kind)
    for index in range(len(frames)):
        if rng.random() < 0.3:
            frames[index] = _damaged(rng, frames[index])
    if rng.random() < 0.2:
        rng.shuffle(frames)
    stream = b"".join(frames)
    feed = make()
    started = time.monotonic()
    try:
        while stream:
            size = rng.choice([1, 3, 8, 17, 200, 100_000])
            piece, stream = stream[:size], stream[size:]
            feed(piece)
    except (SpdyError, WebSocketError, ClientLeft):
        pass
    except Exception:
        raise Failure(f"{name}, seed {seed}:\n{traceback.format_exc()}") from None
    took_s = time.monotonic() - started
    if took_s > CASE_LIMIT_S:
        raise Failure(f"{name}, seed {seed}: took {took_s:.1f} s")


def run(cases: int, seed: int, report: Callable[[str], None] = lambda _text: None) -> None:
    """Many cases.

    :raises Failure: one went wrong, or memory grows.
    """
    # Twice what a reader may ever keep, so that the first use of everything isn't taken for growth.
    list(map(run_case, range(seed, seed + min(cases, 2000))))
    warm_kib = _peak_kib()
    assert GROWTH_LIMIT_KIB > 2 * MAX_CONTROL_BYTES // 1024
    for number in range(cases):
        run_case(seed + number)
        if number % 20_000 == 19_999:
            report(f"{number + 1} cases, {_peak_kib() - warm_kib} KiB more than at the start")
        if number % 1000 == 0 and _peak_kib() - warm_kib > GROWTH_LIMIT_KIB:
            raise Failure(f"memory grew by {_peak_kib() - warm_kib} KiB in {number} cases from seed {seed}")


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers of the streaming server.")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 40))
    options = parser.parse_args()
    print(f"{options.cases} cases from seed {options.seed}", flush=True)
    try:
        run(options.cases, options.seed, lambda text: print(text, flush=True))
    except Failure as err:
        print(err, file=sys.stderr)
        return 1
    print("no crash, no growth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
