"""Properties of what a container is: names, owners, labels, access, state, times."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import access, credentials, limits, names, states, text
from shim_embedded_porto.access import Access
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value, permission
from shim_embedded_porto.properties.base import Computed, Context, Property, Value, flag, text_value

# -- owners ------------------------------------------------------------------------------------------------------------


class OwnerCred(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.owner.format()

    def _assign(self, ct: Container, cred: Cred, ctx: Context) -> None:
        ctx.client.check_cred(cred)
        ct.owner = cred
        ct.assigned |= {"owner_user", "owner_group"}
        ct.sanitize_capabilities()

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, credentials.by_name(value), ctx)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._assign(ct, credentials.from_message(spec.owner_cred), ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        ct.owner.dump(out.spec.owner_cred)


class OwnerUser(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.owner.user

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        cred, gid = credentials.by_name(value), ct.owner.gid
        client = ctx.client
        if cred.member_of(gid) or client.cred.member_of(gid) or client.superuser:
            cred = replace(cred, gid=gid)
        client.check_cred(cred)
        ct.owner = cred
        ct.assigned.add(self.name)
        ct.sanitize_capabilities()

    def save(self, ct: Container, ctx: Context) -> str:
        return ct.owner.format()

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        ct.owner = credentials.parse(value)
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.owner_user, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.owner_user = ct.owner.user


class OwnerGroup(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.owner.group

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        gid = credentials.group_id(value)
        if not ct.owner.member_of(gid) and not ctx.client.cred.member_of(gid) and not ctx.client.superuser:
            raise permission(f"Desired group : {value} isn't in current user supplementary group list")
        ct.owner = replace(ct.owner, gid=gid)
        ct.assigned.add(self.name)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        ct.assigned.add(self.name)  # the user's record has it

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.owner_group, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.owner_group = ct.owner.group


class OwnerContainers(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self.assign(ct, [ctx.client.resolve_name(name) for name in text.split(value, ";")])

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.owner_containers, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.owner_containers = text.merge(ct.owner_containers, ";")


class EnablePorto(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        level = access.parse(value)
        if level > Access.NONE and not ctx.client.superuser:
            for parent in ct.ancestors():
                if not access.compatible(parent.access, level):
                    raise permission("Parent container has lower access level")
        self.assign(ct, level)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.enable_porto, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.enable_porto = access.format_level(ct.access)

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.parent is not None and not access.compatible(ct.parent.access, ct.access):
            ct.access = ct.parent.access


# -- labels ------------------------------------------------------------------------------------------------------------


class Labels(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        with ctx.porto.tree.lock:
            return text.format_map(ct.labels)

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        return get_label(ct, index)

    def _assign(self, ct: Container, values: dict[str, str], ctx: Context, *, keep_others: bool) -> None:
        for name, value in values.items():
            names.check_label(name, value)
        with ctx.porto.tree.lock:
            # Those that are to go still count.
            if sum(1 for value in {**ct.labels, **values}.values() if value) > limits.LABEL_COUNT_MAX:
                raise Fault(pb.ResourceNotAvailable, "Too many labels")
            changed = values if keep_others else {**dict.fromkeys(ct.labels, ""), **values}
            merged = {**ct.labels, **values} if keep_others else values
            ct.labels = {name: value for name, value in merged.items() if value}
            ct.assigned.add(self.name)
        for name, value in changed.items():
            ctx.porto.waiters.tell(ct, name, value)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, text.parse_map(value), ctx, keep_others=True)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        # A value may have colons, which only the first of a pair separates.
        pairs = (entry.partition(": ") for entry in value.split("; ") if entry)
        ct.labels = {name: content for name, _, content in pairs}
        ct.assigned.add(self.name)

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        set_label(ct, index, value, ctx)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        values = {entry.key: entry.val for entry in spec.labels.map}
        self._assign(ct, values, ctx, keep_others=spec.labels.merge)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.labels.SetInParent()
        with ctx.porto.tree.lock:
            for name in sorted(ct.labels):
                out.spec.labels.map.add(key=name, val=ct.labels[name])


def get_label(ct: Container, name: str) -> str:
    """A label's value; ``.NAME`` looks at the ancestors as well.

    :raises Fault: LabelNotFound.
    """
    candidates = ct.lineage() if name.startswith(".") else iter([ct])
    for other in candidates:
        value = other.labels.get(name.removeprefix("."))
        if value is not None:
            return value
    raise Fault(pb.LabelNotFound, f"Label {name} is not set")


def set_label(ct: Container, name: str, value: str, ctx: Context) -> None:
    """Set one label; an empty value removes it."""
    names.check_label(name, value)
    with ctx.porto.tree.lock:
        if value and len(ct.labels) >= limits.LABEL_COUNT_MAX:
            raise Fault(pb.ResourceNotAvailable, "Too many labels")
        if value:
            ct.labels[name] = value
        else:
            ct.labels.pop(name, None)
        ct.assigned.add("labels")
    ctx.porto.waiters.tell(ct, name, value)


def _check_private(_ct: Container, value: str) -> None:
    if len(value.encode()) > limits.PRIVATE_MAX:
        raise invalid_value(f"Private value is too long, max {limits.PRIVATE_MAX} bytes")


# -- respawning --------------------------------------------------------------------------------------------------------


class RespawnLimit(Value):
    """``max_respawns``: negative, or not set: as often as it takes."""

    def get(self, ct: Container, ctx: Context) -> str:
        return str(ct.respawn_limit) if self.name in ct.assigned else ""

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._limit(ct, text.parse_int(value) if value else -1)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._limit(ct, spec.max_respawns)

    def _limit(self, ct: Container, value: int) -> None:
        self.assign(ct, value)
        if value < 0:
            ct.assigned.discard(self.name)


# -- state and times ---------------------------------------------------------------------------------------------------


def _state_only(ct: Container, _ctx: Context) -> str:
    return ct.state


def _root_pid(ct: Container, ctx: Context) -> int:
    """The command's process id, as the client counts."""
    client = ctx.client
    holder = client.container
    while not holder.isolate and holder.parent is not None:
        holder = holder.parent
    if holder is not ct and not ct.child_of(holder):
        raise permission("pid is unreachable")
    if ct.is_root:
        return 1
    if not ct.task.pid:
        raise invalid_state("container isn't running")
    if holder.is_root:
        return ct.task.pid
    pid: int = ctx.porto.translate_pid(ct.task.pid, client.pid)
    return pid


