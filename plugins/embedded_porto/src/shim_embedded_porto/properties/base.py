"""What properties have in common, and the plain ones: a value of the container with a way to write it down."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import states, text
from shim_embedded_porto.cgroups.usage import Usage
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value, not_supported

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto


class Context:
    """One request's view: who asks, and counters that are read once."""

    def __init__(self, porto: Porto, client: Client) -> None:
        self.porto = porto
        self.client = client
        self._usages: dict[int, Usage] = {}

    def usage(self, ct: Container) -> Usage:
        usage = self._usages.get(id(ct))
        if usage is None:
            usage = self._usages[id(ct)] = Usage(self.porto.cgroups, ct)
        return usage


class Property:
    """One property. Subclasses say how to get, set, and transfer it.

    :param stored: it belongs to what is remembered of a container; otherwise it follows from something else.
    :param dynamic: it may be set while the container runs. :param any_state: and when it is dead.
    :param runtime_only: it is there from the start on. :param dead_only: it is there at the end alone.
    :param controllers: cgroup controllers it needs. :param machine: one the machine has to have; else there is no such
        property.
    :param field: its name in TContainerSpec, or in TContainerStatus when read-only; empty: in neither.
    """

    def __init__(
        self,
        name: str,
        description: str,
        *,
        stored: bool = False,
        read_only: bool = False,
        dynamic: bool = False,
        any_state: bool = False,
        runtime_only: bool = False,
        dead_only: bool = False,
        hidden: bool = False,
        supported: bool = True,
        controllers: tuple[str, ...] = (),
        machine: str = "",
        field: str | None = None,
    ) -> None:
        self.name = name
        self._description = description
        self.stored = stored
        self.read_only = read_only
        self.dynamic = dynamic
        self.any_state = any_state
        self.runtime_only = runtime_only
        self.dead_only = dead_only
        self.hidden = hidden
        self.supported = supported
        self.controllers = controllers
        self.machine = machine
        self.field = name if field is None else field

    @property
    def description(self) -> str:
        flags = (" (ro)" if self.read_only else "") + (" (dynamic)" if self.dynamic else "")
        return self._description + flags

    # -- checks ----------------------------------------------------------------------------------------------------

    def is_supported(self, ctx: Context) -> bool:
        """True when it is to be had on this machine."""
        return self.supported and (not self.machine or ctx.porto.cgroups.has(self.machine))

    def check_get(self, ct: Container, ctx: Context) -> None:
        """:raises Fault: NotSupported, InvalidState."""
        if not self.is_supported(ctx):
            raise not_supported(f"{self.name} is not supported")
        if self.runtime_only and ct.state in (states.STOPPED, states.STARTING):
            raise invalid_state(f"{self.name} is not available in {ct.state} state")
        if self.dead_only and ct.state != states.DEAD:
            raise invalid_state(f"{self.name} available only in dead state")

    def check_set(self, ct: Container, ctx: Context) -> None:
        """:raises Fault: NotSupported, InvalidValue (read-only), InvalidState."""
        if not self.is_supported(ctx):
            raise not_supported(f"{self.name} is not supported")
        if self.read_only:
            raise invalid_value(f"{self.name} is read-only")
        if not self.dynamic and ct.state != states.STOPPED:
            raise invalid_state(f"{self.name} could be set only in stopped state")
        if not self.any_state and ct.state == states.DEAD:
            raise invalid_state(f"{self.name} cannot be set in dead state")

    def check_real(self, ct: Container, ctx: Context) -> None:
        """Whether there is more than a default to get.

        :raises Fault: NoValue, InvalidState.
        """
        if not self.is_supported(ctx):
            raise not_supported("Not supported")
        if self.stored and self.name not in ct.assigned:
            raise Fault(pb.NoValue, "Property not set")
        if self.controllers:
            if ct.state == states.STOPPED:
                raise invalid_state("Not available in stopped state")
            if not ct.controllers.intersection(self.controllers):
                raise Fault(pb.NoValue, "Controllers is disabled")

    # -- text ------------------------------------------------------------------------------------------------------

    def get(self, ct: Container, ctx: Context) -> str:
        raise NotImplementedError

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        raise not_supported(f"Not implemented: {self.name}")

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        raise invalid_value("Invalid subscript for property")

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        raise invalid_value("Invalid subscript for property")

    def save(self, ct: Container, ctx: Context) -> str:
        """What is remembered of it."""
        return self.get(ct, ctx)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        self.set(ct, value, ctx)

    # -- messages --------------------------------------------------------------------------------------------------

    def in_spec(self, spec: pb.TContainerSpec) -> bool:
        return not self.read_only and bool(self.field) and spec.HasField(self.field)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        """Set it from a message."""
        raise NotImplementedError

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        """Put it into a message; nothing when it isn't to be had."""

    def dump_indexed(self, ct: Container, index: str, out: pb.TContainer, ctx: Context) -> None:
        """As :meth:`dump`, a part of it."""

    # -- the container's life --------------------------------------------------------------------------------------

    def start(self, ct: Container, ctx: Context) -> None:
        """The container is about to start: fill in what depends on its mode, refuse what doesn't go together.

        :raises Fault: it can't start so.
        """


