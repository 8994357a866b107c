"""Properties of what a container sees: its root, mounts, devices, volumes, name resolution."""

from __future__ import annotations

import os
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import inroot, kernel, paths, text
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import ROOT
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value, permission, system
from shim_embedded_porto.properties.base import Computed, Context, Property, Value, flag, text_value
from shim_embedded_porto.settings import binds, devices


class Root(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        if ct.volume_mounts:
            raise Fault(pb.Busy, "Cannot change root path, container have volume mounts")
        ctx.porto.enable_controllers(ct, ("devices",))
        if paths.normal(value).startswith(".."):
            raise permission("root path starts with ..")
        self.assign(ct, value)
        ct.sanitize_capabilities()
        ct.update_root_path()

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        self.assign(ct, value)
        ct.update_root_path()

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.root, ctx)

    def start(self, ct: Container, ctx: Context) -> None:
        if (ct.host_mode or ct.job_mode) and ct.root != "/":
            raise invalid_value("Cannot change root in this virt_mode")


def _root_path(ct: Container, ctx: Context) -> str:
    path = ctx.client.compose_path(ct.root_path)
    if not path:
        raise permission("Root path is unreachable")
    return path


class Binds(Value):
    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.assign(ct, tuple(binds.from_message(entry) for entry in spec.bind.bind))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.bind.SetInParent()
        for bind in ct.binds:
            bind.dump(out.spec.bind.bind.add())


class BindDns(Value):
    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and self.name not in ct.assigned:
            ct.bind_dns = False