def _exit_status(ct: Container, _ctx: Context) -> int:
    return ct.exit_status


def _running_time(ct: Container, _ctx: Context) -> int:
    if ct.is_root:
        with open("/proc/uptime") as file:
            return int(float(file.read().split()[0]))
    if ct.state == states.STOPPED or not ct.times.started:
        return 0
    end = ct.times.died if ct.state == states.DEAD else time.time()
    return max(int(end - ct.times.started), 0)


def _dead_time(ct: Container) -> int:
    return max(int(time.time() - ct.times.died), 0)


class RunningTime(Computed):
    def __init__(self) -> None:
        super().__init__("time", "Running time [seconds]", _running_time, indexed=self._part)

    @staticmethod
    def _part(ct: Container, index: str, _ctx: Context) -> str:
        if index != "dead":
            raise invalid_value(f"What {index}?")
        if ct.state != states.DEAD:
            raise invalid_state("Not dead yet")
        return str(_dead_time(ct))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        super().dump(ct, out, ctx)
        if ct.state == states.DEAD:
            out.status.dead_time = _dead_time(ct)


def _moment(name: str, description: str, attribute: str, **flags: Any) -> Computed:
    def compute(ct: Container, _ctx: Context) -> int | None:
        return int(getattr(ct.times, attribute)) or None

    def raw(ct: Container, index: str, ctx: Context) -> str:
        if index != "raw":
            raise invalid_value(f"What {index}?")
        return str(compute(ct, ctx) or 0)

    def show(seconds: int) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

    return Computed(name, description, compute, show=show, indexed=raw, **flags)


def _put_start_error(fault: Fault, out: pb.TContainerStatus) -> None:
    out.start_error.error = fault.code  # type: ignore[assignment]
    out.start_error.msg = fault.message


def _put_taints(taints: list[str], out: pb.TContainerStatus) -> None:
    for taint in taints:
        out.taint.add(error=pb.Taint, msg=taint)


def taints(ct: Container) -> list[str]:
    """What is doubtful about a container's configuration."""
    limited = ct.memory_limit and "memory_limit" in ct.assigned
    escapes = ct.access >= Access.NORMAL
    found = {
        "Container owned by root has unrestricted capabilities.": (
            ct.owner.uid == 0 and ct.level and "capabilities" not in ct.assigned
        ),
        "Container with network namespace without hostname is confusing.": ct.net_isolate and not ct.hostname,
        "Property bind_dns is deprecated and will be removed soon.": ct.bind_dns,
        "Containers with oom_is_fatal=false often stuck in broken state after OOM, you have been warned.": (
            not ct.oom_is_fatal
        ),
        "Containers virt_mode=os and custom command often infected with zombies, use virt_mode=app user=root "
        "group=root.": ct.os_mode and ct.isolate and "command" in ct.assigned and ct.command != "/sbin/init",
        "RT scheduler works really badly when usage hits cpu_limit, use cpu_policy=high": (
            ct.cpu_policy == "rt" and ct.cpu_limit
        ),
        "First level container without memory_limit.": ct.level == 1 and not limited,
        "First level container without cpu_limit.": ct.level == 1 and not ct.cpu_limit,
        "First level container without pid namespace.": ct.level == 1 and not ct.isolate,
        "First level container without devices cgroup.": ct.level == 1 and "devices" not in ct.controllers,
        "Container with chroot and without devices cgroup.": ct.root != "/" and "devices" not in ct.controllers,
        "Container could escape chroot with enable_porto=true.": escapes and ct.root != "/",
        "Container could escape pid namespace with enable_porto=true.": escapes and ct.isolate,
        "Container could escape network namespace with enable_porto=true.": escapes and ct.net_isolate,
        "Container could escape network namespace without ip_limit.": (
            ct.access > Access.READ_ONLY and ct.net_isolate and ct.ip_policy == "any"
        ),
    }
    return [taint for taint, applies in found.items() if applies]


