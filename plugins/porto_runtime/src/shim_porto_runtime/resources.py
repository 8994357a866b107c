"""Limits: from the CRI's units to Porto's properties, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented

DEFAULT_PERIOD_US = 100_000
MIN_PERIOD_US, MAX_PERIOD_US = 1_000, 1_000_000
MIN_QUOTA_US, MAX_QUOTA_US = 1_000, 10**12
MIN_MEMORY_BYTES = 1024 * 1024
MAX_MEMORY_BYTES = 2**62
"""Porto and the kernel count pages with a sign."""
MAX_PROCESSES = 4 * 1024 * 1024
_CPU_SET = re.compile(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*")
_TWO_MIB = ("2Mi", "2MB", "2M", "2MiB")
_NO_PAGES_BYTES = 1
"""Less than one huge page: to Porto a limit of 0 is none."""


def check(
    resources: pb.LinuxContainerResources,
    field: str = "linux.resources",
    in_force: pb.LinuxContainerResources | None = None,
) -> None:
    """Refuse values no container can have, and those Porto has no property for.

    :param in_force: what they are going to be applied over.
    :raises InvalidArgument: out of range.   :raises Unimplemented: nothing in Porto does this.
    """

    def require(condition: bool, name: str, text: str) -> None:
        if not condition:
            raise InvalidArgument(f"{field}.{name}: {getattr(resources, name)!r}: {text}")

    period = resources.cpu_period
    require(period == 0 or MIN_PERIOD_US <= period <= MAX_PERIOD_US, "cpu_period", "must be 1000 to 1000000 µs")
    quota = resources.cpu_quota
    require(quota in (0, -1) or quota >= MIN_QUOTA_US, "cpu_quota", "must be at least 1000 µs, or -1 for no limit")
    require(0 <= resources.cpu_shares <= 262144, "cpu_shares", "must be 0 to 262144")
    require(quota <= MAX_QUOTA_US, "cpu_quota", f"must be at most {MAX_QUOTA_US} µs, or -1 for no limit")
    memory = resources.memory_limit_in_bytes
    require(memory in (0, -1) or memory >= MIN_MEMORY_BYTES, "memory_limit_in_bytes", "must be at least 1 MiB")
    require(memory <= MAX_MEMORY_BYTES, "memory_limit_in_bytes", "is more than any machine has; -1 is no limit")
    require(-1000 <= resources.oom_score_adj <= 1000, "oom_score_adj", "must be -1000 to 1000")
    if resources.cpuset_cpus:
        _check_cpus(resources.cpuset_cpus, f"{field}.cpuset_cpus")
    if resources.cpuset_mems:
        _check_mems(resources.cpuset_mems, f"{field}.cpuset_mems")
    both = merged(in_force, resources) if in_force is not None else resources
    swap, memory = both.memory_swap_limit_in_bytes, both.memory_limit_in_bytes
    if swap not in (0, memory) and not (swap == -1 and memory == 0):
        raise Unimplemented(
            f"{field}.memory_swap_limit_in_bytes: a container with a memory limit has no swap in Porto: give "
            "that limit here too, or nothing"
        )
    for limit in resources.hugepage_limits:
        if limit.page_size not in _TWO_MIB and limit.limit:
            raise Unimplemented(f"{field}.hugepage_limits: Porto limits 2 MiB pages only, not {limit.page_size[:20]!r}")
        if limit.limit > MAX_MEMORY_BYTES:
            raise InvalidArgument(f"{field}.hugepage_limits: {limit.limit}: is more than any machine has")
    for name, value in resources.unified.items():
        _unified(name, value, f"{field}.unified[{name[:60]!r}]", rpc_pb2.TContainerSpec())


def into_spec(resources: pb.LinuxContainerResources, spec: rpc_pb2.TContainerSpec, *, hugetlb: bool) -> None:
    """Set what the resources name; zero and empty leave things as they are (CRI, UpdateContainerResources).

    Porto's guarantee of memory is not touched: a request in the CRI is no promise. That of processors is what Porto
    makes shares of, and nothing else; its weight only multiplies them.

    :param hugetlb: whether this Porto can limit huge pages. Where it can't, "none" is left out and any other limit is
        Porto's to refuse.
    """
    if resources.memory_limit_in_bytes:
        spec.memory_limit = max(resources.memory_limit_in_bytes, 0)
    if resources.cpu_period:
        spec.cpu_period = resources.cpu_period * 1000
    if resources.cpu_quota:
        period_us = resources.cpu_period or DEFAULT_PERIOD_US
        spec.cpu_limit = max(resources.cpu_quota, 0) / period_us
        spec.cpu_period = period_us * 1000
    if resources.cpu_shares:
        spec.cpu_guarantee = _guarantee(resources.cpu_shares)
    if resources.cpuset_cpus:
        spec.cpu_set.policy = "set"
        spec.cpu_set.list = resources.cpuset_cpus
    for limit in resources.hugepage_limits:
        if limit.page_size in _TWO_MIB and (limit.limit or hugetlb):
            spec.hugetlb_limit = limit.limit or _NO_PAGES_BYTES
    if resources.oom_score_adj:
        spec.oom_score_adj = resources.oom_score_adj
    for name, value in resources.unified.items():
        if hugetlb or name != _HUGETLB or value not in ("0", "max"):
            _unified(name, value, name, spec)


def _guarantee(shares: float) -> float:
    """The guarantee, in cores, of which Porto makes this many shares: it cuts off what is less than one."""
    return (shares + 0.01) / 1024


def _unified(name: str, value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    """A cgroup v2 knob, where a property of Porto's does the same."""
    knob = _KNOBS.get(name)
    if knob is None:
        raise Unimplemented(f"{field}: nothing in Porto does what this does; known are {', '.join(_KNOBS)}")
    knob(value, field, spec)


