"""What a client may say of a volume: properties by name (the older form) turned into a TVolumeSpec."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.errors import Fault

PROPERTIES: dict[str, tuple[str, bool]] = {
    "backend": (
        "dir|plain|bind|rbind|tmpfs|hugetmpfs|quota|native|overlay|squash|lvm|loop|rbd (default - autodetect)",
        False,
    ),
    "storage": ("path to data storage (default - internal)", False),
    "ready": ("true|false - contruction complete (ro)", True),
    "state": ("volume state (ro)", True),
    "private": ("user-defined property", False),
    "target_container": ("target container (default - self)", False),
    "owner_container": ("owner container (default - self)", False),
    "owner_user": ("owner user (default - creator)", False),
    "owner_group": ("owner group (default - creator)", False),
    "user": ("directory user (default - creator)", False),
    "group": ("directory group (default - creator)", False),
    "permissions": ("directory permissions (default - 0775)", False),
    "creator": ("container user group (ro)", True),
    "read_only": ("true|false (default - false)", False),
    "fs_type": ("ext4|squashfs|erofs...", False),
    "containers": ("container [target] [ro] [!];... - initial links (default - self)", False),
    "image": ("[<registry>/][<repository>/]<name>[:<tag>][@<digest>] - docker image", False),
    "layers": ("top-layer;...;bottom-layer - overlayfs layers", False),
    "place": ("place for layers and default storage (optional)", False),
    "device_name": ("name of backend disk device (ro)", True),
    "space_limit": ("disk space limit (dynamic, default zero - unlimited)", False),
    "inode_limit": ("disk inode limit (dynamic, default zero - unlimited)", False),
    "space_guarantee": ("disk space guarantee (dynamic, default - zero)", False),
    "inode_guarantee": ("disk inode guarantee (dynamic, default - zero)", False),
    "space_used": ("current disk space usage (ro)", True),
    "inode_used": ("current disk inode used (ro)", True),
    "space_available": ("available disk space (ro)", True),
    "inode_available": ("available disk inodes (ro)", True),
}
"""Description, and whether it is read-only, in Porto's order."""


def parse(values: Mapping[str, str]) -> pb.TVolumeSpec:
    """:raises Fault: InvalidProperty: unknown or read-only; InvalidValue."""
    spec = pb.TVolumeSpec()
    for name in values:
        if name != "path" and name not in PROPERTIES:
            raise Fault(pb.InvalidProperty, f"Unknown property: {name}")
        if name != "path" and PROPERTIES[name][1]:
            raise Fault(pb.InvalidProperty, f"Read-only property: {name}")
    for name in sorted(values):
        _SETTERS[name](spec, values[name])
    return spec


def _plain(field: str) -> Callable[[pb.TVolumeSpec, str], None]:
    return lambda spec, value: setattr(spec, field, value)


def _resource(resource: str, field: str) -> Callable[[pb.TVolumeSpec, str], None]:
    return lambda spec, value: setattr(getattr(spec, resource), field, text.parse_size(value))


def _cred(cred: str, field: str) -> Callable[[pb.TVolumeSpec, str], None]:
    return lambda spec, value: setattr(getattr(spec, cred), field, value)


def _links(spec: pb.TVolumeSpec, value: str) -> None:
    for words in text.split_nested(value, " ", ";"):
        link = spec.links.add(container=words[0])
        if len(words) > 1:
            link.target = words[1]
        if words[2:3] == ["ro"]:
            link.read_only = True
        if "!" in words[2:4]:
            link.required = True


_SETTERS: dict[str, Callable[[pb.TVolumeSpec, str], None]] = {
    "path": _plain("path"),
    "backend": _plain("backend"),
    "storage": _plain("storage"),
    "private": _plain("private_value"),
    "target_container": _plain("container"),
    "owner_container": _plain("owner_container"),
    "place": _plain("place"),
    "image": _plain("image"),
    "fs_type": _plain("filesystem_type"),
    "owner_user": _cred("owner", "user"),
    "owner_group": _cred("owner", "group"),
    "user": _cred("cred", "user"),
    "group": _cred("cred", "group"),
    "permissions": lambda spec, value: setattr(spec, "permissions", text.parse_octal(value)),
    "read_only": lambda spec, value: setattr(spec, "read_only", text.parse_bool(value)),
    "containers": _links,
    "layers": lambda spec, value: spec.layers.extend(text.split(value, ";")),
    "space_limit": _resource("space", "limit"),
    "space_guarantee": _resource("space", "guarantee"),
    "inode_limit": _resource("inodes", "limit"),
    "inode_guarantee": _resource("inodes", "guarantee"),
}
