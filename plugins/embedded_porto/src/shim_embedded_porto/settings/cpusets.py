"""CPU sets: ``0-3``, ``node 0``, ``jail 2``, ``jail 2; node 0``, or the parent's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.errors import Fault, invalid_value

_CPU = Path("/sys/devices/system/cpu")
_NODE = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Topology:
    """The machine's CPUs by NUMA node."""

    nodes: dict[int, frozenset[int]]

    @property
    def cpus(self) -> frozenset[int]:
        return frozenset().union(*self.nodes.values())


@lru_cache(maxsize=1)
def topology() -> Topology:
    online = text.parse_bitmap((_CPU / "online").read_text())
    try:
        numbers = text.parse_bitmap((_NODE / "online").read_text())
        nodes = {n: text.parse_bitmap((_NODE / f"node{n}/cpulist").read_text()) & online for n in numbers}
    except OSError:  # a kernel without NUMA
        nodes = {0: online}
    return Topology(nodes)


@dataclass(frozen=True, slots=True)
class CpuSet:
    """What was asked for."""

    policy: str = "inherit"
    cpus: frozenset[int] = frozenset()
    node: int = -1
    jail: int = 0

    def format(self) -> str:
        if self.policy == "set":
            return text.format_bitmap(self.cpus)
        if self.policy == "node":
            return f"node {self.node}"
        if self.policy == "jail":
            return f"jail {self.jail}" + (f"; node {self.node}" if self.node >= 0 else "")
        return ""

    def dump(self, out: pb.TContainerCpuSet) -> None:
        out.policy = self.policy
        if self.policy == "set":
            out.cpu.extend(sorted(self.cpus))
            out.list, out.count = text.format_bitmap(self.cpus), len(self.cpus)
        elif self.policy == "node":
            out.arg = self.node
        elif self.policy == "jail":
            out.jail = self.jail
            if self.node >= 0:
                out.arg = self.node

    def candidates(self) -> frozenset[int]:
        """The CPUs a jail may be made of, or the whole set."""
        if self.policy == "set":
            return self.cpus
        return topology().nodes[self.node] if self.node >= 0 else topology().cpus


INHERIT = CpuSet()


def parse(value: str) -> CpuSet:
    """:raises Fault: InvalidValue."""
    if value in ("", "all", "inherit"):
        return INHERIT
    wrong = invalid_value(f"invalid cpu_set: {value}")
    try:
        lines = text.split_nested(value, " ", ";")
        if len(lines) == 1 and len(lines[0]) == 1:
            return _checked(CpuSet("set", text.parse_bitmap(lines[0][0])))
        words = {line[0]: text.parse_int(line[1], 0, kind="int") for line in lines if len(line) == 2}
    except Fault:
        raise wrong from None
    if len(words) != len(lines) or not words or set(words) - {"jail", "node"}:
        raise wrong
    try:
        if "jail" in words:
            return _checked(CpuSet("jail", node=words.get("node", -1), jail=words["jail"]))
        return _checked(CpuSet("node", node=words["node"]))
    except Fault:
        raise wrong from None


def from_message(message: pb.TContainerCpuSet) -> CpuSet:
    if message.policy in ("", "inherit"):
        return INHERIT
    try:
        if message.policy == "set":
            cpus = text.parse_bitmap(message.list) if message.HasField("list") else frozenset(message.cpu)
            return _checked(CpuSet("set", cpus))
        if message.policy == "node":
            return _checked(CpuSet("node", node=message.arg))
        if message.policy == "jail":
            return _checked(CpuSet("jail", node=message.arg if message.HasField("arg") else -1, jail=message.jail))
    except Fault:
        pass
    raise invalid_value("invalid cpu_set")


def _checked(spec: CpuSet) -> CpuSet:
    machine = topology()
    if spec.node >= 0 and spec.node not in machine.nodes:
        raise invalid_value("no such node")
    if not spec.cpus <= machine.cpus:
        raise invalid_value("no such CPU")
    if spec.policy == "jail" and not 0 < spec.jail <= len(spec.candidates()):
        raise invalid_value("no jail of that size")
    return spec


def choose_jail(spec: CpuSet, taken: Iterable[frozenset[int]], kept: frozenset[int] = frozenset()) -> frozenset[int]:
    """The CPUs of a jail: ``kept`` if they still fit, else those that fewest other jails use."""
    candidates = spec.candidates()
    if len(kept) == spec.jail and kept <= candidates:
        return kept
    usage = dict.fromkeys(candidates, 0)
    for jail in taken:
        for cpu in jail & candidates:
            usage[cpu] += 1
    return frozenset(sorted(candidates, key=lambda cpu: (usage[cpu], cpu))[: spec.jail])
