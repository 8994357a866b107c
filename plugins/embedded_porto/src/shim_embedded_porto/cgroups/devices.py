"""The devices a container's processes may open: the devices controller, or an eBPF program in version 2."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.cgroups.hierarchy import Cgroups, write
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.settings import devices

Rule = tuple[str, str, str]
_SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine, 0)
_BPF_PROG_LOAD, _BPF_PROG_ATTACH, _BPF_PROG_QUERY, _BPF_PROG_DETACH, _BPF_PROG_GET_FD_BY_ID = 5, 8, 16, 9, 13
_PROG_TYPE_CGROUP_DEVICE, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI = 15, 6, 2
_ACCESS = {"m": 1, "r": 2, "w": 4}
_KINDS = {"b": 1, "c": 2}
_libc = ctypes.CDLL(None, use_errno=True)


class DeviceControl:
    """Applies device rules."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups

    def apply(self, ct: Container) -> None:
        """:raises Fault: the kernel refuses."""
        hierarchy = self._cgroups.hierarchy("devices")
        if hierarchy is None:
            return
        path = self._cgroups.path(ct, "devices")
        wanted = devices.rules(ct.effective_devices())
        if hierarchy.v2:
            _attach(path, wanted)
        else:
            _apply_v1(path, wanted)


def _apply_v1(path: str, wanted: frozenset[Rule]) -> None:
    with open(f"{path}/devices.list") as file:
        lines = [line.split() for line in file]
    if any(kind == "a" for kind, _, _ in lines):
        write(f"{path}/devices.deny", "a")
        lines = []
    current = {(kind, node, letter) for kind, node, access in lines for letter in access}
    for knob, rules in (("devices.deny", current - wanted), ("devices.allow", wanted - current)):
        grouped: dict[tuple[str, str], str] = {}
        for kind, node, letter in sorted(rules):
            grouped[kind, node] = grouped.get((kind, node), "") + letter
        for (kind, node), letters in grouped.items():
            write(f"{path}/{knob}", f"{kind} {node} {letters}")


# -- version 2 ---------------------------------------------------------------------------------------------------------


def program(rules: Iterable[Rule]) -> bytes:
    """An eBPF program that returns 1 for what the rules allow.

    Its context is ``struct bpf_cgroup_dev_ctx``: access and kind in one word, then major and minor number.
    """
    code = [
        _insn(0x61, 2, 1, 0),  # r2 = access << 16 | kind
        _insn(0xBC, 3, 2, 0),  # w3 = w2
        _insn(0x54, 2, 0, 0, 0xFFFF),  # w2: kind
        _insn(0x74, 3, 0, 0, 16),  # w3: access
        _insn(0x61, 4, 1, 4),  # r4 = major
        _insn(0x61, 5, 1, 8),  # r5 = minor
    ]
    allowed: dict[tuple[str, str], int] = {}
    for kind, node, letter in sorted(rules):
        allowed[kind, node] = allowed.get((kind, node), 0) | _ACCESS[letter]
    for (kind, node), mask in allowed.items():
        major, _, minor = node.partition(":")
        tests = [(2, _KINDS[kind]), (4, int(major)), *([] if minor == "*" else [(5, int(minor))])]
        # Past the tests to come, the access test of three instructions, and the two of the answer.
        block = [_insn(0x55, register, 0, len(tests) - 1 - i + 5, value) for i, (register, value) in enumerate(tests)]
        block += [
            _insn(0xBC, 6, 3, 0),  # w6 = access
            _insn(0x54, 6, 0, 0, ~mask & 0xFFFF),  # what is not allowed of it
            _insn(0x55, 6, 0, 2, 0),
            _insn(0xB7, 0, 0, 0, 1),
            _insn(0x95, 0, 0, 0),  # exit: allowed
        ]
        code += block
    code += [_insn(0xB7, 0, 0, 0, 0), _insn(0x95, 0, 0, 0)]
    return b"".join(code)


def _insn(opcode: int, target: int, source: int, offset: int, value: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, source << 4 | target, offset, value)


def _attach(path: str, rules: frozenset[Rule]) -> None:
    """Put a program for the rules on a cgroup, in the place of the one before."""
    code = program(rules)
    code_buffer = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    cgroup = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        before = _attached(cgroup)
        attributes = struct.pack(
            "<IIQQIIQII16sII",
            *(_PROG_TYPE_CGROUP_DEVICE, len(code) // 8, ctypes.addressof(code_buffer), ctypes.addressof(licence)),
            *(0, 0, 0, 0, 0, b"porto_devices", 0, _ATTACH_CGROUP_DEVICE),
        )
        fd = _bpf(_BPF_PROG_LOAD, attributes)
        try:
            _bpf(_BPF_PROG_ATTACH, struct.pack("<IIII", cgroup, fd, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI))
        finally:
            os.close(fd)
        for number in before:
            old = _bpf(_BPF_PROG_GET_FD_BY_ID, struct.pack("<III", number, 0, 0))
            try:
                _bpf(_BPF_PROG_DETACH, struct.pack("<III", cgroup, old, _ATTACH_CGROUP_DEVICE))
            finally:
                os.close(old)
    finally:
        os.close(cgroup)


def _attached(cgroup: int) -> list[int]:
    numbers = (ctypes.c_uint32 * 64)()
    attributes = ctypes.create_string_buffer(
        struct.pack("<IIIIQI", cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(numbers), len(numbers)), 64
    )
    _bpf_buffer(_BPF_PROG_QUERY, attributes)
    count = struct.unpack_from("<I", attributes, 24)[0]
    return list(numbers[:count])


def _bpf(command: int, attributes: bytes) -> int:
    return _bpf_buffer(command, ctypes.create_string_buffer(attributes, 128))


def _bpf_buffer(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    result = int(_libc.syscall(_SYS_BPF, command, attributes, len(attributes)))
    if result < 0:
        raise Fault(pb.Unknown, f"bpf({command})", ctypes.get_errno())
    return result
