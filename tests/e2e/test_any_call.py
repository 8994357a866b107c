"""Every call of the CRI with random messages: each is carried out, or refused as the CRI knows it. No call breaks.

``SHIM_TEST_LONG=1`` makes some hundred thousand calls.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.dispatch import Method, methods, repeated
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, until
from tests.e2e.test_lifecycle import traces
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root

CALLS = 3000 if "SHIM_TEST_LONG" in os.environ else 40
"""Of each kind; a tenth of that where a call may take a while."""
SLOW = {"PullImage", "ExecSync", "StopContainer", "RunPodSandbox", "GetContainerEvents"}
TIMEOUT_S = 3.0

REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "FAILED_PRECONDITION", "ALREADY_EXISTS", "OUT_OF_RANGE"}
ALSO = {
    "PullImage": {"UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED"},
    "ExecSync": {"DEADLINE_EXCEEDED", "UNKNOWN"},  # the command can't be run: as other runtimes have it
    "StopContainer": {"DEADLINE_EXCEEDED"},
    # The tickets that nobody comes for.
    "Exec": {"RESOURCE_EXHAUSTED"},
    "Attach": {"RESOURCE_EXHAUSTED"},
    "PortForward": {"RESOURCE_EXHAUSTED"},
}

WORDS = (
    "", "a", "*", "**", "***", "/", ".", "..", "self", "../../etc/passwd", "/proc/self/fd/7", "a/../../b", "%s%n", "\n",
    "x\ny", "\u202e", "ü" * 40, "a" * 300, "f" * 64, "g" * 64, "-1", "0", "true", "sh", "latest", "10.0.0.0/8", "tcp",
    "localhost", "sha256:" + "0" * 64, "localhost:1/a@sha256:" + "0" * 64, "localhost:1/a:b", "k=v",
    "net.core.somaxconn",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 9, 15, 80, 255, 1000, 65535, 65536, 2**31 - 1)


class Maker:
    """Makes messages; what is there already is named now and then."""

    def __init__(self, chance: random.Random, known: dict[str, list[str]]) -> None:
        self._chance = chance
        self._known = known

    def message(self, kind: type[Message], depth: int = 0) -> Message:
        made = kind()
        fields: Iterable[Any] = kind.DESCRIPTOR.fields
        for field in fields:
            if self._chance.random() < (0.5 if depth < 3 else 0.15):
                self._set(made, field, depth)
        return made

    def _set(self, made: Message, field: FieldDescriptor, depth: int) -> None:
        times = self._chance.choice((1, 1, 2, 5))
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(times):
                key = self._value(field.message_type.fields_by_name["key"])
                value = field.message_type.fields_by_name["value"]
                if value.message_type is None:
                    getattr(made, field.name)[key] = self._value(value)
        elif field.message_type is not None:
            inner = getattr(pb, field.message_type.name)
            if repeated(field):
                getattr(made, field.name).extend(self.message(inner, depth + 1) for _ in range(times))
            else:
                getattr(made, field.name).CopyFrom(self.message(inner, depth + 1))
        elif repeated(field):
            getattr(made, field.name).extend(self._value(field) for _ in range(times))
        else:
            setattr(made, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        known = self._known.get(field.name)
        if known and field.cpp_type == FieldDescriptor.CPPTYPE_STRING and self._chance.random() < 0.7:
            return self._chance.choice(known)
        if field.enum_type is not None:
            return self._chance.choice([*(value.number for value in field.enum_type.values), 99])
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                word = self._chance.choice(WORDS)
                return word.encode() if field.type == FieldDescriptor.TYPE_BYTES else word
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._chance.random() < 0.3
            case FieldDescriptor.CPPTYPE_INT64:
                return self._chance.choice((*NUMBERS, 2**63 - 1, -(2**63)))
            case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
                return abs(self._chance.choice(NUMBERS))
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self._chance.choice((0.0, -1.5, 1e300))
            case _:
                return self._chance.choice(NUMBERS)


@pytest.fixture(scope="module")
def own(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), registry=registry) as made:
        yield made
        made.remove_pods()


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.rpc)
def test_any_message_is_carried_out_or_refused(own: Node, registry: LocalRegistry, method: Method) -> None:
    chance = random.Random(f"{method.rpc} {os.environ.get('SHIM_TEST_SEED', '')}")
    pods = Pods(own, f"{registry.address}/public/busybox:1")
    known = {"image": [pods.image], "user_specified_image": [pods.image]}
    for number in range(CALLS // 10 if method.rpc in SLOW else CALLS):
        if number % 100 == 0:
            pull(own, pods.image)  # RemoveImage may have removed it
            sandbox = pods.run()
            containers = [pods.create(sandbox, "true"), pods.container(sandbox)]
            known |= {"pod_sandbox_id": [sandbox], "container_id": containers, "id": [sandbox, *containers]}
        request = Maker(chance, known).message(method.request)
        code, text = _call(own, method, request)
        assert code in {"OK", *REFUSED, *ALSO.get(method.rpc, ())}, f"{code} {text}\n{request}"
        assert code == "OK" or len(text) > 10
    pods.remove_all()
    own.remove_pods()
    until(lambda: traces(own), lambda found: not any(found[kind] for kind in ("volumes", "helpers", "leases")))


def _call(node: Node, method: Method, request: Message) -> tuple[str, str]:
    """The code's name, and the error's text."""
    call = getattr(node.cri, method.rpc)
    try:
        if not method.streaming:
            call(request, timeout=TIMEOUT_S if method.rpc in SLOW else 60)
        else:
            endless = method.rpc == "GetContainerEvents"
            stream = call(request, timeout=0.3 if endless else 60)
            for _ in stream:
                pass
    except grpc.RpcError as err:
        if method.rpc == "GetContainerEvents" and err.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "OK", ""
        return err.code().name, err.details() or ""
    return "OK", ""
