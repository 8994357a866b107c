"""The plugin: hooks in, the parts of this package behind them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from shim_cni_net.config import CniSection
from shim_cni_net.netconf import NetworkConfig, NetworkConfigError
from shim_cni_net.networking import Networking
from shim_cni_net.podcidr import PodCidr
from shim_cni_net.readiness import Readiness
from shim_cni_net.recovery import Recovery
from shim_core.config import PortoshimSection, Section
from shim_core.context import CallContext
from shim_core.errors import StartupError
from shim_core.hookspecs import hookimpl
from shim_core.types import NetworkAttachment, NetworkSandbox, RuntimeCondition, Shim

if TYPE_CHECKING:
    from shim_core.cri.v1 import api_pb2 as pb

logger = logging.getLogger("shim.cni_net")

_STOP_WAIT_S = 5.0


class CniNet:
    """Pod networking by CNI plugins."""

    def __init__(self) -> None:
        self._shim: Shim | None = None
        self._state_dir = ""
        self._recovery: Recovery | None = None

    # -- the daemon's life ---------------------------------------------------------------------------------------------

    @hookimpl
    def shim_config_section(self) -> type[Section]:
        return CniSection

    @hookimpl
    def shim_configure(self, shim: Shim) -> None:
        self._shim = shim
        section = shim.config.get(CniSection)
        self._state_dir = os.path.join(shim.config.get(PortoshimSection).state_dir, "cni")
        self._pod_cidr = PodCidr(self._state_dir, section.conf_dir, section.conf_template)
        self._networking = Networking(section, self._state_dir, os.environ, self._pod_cidr.cidrs)
        self._readiness = Readiness(self._networking)

    @hookimpl
    def shim_startup(self) -> None:
        assert self._shim is not None
        started = time.monotonic()
        try:
            inherited = self._networking.open()
        except OSError as err:
            raise StartupError(
                f"{err.filename or self._state_dir}: {err.strerror}; set Portoshim.StateDir to a directory for records"
            ) from err
        self._pod_cidr.open()
        self._recovery = Recovery(self._networking, self._shim.hooks, inherited=inherited)
        self._recovery.start()
        count = len(self._networking.records.all())
        logger.info("%d attachments found in %.1f ms", count, (time.monotonic() - started) * 1000)

    @hookimpl
    def shim_shutdown(self) -> None:
        if self._recovery is not None:
            self._recovery.stop(_STOP_WAIT_S)
        if self._shim is not None:
            self._readiness.close()

    # -- pods ----------------------------------------------------------------------------------------------------------

    @hookimpl
    def network_attach(self, sandbox: NetworkSandbox, context: CallContext) -> NetworkAttachment:
        return self._networking.attach(sandbox, context)

    @hookimpl
    def network_detach(self, sandbox: NetworkSandbox, context: CallContext) -> bool:
        self._networking.detach(sandbox.sandbox_id, sandbox, context)
        return True

    @hookimpl
    def network_status(self, sandbox: NetworkSandbox) -> NetworkAttachment | None:
        return self._networking.status(sandbox.sandbox_id)

    # -- the node ------------------------------------------------------------------------------------------------------

    @hookimpl
    def runtime_conditions(self, context: CallContext) -> RuntimeCondition:
        return self._readiness.condition(context)

    @hookimpl
    def runtime_info(self, context: CallContext) -> Mapping[str, str]:
        """The names are containerd's, which ``crictl info`` users know. Configurations may hold secrets: only parts."""
        section = self._networking.section
        problem = ""
        networks: tuple[NetworkConfig, ...] = ()
        try:
            networks = self._networking.networks(context)
        except NetworkConfigError as err:
            problem = str(err)
        statistics = self._networking.statistics
        config = {
            "PluginDirs": section.bin_dir,
            "PluginConfDir": section.conf_dir,
            "PluginMaxConfNum": section.max_conf_num,
            "NetType": section.net_type,
            "NetnsDir": section.netns_dir,
            "PodCIDRs": self._pod_cidr.cidrs(),
            "Networks": [_shown(network, f"eth{index}") for index, network in enumerate(networks)],
        }
        costs = {
            "attached": statistics.attached,
            "attachSeconds": round(statistics.attach_s, 6),
            "detached": statistics.detached,
            "detachSeconds": round(statistics.detach_s, 6),
            "pluginSeconds": round(self._networking.plugins.spent_s, 6),
        }
        return {
            "cniconfig": json.dumps(config),
            "cnistatistics": json.dumps(costs),
            "lastCNILoadStatus": json.dumps(problem or "OK"),
        }

    @hookimpl
    def cri_update_runtime_config(self, request: pb.UpdateRuntimeConfigRequest) -> pb.UpdateRuntimeConfigResponse:
        from shim_core.cri.v1 import api_pb2

        self._pod_cidr.update(request.runtime_config.network_config.pod_cidr)
        return api_pb2.UpdateRuntimeConfigResponse()


def _shown(network: NetworkConfig, ifname: str) -> dict[str, object]:
    return {
        "IFName": ifname,
        "Config": {
            "Name": network.name,
            "CNIVersion": network.version,
            "File": network.path,
            "DisableCheck": network.disable_check,
            "DisableGC": network.disable_gc,
            "Plugins": [
                {
                    "type": plugin.type,
                    "capabilities": sorted(plugin.capabilities),
                    "ipam": (plugin.tree.get("ipam") or {}).get("type", ""),
                }
                for plugin in network.plugins
            ],
        },
    }
