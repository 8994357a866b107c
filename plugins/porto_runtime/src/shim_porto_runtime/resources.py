"""Limits: from the CRI's units to Porto's properties, and back."""

from __future__ import annotations

import re

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented

DEFAULT_PERIOD_US = 100_000
MIN_PERIOD_US, MAX_PERIOD_US = 1_000, 1_000_000
MIN_QUOTA_US = 1_000
MIN_MEMORY_BYTES = 1024 * 1024
_CPU_SET = re.compile(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*")
_TWO_MIB = ("2Mi", "2MB", "2M", "2MiB")


def check(resources: pb.LinuxContainerResources, field: str = "linux.resources") -> None:
    """Refuse values no container can have, and those Porto has no property for.

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
    memory = resources.memory_limit_in_bytes
    require(memory in (0, -1) or memory >= MIN_MEMORY_BYTES, "memory_limit_in_bytes", "must be at least 1 MiB")
    require(-1000 <= resources.oom_score_adj <= 1000, "oom_score_adj", "must be -1000 to 1000")
    for name in ("cpuset_cpus", "cpuset_mems"):
        value = getattr(resources, name)
        require(not value or _CPU_SET.fullmatch(value) is not None, name, "must be a list such as 0-3,7")
    swap = resources.memory_swap_limit_in_bytes
    if swap not in (0, -1) and swap != memory:
        raise Unimplemented(
            f"{field}.memory_swap_limit_in_bytes: Porto limits memory without swap: give the memory limit"
        )
    for limit in resources.hugepage_limits:
        if limit.page_size not in _TWO_MIB and limit.limit:
            raise Unimplemented(f"{field}.hugepage_limits: Porto limits 2 MiB pages only, not {limit.page_size[:20]!r}")
    for name, value in resources.unified.items():
        _unified(name, value, f"{field}.unified[{name[:60]!r}]", rpc_pb2.TContainerSpec())


def into_spec(resources: pb.LinuxContainerResources, spec: rpc_pb2.TContainerSpec) -> None:
    """Set what the resources name; zero and empty leave things as they are (CRI, UpdateContainerResources).

    Porto's guarantees are not touched: a request in the CRI is a share of what there is, and no promise.
    """
    if resources.memory_limit_in_bytes:
        spec.memory_limit = max(resources.memory_limit_in_bytes, 0)
    if resources.cpu_quota:
        period_us = resources.cpu_period or DEFAULT_PERIOD_US
        spec.cpu_limit = max(resources.cpu_quota, 0) / period_us
        spec.cpu_period = period_us * 1000
    if resources.cpu_shares:
        # Both are relative: 1024 shares and weight 1 are the same.
        spec.cpu_weight = min(max(resources.cpu_shares / 1024, 0.01), 100.0)
    if resources.cpuset_cpus:
        spec.cpu_set.policy = "set"
        spec.cpu_set.list = resources.cpuset_cpus
    if resources.cpuset_mems:
        spec.cpu_set.mems = resources.cpuset_mems
    for limit in resources.hugepage_limits:
        if limit.page_size in _TWO_MIB:
            spec.hugetlb_limit = limit.limit
    if resources.oom_score_adj:
        spec.oom_score_adj = resources.oom_score_adj
    for name, value in resources.unified.items():
        _unified(name, value, name, spec)


def _unified(name: str, value: str, field: str, spec: rpc_pb2.TContainerSpec) -> None:
    """A cgroup v2 knob, where a property of Porto's does the same."""
    if name == "pids.max":
        spec.thread_limit = _number(value, field)
    elif name == "memory.max":
        spec.memory_limit = _number(value, field)
    elif name == "cpu.weight":
        weight = _number(value, field)
        if not 1 <= weight <= 10000:
            raise InvalidArgument(f"{field}: {value[:40]!r} must be 1 to 10000")
        spec.cpu_weight = max(weight / 100, 0.01)
    elif name == "hugetlb.2MB.max":
        spec.hugetlb_limit = _number(value, field)
    else:
        raise Unimplemented(
            f"{field}: nothing in Porto does what this does; known are pids.max, memory.max, cpu.weight"
        )


def _number(value: str, field: str) -> int:
    if value == "max":
        return 0
    if not value.isascii() or not value.isdecimal():
        raise InvalidArgument(f"{field}: {value[:40]!r} must be a number, or max")
    return int(value)


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
