"""Properties that limit what a container uses: CPU, memory, disks, processes."""

from __future__ import annotations

from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, text
from shim_embedded_porto.cgroups.control import IO_PRIORITIES
from shim_embedded_porto.cgroups.hierarchy import CONTROLLERS
from shim_embedded_porto.cgroups.usage import hugetlb_memory, total_memory
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_value
from shim_embedded_porto.properties.base import Computed, Context, Property, UintMap, Unsupported, Value, flag, size
from shim_embedded_porto.settings import cpusets

# -- memory ------------------------------------------------------------------------------------------------------------


def _check_memory(_ct: Container, value: int) -> None:
    if value and value < limits.MEMORY_LIMIT_MIN:
        raise invalid_value(f"Should be at least {limits.MEMORY_LIMIT_MIN}")


class MemoryLimit(Value):
    def get(self, ct: Container, ctx: Context) -> str:
        return str(self._value(ct))

    @staticmethod
    def _value(ct: Container) -> int:
        return total_memory() - hugetlb_memory() if ct.is_root else ct.memory_limit

    def assign(self, ct: Container, value: int) -> None:
        _check_memory(ct, value)
        if ct.memory_limit != value:
            ct.memory_limit = value
            ct.assigned.add(self.name)
            ct.sanitize_capabilities()

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.memory_limit = self._value(ct)


class HugetlbLimit(Value):
    def get(self, ct: Container, ctx: Context) -> str:
        return str(hugetlb_memory() if ct.is_root else ct.hugetlb_limit)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._limit(ct, text.parse_size(value), ctx)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._limit(ct, spec.hugetlb_limit, ctx)

    def _limit(self, ct: Container, value: int, ctx: Context) -> None:
        try:
            used = ctx.usage(ct).hugetlb()
        except Fault:
            used = 0
        if value < used:
            raise invalid_value("current hugetlb usage is greater than limit")
        self.assign(ct, value)


# -- CPU ---------------------------------------------------------------------------------------------------------------


class CpuPower(Value):
    """``cpu_limit`` and ``cpu_guarantee``."""

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self.assign(ct, text.parse_cpu_power(value, ctx.porto.cores))

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.assign(ct, int(getattr(spec, self.field) * limits.NS_PER_S))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        setattr(out.spec, self.field, getattr(ct, self.attribute) / limits.NS_PER_S)


def propagate_cpu_limit(ct: Container) -> None:
    """Recalculate ``cpu_limit_bound``, here and below."""
    if ct.parent is not None:
        bound = ct.parent.cpu_limit_bound
        ct.cpu_limit_bound = min(ct.cpu_limit, bound) if ct.cpu_limit else bound
    for child in list(ct.children.values()):
        propagate_cpu_limit(child)


def propagate_cpu_guarantee(ct: Container) -> None:
    """Recalculate ``cpu_guarantee_bound``, here and below."""
    if ct.parent is not None:
        bound = ct.parent.cpu_guarantee_bound
        ct.cpu_guarantee_bound = min(ct.cpu_guarantee, bound) if "cpu" in ct.controllers else bound
    for child in list(ct.children.values()):
        propagate_cpu_guarantee(child)


def _bound(name: str, description: str, attribute: str) -> Computed:
    return Computed(
        name,
        description,
        lambda ct, _: getattr(ct, attribute),
        show=text.format_cpu_power,
        put=lambda value, out: setattr(out, name, value / limits.NS_PER_S),
    )


def _check_cpu_policy(_ct: Container, value: str) -> None:
    if value not in ("rt", "high", "normal", "batch", "idle", "iso", "nosmt"):
        raise invalid_value(f"Unknown cpu policy: {value}")


def _check_cpu_period(_ct: Container, value: int) -> None:
    if not 1_000_000 <= value <= 1_000_000_000:
        raise invalid_value("cpu period out of range")


class CpuWeight(Value):
    """0.01 to 100; kept in hundredths."""

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        number, unit = text.parse_number(value)
        if not unit:  # Porto ignores what it can't read as a number
            self._weight(ct, number)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._weight(ct, spec.cpu_weight)

    def _weight(self, ct: Container, value: float) -> None:
        if not 0.01 <= value <= 100:
            raise invalid_value("out of range")
        self.assign(ct, int(value * 100))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.cpu_weight = ct.cpu_weight / 100


class CpuSetProperty(Value):
    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.assign(ct, cpusets.from_message(spec.cpu_set))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        ct.cpu_set.dump(out.spec.cpu_set)


def _affinity(ct: Container, ctx: Context) -> frozenset[int] | None:
    try:
        return text.parse_bitmap(ctx.usage(ct).read("cpuset", "cpuset.cpus").strip())
    except Fault:
        return frozenset()


