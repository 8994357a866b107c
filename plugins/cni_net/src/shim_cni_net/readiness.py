"""NetworkReady: whether a pod that came now would get a network, and why not."""

from __future__ import annotations

import logging
import threading
import time

from shim_cni_net import chain, versions
from shim_cni_net.execute import PluginError
from shim_cni_net.netconf import NetworkConfig, NetworkConfigError
from shim_cni_net.networking import Networking
from shim_core.context import CallContext
from shim_core.types import RuntimeCondition

logger = logging.getLogger("shim.cni_net")

REASON = "NetworkPluginNotReady"
_STATUS_INTERVAL_S = 10.0
_STATUS_TIMEOUT_S = 10.0
_STATUS_WAIT_S = 1.0


class Readiness:
    """The condition, and the STATUS calls behind it.

    STATUS runs plugins, which a health check can't wait for: one runs in the background every now and then, and the
    latest answer counts.
    """

    def __init__(self, networking: Networking) -> None:
        self._networking = networking
        self._lock = threading.Lock()
        self._last: RuntimeCondition | None = None
        self._asked: tuple[NetworkConfig, ...] = ()
        self._asked_at = 0.0
        self._answer: str | None = None
        self._answered = threading.Event()
        self._context = CallContext("Status", "cni-status")

    def condition(self, context: CallContext) -> RuntimeCondition:
        """``NetworkReady`` as it is now. A change is logged once."""
        problem = self._problem(context)
        now = RuntimeCondition("NetworkReady", not problem, REASON if problem else "", problem)
        with self._lock:
            changed, self._last = now != self._last, now
        if changed and problem:
            logger.warning("the network is not ready: %s", problem)
        elif changed:
            logger.info("the network is ready")
        return now

    def close(self) -> None:
        """End a STATUS call that is under way."""
        self._context.cancel()

    def _problem(self, context: CallContext) -> str:
        try:
            networks = self._networking.networks(context)
            for network in networks:
                for plugin in network.plugins:
                    try:
                        self._networking.plugins.find(plugin.type)
                    except LookupError as err:
                        raise NetworkConfigError(f"{network.path}: {err}") from None
        except NetworkConfigError as err:
            return f"cni plugin not initialized: {err}"
        if not any(versions.at_least(network.version, versions.GC_AND_STATUS) for network in networks):
            return ""
        answered = self._ask(networks)
        answered.wait(_STATUS_WAIT_S)
        with self._lock:
            return self._answer if self._answer is not None else "the plugins have not answered STATUS yet"

    def _ask(self, networks: tuple[NetworkConfig, ...]) -> threading.Event:
        """Have the plugins asked, unless they have been lately. Returns what says that there is an answer."""
        with self._lock:
            if networks == self._asked and time.monotonic() - self._asked_at < _STATUS_INTERVAL_S:
                return self._answered
            if networks != self._asked:
                self._answer, self._answered = None, threading.Event()
            elif not self._answered.is_set():
                return self._answered  # still under way
            self._asked, self._asked_at = networks, time.monotonic()
            answered = self._answered
        threading.Thread(target=self._run, args=(networks, answered), name="cni-status", daemon=True).start()
        return answered

    def _run(self, networks: tuple[NetworkConfig, ...], answered: threading.Event) -> None:
        answer = "the plugins could not be asked for their STATUS"
        try:
            for network in networks:
                chain.status(network, self._networking.plugins, _STATUS_TIMEOUT_S, self._context)
            answer = ""
        except PluginError as err:
            answer = str(err)
        finally:
            with self._lock:
                if answered is self._answered:  # else the configuration has changed meanwhile
                    self._answer = answer
            answered.set()