def make_symlink(ct: Container, path: str, target: str) -> None:
    """Make a symbolic link, in the container's root if it runs; an empty target removes it."""
    if ct.task.pid:
        cwd = ct.working_directory()
        link = paths.normal(os.path.join(cwd, path))
        to = paths.normal(os.path.join(cwd, target)) if target else ""
        try:
            root = os.open(f"/proc/{ct.task.pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                inroot.make_symlink(root, link, to, ct.cred.uid, ct.cred.gid)
            finally:
                os.close(root)
        except OSError as err:
            raise system(err, f"symlink {path}") from err
    if target:
        ct.symlinks[path] = target
    else:
        ct.symlinks.pop(path, None)
    ct.assigned.add("symlink")


class Symlinks(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return "".join(f"{path}: {ct.symlinks[path]}; " for path in sorted(ct.symlinks))

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        target = ct.symlinks.get(paths.normal(index))
        if target is None:
            raise Fault(pb.NoValue, f"Symlink {index} not set")
        return target

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        make_symlink(ct, paths.normal(index), paths.normal(value))

    def _replace(self, ct: Container, wanted: dict[str, str], *, keep_others: bool) -> None:
        others = {} if keep_others else dict.fromkeys(ct.symlinks, "")
        for path, target in {**others, **wanted}.items():
            make_symlink(ct, path, target)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        wanted = {paths.normal(path): paths.normal(target) for path, target in text.parse_map(value).items()}
        self._replace(ct, wanted, keep_others=False)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        ct.symlinks = text.parse_map(value)
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        wanted = {entry.key: entry.val for entry in spec.symlink.map}
        self._replace(ct, wanted, keep_others=spec.symlink.merge)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.symlink.SetInParent()
        for path in sorted(ct.symlinks):
            out.spec.symlink.map.add(key=path, val=ct.symlinks[path])


class ResolvConf(Property):
    """``default``: the machine's; ``keep``: the root's own; otherwise lines, separated by semicolons."""

    @staticmethod
    def _overrides(ct: Container) -> bool:
        """True when the container's file is one of ours."""
        return bool(ct.resolv_conf) if "resolv_conf" in ct.assigned else ct.root != "/"

    def get(self, ct: Container, ctx: Context) -> str:
        if ct.resolv_conf or ct.is_root:
            return ct.resolv_conf.replace("\n", ";")
        if self.name in ct.assigned:
            return "keep"
        return "inherit" if ct.root == "/" else "default"

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        keeps = value in ("keep", "") or (ct.root == "/" and value == "inherit")
        if ct.state != "stopped" and self._overrides(ct) == keeps:
            raise invalid_state("Cannot enable/disable resolv.conf overriding in runtime")
        self._assign(ct, value)
        if ct.has_resources and ct.task.pid and self._overrides(ct):
            write_resolv_conf(ct, ct.resolv_conf or ctx.porto.tree.root.resolv_conf)

    def _assign(self, ct: Container, value: str) -> None:
        ct.assigned.add(self.name)
        if value in ("default", "inherit"):
            ct.resolv_conf = ""
            ct.assigned.discard(self.name)
        elif value in ("keep", ""):
            ct.resolv_conf = ""
        else:
            ct.resolv_conf = value.replace(";", "\n")

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, value)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.resolv_conf, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        shown = ct.resolv_conf if ct.resolv_conf or ct.is_root else self.get(ct, ctx)
        out.spec.resolv_conf = shown


def write_resolv_conf(ct: Container, content: str) -> None:
    """Change the resolv.conf of a running container, which is a file of its own.

    :raises Fault: it can't be written.
    """
    try:
        root = os.open(f"/proc/{ct.task.pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = kernel.open_in(root, "etc/resolv.conf", os.O_WRONLY | os.O_NOCTTY, symlinks=False)
        finally:
            os.close(root)
    except OSError as err:
        if err.errno == 40:  # ELOOP
            raise invalid_value("Path /etc/resolv.conf contains symbolic link") from None
        raise system(err, "open /etc/resolv.conf") from err
    try:
        os.ftruncate(fd, 0)
        os.write(fd, content.encode())
    finally:
        os.close(fd)


class Devices(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return devices.format_all(ct.devices)

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        if not value:
            ct.devices = ()
            ct.assigned.discard(self.name)
        else:
            self._assign(ct, devices.parse(value, ctx.client.cred), ctx, keep_others=False)

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        self._assign(ct, devices.parse(f"{index} {value}", ctx.client.cred), ctx, keep_others=True)

    def _assign(self, ct: Container, wanted: devices.Devices, ctx: Context, *, keep_others: bool) -> None:
        ctx.porto.enable_controllers(ct, ("devices",))
        assert ct.parent is not None
        if not ct.parent.host_mode and not devices.covered(wanted, ct.parent.effective_devices()):
            raise permission("Device is not permitted for parent container")
        merged = devices.merge(ct.devices, wanted) if keep_others else wanted
        base = devices.DEFAULT if ct.devices_explicit else ct.parent.effective_devices()
        effective = devices.merge(base, merged)
        for other in ct.subtree():
            if other is not ct and other.running_or_meta and not devices.covered(other.devices, effective):
                raise invalid_state(f"Device is required in running subcontainer {other.name}")
        ct.devices = merged
        ct.assigned.add(self.name)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        try:
            ct.devices = devices.parse(value, ROOT)
        except Fault:
            ct.devices = ()  # the device has gone meanwhile
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        wanted = devices.from_messages(spec.devices.device, ctx.client.cred)
        self._assign(ct, wanted, ctx, keep_others=spec.devices.merge)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.devices.SetInParent()
        for device in ct.devices:
            device.dump(out.spec.devices.device.add())


def sync_device_nodes(ct: Container) -> None:
    """Make the device nodes of a running container, and remove those it may no longer use."""
    wanted = {dev.path_inside: dev for dev in ct.effective_devices() if dev.makes_node}
    if ct.task.pid and ct.root != "/":
        try:
            root = os.open(f"/proc/{ct.task.pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            for path in sorted(ct.device_paths - wanted.keys()):
                inroot.remove(root, path)
            for dev in wanted.values():
                kind = 0o060000 if dev.kind == "b" else 0o020000
                inroot.make_node(
                    root, dev.path_inside, kind | dev.mode, os.makedev(dev.major, dev.minor), dev.uid, dev.gid
                )
        except FileExistsError as err:
            raise Fault(pb.Busy, f"Different device node {err.filename} in container") from err
        except OSError as err:
            raise system(err, "mknod") from err
        finally:
            os.close(root)
    ct.device_paths = frozenset(wanted)


class Place(Value):
    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        entries = spec.place.cfg
        self.assign(ct, [f"{e.alias}={e.place}" if e.HasField("alias") else e.place for e in entries])

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.place.SetInParent()
        for policy in ct.place_policy:
            alias, separator, path = policy.partition("=")
            if policy.startswith("/") or policy == "***" or not separator:
                out.spec.place.cfg.add(place=policy)
            else:
                out.spec.place.cfg.add(place=path, alias=alias)


class PlaceLimit(Property):
    """Accepted and forgotten, as portod does since it has project quotas."""

    def get(self, ct: Container, ctx: Context) -> str:
        return ""

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        return ""

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        pass

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        pass

    def in_spec(self, spec: pb.TContainerSpec) -> bool:
        return False


# -- volumes -----------------------------------------------------------------------------------------------------------


def _owned(ct: Container, ctx: Context) -> list[str]:
    client = ctx.client
    return [client.compose_path(volume.path) or f"@{volume.path}" for volume in list(ct.owned_volumes)]


def _put_owned(found: list[str], out: pb.TContainerStatus) -> None:
    out.volumes_owned.SetInParent()
    out.volumes_owned.volume.extend(found)


def _linked(ct: Container, ctx: Context) -> list[tuple[str, Any]]:
    own = ctx.client.container
    return [(link.volume.path_for(own) or f"%{link.volume.path}", link) for link in list(ct.volume_links)]


def _show_linked(found: list[tuple[str, Any]]) -> str:
    lines = []
    for path, link in found:
        words = [path, *([link.target] if link.target else [])]
        lines.append(words + ["ro"] * link.read_only + ["!"] * link.required)
    return text.merge_nested(lines, " ", ";")


def _put_linked(found: list[tuple[str, Any]], out: pb.TContainerStatus) -> None:
    out.volumes_linked.SetInParent()
    for path, link in found:
        entry = out.volumes_linked.link.add(volume=path)
        if link.target:
            entry.target = link.target
        if link.read_only:
            entry.read_only = True
        if link.required:
            entry.required = True


class RequiredVolumes(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        before, ct.required_volumes = ct.required_volumes, text.split(value, ";")
        if ct.has_resources:
            try:
                ctx.porto.volumes.check_required(ct)
            except Fault:
                ct.required_volumes = before
                raise
        ct.assigned.add(self.name)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        self.assign(ct, text.split(value, ";"))

    def in_spec(self, spec: pb.TContainerSpec) -> bool:
        return False

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.volumes_required.SetInParent()
        out.spec.volumes_required.volume.extend(ct.required_volumes)


PROPERTIES: list[Property] = [
    Root("root", "Container root path in parent namespace"),
    Computed("root_path", "Container root path in client namespace", _root_path),
    flag("root_readonly", "Make filesystem read-only"),
    Binds(
        "bind",
        "Bind mounts: <source> <target> [ro|rw|<flag>],... ;...",
        "binds",
        parse=binds.parse,
        show=binds.format_all,
    ),
    BindDns(
        "bind_dns",
        "Bind /etc/hosts from parent, deprecated",
        parse=text.parse_bool,
        show=text.format_bool,
        hidden=True,
        field="",
    ),
    Symlinks("symlink", "Symlinks: <symlink>: <target>;...", stored=True, dynamic=True),
    text_value("hostname", "Container hostname"),
    ResolvConf(
        "resolv_conf",
        "DNS resolver configuration: default|keep|<resolv.conf option>;...",
        stored=True,
        dynamic=True,
    ),
    text_value("etc_hosts", "Override /etc/hosts content"),
    Devices(
        "devices",
        "Devices that container can access: <device> [r][w][m][-][?] [path] [mode] [user] [group]|preset <preset>; ...",
        stored=True,
        dynamic=True,
    ),
    flag(
        "devices_explicit",
        "Do not merge user-specified devices with effective devices of parent container: true|false",
        dynamic=True,
    ),
    Place(
        "place",
        "Places for volumes and layers: [default][;/path...][;***][;alias=/path]",
        "place_policy",
        parse=lambda value: text.split(value, ";"),
        show=lambda value: text.merge(value, ";"),
    ),
    PlaceLimit(
        "place_limit",
        "Limits sum of volume space_limit: total|default|/place|tmpfs|lvm group|rbd: bytes;... [deprecated]",
        stored=True,
    ),
    Computed(
        "place_usage",
        "Current sum of volume space_limit: total|/place|tmpfs|lvm group|rbd: bytes;... [deprecated]",
        lambda _ct, _ctx: None,
        indexed=lambda _ct, _index, _ctx: "",
    ),
    Computed(
        "volumes_owned",
        "Owned volumes: volume;...",
        _owned,
        show=lambda found: text.merge(found, ";"),
        put=_put_owned,
    ),
    Computed(
        "volumes_linked",
        "Linked volumes: volume [target] [ro] [!];...",
        _linked,
        show=_show_linked,
        put=_put_linked,
    ),
    RequiredVolumes(
        "volumes_required",
        "Volume links required by container: path;...",
        "required_volumes",
        show=lambda value: text.merge(value, ";"),
        dynamic=True,
    ),
]
