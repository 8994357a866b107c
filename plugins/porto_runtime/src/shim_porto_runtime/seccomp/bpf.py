"""From a profile to the kernel's filter language: classic BPF over ``struct seccomp_data``.

::

    load the architecture      none of ours: kill
    load the number            a binary search over ranges of numbers with the same rules
    for each rule              load the halves of each argument, compare, return
"""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from shim_core.errors import InvalidArgument
from shim_porto_runtime.seccomp.profile import ALLOW, KILL_PROCESS, Condition, Profile, Rule

MAX_INSTRUCTIONS = 4096

# linux/audit.h; x32 is the x86_64 architecture with a bit set in the number.
_AUDIT_ARCH = {
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X32": 0xC000003E,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
}
_NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}

# offsets in struct seccomp_data (little-endian)
_NR, _ARCH, _ARGS = 0, 4, 16

# linux/bpf_common.h
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_JUMP, _IF_EQ, _IF_GT, _IF_GE = 0x05, 0x15, 0x25, 0x35

Table = Mapping[str, Mapping[str, int]]


@cache
def syscalls() -> Table:
    """Numbers of system calls by architecture and name, as the headers had them when this package was built."""
    text = (resources.files("shim_porto_runtime") / "init" / "syscalls.json").read_text()
    table: Table = json.loads(text)
    return table


def compile_profile(profile: Profile, table: Table | None = None, machine: str | None = None) -> bytes:
    """The filter as ``struct sock_filter`` after ``struct sock_filter``; empty when the profile allows everything.

    Names the machine doesn't know are passed over, as everywhere: a profile serves many kernels and architectures.

    :raises InvalidArgument: an architecture nobody knows, or a filter larger than the kernel takes.
    """
    native = _NATIVE.get(machine or platform.machine())
    if native is None:
        raise InvalidArgument(f"seccomp: no profiles on {machine or platform.machine()}: use Unconfined")
    if not profile.rules and profile.default_action == ALLOW:
        return b""
    tables = _wanted(profile, table or syscalls(), native)
    by_audit: dict[int, dict[str, Mapping[str, int]]] = {}
    for architecture, numbers in tables.items():
        by_audit.setdefault(_AUDIT_ARCH[architecture], {})[architecture] = numbers

    code = _Code()
    code.add(_LOAD, _ARCH)
    for audit, group in by_audit.items():
        other = code.label()
        code.unless_equal(audit, other)
        code.add(_LOAD, _NR)
        _search(code, _ranges(profile, group))
        code.place(other)
    code.add(_RETURN, KILL_PROCESS)
    assembled = code.assemble()
    if len(assembled) > MAX_INSTRUCTIONS:
        raise InvalidArgument(
            f"seccomp: the profile makes {len(assembled)} instructions; Linux takes {MAX_INSTRUCTIONS}"
        )
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in assembled)


def _wanted(profile: Profile, table: Table, native: str) -> dict[str, Mapping[str, int]]:
    for name in profile.architectures:
        if not name.startswith("SCMP_ARCH_"):
            raise InvalidArgument(f"seccomp: architectures: {name[:40]!r} is none")
    names = profile.architectures or tuple(table)
    return {name: table[name] for name in dict.fromkeys((native, *names)) if name in table}


@dataclass(frozen=True, slots=True)
class _Range:
    """Numbers from ``first`` on that share their rules, up to the next range's first."""

    first: int
    rules: tuple[Rule, ...]
    otherwise: int


def _ranges(profile: Profile, group: Mapping[str, Mapping[str, int]]) -> list[_Range]:
    """All numbers from 0, cut where the outcome changes."""
    by_number: dict[int, list[Rule]] = {}
    highest = 0
    for numbers in group.values():
        for rule in profile.rules:
            for name in rule.names:
                if name in numbers:
                    by_number.setdefault(numbers[name], []).append(rule)
    points: dict[int, _Range] = {0: _Range(0, (), profile.default_action)}
    for number, rules in by_number.items():
        points[number] = _outcome(number, rules, profile.default_action)
        if number + 1 not in by_number:
            points[number + 1] = _Range(number + 1, (), profile.default_action)
    if profile.unknown_action is not None:
        for numbers in group.values():
            highest = max(numbers.values())
            points[highest + 1] = _Range(highest + 1, (), profile.unknown_action)
            # x32 numbers begin far above: what lies between is unknown too.
            low = min(numbers.values())
            if low >= 0x40000000 and low not in points:
                points[low] = _Range(low, (), profile.default_action)
    cut: list[_Range] = []
    for number in sorted(points):
        point = points[number]
        if not cut or (cut[-1].rules, cut[-1].otherwise) != (point.rules, point.otherwise):
            cut.append(point)
    return cut


