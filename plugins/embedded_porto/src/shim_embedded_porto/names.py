"""Names of containers, labels and layers."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits
from shim_embedded_porto.errors import Fault, invalid_value


def check(name: str, *, superuser: bool = False) -> None:
    """:raises Fault: InvalidValue: no container can have this name."""
    longest = limits.SUPERUSER_PATH_MAX if superuser else limits.PATH_MAX
    if not name:
        raise invalid_value("container path too short")
    if len(name.encode()) > longest:
        raise invalid_value(f"container path too long, limit is {longest}")
    if name == limits.ROOT:
        return
    if name.startswith("/"):
        raise invalid_value(f"container path starts with '/': {name}")
    for component in name.split("/"):
        if not component:
            raise invalid_value(f"double/trailing '/' in container path: {name}")
        if len(component) > limits.NAME_MAX:
            raise invalid_value(f"container name component too long, limit is {limits.NAME_MAX}: '{component}'")
        if component in (limits.SELF, limits.DOT):
            raise invalid_value(f"container name '{component}' is reserved")
        for char in component:
            if char not in limits.NAME_CHARS:
                raise invalid_value(f"forbidden character {char.encode()[0]:#x}")


def parent_of(name: str) -> str:
    return name.rpartition("/")[0] or limits.ROOT


def check_label(name: str, value: str) -> None:
    """:raises Fault: InvalidLabel."""
    if len(name) > limits.LABEL_NAME_MAX:
        raise Fault(pb.InvalidLabel, f"Label name too log, max {limits.LABEL_NAME_MAX} bytes")
    if len(value.encode()) > limits.LABEL_VALUE_MAX:
        raise Fault(pb.InvalidLabel, f"Label value too log, max {limits.LABEL_VALUE_MAX} bytes")
    prefix, separator, _ = name.partition(".")
    if (
        not separator
        or not limits.LABEL_PREFIX_MIN <= len(prefix) <= limits.LABEL_PREFIX_MAX
        or not limits.LABEL_PREFIX_CHARS.issuperset(prefix)
        or not limits.NAME_CHARS.issuperset(name)
        or name.startswith("PORTO")
    ):
        raise Fault(pb.InvalidLabel, f"Invalid label name: {name}")
    if not limits.NAME_CHARS.issuperset(value):
        raise Fault(pb.InvalidLabel, f"Invalid label value: {value}")


_RESERVED = ("_tmp_", "_import_", "_remove_", "_private_", "_meta_", "_layer_")


def check_storage(name: str, *, part: bool = False) -> None:
    """:raises Fault: InvalidValue: no layer or storage can have this name."""
    if not part and "/" in name:
        meta, _, rest = name.partition("/")
        check_storage(meta, part=True)
        check_storage(rest, part=True)
        return
    for char in name:
        if char not in limits.NAME_CHARS:
            raise invalid_value(f"forbidden character {char.encode()[0]:#x}")
    if name in ("", ".", "..") or name.startswith(_RESERVED):
        raise invalid_value(f"invalid layer name '{name}'")
