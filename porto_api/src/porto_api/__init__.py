"""Porto's protobuf protocol in Python: messages, framing, a client.

::

    from porto_api import Client

    with Client() as porto:
        porto.create("hello")
        porto.set_property("hello", "command", "echo Hello")
        porto.start("hello")
        porto.wait(["hello"])
        print(porto.get_property("hello", "stdout"))
"""

from porto_api import errors, rpc_pb2, seccomp_pb2
from porto_api.cancel import CancelToken
from porto_api.client import DEFAULT_SOCKET, Client, WaitResult
from porto_api.connection import Connection
from porto_api.errors import PortoError
from porto_api.events import Event, Subscription

__all__ = [
    "DEFAULT_SOCKET",
    "CancelToken",
    "Client",
    "Connection",
    "Event",
    "PortoError",
    "Subscription",
    "WaitResult",
    "errors",
    "rpc_pb2",
    "seccomp_pb2",
]
