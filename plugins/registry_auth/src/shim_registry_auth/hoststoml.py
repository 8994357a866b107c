"""``hosts.toml`` directories, as containerd reads them (its docs/hosts.md). Read for each pull: no restart is needed.

::

    <ConfigPath>/registry.example.org_5000_/hosts.toml     also: registry.example.org:5000, _default

A directory without hosts.toml may hold certificates alone, as Docker's: ``*.crt`` to be trusted, ``*.cert`` and
``*.key`` to show.
"""

from __future__ import annotations

import os
import tomllib
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shim_core.config import parse_duration
from shim_core.errors import InvalidArgument
from shim_core.types import RegistryEndpoint
from shim_registry_auth.hosts import own_host

FILE_NAME = "hosts.toml"
_MAX_FILE_BYTES = 1024 * 1024
_SERVER = "server"
_CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})
_HOST_KEYS = frozenset(
    {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
)  # fmt: skip


def find(registry: str, roots: Sequence[str]) -> list[RegistryEndpoint] | None:
    """The endpoints for a registry, in the order to ask them; None when there is no directory for it.

    :raises InvalidArgument: there is one, and its file is wrong; names file and key.
    """
    directory = _directory(registry, roots)
    if directory is None:
        return None
    path = directory / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return [_with_docker_certificates(registry, directory)]
    except OSError as err:
        raise InvalidArgument(f"{path}: can't be read: {err.strerror}") from None
    try:
        if len(data) > _MAX_FILE_BYTES:
            raise ValueError(f"larger than {_MAX_FILE_BYTES} bytes")
        return _endpoints(registry, tomllib.loads(data.decode("utf-8")), directory)
    except (ValueError, RecursionError) as err:
        reason = "nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise InvalidArgument(f"{path}: {reason}") from None


def _directory(registry: str, roots: Sequence[str]) -> Path | None:
    """The first directory for a registry; the grammar of references keeps its name from leading elsewhere."""
    host, colon, port = registry.rpartition(":")
    names = [f"{host}_{port}_"] if colon and port.isdigit() else []
    for root in roots:
        for name in (*names, registry, "_default"):
            path = Path(root, name)
            if path.is_dir():
                return path
    return None


def _endpoints(registry: str, document: Mapping[str, Any], directory: Path) -> list[RegistryEndpoint]:
    tables = document.get("host", {})
    if not isinstance(tables, dict):
        raise ValueError('host: must be tables: [host."https://mirror.example.org"]')
    found = []
    for address, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"host.{address}: must be a table")
        found.append(_endpoint(registry, address, table, directory, f'host."{address}"'))
    server = document.get(_SERVER, "")
    if not isinstance(server, str):
        raise ValueError("server: must be a text")
    own = {key: value for key, value in document.items() if key not in (_SERVER, "host")}
    found.append(_endpoint(registry, server, own, directory, _SERVER))
    return found


def _endpoint(registry: str, address: str, table: Mapping[str, Any], directory: Path, where: str) -> RegistryEndpoint:
    unknown = set(table) - _HOST_KEYS
    if unknown:
        raise ValueError(f"{where}: unknown key {sorted(unknown)[0]}; known here: {', '.join(sorted(_HOST_KEYS))}")
    url, host = _url(address or own_host(registry), _flag(table, "override_path", where), where)
    # The server stands for the registry, whatever it is called; any other host is somebody else.
    is_own = where == _SERVER or host in (registry, own_host(registry))
    capabilities = _texts(table, "capabilities", where)
    if not _CAPABILITIES.issuperset(capabilities):
        raise ValueError(f"{where}.capabilities: only {', '.join(sorted(_CAPABILITIES))} are known")
    everything = "capabilities" not in table
    return RegistryEndpoint(
        url=url,
        registry=registry if is_own else host,
        can_resolve=everything or "resolve" in capabilities,
        can_pull=everything or "pull" in capabilities,
        ca_paths=tuple(_below(directory, path) for path in _texts(table, "ca", where)),
        client_certs=_clients(table, directory, where),
        insecure=_flag(table, "skip_verify", where) or url.startswith("http://"),
        headers=_headers(table, where),
        connect_timeout_s=_timeout(table, where),
    )


def _url(address: str, override_path: bool, where: str) -> tuple[str, str]:
    """The base of requests, and host with port."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"https://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError(f"{where}: must be an http:// or https:// address without user and password")
    path = parts.path.rstrip("/")
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    return f"{parts.scheme}://{parts.netloc}{path}", parts.netloc


def _with_docker_certificates(registry: str, directory: Path) -> RegistryEndpoint:
    names = sorted(os.listdir(directory))
    return RegistryEndpoint(
        url=f"https://{own_host(registry)}/v2",
        registry=registry,
        ca_paths=tuple(str(directory / name) for name in names if name.endswith(".crt")),
        client_certs=tuple(
            (str(directory / name), str(directory / f"{name.removesuffix('.cert')}.key"))
            for name in names
            if name.endswith(".cert")
        ),
    )


def _texts(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = table.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{where}.{key}: must be a text or a list of texts")
    return values


def _clients(table: Mapping[str, Any], directory: Path, where: str) -> tuple[tuple[str, str], ...]:
    """``client``: a file with certificate and key, a list of those, or a list of pairs."""
    value = table.get("client", [])
    found = []
    for item in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        pair = [item, ""] if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) not in (1, 2) or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{where}.client: must be a file, or a list of files or of [certificate, key]")
        cert, key = (*pair, "")[:2]
        found.append((_below(directory, cert), _below(directory, key) if key else ""))
    return tuple(found)


def _headers(table: Mapping[str, Any], where: str) -> dict[str, str]:
    value = table.get("header", {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}.header: must be a table")
    made = {}
    for name in value:
        texts = _texts(value, name, f"{where}.header")
        if not name.isascii() or not all(text.isprintable() for text in (name, *texts)):
            raise ValueError(f"{where}.header: names and values must be printable text")
        made[name] = ", ".join(texts)
    return made


def _flag(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}.{key}: must be true or false")
    return value


def _timeout(table: Mapping[str, Any], where: str) -> float | None:
    if "dial_timeout" not in table:
        return None
    try:
        return parse_duration(table["dial_timeout"]) or None
    except ValueError as err:
        raise ValueError(f"{where}.dial_timeout: {err}") from None


def _below(directory: Path, path: str) -> str:
    """A path as the file has it: relative ones are beside the file."""
    return str(directory / path)
