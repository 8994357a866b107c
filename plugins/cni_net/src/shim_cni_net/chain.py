"""The plugins of a network run one after the other: ADD, DEL, CHECK, STATUS, GC (CNI section 3).

How far an ADD has come is told at every step, so that whatever interrupts it, DEL reaches exactly what may have been
made, with the latest result known.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shim_cni_net import results, versions
from shim_cni_net.execute import Call, PluginError, Plugins
from shim_cni_net.netconf import NetworkConfig, PluginConfig
from shim_cni_net.results import Result, ResultError
from shim_core.context import CallContext

logger = logging.getLogger("shim.cni_net")

# Made by the runtime for each call, and not the configuration's to set (CNI sections 1 and 3).
_RESERVED = ("capabilities", "prevResult")
_RESERVED_PREFIX = "cni.dev/"
_MIN_SHARE_S = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """What is connected to a network: the attachment parameters of CNI section 3."""

    container_id: str
    netns: str
    """Empty when the namespace is no more: DEL then does without."""
    ifname: str
    args: str = ""
    capability_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a network's ADD has come."""

    started: int = 0
    """So many of its plugins may have run."""
    succeeded: int = 0
    """So many of them have returned a result."""
    result: Result | None = None
    """The latest result."""


def add(
    network: NetworkConfig,
    target: Target,
    plugins: Plugins,
    timeout_s: float,
    context: CallContext,
    report: Callable[[Progress], None],
) -> Result:
    """Connect a container to a network.

    :param timeout_s: for all plugins together.
    :param report: told before each plugin runs.
    :raises PluginError: one failed; the others are not run.
    """
    deadline = time.monotonic() + timeout_s
    result: Result | None = None
    for index, plugin in enumerate(network.plugins):
        report(Progress(started=index + 1, succeeded=index, result=result))
        call = _call(network, plugin, "ADD", target)
        stdin = request(network, plugin, target, result)
        try:
            result = results.parse(plugins.run(call, stdin, deadline - time.monotonic(), context), network.version)
        except ResultError as err:
            raise PluginError(call, str(err), started=True) from None
        except PluginError as err:
            if not err.started:
                report(Progress(started=index, succeeded=index, result=result))
            raise
    assert result is not None
    return result


def delete(
    network: NetworkConfig,
    target: Target,
    plugins: Plugins,
    timeout_s: float,
    context: CallContext,
    progress: Progress,
) -> None:
    """Disconnect a container from a network, the plugins in reverse order.

    A plugin whose ADD succeeded and whose DEL fails ends it: the plugins before it stand on what is left (CNI: halt).
    One whose ADD did not succeed is no reason to keep the others' addresses; the error is raised all the same, at the
    end.

    :param timeout_s: for all plugins together. One whose ADD did not succeed gets an equal part of what is left, so
        that it leaves the others their time if it hangs.
    :raises PluginError: the first that failed. Doing it all again is harmless.
    """
    deadline = time.monotonic() + timeout_s
    result = progress.result if versions.at_least(network.version, versions.CHECK) else None
    failure: PluginError | None = None
    for index in range(min(progress.started, len(network.plugins)) - 1, -1, -1):
        plugin = network.plugins[index]
        left_s = deadline - time.monotonic()
        if index >= progress.succeeded:
            left_s = max(left_s / (index + 1), _MIN_SHARE_S)
        try:
            plugins.run(
                _call(network, plugin, "DEL", target), request(network, plugin, target, result), left_s, context
            )
        except PluginError as err:
            if err.nothing_left:
                continue
            failure = failure or err
            if index < progress.succeeded:
                break
            logger.warning("%s: its ADD is not known to have succeeded; going on with the other plugins", err)
    if failure is not None:
        raise failure


def check(
    network: NetworkConfig, target: Target, plugins: Plugins, timeout_s: float, context: CallContext, result: Result
) -> None:
    """Ask every plugin whether the connection is as it should be. Done without asking if that isn't wanted or known.

    :raises PluginError: the first that says no.
    """
    if network.disable_check or not versions.at_least(network.version, versions.CHECK):
        return
    deadline = time.monotonic() + timeout_s
    for plugin in network.plugins:
        call = _call(network, plugin, "CHECK", target)
        plugins.run(call, request(network, plugin, target, result), deadline - time.monotonic(), context)


def status(network: NetworkConfig, plugins: Plugins, timeout_s: float, context: CallContext) -> None:
    """Ask every plugin whether it can serve ADD, if the network's version knows how.

    :raises PluginError: the first that can't.
    """
    if not versions.at_least(network.version, versions.GC_AND_STATUS):
        return
    deadline = time.monotonic() + timeout_s
    for plugin in network.plugins:
        call = Call(plugin.type, network.name, "STATUS")
        plugins.run(call, request(network, plugin), deadline - time.monotonic(), context)


def collect_garbage(
    network: NetworkConfig,
    valid: Iterable[tuple[str, str]],
    plugins: Plugins,
    timeout_s: float,
    context: CallContext,
    operation: str,
) -> list[PluginError]:
    """Have every plugin reclaim what belongs to no attachment, if that is wanted and the network's version knows how.

    No ADD or DEL may run meanwhile (CNI: lifecycle).

    :param valid: container ids and interface names of the attachments there are.
    :param operation: by what its processes are found if the daemon is killed.
    :returns: the plugins that failed; the others have done it.
    """
    if network.disable_gc or not versions.at_least(network.version, versions.GC_AND_STATUS):
        return []
    deadline = time.monotonic() + timeout_s
    attachments = [{"containerID": container_id, "ifname": ifname} for container_id, ifname in valid]
    failures = []
    for plugin in network.plugins:
        # The second name is an earlier draft's; plugins in use know that one alone (libcni passes both).
        stdin = request(
            network, plugin, extra={"cni.dev/valid-attachments": attachments, "cni.dev/attachments": attachments}
        )
        try:
            call = Call(plugin.type, network.name, "GC", operation=operation)
            plugins.run(call, stdin, deadline - time.monotonic(), context)
        except PluginError as err:
            failures.append(err)
    return failures


def request(
    network: NetworkConfig,
    plugin: PluginConfig,
    target: Target | None = None,
    result: Result | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """What a plugin reads on standard input (CNI section 3, deriving request configuration)."""
    tree = {
        key: value
        for key, value in plugin.tree.items()
        if key not in _RESERVED and not key.startswith(_RESERVED_PREFIX)
    }
    tree["name"] = network.name
    tree["cniVersion"] = network.version
    if target is not None:
        runtime = {key: value for key, value in target.capability_args.items() if key in plugin.capabilities}
        if runtime:
            tree["runtimeConfig"] = runtime
    if result is not None:
        tree["prevResult"] = result
    tree.update(extra or {})
    return json.dumps(tree).encode()


def _call(network: NetworkConfig, plugin: PluginConfig, command: str, target: Target) -> Call:
    return Call(
        plugin.type, network.name, command, target.container_id, target.netns, target.ifname, target.args,
        operation=target.container_id,
    )  # fmt: skip
