"""A connection before it has shown a token: TLS handshake, one HTTP request, one answer.

All of it happens in the listener's loop. Nobody gets a thread, or more than a few kilobytes, before the token has
been looked at.
"""

from __future__ import annotations

import functools
import logging
import socket
import ssl
from collections.abc import Callable

import h11

from shim_streaming.handshake import Gatekeeper, Refused, Request, Upgrade
from shim_streaming.limits import Limits
from shim_streaming.loop import Handler, Loop

logger = logging.getLogger("shim.streaming.greeting")

Admit = Callable[[socket.socket, Upgrade, bytes, bytes], None]
"""Takes over a socket: what was granted, what to send first, what came in already.

Raises Refused when there is no room.
"""

_RECEIVE_BYTES = 16 * 1024
_LINGER_S = 2.0


class Greeting:
    """One new connection.

    :param sock: non-blocking; with TLS, its handshake is still to be done.
    :param on_over: called once, when the connection is closed or taken over.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        gatekeeper: Gatekeeper,
        limits: Limits,
        admit: Admit,
        on_over: Callable[[Greeting], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._gatekeeper = gatekeeper
        self._admit = admit
        self._on_over = on_over
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self._request: h11.Request | None = None
        self._answer = b""
        self._answered = False
        self._over = False
        self._timer = loop.call_later(limits.head_timeout_s, self.close)
        if isinstance(sock, ssl.SSLSocket):
            self._guarded(self._shake_hands)
        else:
            self._watch(reader=self._readable)

    @property
    def over(self) -> bool:
        """Closed or taken over."""
        return self._over

    def close(self) -> None:
        """Close, whatever it was about."""
        if not self._over:
            self._leave()
            self._sock.close()

    def _leave(self) -> None:
        self._over = True
        self._timer.cancel()
        self._loop.forget(self._fd)
        self._on_over(self)

    def _watch(self, *, reader: Handler | None = None, writer: Handler | None = None) -> None:
        self._loop.on_readable(self._fd, reader and functools.partial(self._guarded, reader))
        self._loop.on_writable(self._fd, writer and functools.partial(self._guarded, writer))

    def _guarded(self, step: Handler) -> None:
        """An error that nobody has thought of ends this connection, not the listener."""
        if self._over:
            return
        try:
            step()
        except Exception:
            logger.exception("a new connection failed")
            self.close()

    # -- TLS -----------------------------------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        assert isinstance(self._sock, ssl.SSLSocket)
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._watch(reader=self._shake_hands)
        except ssl.SSLWantWriteError:
            self._watch(writer=self._shake_hands)
        except (OSError, ValueError) as err:
            logger.debug("TLS handshake failed: %s", err)
            self.close()
        else:
            self._watch(reader=self._readable)
            # The request may have come along with the end of the handshake.
            self._loop.call_soon(functools.partial(self._guarded, self._readable))

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self.close()
            return
        if not data:
            self.close()
        elif not self._answered:
            self._parse(data)
            if not self._answered and not self._over and isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
                self._loop.call_soon(functools.partial(self._guarded, self._readable))

    def _parse(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while not self._answered and not self._over:
                event = self._http.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.Data):
                    raise Refused(413, "a request for an upgrade has no body")
                elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                    self._decide(self._request)
                else:
                    self.close()
        except h11.RemoteProtocolError as err:
            # The text of the error may quote the request, and with it a token.
            too_large = err.error_status_hint == 431
            text = "the head of the request is too large" if too_large else "not an HTTP/1.1 request"
            self._refuse(Refused(err.error_status_hint, text))
        except Refused as err:
            self._refuse(err)

    def _decide(self, request: h11.Request) -> None:
        if request.http_version != b"1.1":
            raise Refused(505, "HTTP/1.1 is spoken here")
        headers: dict[str, str] = {}
        for name, value in request.headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            headers[key] = f"{headers[key]},{text}" if key in headers else text
        upgrade = self._gatekeeper.admit(
            Request(request.method.decode("latin-1"), request.target.decode("latin-1"), headers)
        )
        answer = self._http.send(h11.InformationalResponse(status_code=101, headers=list(upgrade.headers)))
        early, _ = self._http.trailing_data
        sock = self._sock
        self._leave()
        try:
            self._admit(sock, upgrade, answer or b"", bytes(early))
        except Refused as err:
            # 101 was agreed with h11, but nothing has been sent yet.
            self._last_words(sock, err)
        except Exception:
            sock.close()
            raise

    def _refuse(self, err: Refused) -> None:
        self._answered = True
        # Anybody who can connect can cause these lines.
        logger.debug("refused a request: %d %s", err.status, err.message)
        self._answer = _response(err)
        self._watch(writer=self._send_answer)
        self._send_answer()

    def _send_answer(self) -> None:
        """Send, then read on until the client closes or the time is up: closing with something unread would reset."""
        try:
            while self._answer:
                self._answer = self._answer[self._sock.send(self._answer) :]
            self._watch(reader=self._readable)
            self._sock.shutdown(socket.SHUT_WR)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except (OSError, ValueError):
            self.close()
            return
        self._timer.cancel()
        self._timer = self._loop.call_later(_LINGER_S, self.close)

    @staticmethod
    def _last_words(sock: socket.socket, err: Refused) -> None:
        try:
            sock.send(_response(err))
        except OSError:
            pass  # it would only have been told that there is no room
        sock.close()


def _response(err: Refused) -> bytes:
    """An error, in plain text. Written by hand: after a broken request h11 can't be asked for every status."""
    body = f"{err.message}\n".encode("utf-8", "replace")
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
        ("X-Content-Type-Options", "nosniff"),
        *err.headers,
    ]
    reason = _REASONS.get(err.status, "Error")
    head = f"HTTP/1.1 {err.status} {reason}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
    return head.encode() + b"\r\n" + body


_REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
