"""One request being worked on, and the table of all there are."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.client import Client
from shim_embedded_porto.connection import Connection
from shim_embedded_porto.container import Container
from shim_embedded_porto.porto import Porto
from shim_embedded_porto.properties.base import Context


class Kind(enum.Enum):
    """What a request keeps busy: each kind has threads of its own, as in portod."""

    WRITE = "rw"
    READ = "ro"
    IO = "io"
    VOLUMES = "vl"


@dataclass(slots=True)
class Call:
    """A request, seen from its handler."""

    porto: Porto
    connection: Connection
    response: pb.TContainerResponse
    answered: bool = True
    """False when a report is going to be the answer."""

    @property
    def client(self) -> Client:
        return self.connection.client

    @property
    def context(self) -> Context:
        return Context(self.porto, self.client)

    @contextmanager
    def locked(self, name: str, *, child: bool = False) -> Iterator[Container]:
        """A container the client may change, with its action lock held.

        :param child: it is enough that the client may make children in it.
        :raises Fault: ContainerDoesNotExist, Permission.
        """
        ct = self.client.find_for_write(name, child=child)
        with self.porto.tree.locked(ct, shared=ct.is_root):
            yield ct


@dataclass(frozen=True, slots=True)
class Method:
    """A request of the protocol: the field it comes in, and what it does."""

    kind: Kind
    handler: Callable[[Call, Any], None]
    spec: bool = False
    """It is counted with those that work with a whole specification."""


METHODS: dict[str, Method] = {}


def method(
    *names: str, kind: Kind = Kind.WRITE, spec: bool = False
) -> Callable[[Callable[[Call, Any], None]], Callable[[Call, Any], None]]:
    """Enter a handler into the table, under the names of the request's fields.

    A handler fills in the call's response, and raises Fault.
    """

    def enter(handler: Callable[[Call, Any], None]) -> Callable[[Call, Any], None]:
        for name in names:
            METHODS[name] = Method(kind, handler, spec)
        return handler

    return enter
