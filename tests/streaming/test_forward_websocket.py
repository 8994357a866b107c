"""port-forward over plain WebSocket channels, and what a tunnel doesn't take."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.streaming.harness import Harness, eventually
from tests.streaming.pods import Pods, closed_port, echo
from tests.streaming.websocket_client import WebSocket, WebSocketChannels


def test_a_text_message_in_a_tunnel(harness: Harness) -> None:
    websocket = WebSocket(harness.forward_url(), "SPDY/3.1+portforward.k8s.io")
    websocket.send("text")
    while websocket.recv() is not None:
        pass
    assert websocket.close_code == 1003
    websocket.close()


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""])
def test_websocket_channels(harness: Harness, pods: Pods, protocol: str) -> None:
    first, second = pods(echo), pods(echo)
    names = [protocol] if protocol else []
    channels = WebSocketChannels(WebSocket(harness.forward_url(first.port, second.port), *names))
    channels.wait(lambda: len(channels.messages) >= 4, "the ports")
    assert channels.messages[:4] == [
        (number, struct.pack("<H", port)) for number, port in enumerate([first.port] * 2 + [second.port] * 2)
    ]
    channels.send(0, b"one")
    channels.send(2, b"two")
    channels.wait(lambda: channels.channels[0][2:] == b"one" and channels.channels[2][2:] == b"two", "echoes")
    channels.send(1, b"errors are not the client's to send")
    channels.send(9, b"nor are there so many channels")
    channels.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)


def test_websocket_ends_with_its_last_connection(harness: Harness, pods: Pods) -> None:
    def speak(sock: socket.socket) -> None:
        sock.sendall(b"bye")
        sock.close()

    pod, port = pods(speak), closed_port()
    channels = WebSocketChannels(WebSocket(harness.forward_url(pod.port, port), "v4.channel.k8s.io"))
    channels.wait(lambda: channels.closed, "the end")
    assert channels.socket.close_code == 1000
    assert channels.channels[0][2:] == b"bye"
    assert b"Connection refused" in channels.channels[3]
    channels.close()
