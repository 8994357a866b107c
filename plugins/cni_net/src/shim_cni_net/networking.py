"""Pods connected and disconnected: every step recorded before it is taken, and undone until nothing is left."""

from __future__ import annotations

import errno
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shim_cni_net import chain, processes
from shim_cni_net.capabilities import capability_args, check_id, cni_args
from shim_cni_net.chain import Progress, Target
from shim_cni_net.config import NETNS, CniSection
from shim_cni_net.description import addresses, describe, ifname
from shim_cni_net.directory import ConfigDirectory
from shim_cni_net.execute import PluginError, Plugins
from shim_cni_net.locks import OperationLocks
from shim_cni_net.negotiate import Negotiator
from shim_cni_net.netconf import NetworkConfig, NetworkConfigError
from shim_cni_net.netns import Namespaces, NetnsError
from shim_cni_net.records import Attachment, Operation, Records, may_have_run
from shim_core.context import CallContext
from shim_core.errors import Cancelled, InvalidArgument, ResourceExhausted, ShimError, Unavailable
from shim_core.types import NetworkAttachment, NetworkSandbox

logger = logging.getLogger("shim.cni_net")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LEFTOVER_GRACE_S = 10.0
_COLLECT_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What networking has cost so far."""

    attached: int = 0
    attach_s: float = 0.0
    detached: int = 0
    detach_s: float = 0.0


class Networking:
    """The networks of this node's pods.

    :param state_dir: where records are kept.   :param environment: the daemon's, for plugins.
    :param pod_cidrs: asked for the node's pod CIDRs, for plugins that declare ``ipRanges``.
    :param boot_id: tells this boot of the node from others.
    """

    def __init__(
        self,
        section: CniSection,
        state_dir: str,
        environment: Mapping[str, str],
        pod_cidrs: Callable[[], tuple[str, ...]],
        boot_id: str | None = None,
    ) -> None:
        self.section = section
        self.boot_id = boot_id or _BOOT_ID.read_text().strip()
        self.configs = ConfigDirectory(section.conf_dir, section.max_conf_num)
        self.plugins = Plugins(section.bin_dir, environment)
        self.namespaces = Namespaces(section.netns_dir, state_dir)
        self._collection = f"gc-{self.namespaces.tag}"
        self.records = Records(state_dir)
        self.statistics = Statistics()
        self._negotiator = Negotiator(self.plugins)
        self._pod_cidrs = pod_cidrs
        self._locks = OperationLocks()
        self._run = secrets.token_hex(8)
        self._unconfirmed: set[str] = set()
        self._statistics_lock = threading.Lock()

    def open(self) -> bool:
        """Read the records and remove namespaces that none of them owns.

        :returns: whether there was an earlier run.
        :raises OSError: the state directory can't be used.
        """
        inherited = self.records.open()
        if inherited:
            # It knows nothing of the pods that come from now on, and would take their addresses.
            processes.end_leftovers(self._collection, 0, grace_s=0.0)
        self._unconfirmed = {attachment.sandbox_id for attachment in self.records.all()}
        owned = {self.netns_path(attachment) for attachment in self.records.all()}
        for path in self.namespaces.pinned():
            if path in owned:
                continue
            if self.namespaces.in_use(path):
                logger.warning("%s belongs to no sandbox, but processes live in it: it is left alone", path)
                continue
            logger.warning("%s belongs to no sandbox: it is removed", path)
            try:
                self.namespaces.remove(path)
            except NetnsError as err:
                logger.error("%s", err)
        return inherited

    def networks(self, context: CallContext) -> tuple[NetworkConfig, ...]:
        """The networks a new pod joins, each in the version it is run with.

        :raises NetworkConfigError: there is none, or one can't be used.
        """
        return tuple(self._negotiator.choose(network, context) for network in self.configs.networks())

    def netns_path(self, attachment: Attachment) -> str:
        """Where an attachment's namespace is, though its record can't be read; empty if it has none."""
        return attachment.netns_path if attachment.networks else self.namespaces.path(attachment.sandbox_id)

    # -- connecting ----------------------------------------------------------------------------------------------------

    def attach(self, sandbox: NetworkSandbox, context: CallContext) -> NetworkAttachment:
        """See ``network_attach``."""
        started = time.monotonic()
        sandbox_id = check_id(sandbox.sandbox_id)
        arguments = cni_args(sandbox)
        capabilities = capability_args(sandbox, self._pod_cidrs())
        with self._locks.sandbox(sandbox_id, context.remaining_s(self.section.add_timeout)):
            known = self.records.get(sandbox_id)
            if known is not None and self._stands(known):
                self._confirm(known, context)
                return describe(known, self.section.ip_preference)
            if known is not None:
                # Of an attach that failed, or of another boot. CNI: no ADD twice without a DEL between.
                self._tear_down(known, sandbox, context.for_cleanup(self.section.del_timeout))
            attachment = self._connect(sandbox, arguments, capabilities, context)
            described = describe(attachment, self.section.ip_preference)
        took_s = time.monotonic() - started
        with self._statistics_lock:
            now = self.statistics
            self.statistics = replace(now, attached=now.attached + 1, attach_s=now.attach_s + took_s)
        logger.info(
            "%s (%s) is attached: %s, %.1f ms",
            sandbox_id[:13], attachment.pod, ", ".join(described.addresses), took_s * 1000,
        )  # fmt: skip
        return described

    def _connect(
        self, sandbox: NetworkSandbox, arguments: str, capabilities: Mapping[str, Any], context: CallContext
    ) -> Attachment:
        try:
            networks = self.networks(context)
        except NetworkConfigError as err:
            raise Unavailable(f"the pod network is not ready: {err}") from None
        context.check()
        pinned = self.section.net_type == NETNS
        path = self.namespaces.path(sandbox.sandbox_id)
        attachment = Attachment(
            sandbox_id=sandbox.sandbox_id,
            pod=f"{sandbox.namespace}/{sandbox.name}",
            boot_id=self.boot_id,
            netns_path=path if pinned else "",
            networks=networks,
            cni_args=arguments,
            capability_args=capabilities,
            progress=tuple(Progress() for _ in networks),
            operation=Operation(self._run, processes.now_ticks()),
        )
        self._prepare(attachment)
        deadline = time.monotonic() + context.remaining_s(self.section.add_timeout)
        for index, network in enumerate(networks):
            target = Target(sandbox.sandbox_id, path, ifname(index), arguments, capabilities)
            report = partial(self._record, sandbox.sandbox_id, index)
            try:
                result = chain.add(network, target, self.plugins, deadline - time.monotonic(), context, report)
            except PluginError as err:
                if context.cancelled:
                    raise Cancelled(str(err)) from None
                raise Unavailable(str(err)) from None
            count = len(network.plugins)
            attachment = self._stepped(sandbox.sandbox_id, index, Progress(count, count, result))
            self.records.keep(attachment)  # on disk with the next step
        return self._finish(attachment)

    def _prepare(self, attachment: Attachment) -> None:
        """Record the intent and make the namespace, side by side: the disk and the kernel both take their time."""
        path = attachment.netns_path
        with _namespaces():
            wait = self.namespaces.begin(path) if path else _nothing
        try:
            with _storing():
                self.records.add(attachment)
        except ShimError:
            with _namespaces():
                wait()
                self.namespaces.remove(path)
            raise
        with _namespaces():
            wait()

    def _record(self, sandbox_id: str, index: int, progress: Progress) -> None:
        """Record how far the ADD of one network has come."""
        with _storing():
            self.records.update(self._stepped(sandbox_id, index, progress))

    def _stepped(self, sandbox_id: str, index: int, progress: Progress) -> Attachment:
        attachment = self.records.get(sandbox_id)
        assert attachment is not None  # its lock is ours
        return replace(attachment, progress=(*attachment.progress[:index], progress, *attachment.progress[index + 1 :]))

    def _finish(self, attachment: Attachment) -> Attachment:
        """Record that every plugin has succeeded, and see whether the pod can be reached now."""
        result = attachment.progress[0].result
        network = attachment.networks[0]
        reachable = bool(result and addresses(result, self.section.ip_preference))
        attachment = replace(attachment, attached=reachable, operation=None)
        with _storing():
            self.records.update(attachment)
        if not reachable:
            raise Unavailable(
                f'the plugins of network "{network.name}" ({", ".join(plugin.type for plugin in network.plugins)}) '
                f"gave {ifname(0)} no address: a pod needs one"
            )
        return attachment

    def _stands(self, attachment: Attachment) -> bool:
        return (
            attachment.attached
            and attachment.boot_id == self.boot_id
            and (not attachment.netns_path or self.namespaces.exists(attachment.netns_path))
        )

    def _confirm(self, attachment: Attachment, context: CallContext) -> None:
        """Have the plugins check an attachment that an earlier run of the daemon made.

        :raises Unavailable: it is damaged; it has to be detached first.
        """
        if attachment.sandbox_id not in self._unconfirmed:
            return
        deadline = time.monotonic() + context.remaining_s(self.section.add_timeout)
        for index, (network, progress) in enumerate(zip(attachment.networks, attachment.progress, strict=True)):
            assert progress.result is not None
            # All that ADD was told, CHECK is told as well.
            path = attachment.netns_path or self.namespaces.path(attachment.sandbox_id)
            target = self._target(attachment, index, path)
            try:
                chain.check(network, target, self.plugins, deadline - time.monotonic(), context, progress.result)
            except PluginError as err:
                raise Unavailable(str(err)) from None
        self._unconfirmed.discard(attachment.sandbox_id)

    # -- disconnecting -------------------------------------------------------------------------------------------------

    def detach(self, sandbox_id: str, sandbox: NetworkSandbox | None, context: CallContext) -> None:
        """See ``network_detach``.

        :param sandbox: what is known of the sandbox beside its id, if anything.
        """
        started = time.monotonic()
        try:
            check_id(sandbox_id)
        except InvalidArgument:
            return  # nothing of that name can ever have been attached
        with self._locks.sandbox(sandbox_id, context.remaining_s(self.section.del_timeout)):
            known = self.records.get(sandbox_id)
            if known is None:
                with _namespaces():
                    self.namespaces.remove(self.namespaces.path(sandbox_id))
                return
            # DEL has its own time: it must not be cut short because ADD, or the client, has used up the call's.
            self._tear_down(known, sandbox, context.for_cleanup(self.section.del_timeout))
        took_s = time.monotonic() - started
        with self._statistics_lock:
            now = self.statistics
            self.statistics = replace(now, detached=now.detached + 1, detach_s=now.detach_s + took_s)
        logger.info("%s (%s) is detached, %.1f ms", sandbox_id[:13], known.pod, took_s * 1000)

    def _tear_down(self, attachment: Attachment, sandbox: NetworkSandbox | None, context: CallContext) -> None:
        """Take an attachment down and forget it.

        :raises Unavailable: something is left; it stays recorded as it is.
        """
        operation = attachment.operation
        if operation is not None and operation.run != self._run:
            grace_s = min(_LEFTOVER_GRACE_S, self.section.del_timeout)
            processes.end_leftovers(attachment.sandbox_id, operation.since_ticks, grace_s)
        path = self.netns_path(attachment)
        attachment = self._for_deletion(attachment, sandbox, context)
        try:
            self.records.update(attachment)
        except OSError as err:
            # Memory knows it, and DEL only takes away: a full disk must not keep addresses.
            logger.warning("the progress of %s can't be recorded: %s", attachment.sandbox_id[:13], err)
        netns = path if path and self.namespaces.exists(path) else ""
        deadline = time.monotonic() + self.section.del_timeout
        failures: list[PluginError] = []
        for index in range(len(attachment.networks) - 1, -1, -1):
            share_s = (deadline - time.monotonic()) / (index + 1)
            target = self._target(attachment, index, netns)
            try:
                chain.delete(
                    attachment.networks[index], target, self.plugins, share_s, context, attachment.progress[index]
                )
            except PluginError as err:
                failures.append(err)
        if failures:
            raise Unavailable(f"{failures[0]}; the addresses of {attachment.pod} are not free before it succeeds")
        if path:
            with _namespaces():
                self.namespaces.remove(path)
        with _storing():
            self.records.remove(attachment.sandbox_id)
        self._unconfirmed.discard(attachment.sandbox_id)

    def _for_deletion(self, attachment: Attachment, sandbox: NetworkSandbox | None, context: CallContext) -> Attachment:
        """The attachment as DEL has to see it: a lost record replaced, lost progress not relied upon."""
        if not attachment.networks:
            try:
                networks = self.networks(context)
            except NetworkConfigError as err:
                raise Unavailable(
                    f"the record of sandbox {attachment.sandbox_id[:13]} is lost, and there is no configuration "
                    f"to tear it down with: {err}"
                ) from None
            arguments, capabilities = self._arguments(attachment.sandbox_id, sandbox)
            attachment = replace(
                attachment,
                networks=networks,
                netns_path=self.netns_path(attachment),
                cni_args=arguments,
                capability_args=capabilities,
            )
            attachment = replace(attachment, progress=may_have_run(attachment))
        elif attachment.boot_id != self.boot_id:
            # Progress is not synced to the disk: after a power failure it may be old.
            attachment = replace(attachment, progress=may_have_run(attachment))
        return replace(attachment, attached=False, operation=Operation(self._run, processes.now_ticks()))

    def _arguments(self, sandbox_id: str, sandbox: NetworkSandbox | None) -> tuple[str, dict[str, Any]]:
        """The best that can be said of a sandbox whose record is lost."""
        if sandbox is not None:
            try:
                return cni_args(sandbox), capability_args(sandbox, self._pod_cidrs())
            except InvalidArgument as err:
                logger.warning("%s: deleting without it: %s", sandbox_id[:13], err)
        return f"IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID={sandbox_id}", {}

    # -- looking -------------------------------------------------------------------------------------------------------

    def status(self, sandbox_id: str) -> NetworkAttachment | None:
        """See ``network_status``."""
        known = self.records.get(sandbox_id)
        if known is None or not known.attached or known.boot_id != self.boot_id:
            return None
        return describe(known, self.section.ip_preference)

    def collect_garbage(self, context: CallContext) -> None:
        """Have the plugins of today's networks reclaim what belongs to no recorded attachment.

        :raises NetworkConfigError: there are no networks.   :raises Unavailable: others are at work all the time.
        """
        networks = self.networks(context)
        with self._locks.everything(_COLLECT_WAIT_S):
            for network in networks:
                valid = [
                    (attachment.sandbox_id, ifname(index))
                    for attachment in self.records.all()
                    for index, own in enumerate(attachment.networks or networks)
                    if own.name == network.name
                ]
                for err in chain.collect_garbage(
                    network, valid, self.plugins, self.section.del_timeout, context, self._collection
                ):
                    logger.warning("%s", err)

    def _target(self, attachment: Attachment, index: int, netns: str) -> Target:
        return Target(attachment.sandbox_id, netns, ifname(index), attachment.cni_args, attachment.capability_args)


@contextmanager
def _storing() -> Iterator[None]:
    """What a full or broken disk is to the client."""
    try:
        yield
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = ResourceExhausted if full else Unavailable
        raise kind(f"the network's state can't be recorded in Portoshim.StateDir: {err.strerror}") from err


@contextmanager
def _namespaces() -> Iterator[None]:
    try:
        yield
    except NetnsError as err:
        raise Unavailable(f"network namespace {err}") from None


def _nothing() -> None:
    """In place of a namespace to wait for."""
