"""All properties by name, and how a name with an index or a dot is read."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value, permission
from shim_embedded_porto.properties import files, identity, network, resources, task, usage
from shim_embedded_porto.properties.base import Context, Property

_MODULES = (files, identity, network, resources, task, usage)
PROPERTIES: dict[str, Property] = {
    prop.name: prop for prop in sorted((p for m in _MODULES for p in m.PROPERTIES), key=lambda prop: prop.name)
}


def split_index(name: str) -> tuple[str, str | None]:
    """``stdout[0:10]`` → ``stdout`` and ``0:10``."""
    if name.endswith("]") and "[" in name:
        base, _, index = name[:-1].partition("[")
        return base, index
    return name, None


def _is_label(name: str) -> bool:
    prefix, separator, _ = name.partition(".")
    return bool(separator) and limits.LABEL_PREFIX_CHARS.issuperset(prefix)


def get(ct: Container, name: str, ctx: Context) -> str:
    """The value of a property, of a part of one, of a label, or of a file of the container's cgroups.

    :raises Fault: InvalidProperty, InvalidState, and what the property itself raises.
    """
    base, index = split_index(name)
    if index is None and "." in name:
        if _is_label(name):
            return identity.get_label(ct, name)
        if ct.state == states.STOPPED:
            raise invalid_state(f"Not available in stopped state: {name}")
        return _knob(ct, name, ctx)
    if index == "":
        raise Fault(pb.InvalidProperty, "Empty property index")
    prop = PROPERTIES.get(base)
    if prop is None:
        raise Fault(pb.InvalidProperty, f"Unknown container property: {base}")
    prop.check_get(ct, ctx)
    return prop.get(ct, ctx) if index is None else prop.get_indexed(ct, index, ctx)


def check_real(ct: Container, name: str, ctx: Context) -> None:
    """Whether there is more than a default to get.

    :raises Fault: NoValue and others.
    """
    base, index = split_index(name)
    if index is None and "." in name:
        if _is_label(name):
            identity.get_label(ct, name)
        elif ct.state == states.STOPPED:
            raise invalid_state("Not available in stopped state")
        else:
            try:
                _knob(ct, name, ctx)
            except Fault:
                raise Fault(pb.InvalidProperty, f"Unknown cgroup attribute: {name}") from None
        return
    prop = PROPERTIES.get(base)
    if prop is None:
        raise Fault(pb.InvalidProperty, "Unknown property")
    prop.check_real(ct, ctx)


def set_value(ct: Container, name: str, value: str, ctx: Context) -> None:
    """Set a property, a part of one, or a label; on a container that runs it takes effect, or is taken back.

    Call it with the container's action lock held.
    """
    if ct.is_root:
        raise permission("System containers are read only")
    base, index = split_index(name)
    if index == "":
        raise Fault(pb.InvalidProperty, "Empty property index")
    value = value.strip(" \t\n\r\v\f")
    prop = PROPERTIES.get(base)
    if prop is None:
        if not _is_label(base):
            raise Fault(pb.InvalidProperty, f"Invalid property {base}")
        identity.set_label(ct, base, value, ctx)
        return
    prop.check_set(ct, ctx)
    if prop.controllers:
        ctx.porto.enable_controllers(ct, prop.controllers)
    had = prop.name in ct.assigned
    before = prop.save(ct, ctx)
    if index is None:
        prop.set(ct, value, ctx)
    else:
        prop.set_indexed(ct, index, value, ctx)
    if ct.has_resources:
        try:
            ctx.porto.apply(ct, {prop.name})
        except Fault:
            prop.restore(ct, before, ctx)
            if not had:
                ct.assigned.discard(prop.name)
            raise


def load(ct: Container, spec: pb.TContainerSpec, ctx: Context, *, undo: bool = False) -> None:
    """Set what a message holds.

    :param undo: take everything back when something can't be set.
    """
    done: list[tuple[Property, str, bool]] = []
    try:
        given = {field.name for field, _ in spec.ListFields()}
        for prop in PROPERTIES.values():
            if prop.field not in given or not prop.in_spec(spec):
                continue
            prop.check_set(ct, ctx)
            if prop.controllers:
                ctx.porto.enable_controllers(ct, prop.controllers)
            if prop.stored:
                done.append((prop, prop.save(ct, ctx), prop.name in ct.assigned))
            prop.load(ct, spec, ctx)
        ct.sanitize_capabilities()
        if ct.has_resources:
            ctx.porto.apply(ct, {prop.name for prop, _, _ in done})
    except Fault:
        if undo:
            _take_back(ct, done, ctx)
        raise


def _take_back(ct: Container, done: list[tuple[Property, str, bool]], ctx: Context) -> None:
    for prop, before, had in reversed(done):
        prop.restore(ct, before, ctx)
        if not had:
            ct.assigned.discard(prop.name)
    ct.sanitize_capabilities()
    if ct.has_resources:
        ctx.porto.apply(ct, {prop.name for prop, _, _ in done})


def dump(ct: Container, wanted: list[str], indexes: dict[str, str], out: pb.TContainer, ctx: Context) -> None:
    """Put properties into a message: the wanted ones, or all."""
    out.status.SetInParent()
    for name in wanted or PROPERTIES:
        prop = PROPERTIES.get(name)
        if prop is None:
            out.status.error.add(error=pb.InvalidProperty, msg=f"Unknown property {name}")
            continue
        try:
            prop.check_get(ct, ctx)
        except Fault:
            continue
        if name in indexes:
            prop.dump_indexed(ct, indexes[name], out, ctx)
        else:
            prop.dump(ct, out, ctx)


def _knob(ct: Container, name: str, ctx: Context) -> str:
    controller = name.partition(".")[0]
    known = "cgroup2" if controller == "unified" else controller
    if not ctx.porto.cgroups.has(known):
        raise invalid_value(f"Cgroup does not found by {name}")
    if "/" in name:
        raise invalid_value(f"Unknown cgroup attribute: {name}")
    try:
        return ctx.usage(ct).read(known, name)
    except Fault as fault:
        if fault.errno == 2:
            raise invalid_value(f"Unknown cgroup attribute: {name}") from None
        raise
