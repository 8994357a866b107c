"""Records of attachments: all that is needed to take one down again, in files that outlive the daemon and the node.

For each sandbox there are two::

    attachments/ID.json    what was intended: written once, on disk before the first plugin runs, removed last
    progress/ID.jsonl      how far it has come: a line at every step, the last one counts. It outlives a SIGKILL, for
                           which the page cache is enough; after a power failure it may be old or gone, and is not
                           relied upon. Lines cost a tenth of what replacing a file does, and pods wait for them

A file that can't be read is never a reason to forget the sandbox: its name says the id.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shim_cni_net import netconf
from shim_cni_net.capabilities import check_id
from shim_cni_net.chain import Progress
from shim_cni_net.netconf import NetworkConfig
from shim_core.errors import InvalidArgument

logger = logging.getLogger("shim.cni_net")

_FORMAT = 1
_INTENT = ".json"
_PROGRESS = ".jsonl"
_MAX_PROGRESS_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Operation:
    """An ADD or DEL under way: what a later run of the daemon needs to find the processes of one that was killed."""

    run: str
    """The run of the daemon that began it."""
    since_ticks: int
    """When, see :mod:`shim_cni_net.processes`."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A sandbox's connection to its networks, whole or in part."""

    sandbox_id: str
    pod: str
    """``namespace/name``, for messages."""
    boot_id: str
    """The boot of the node it was made in: namespaces and interfaces end with it, leases don't."""
    netns_path: str
    """Empty with a NetType other than netns."""
    networks: tuple[NetworkConfig, ...] = ()
    """As they were when it was made; empty when the record could not be read."""
    cni_args: str = ""
    capability_args: Mapping[str, Any] = field(default_factory=dict)
    progress: tuple[Progress, ...] = ()
    """For each of the networks."""
    attached: bool = False
    """Every network is connected, and nothing has been taken down."""
    operation: Operation | None = None