def _outcome(number: int, rules: Sequence[Rule], default: int) -> _Range:
    """What decides about one number: conditional rules in order, then the first unconditional one."""
    conditional: list[Rule] = []
    for rule in rules:
        if not rule.conditions:
            return _Range(number, tuple(conditional), rule.action)
        # Names play no part any more: rules that differ in nothing else can share code.
        conditional.append(Rule((), rule.action, rule.conditions))
    return _Range(number, tuple(conditional), default)


def _search(code: _Code, ranges: Sequence[_Range]) -> None:
    """Binary search for the range the loaded number falls in."""
    if len(ranges) == 1:
        for rule in ranges[0].rules:
            _rule(code, rule)
        code.add(_RETURN, ranges[0].otherwise)
        return
    middle = len(ranges) // 2
    right = code.label()
    code.jump_if(_IF_GE, ranges[middle].first, right)
    _search(code, ranges[:middle])
    code.place(right)
    _search(code, ranges[middle:])


def _rule(code: _Code, rule: Rule) -> None:
    following = code.label()
    for condition in rule.conditions:
        _condition(code, condition, following)
    code.add(_RETURN, rule.action)
    code.place(following)


def _condition(code: _Code, condition: Condition, otherwise: int) -> None:
    """Go on if the condition holds, else jump. BPF compares 32 bits: the upper halves decide unless they are equal."""
    low = _ARGS + 8 * condition.index
    value = condition.value_two if condition.operator == "SCMP_CMP_MASKED_EQ" else condition.value
    high_value, low_value = value >> 32, value & 0xFFFFFFFF
    holds = code.label()
    code.add(_LOAD, low + 4)
    if condition.operator == "SCMP_CMP_MASKED_EQ":
        code.add(_AND, condition.value >> 32)
        code.unless_equal(high_value, otherwise)
        code.add(_LOAD, low)
        code.add(_AND, condition.value & 0xFFFFFFFF)
        code.unless_equal(low_value, otherwise)
    elif condition.operator == "SCMP_CMP_EQ":
        code.unless_equal(high_value, otherwise)
        code.add(_LOAD, low)
        code.unless_equal(low_value, otherwise)
    elif condition.operator == "SCMP_CMP_NE":
        code.unless_equal(high_value, holds)
        code.add(_LOAD, low)
        code.jump_if(_IF_EQ, low_value, otherwise)
    elif condition.operator in ("SCMP_CMP_GT", "SCMP_CMP_GE"):
        code.jump_if(_IF_GT, high_value, holds)
        code.unless_equal(high_value, otherwise)
        code.add(_LOAD, low)
        code.jump_if(_IF_GT if condition.operator == "SCMP_CMP_GT" else _IF_GE, low_value, holds)
        code.jump(otherwise)
    else:
        code.jump_if(_IF_GT, high_value, otherwise)
        code.unless_equal(high_value, holds)
        code.add(_LOAD, low)
        code.jump_if(_IF_GE if condition.operator == "SCMP_CMP_LT" else _IF_GT, low_value, otherwise)
    code.place(holds)


class _Code:
    """Instructions with labels. Conditional jumps reach 255 instructions, so each is one over an unconditional one."""

    def __init__(self) -> None:
        self._items: list[tuple[int, int, int | None]] = []
        self._places: dict[int, int] = {}
        self._labels = 0

    def label(self) -> int:
        self._labels += 1
        return self._labels

    def place(self, label: int) -> None:
        self._places[label] = len(self._items)

    def add(self, opcode: int, value: int) -> None:
        self._items.append((opcode, value, None))

    def jump(self, label: int) -> None:
        self._items.append((_JUMP, 0, label))

    def jump_if(self, opcode: int, value: int, label: int) -> None:
        """To ``label`` if the comparison holds, else to the next instruction."""
        # Over the jump when it doesn't hold.
        self._items.append((opcode, value, None))
        self.jump(label)

    def unless_equal(self, value: int, label: int) -> None:
        """To ``label`` if the accumulator isn't ``value``, else to the next instruction."""
        self._items.append((_IF_EQ | _INVERTED, value, None))
        self.jump(label)

    def assemble(self) -> list[tuple[int, int, int, int]]:
        """Opcode, jump if true, jump if false, operand."""
        out = []
        for position, (opcode, value, label) in enumerate(self._items):
            if label is not None:
                out.append((opcode, 0, 0, self._places[label] - position - 1))
            elif opcode & _INVERTED:
                out.append((opcode & ~_INVERTED, 1, 0, value))
            elif opcode in (_IF_EQ, _IF_GT, _IF_GE):
                out.append((opcode, 0, 1, value))
            else:
                out.append((opcode, 0, 0, value))
        return out


_INVERTED = 0x10000