def _put_affinity(cpus: frozenset[int], out: pb.TContainerStatus) -> None:
    if cpus:
        out.cpu_set_affinity.cpu.extend(sorted(cpus))
        out.cpu_set_affinity.list = text.format_bitmap(cpus)
        out.cpu_set_affinity.count = len(cpus)


# -- disks -------------------------------------------------------------------------------------------------------------


class IoLimit(UintMap):
    """By disk and direction; a bare number, or ``fs``, is for the file systems as a whole."""

    def get(self, ct: Container, ctx: Context) -> str:
        values: dict[str, int] = getattr(ct, self.attribute)
        return str(values["fs"]) if list(values) == ["fs"] else text.format_map(values)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        values = {"fs": text.parse_size(value)} if value and ":" not in value else text.parse_uint_map(value)
        self._limit(ct, values, ctx)

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        self._limit(ct, {**getattr(ct, self.attribute), index: text.parse_size(value)}, ctx)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        message = getattr(spec, self.field)
        values = dict(getattr(ct, self.attribute)) if message.merge else {}
        self._limit(ct, {**values, **{entry.key: entry.val for entry in message.map}}, ctx)

    def _limit(self, ct: Container, values: dict[str, int], ctx: Context) -> None:
        if "fs" in values:
            ctx.porto.enable_controllers(ct, ("memory",))
        if values.keys() - {"fs"}:
            ctx.porto.enable_controllers(ct, ("blkio",))
        self.assign(ct, values)


class IoGuarantee(IoLimit):
    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if self.name in ct.assigned:
            super().dump(ct, out, ctx)