class Records:
    """The attachments of a shim, in memory and on disk.

    :param directory: where they are kept; made when it is opened.
    """

    def __init__(self, directory: str) -> None:
        self._intents = Path(directory, "attachments")
        self._progress = Path(directory, "progress")
        self._attachments: dict[str, Attachment] = {}
        self._networks: dict[str, tuple[NetworkConfig, ...]] = {}
        self._lock = threading.Lock()

    def open(self) -> bool:
        """Read what earlier runs left.

        :returns: whether there was an earlier run.
        :raises OSError: the directories can't be made or read.
        """
        inherited = self._intents.is_dir()
        for directory in (self._intents, self._progress):
            _make_private(directory)
            for path in directory.glob("*.tmp"):
                path.unlink()  # written by half
        found: dict[str, Attachment] = {}
        for path in sorted(self._intents.glob(f"*{_INTENT}")):
            try:
                found[check_id(path.stem)] = self._load(path.stem)
            except InvalidArgument:
                logger.warning("%s is not named after a sandbox: it is ignored", path)
        with self._lock:
            self._attachments = found
        for path in self._progress.glob(f"*{_PROGRESS}"):
            if path.stem not in found:
                path.unlink()
        self._networks.clear()
        return inherited

    def get(self, sandbox_id: str) -> Attachment | None:
        with self._lock:
            return self._attachments.get(sandbox_id)

    def all(self) -> tuple[Attachment, ...]:
        with self._lock:
            return tuple(self._attachments.values())

    def add(self, attachment: Attachment) -> None:
        """Record what is about to be done; it is on disk when this returns.

        :raises OSError: it is not recorded.
        """
        path = self._intents / (check_id(attachment.sandbox_id) + _INTENT)
        tree = {
            "format": _FORMAT,
            "pod": attachment.pod,
            "bootId": attachment.boot_id,
            "netnsPath": attachment.netns_path,
            "networks": [network.as_tree() for network in attachment.networks],
            "cniArgs": attachment.cni_args,
            "capabilityArgs": dict(attachment.capability_args),
        }
        # Progress first: of an id that was used before, what is left there must not be taken for this one's.
        self._progress_path(attachment.sandbox_id).unlink(missing_ok=True)
        self._write_progress(attachment)
        _replace(path, _json(tree), durable=True)
        with self._lock:
            self._attachments[attachment.sandbox_id] = attachment

    def update(self, attachment: Attachment) -> None:
        """Record how far it has come.

        :raises OSError: it is known in memory alone.
        """
        self.keep(attachment)
        self._write_progress(attachment)

    def keep(self, attachment: Attachment) -> None:
        """Remember how far it has come, in memory alone."""
        with self._lock:
            self._attachments[attachment.sandbox_id] = attachment

    def remove(self, sandbox_id: str) -> None:
        """Forget an attachment of which nothing is left.

        :raises OSError: it is still recorded.
        """
        self._progress_path(sandbox_id).unlink(missing_ok=True)
        (self._intents / (sandbox_id + _INTENT)).unlink(missing_ok=True)
        with self._lock:
            self._attachments.pop(sandbox_id, None)

    def _write_progress(self, attachment: Attachment) -> None:
        operation = attachment.operation
        tree = {
            "attached": attachment.attached,
            "operation": operation and {"run": operation.run, "sinceTicks": operation.since_ticks},
            "networks": [
                {"started": item.started, "succeeded": item.succeeded, "result": item.result}
                for item in attachment.progress
            ],
        }
        path, line = self._progress_path(attachment.sandbox_id), _json(tree)
        if not _append(path, line):
            _replace(path, line + b"\n", durable=False)

    def _progress_path(self, sandbox_id: str) -> Path:
        return self._progress / (sandbox_id + _PROGRESS)

    def _load(self, sandbox_id: str) -> Attachment:
        path = self._intents / (sandbox_id + _INTENT)
        try:
            attachment = self._parse_intent(sandbox_id, path.read_bytes(), str(path))
        except (OSError, ValueError, TypeError, KeyError, RecursionError, netconf.NetworkConfigError) as err:
            logger.error("%s can't be read; the sandbox will be torn down with today's configuration: %s", path, err)
            return Attachment(sandbox_id, pod="", boot_id="", netns_path="")
        path = self._progress_path(sandbox_id)
        try:
            lines = [line for line in path.read_bytes().split(b"\n") if line]
        except OSError as err:
            lines = []
            logger.warning("%s can't be read: %s", path, err)
        for age, line in enumerate(reversed(lines)):
            try:
                found = _with_progress(attachment, line)
            except (ValueError, TypeError, KeyError, RecursionError) as err:
                logger.warning("a line of %s can't be read: %s", path, err)
                continue
            # Behind an older line more may have been done than it says.
            return found if age == 0 else replace(found, progress=may_have_run(found), attached=False)
        return replace(attachment, progress=may_have_run(attachment))

    def _parse_intent(self, sandbox_id: str, data: bytes, where: str) -> Attachment:
        tree = json.loads(data)
        if tree["format"] != _FORMAT:
            raise ValueError(f"its format is {tree['format']!r}, not {_FORMAT}")
        # Most pods of a node have the same networks: they are kept once.
        key = json.dumps(tree["networks"], sort_keys=True)
        if key not in self._networks:
            self._networks[key] = tuple(
                netconf.parse_list(item, f"{where}: networks[{index}]") for index, item in enumerate(tree["networks"])
            )
        return Attachment(
            sandbox_id=sandbox_id,
            pod=str(tree["pod"]),
            boot_id=str(tree["bootId"]),
            netns_path=str(tree["netnsPath"]),
            networks=self._networks[key],
            cni_args=str(tree["cniArgs"]),
            capability_args=dict(tree["capabilityArgs"]),
        )


def may_have_run(attachment: Attachment) -> tuple[Progress, ...]:
    """An attachment's progress when what is known of it may be old: any plugin may have run meanwhile."""
    known = attachment.progress or (Progress(),) * len(attachment.networks)
    return tuple(
        replace(progress, started=len(network.plugins))
        for network, progress in zip(attachment.networks, known, strict=True)
    )


def _with_progress(attachment: Attachment, data: bytes) -> Attachment:
    tree = json.loads(data)
    progress = tuple(Progress(item["started"], item["succeeded"], item["result"]) for item in tree["networks"])
    if len(progress) != len(attachment.networks) or not all(
        type(item.started) is int and type(item.succeeded) is int and isinstance(item.result, dict | None)
        for item in progress
    ):
        raise ValueError("it doesn't fit the attachment")
    operation = tree["operation"]
    return replace(
        attachment,
        progress=progress,
        attached=bool(tree["attached"]),
        operation=operation and Operation(operation["run"], operation["sinceTicks"]),
    )


def _make_private(directory: Path) -> None:
    """Make a directory, and those above it that are missing, for root alone."""
    if not directory.is_dir():
        _make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree).encode()


def _append(path: Path, line: bytes) -> bool:
    """Add a line to a file; False if it has grown so much that it should be replaced."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(fd).st_size > _MAX_PROGRESS_BYTES:
            return False
        # A line of its own even behind one that was cut short.
        data = b"\n" + line + b"\n"
        if os.write(fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(fd)
    return True


def _replace(path: Path, data: bytes, *, durable: bool) -> None:
    """Replace a file as a whole.

    :param durable: whether it must survive a power failure from now on.
    """
    temporary = path.with_suffix(".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(fd)
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