def _parent_name(ct: Container, _ctx: Context) -> str | None:
    return ct.parent.absolute_name if ct.parent is not None else None


def _core_dumped(ct: Container, _ctx: Context) -> bool:
    return os.WIFSIGNALED(ct.exit_status) and os.WCOREDUMP(ct.exit_status)


PROPERTIES: list[Property] = [
    Computed("absolute_name", "Container name including porto namespaces", lambda ct, _: ct.absolute_name),
    Computed(
        "absolute_namespace",
        "Container namespace including parent namespaces",
        lambda ct, _: limits.NAMESPACE + ct.namespace(),
    ),
    Computed("id", "Container id", lambda ct, _: ct.id),
    Computed("level", "Container level", lambda ct, _: ct.level),
    Computed("parent", "Parent container absolute name", _parent_name),
    Computed("state", "container state", _state_only, stored=True),
    Computed("root_pid", "Main task pid", _root_pid, runtime_only=True),
    Computed("exit_status", "Main task exit status", _exit_status, dead_only=True),
    Computed(
        "exit_code",
        "Main task exit code, negative: exit signal, OOM: -99",
        lambda ct, _: ct.exit_code(),
        dead_only=True,
    ),
    Computed("core_dumped", "Main task dumped core at exit", _core_dumped, show=text.format_bool, dead_only=True),
    Computed(
        "oom_killed",
        "Container has been killed by OOM",
        lambda ct, _: ct.oom_killed,
        show=text.format_bool,
        dead_only=True,
    ),
    Computed("start_error", "Last start error", lambda ct, _: ct.start_error, put=_put_start_error),
    Computed(
        "taint",
        "Container problems",
        lambda ct, _: taints(ct),
        show=lambda found: "".join(f"{taint}\n" for taint in found),
        put=_put_taints,
    ),
    RunningTime(),
    _moment("creation_time", "Creation time", "created"),
    _moment("start_time", "Start time", "started"),
    _moment("death_time", "Death time", "died", dead_only=True),
    _moment("change_time", "Change time", "changed"),
    OwnerCred("owner_cred", "Owner credentials: uid gid groups..."),
    OwnerUser("owner_user", "Container owner user", stored=True),
    OwnerGroup("owner_group", "Container owner group", stored=True),
    OwnerContainers(
        "owner_containers",
        "Containers that have write access to container",
        show=lambda value: text.merge(value, ";"),
        dynamic=True,
    ),
    EnablePorto(
        "enable_porto",
        "Proto access level: false (none) | read-isolate | read-only | isolate | child-only | true (full)",
        "access",
        show=access.format_level,
        dynamic=True,
    ),
    text_value(
        "porto_namespace",
        "Porto containers namespace (container name prefix) (deprecated, use enable_porto=isolate instead)",
    ),
    Labels("labels", "User-defined labels", stored=True, dynamic=True, any_state=True),
    text_value("private", "User-defined property", check=_check_private, dynamic=True, any_state=True),
    flag("weak", "Destroy container when client disconnects", dynamic=True, any_state=True),
    Value(
        "aging_time",
        "Remove dead containrs after [seconds]",
        "aging_time_s",
        parse=text.parse_uint,
        dynamic=True,
        any_state=True,
    ),
    flag("children_allowed", "Allow nested containers"),
    flag("respawn", "Automatically respawn dead container", dynamic=True, any_state=True),
    Value("respawn_count", "Container respawn count", parse=text.parse_uint, dynamic=True, any_state=True),
    RespawnLimit(
        "max_respawns",
        "Limit respawn count for specific container",
        "respawn_limit",
        parse=text.parse_int,
        dynamic=True,
        any_state=True,
    ),
    Value(
        "respawn_delay",
        "Delay before automatic respawn",
        "respawn_delay_ns",
        parse=text.parse_nsec,
        show=lambda value: f"{value}ns",
        dynamic=True,
        any_state=True,
    ),
    Computed("extra_properties", "Container's extra properties", lambda _ct, _: "", hidden=True),
]
