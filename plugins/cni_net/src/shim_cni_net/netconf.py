"""Network configurations: ``.conf``, ``.json`` and ``.conflist`` files, read as libcni reads them (CNI section 1)."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shim_cni_net import versions

EXTENSIONS = (".conf", ".conflist", ".json")
MAX_FILE_BYTES = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_MAX_NAME_LENGTH = 200


class NetworkConfigError(Exception):
    """A configuration that can't be used: the text names the file, the key and the fix."""


@dataclass(frozen=True, slots=True)
class PluginConfig:
    """One plugin of a network."""

    type: str
    capabilities: frozenset[str]
    """Those the configuration says ``true`` to."""
    tree: Mapping[str, Any]
    """The configuration object as it stands in the file."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """A network: plugins to be run one after the other."""

    name: str
    versions: tuple[str, ...]
    """The specification versions it may be run with, the highest first; never empty."""
    plugins: tuple[PluginConfig, ...]
    disable_check: bool = False
    disable_gc: bool = False
    path: str = ""
    """The file it was read from."""

    @property
    def version(self) -> str:
        """The version it is run with."""
        return self.versions[0]

    def as_tree(self) -> dict[str, Any]:
        """A configuration list that :func:`parse_list` reads back as the same network."""
        return {
            "name": self.name,
            "cniVersion": self.version,
            "cniVersions": list(self.versions),
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "loadOnlyInlinedPlugins": True,
            "plugins": [dict(plugin.tree) for plugin in self.plugins],
        }


def load_directory(directory: str, max_networks: int) -> tuple[NetworkConfig, ...]:
    """The networks of a directory, ordered by file name.

    :param max_networks: read so many files; 0 is all of them.
    :raises NetworkConfigError: there is none, or one of those wanted can't be used: pods must not silently come into
        another network than the one that was meant.
    """
    networks: list[NetworkConfig] = []
    for path in _files(directory, EXTENSIONS):
        network = load_file(path)
        if network is not None:
            networks.append(network)
        if len(networks) == max_networks:
            break
    if not networks:
        raise NetworkConfigError(f"no network configuration found in {directory}: install one there, or a CNI provider")
    return tuple(networks)


def load_file(path: str) -> NetworkConfig | None:
    """The network of one file; None if the file has vanished meanwhile.

    :raises NetworkConfigError: it can't be used.
    """
    data = _read(path)
    if data is None:
        return None
    tree = parse_json(data, path)
    if path.endswith(".conflist"):
        return parse_list(tree, path)
    if "plugins" in tree and "type" not in tree:
        raise NetworkConfigError(f"{path}: a list of plugins must be in a file named *.conflist")
    return parse_list(
        {"name": tree.get("name"), "loadOnlyInlinedPlugins": True, "plugins": [tree]}
        | {key: tree[key] for key in ("cniVersion",) if key in tree},
        path,
    )


def plugin_directories(directory: str, networks: tuple[NetworkConfig, ...]) -> tuple[str, ...]:
    """The directories, beside the main one, that plugin objects of these networks come from."""
    return tuple(os.path.join(directory, network.name) for network in networks)


def parse_list(tree: Mapping[str, Any], where: str) -> NetworkConfig:
    """The network that a configuration list describes; plugin objects from beside ``where`` are added.

    :param where: the file's path, for messages and for the directory of further plugin objects.
    :raises NetworkConfigError: it can't be used.
    """
    name = tree.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _MAX_NAME_LENGTH:
        raise NetworkConfigError(
            f"{where}: name: must be letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    inlined_only = _flag(tree, "loadOnlyInlinedPlugins", where)
    objects = tree.get("plugins")
    if objects is None and inlined_only:
        raise NetworkConfigError(f"{where}: plugins: must be there when loadOnlyInlinedPlugins is true")
    if objects is not None and (not isinstance(objects, list) or not objects):
        raise NetworkConfigError(f"{where}: plugins: must be a list with at least one plugin")
    plugins = [parse_plugin(item, f"{where}: plugins[{index}]") for index, item in enumerate(objects or ())]
    if not inlined_only:
        for path in _files(os.path.join(os.path.dirname(where), name), (".conf",)):
            data = _read(path)
            if data is not None:
                plugins.append(parse_plugin(parse_json(data, path), path))
    if not plugins:
        raise NetworkConfigError(f"{where}: the network {name} has no plugins")
    return NetworkConfig(
        name=name,
        versions=_versions(tree, where),
        plugins=tuple(plugins),
        disable_check=_flag(tree, "disableCheck", where),
        disable_gc=_flag(tree, "disableGC", where),
        path=where,
    )


def parse_plugin(tree: object, where: str) -> PluginConfig:
    """One plugin configuration object.

    :raises NetworkConfigError: it can't be used.
    """
    if not isinstance(tree, Mapping):
        raise NetworkConfigError(f"{where}: must be an object")
    name = check_type(tree.get("type"), f"{where}: type")
    ipam = tree.get("ipam")
    if ipam is not None:
        if not isinstance(ipam, Mapping):
            raise NetworkConfigError(f"{where}: ipam: must be an object")
        if ipam.get("type"):
            check_type(ipam["type"], f"{where}: ipam.type")
    capabilities = tree.get("capabilities") or {}
    if not isinstance(capabilities, Mapping) or not all(isinstance(value, bool) for value in capabilities.values()):
        raise NetworkConfigError(f"{where}: capabilities: must map names to true or false")
    return PluginConfig(name, frozenset(key for key, value in capabilities.items() if value), dict(tree))


def check_type(name: object, where: str) -> str:
    """A plugin's name as it may be looked up in BinDir: one path component, never a path.

    :raises NetworkConfigError: it is none.
    """
    if not isinstance(name, str) or not name:
        raise NetworkConfigError(f"{where}: must name a plugin")
    if name in (".", "..") or not name.isprintable() or any(sign in name for sign in "/\\:"):
        raise NetworkConfigError(f"{where}: {name[:64]!r} is not the name of a plugin: no path is allowed")
    return name


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, with numbers as libcni passes them on: 1500.0 and 1.5e3 are 1500.

    :raises NetworkConfigError: it is none.
    """
    try:
        tree = json.loads(data, parse_float=_number, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        problem = "nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise NetworkConfigError(f"{where}: not valid JSON: {problem}") from None
    if not isinstance(tree, dict):
        raise NetworkConfigError(f"{where}: must be a JSON object")
    return tree


def _versions(tree: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What ``cniVersion`` and ``cniVersions`` offer and is known here, the highest first (CNI: version selection)."""
    stated = tree.get("cniVersion")
    offered = tree.get("cniVersions")
    if stated is not None and not isinstance(stated, str):
        raise NetworkConfigError(f"{where}: cniVersion: must be a string")
    if offered is not None and (not isinstance(offered, list) or not all(isinstance(item, str) for item in offered)):
        raise NetworkConfigError(f"{where}: cniVersions: must be a list of strings")
    wanted = [*(offered or ()), *([stated] if stated else ())] or [versions.UNSTATED]
    usable = [version for version in reversed(versions.KNOWN) if version in wanted]
    if not usable:
        raise NetworkConfigError(
            f"{where}: cniVersion: {', '.join(wanted)[:64]} is not known; the highest known is {versions.KNOWN[-1]}"
        )
    return tuple(usable)


def _flag(tree: Mapping[str, Any], key: str, where: str) -> bool:
    value = tree.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise NetworkConfigError(f"{where}: {key}: must be true or false")
    return value


def _files(directory: str, extensions: tuple[str, ...]) -> list[str]:
    """Paths of the files that may be configurations, sorted; none if there is no such directory."""
    try:
        with os.scandir(directory) as entries:
            names = [
                entry.name
                for entry in entries
                if os.path.splitext(f"x{entry.name}")[1] in extensions and not entry.is_dir(follow_symlinks=False)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as err:
        raise NetworkConfigError(f"{directory}: can't be read: {err.strerror}") from None
    return [os.path.join(directory, name) for name in sorted(names)]


def _read(path: str) -> bytes | None:
    try:
        # O_NONBLOCK: a FIFO in the directory must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if os.path.islink(path):
            raise NetworkConfigError(f"{path}: the symbolic link leads nowhere") from None
        return None
    except OSError as err:
        raise NetworkConfigError(f"{path}: can't be read: {err.strerror}") from None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NetworkConfigError(f"{path}: must be a regular file")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise NetworkConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes: not a network configuration")
    return data


def _number(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:32]} is too large")
    return int(number) if number.is_integer() and abs(number) < 1e21 else number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