def _pids_max(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    spec.thread_limit = _number(value, field, 1)
    if spec.thread_limit > MAX_PROCESSES:
        raise InvalidArgument(f"{field}: {value[:40]!r}: no kernel has more than {MAX_PROCESSES}")


def _memory_max(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    spec.memory_limit = _number(value, field, MIN_MEMORY_BYTES)


def _memory_swap_max(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    # kubelet says 0 of every container; that is so on a node without swap.
    if value != "0" or _node_has_swap():
        raise Unimplemented(f"{field}: Porto has no limit for swap; the node should have none, and this be 0")


def _memory_oom_group(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    if value not in ("0", "1"):
        raise InvalidArgument(f"{field}: {value[:40]!r} must be 0 or 1")
    spec.oom_is_fatal = value == "1"


def _cpu_weight(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    weight = _number(value, field, 1)
    if not 1 <= weight <= 10000:
        raise InvalidArgument(f"{field}: {value[:40]!r} must be 1 to 10000")
    # cgroup v2 has 100 where v1 has 1024.
    spec.cpu_guarantee = _guarantee(weight * 1024 / 100)


def _cpu_max(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    words = value.split()
    if len(words) not in (1, 2):
        raise InvalidArgument(f"{field}: {value[:40]!r} must be a quota and a period in µs, such as 50000 100000")
    quota_us = _number(words[0], field, MIN_QUOTA_US)
    period_us = _number(words[1], field, MIN_PERIOD_US) if words[1:] else DEFAULT_PERIOD_US
    if not MIN_PERIOD_US <= period_us <= MAX_PERIOD_US or quota_us > MAX_QUOTA_US:
        raise InvalidArgument(f"{field}: {value[:40]!r}: the period must be 1000 to 1000000 µs")
    spec.cpu_limit = quota_us / period_us
    spec.cpu_period = period_us * 1000


def _cpuset_cpus(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    _check_cpus(value, field)
    spec.cpu_set.policy = "set"
    spec.cpu_set.list = value


def _cpuset_mems(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    _check_mems(value, field)


def _hugetlb_max(value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    spec.hugetlb_limit = _number(value, field, 0) or (0 if value == "max" else _NO_PAGES_BYTES)


_HUGETLB = "hugetlb.2MB.max"

_KNOBS: Mapping[str, Callable[[str, str, rpc_pb2.TContainerSpec], None]] = {
    "pids.max": _pids_max,
    "memory.max": _memory_max,
    "memory.swap.max": _memory_swap_max,
    "memory.oom.group": _memory_oom_group,
    "cpu.weight": _cpu_weight,
    "cpu.max": _cpu_max,
    "cpuset.cpus": _cpuset_cpus,
    "cpuset.mems": _cpuset_mems,
    _HUGETLB: _hugetlb_max,
}


def _check_cpus(value: str, field: str) -> None:
    if not _members(value, field) <= _members(_of_machine("cpu/online"), "/sys/devices/system/cpu/online"):
        raise InvalidArgument(f"{field}: {value[:40]!r}: this machine has {_of_machine('cpu/online')}")


def _check_mems(value: str, field: str) -> None:
    """Porto has no limit of this kind, so all memory nodes it has to be."""
    wanted = _members(value, field)
    there = _members(_of_machine("node/has_memory"), "/sys/devices/system/node/has_memory")
    if not wanted <= there:
        raise InvalidArgument(f"{field}: {value[:40]!r}: this machine has {_of_machine('node/has_memory')}")
    if wanted != there:
        raise Unimplemented(f"{field}: Porto can't bind a container to memory nodes; leave it out")


def _members(value: str, field: str) -> set[int]:
    """``0-3,7`` → 0, 1, 2, 3, 7."""
    if _CPU_SET.fullmatch(value) is None:
        raise InvalidArgument(f"{field}: {value[:40]!r} must be a list such as 0-3,7")
    found: set[int] = set()
    for part in value.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise InvalidArgument(f"{field}: {value[:40]!r}: a range must not run backwards")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _of_machine(what: str) -> str:
    """What the kernel says of its processors or memory nodes; one of each where it says nothing."""
    try:
        return Path("/sys/devices/system", what).read_text().strip() or "0"
    except OSError:
        return "0"


def _number(value: str, field: str, least: int) -> int:
    """A limit as Porto has it, where 0 is none."""
    if value == "max":
        return 0
    if not value.isascii() or not value.isdecimal() or len(value) > 18 or int(value) < least:
        raise InvalidArgument(f"{field}: {value[:40]!r} must be a number, at least {least}, or max")
    return int(value)


def _node_has_swap() -> bool:
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def of_pod(resources: pb.LinuxContainerResources, overhead: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """What limits a pod as a whole: its resources and the overhead of its sandbox."""
    total = pb.LinuxContainerResources()
    total.CopyFrom(resources)
    if total.memory_limit_in_bytes > 0:
        total.memory_limit_in_bytes += max(overhead.memory_limit_in_bytes, 0)
        # It has been checked to be the same, or nothing.
        total.memory_swap_limit_in_bytes = 0
    if total.cpu_quota > 0 and overhead.cpu_quota > 0:
        period = total.cpu_period or DEFAULT_PERIOD_US
        total.cpu_quota += overhead.cpu_quota * period // (overhead.cpu_period or DEFAULT_PERIOD_US)
    # The sandbox's own container runs nothing, so this has no meaning; each container has its own.
    total.oom_score_adj = 0
    return total


def merged(old: pb.LinuxContainerResources, new: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """What is in force once ``new`` has been applied over ``old``."""
    result = pb.LinuxContainerResources()
    result.CopyFrom(old)
    for field, value in new.ListFields():
        if field.name == "hugepage_limits":
            sizes = {limit.page_size for limit in new.hugepage_limits}
            kept = [limit for limit in old.hugepage_limits if limit.page_size not in sizes]
            del result.hugepage_limits[:]
            result.hugepage_limits.extend([*kept, *new.hugepage_limits])
        elif field.name == "unified":
            result.unified.update(new.unified)
        else:
            setattr(result, field.name, value)
    return result


def changes(old: pb.LinuxContainerResources, new: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """What has to be set to get from ``old`` to ``new``: Porto refuses some properties of running containers."""
    result = pb.LinuxContainerResources()
    for field, value in new.ListFields():
        if field.name == "hugepage_limits":
            result.hugepage_limits.extend(limit for limit in new.hugepage_limits if limit not in old.hugepage_limits)
        elif field.name == "unified":
            result.unified.update({key: text for key, text in new.unified.items() if old.unified.get(key) != text})
        elif value != getattr(old, field.name):
            setattr(result, field.name, value)
    if result.cpu_quota or result.cpu_period:
        # Porto has their quotient.
        result.cpu_quota, result.cpu_period = new.cpu_quota, new.cpu_period
    return result