class Value(Property):
    """A value kept in an attribute of the container.

    :param parse: from text; raises Fault. :param show: to text.
    :param check: raises Fault for values that can't be. :param after: what else changes with it.
    """

    def __init__(
        self,
        name: str,
        description: str,
        attribute: str = "",
        *,
        parse: Callable[[str], Any] = str,
        show: Callable[[Any], str] = str,
        check: Callable[[Container, Any], None] | None = None,
        after: Callable[[Container], None] | None = None,
        **flags: Any,
    ) -> None:
        super().__init__(name, description, stored=True, **flags)
        self.attribute = attribute or name
        self._parse = parse
        self._show = show
        self._check = check
        self._after = after

    def get(self, ct: Container, ctx: Context) -> str:
        return self._show(getattr(ct, self.attribute))

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self.assign(ct, self._parse(value))

    def assign(self, ct: Container, value: Any) -> None:
        """Set the value itself."""
        if self._check is not None:
            self._check(ct, value)
        setattr(ct, self.attribute, value)
        ct.assigned.add(self.name)
        if self._after is not None:
            self._after(ct)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.assign(ct, getattr(spec, self.field))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if self.field:
            setattr(out.spec, self.field, getattr(ct, self.attribute))


def text_value(name: str, description: str, attribute: str = "", **flags: Any) -> Value:
    return Value(name, description, attribute, **flags)


def flag(name: str, description: str, attribute: str = "", **flags: Any) -> Value:
    return Value(name, description, attribute, parse=text.parse_bool, show=text.format_bool, **flags)


def size(name: str, description: str, attribute: str = "", **flags: Any) -> Value:
    return Value(name, description, attribute, parse=text.parse_size, **flags)


class UintMap(Value):
    """Numbers by name."""

    def __init__(self, name: str, description: str, attribute: str = "", **flags: Any) -> None:
        super().__init__(name, description, attribute, parse=text.parse_uint_map, show=text.format_map, **flags)

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        values: dict[str, int] = getattr(ct, self.attribute)
        if index not in values:
            raise invalid_value(f"invalid index {index}")
        return str(values[index])

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        self.assign(ct, {**getattr(ct, self.attribute), index: text.parse_size(value)})

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        message = getattr(spec, self.field)
        values = dict(getattr(ct, self.attribute)) if message.merge else {}
        values.update({entry.key: entry.val for entry in message.map})
        self.assign(ct, values)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        dump_map(getattr(ct, self.attribute), getattr(out.spec, self.field))


def dump_map(values: dict[str, Any], out: Any) -> None:
    """Into a TUintMap or TStringMap."""
    out.SetInParent()
    for name in sorted(values):
        out.map.add(key=name, val=values[name])


class Computed(Property):
    """A read-only property that follows from others, or from the machine.

    :param compute: the value; None: nothing to show. :param show: to text.
    :param indexed: the value of a part.
    :param put: writes it into the status; by default the value is the field's.
    :param skip_empty: in messages an empty map is left out.
    """

    def __init__(
        self,
        name: str,
        description: str,
        compute: Callable[[Container, Context], Any],
        *,
        show: Callable[[Any], str] = str,
        indexed: Callable[[Container, str, Context], str] | None = None,
        put: Callable[[Any, pb.TContainerStatus], None] | None = None,
        skip_empty: bool = False,
        **flags: Any,
    ) -> None:
        super().__init__(name, description, read_only=True, **flags)
        self._skip_empty = skip_empty
        self._compute = compute
        self._show = show
        self._indexed = indexed
        self._put = put

    def get(self, ct: Container, ctx: Context) -> str:
        value = self._compute(ct, ctx)
        return "" if value is None else self._show(value)

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        if self._indexed is None:
            return super().get_indexed(ct, index, ctx)
        return self._indexed(ct, index, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if not self.field:
            return
        try:
            value = self._compute(ct, ctx)
        except Fault:
            return
        if value is None or (self._skip_empty and not value):
            return
        if self._put is not None:
            self._put(value, out.status)
        elif isinstance(value, dict):
            dump_map(value, getattr(out.status, self.field))
        else:
            setattr(out.status, self.field, value)


class Unsupported(Property):
    """A property that takes a feature of the kernel, or of portod.conf, that isn't there."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description, supported=False)

    def in_spec(self, spec: pb.TContainerSpec) -> bool:
        return self.field in spec.DESCRIPTOR.fields_by_name and super().in_spec(spec)
