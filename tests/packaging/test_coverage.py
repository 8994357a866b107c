"""docs/cri-coverage.md says of every field of the CRI's configuration messages what becomes of it."""

from __future__ import annotations

import re

from google.protobuf.descriptor import Descriptor

from shim_core.cri.v1 import api_pb2 as pb
from tools.docs import DOCS

ROOTS = (
    "RunPodSandboxRequest",
    "CreateContainerRequest",
    "UpdateContainerResourcesRequest",
    "UpdatePodSandboxResourcesRequest",
    "ImageSpec",
)
VERDICTS = {"honoured", "refused", "not applicable"}


def fields(message: Descriptor, seen: set[str]) -> set[str]:
    """``Message.field`` of a message and of all that it is made of."""
    if message.name in seen or message.GetOptions().map_entry:
        return set()
    seen.add(message.name)
    found = {f"{message.name}.{field.name}" for field in message.fields}
    for field in message.fields:
        if field.message_type is not None:
            found |= fields(field.message_type, seen)
    return found


def test_every_field_has_a_line_and_every_line_a_field() -> None:
    seen: set[str] = set()
    there = {name for root in ROOTS for name in fields(pb.DESCRIPTOR.message_types_by_name[root], seen)}
    page = (DOCS / "cri-coverage.md").read_text()
    lines = re.findall(r"^\| `(\w+\.\w+)` \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    assert sorted(name for name, _, _ in lines) == sorted(there)
    for name, verdict, text in lines:
        assert verdict in VERDICTS, name
        assert text or verdict == "honoured", f"{name}: say why"
