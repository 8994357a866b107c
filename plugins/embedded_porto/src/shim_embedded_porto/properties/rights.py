"""Properties of whom a container's processes run as, and of what they may do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import capabilities, credentials, text
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value
from shim_embedded_porto.properties.base import Computed, Context, Property, Value
from shim_embedded_porto.settings import seccomp

# -- users -------------------------------------------------------------------------------------------------------------


class TaskCred(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.cred.format()

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        ct.cred = credentials.by_name(value)
        ct.assigned |= {"user", "group"}

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        ct.cred = credentials.from_message(spec.task_cred, ct.cred)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        ct.cred.dump(out.spec.task_cred)


class User(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.cred.user

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        if ct.userns_cred is not None and value == "root":
            cred = ct.userns_cred
        else:
            try:
                cred = credentials.by_name(value)
                if "group" in ct.assigned:
                    cred = replace(cred, gid=ct.cred.gid)
            except Fault:
                cred = credentials.Cred(credentials.user_id(value), ct.cred.gid)
        ct.cred = cred
        ct.assigned.add(self.name)

    def save(self, ct: Container, ctx: Context) -> str:
        return ct.cred.format()

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        ct.cred = credentials.parse(value)
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.user, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.user = ct.cred.user

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and not ct.userns and not ct.in_userns:
            ct.cred = replace(ct.cred, uid=0, given="")


class Group(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.cred.group

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        inside = ct.userns_cred if value == "root" else None
        ct.cred = replace(ct.cred, gid=inside.gid if inside is not None else credentials.group_id(value))
        ct.assigned.add(self.name)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        ct.assigned.add(self.name)  # the user's record has it

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.group, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.group = ct.cred.group

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and not ct.userns and not ct.in_userns:
            ct.cred = replace(ct.cred, gid=0)


# -- rights ------------------------------------------------------------------------------------------------------------


class Capabilities(Value):
    def _commit(self, ct: Container, caps: int) -> None:
        unknown = caps & ~capabilities.every()
        if unknown:
            raise invalid_value(f"Unsupported capability: {capabilities.format_set(caps & capabilities.every())}")
        self.assign(ct, caps)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._commit(ct, self._parse(value))

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        caps = capabilities.parse(index)
        return text.format_bool(getattr(ct, self.attribute) & caps == caps)

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        caps, wanted = capabilities.parse(index), text.parse_bool(value)
        current = getattr(ct, self.attribute)
        self._commit(ct, current | caps if wanted else current & ~caps)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        message: pb.TCapabilities = getattr(spec, self.field)
        caps, current = capabilities.from_message(message), getattr(ct, self.attribute)
        if message.HasField("action"):
            caps = current | caps if message.action else current & ~caps
        self._commit(ct, caps)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        capabilities.dump(getattr(ct, self.attribute), getattr(out.spec, self.field))


def allowed_capabilities(name: str, description: str) -> Computed:
    def indexed(ct: Container, index: str, _ctx: Context) -> str:
        caps = capabilities.parse(index)
        return text.format_bool(ct.cap_bound & caps == caps)

    return Computed(
        name,
        description,
        lambda ct, _: ct.cap_bound,
        show=capabilities.format_set,
        indexed=indexed,
        put=lambda caps, out: capabilities.dump(caps, getattr(out, name)),
    )


class Seccomp(Property):
    """A profile holds for the containers below as well: of all on a path from the root only one may have one."""

    def check_set(self, ct: Container, ctx: Context) -> None:
        super().check_set(ct, ctx)
        if any(other.seccomp is not None for other in ct.ancestors()):
            raise invalid_state("seccomp already set for ancestor")
        if any(other.seccomp is not None for other in ct.subtree() if other is not ct):
            raise invalid_state("seccomp already set for descendant")

    def get(self, ct: Container, ctx: Context) -> str:
        return seccomp.format_profile(ct.seccomp)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, seccomp.parse(value))

    def _assign(self, ct: Container, profile: Any) -> None:
        ct.seccomp, ct.seccomp_name = profile, ""
        ct.assigned.add(self.name)
        ct.assigned.discard("seccomp_name")

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        seccomp.check(spec.seccomp)
        self._assign(ct, type(spec.seccomp).FromString(spec.seccomp.SerializeToString()))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if ct.seccomp is not None:
            out.spec.seccomp.CopyFrom(ct.seccomp)


class SeccompName(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.seccomp_name

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        raise invalid_value(f"unkown seccomp profile {value}")  # portod.conf names them, and there is none

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.seccomp_name, ctx)