class IoWeight(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        number, unit = text.parse_number(value)
        if unit:
            raise invalid_value("out of range")
        self.assign(ct, number)


def _check_io_weight(_ct: Container, value: float) -> None:
    if not 0.01 <= value <= 100:
        raise invalid_value("out of range")


def _check_io_policy(_ct: Container, value: str) -> None:
    if value not in IO_PRIORITIES:
        raise invalid_value(f"invalid policy: {value}")


# -- controllers -------------------------------------------------------------------------------------------------------


def _parse_controllers(value: str) -> set[str]:
    found = {word.strip() for word in value.split(";") if word.strip()}
    for word in found:
        if word not in CONTROLLERS:
            raise invalid_value(f'Unknown flag "{word}"')
    return found


class Controllers(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ";".join(name for name in CONTROLLERS if name in ct.controllers)

    def _assign(self, ct: Container, wanted: set[str]) -> None:
        if not ct.required_controllers <= wanted:
            raise invalid_value("Cannot disable required controllers")
        changed = ct.controllers ^ wanted
        ct.controllers = wanted
        ct.assigned.add(self.name)
        if "cpu" in changed:
            propagate_cpu_guarantee(ct)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, _parse_controllers(value))

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        ct.controllers = _parse_controllers(value)
        ct.assigned.add(self.name)

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        return text.format_bool(_parse_controllers(index) <= ct.controllers)

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        named = _parse_controllers(index)
        self._assign(ct, ct.controllers | named if text.parse_bool(value) else ct.controllers - named)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._assign(ct, _parse_controllers(";".join(spec.controllers.controller)))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.controllers.controller.extend(name for name in CONTROLLERS if name in ct.controllers)


def _cgroups(ct: Container, ctx: Context) -> dict[str, tuple[str, bool]]:
    found: dict[str, tuple[str, bool]] = ctx.porto.cgroups.reported_paths(ct)
    return found


def _cgroup(ct: Container, index: str, ctx: Context) -> str:
    found = _cgroups(ct, ctx).get(index)
    if found is None:
        raise Fault(pb.InvalidProperty, f"Unknown cgroup subststem: {index}")
    return found[0]


def _put_cgroups(found: dict[str, tuple[str, bool]], out: pb.TContainerStatus) -> None:
    for name, (path, inherited) in found.items():
        entry = out.cgroups.cgroup.add(controller=name, path=path)
        if inherited:
            entry.inherited = True


class ThreadLimit(Value):
    def get(self, ct: Container, ctx: Context) -> str:
        return str(ct.thread_limit) if self.name in ct.assigned else ""

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if self.name in ct.assigned:
            out.spec.thread_limit = ct.thread_limit


def _io(name: str, description: str, attribute: str, kind: type[IoLimit] = IoLimit) -> IoLimit:
    return kind(name, description, attribute, dynamic=True)


_MEMORY: dict[str, Any] = {"dynamic": True, "controllers": ("memory",)}
_CPU: dict[str, Any] = {"dynamic": True, "controllers": ("cpu",)}

PROPERTIES: list[Property] = [
    MemoryLimit("memory_limit", "Memory limit [bytes]", parse=text.parse_size, **_MEMORY),
    Computed(
        "memory_limit_total",
        "Effective memory limit [bytes]",
        lambda ct, _: ct.effective_memory_limit(total_memory()),
    ),
    size("dirty_limit", "Dirty file cache limit [bytes]", check=_check_memory, hidden=True, **_MEMORY),
    Computed("dirty_limit_bound", "Dirty file cache limit bound [bytes]", lambda _ct, _: None, hidden=True, field=""),
    HugetlbLimit(
        "hugetlb_limit",
        "Hugetlb memory limit [bytes]",
        parse=text.parse_size,
        dynamic=True,
        controllers=("hugetlb",),
        machine="hugetlb",
    ),
    flag("pressurize_on_death", "After death set tiny soft memory limit", **_MEMORY),
    flag(
        "link_memory_writeback_blkio",
        "Link memory writeback with blkio cgroup",
        hidden=True,
    ),
    flag("oom_is_fatal", "Kill all affected containers on OOM event", dynamic=True),
    CpuPower("cpu_limit", "CPU limit: <CPUS>c [cores]", show=text.format_cpu_power, after=propagate_cpu_limit, **_CPU),
    CpuPower(
        "cpu_guarantee",
        "CPU guarantee: <CPUS>c [cores]",
        show=text.format_cpu_power,
        after=propagate_cpu_guarantee,
        **_CPU,
    ),
    _bound("cpu_limit_total", "CPU bound limit: <CPUS>c [cores]", "cpu_limit_bound"),
    _bound("cpu_limit_bound", "CPU bound limit: <CPUS>c [cores]", "cpu_limit_bound"),
    _bound("cpu_guarantee_total", "CPU total guarantee: <CPUS>c [cores]", "cpu_guarantee_bound"),
    _bound("cpu_guarantee_bound", "CPU bound guarantee: <CPUS>c [cores]", "cpu_guarantee_bound"),
    Value(
        "cpu_period",
        "CPU limit period: 1ms..1s, default: 100ms [nanoseconds]",
        "cpu_period_ns",
        parse=text.parse_nsec,
        check=_check_cpu_period,
        dynamic=True,
    ),
    CpuWeight(
        "cpu_weight",
        "CPU weight 0.01..100, default is 1",
        show=lambda value: f"{value / 100:g}",
        dynamic=True,
    ),
    Value("cpu_policy", "CPU policy: rt, high, normal, batch, idle", check=_check_cpu_policy, dynamic=True),
    CpuSetProperty(
        "cpu_set",
        "CPU set: [N|N-M,]... | jail N | [jail N;] node N",
        parse=cpusets.parse,
        show=lambda value: str(value.format()),
        dynamic=True,
        controllers=("cpuset",),
    ),
    Computed(
        "cpu_set_affinity",
        "Resulting CPU affinity: [N,N-M,]...",
        _affinity,
        show=text.format_bitmap,
        put=_put_affinity,
    ),
    _io("io_limit", "IO bandwidth limit: fs|<path>|<disk> [r|w]: <bytes/s>;...", "io_limit"),
    _io("io_guarantee", "IO bandwidth guarantee: fs|<path>|<disk> [r|w]: <bytes/s>;...", "io_guarantee", IoGuarantee),
    _io("io_ops_limit", "IOPS limit: fs|<path>|<disk> [r|w]: <iops>;...", "io_ops_limit"),
    _io("io_ops_guarantee", "IOPS guarantee: fs|<path>|<disk> [r|w]: <iops>;...", "io_ops_guarantee", IoGuarantee),
    Value("io_policy", "IO policy: none | rt | high | normal | batch | idle", check=_check_io_policy, dynamic=True),
    IoWeight(
        "io_weight",
        "IO weight: 0.01..100, default is 1",
        show=lambda value: f"{value:g}",
        check=_check_io_weight,
        dynamic=True,
        controllers=("blkio",),
    ),
    ThreadLimit("thread_limit", "Thread limit", parse=text.parse_size, dynamic=True, controllers=("pids",)),
    Controllers("controllers", "Cgroup controllers", stored=True),
    Computed(
        "cgroups",
        "Cgroups",
        _cgroups,
        show=lambda found: text.format_map({name: path for name, (path, _) in found.items()}),
        indexed=_cgroup,
        put=_put_cgroups,
    ),
    Unsupported("memory_guarantee", "Guaranteed amount of memory [bytes]"),
    Unsupported("memory_guarantee_total", "Total memory guarantee for container hierarchy"),
    Unsupported("memory_lock_policy", "Memory lock policy to container memory cgroup"),
    Unsupported("anon_limit", "Anonymous memory limit [bytes]"),
    Unsupported("anon_limit_total", "Effective anonymous memory limit [bytes]"),
    Unsupported("anon_only", "Keep only anon pages, allocate cache in parent"),
    Unsupported("recharge_on_pgfault", "Recharge memory on page fault"),
]
