"""Version negotiation: the highest version that a network offers and all its plugins speak (CNI: VERSION).

Plugins are asked only when the network offers more than one, and once for each executable.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import replace

from shim_cni_net import versions
from shim_cni_net.execute import Call, PluginError, Plugins
from shim_cni_net.netconf import NetworkConfig, NetworkConfigError
from shim_core.context import CallContext

logger = logging.getLogger("shim.cni_net")

_TIMEOUT_S = 5.0


class Negotiator:
    """Chooses versions; remembers what executables have answered."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._answers: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}
        self._lock = threading.Lock()

    def choose(self, network: NetworkConfig, context: CallContext) -> NetworkConfig:
        """The network without the versions that one of its plugins doesn't speak.

        A plugin that can't be asked is taken to speak all: what is wrong with it shows when it is run.

        :raises NetworkConfigError: nothing is left.
        """
        if len(network.versions) == 1:
            return network
        left = network.versions
        for plugin in network.plugins:
            spoken = self._spoken(plugin.type, network.name, context)
            if spoken is None:
                continue
            left = tuple(version for version in left if version in spoken)
            if not left:
                raise NetworkConfigError(
                    f"{network.path}: cniVersions: the plugin {plugin.type} speaks none of what the others do; "
                    f"it speaks {', '.join(sorted(spoken))}"
                )
        return replace(network, versions=left)

    def _spoken(self, name: str, network: str, context: CallContext) -> frozenset[str] | None:
        try:
            path = self._plugins.find(name)
            status = os.stat(path)
        except (LookupError, OSError):
            return None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        with self._lock:
            known = self._answers.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        # Plugins built before VERSION was known want these variables, whatever they say.
        call = Call(name, network, "VERSION", netns="dummy", ifname="dummy")
        stdin = json.dumps({"cniVersion": versions.KNOWN[-1]}).encode()
        try:
            document = json.loads(self._plugins.run(call, stdin, _TIMEOUT_S, context))
            spoken = frozenset(item for item in document["supportedVersions"] if isinstance(item, str))
        except (PluginError, ValueError, RecursionError, TypeError, KeyError) as err:
            logger.warning("the plugin %s doesn't tell which versions it speaks: %s", name, err)
            return None
        with self._lock:
            self._answers[path] = (identity, spoken)
        return spoken
