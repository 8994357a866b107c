"""What an earlier run, or an earlier boot, has left: given back in the background, tried again until it is done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from shim_cni_net.netconf import NetworkConfigError
from shim_cni_net.networking import Networking
from shim_core.context import CallContext
from shim_core.errors import ShimError

logger = logging.getLogger("shim.cni_net")

_FIRST_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class Recovery:
    """A thread that ends when nothing is left to recover.

    :param hooks: to ask the runtime which sandboxes there are.
    :param inherited: whether there was an earlier run; without one nothing on the node is ours to collect.
    """

    def __init__(self, networking: Networking, hooks: Any, *, inherited: bool) -> None:
        self._networking = networking
        self._hooks = hooks
        self._found = tuple(attachment.sandbox_id for attachment in networking.records.all())
        self._tasks: list[Callable[[], bool]] = [self._release_other_boots, self._release_unknown]
        if inherited:
            self._tasks.append(self._collect_garbage)
        self._context = CallContext("Recovery", "cni-recovery")
        self._thread = threading.Thread(target=self._run, name="cni-recovery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End it; what is left waits for the next start."""
        self._context.cancel()
        self._thread.join(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is done; False when the time is up."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        delay_s = _FIRST_RETRY_S
        tasks = self._tasks
        while True:
            tasks = [task for task in tasks if not self._done(task)]
            if not tasks or self._context.wait(delay_s):
                return
            delay_s = min(delay_s * 2, _MAX_RETRY_S)

    def _done(self, task: Callable[[], bool]) -> bool:
        if self._context.cancelled:
            return False
        try:
            return task()
        except Exception:
            logger.exception("recovery failed; it is tried again")
            return False

    def _release_other_boots(self) -> bool:
        """Nothing of another boot runs any more, so its addresses can be given back before anybody asks."""
        return self._release(
            [
                attachment.sandbox_id
                for attachment in self._networking.records.all()
                if attachment.boot_id not in ("", self._networking.boot_id)
            ]
        )

    def _release_unknown(self) -> bool:
        """Sandboxes that the runtime has lost, and whose namespace is empty, have nobody who would release them."""
        left = [sandbox_id for sandbox_id in self._found if self._networking.records.get(sandbox_id)]
        if not left:
            return True
        from shim_core.cri.v1 import api_pb2 as pb

        try:
            answer = self._hooks.cri_list_pod_sandbox(request=pb.ListPodSandboxRequest(), context=self._context)
        except ShimError as err:
            logger.debug("the runtime can't say yet which sandboxes there are: %s", err)
            return False
        if answer is None:
            return True  # there is no runtime plugin
        known = {item.id for item in answer.items}
        unknown = []
        for sandbox_id in left:
            attachment = self._networking.records.get(sandbox_id)
            if attachment is None or sandbox_id in known:
                continue
            path = self._networking.netns_path(attachment)
            if path and self._networking.namespaces.in_use(path):
                logger.warning("the runtime doesn't know %s, but it runs: its network is left alone", sandbox_id[:13])
                continue
            unknown.append(sandbox_id)
        return self._release(unknown)

    def _release(self, sandbox_ids: list[str]) -> bool:
        done = True
        for sandbox_id in sandbox_ids:
            try:
                self._networking.detach(sandbox_id, None, self._context)
            except ShimError as err:
                logger.warning("%s can't be released yet: %s", sandbox_id[:13], err)
                done = False
        return done

    def _collect_garbage(self) -> bool:
        try:
            self._networking.collect_garbage(self._context)
        except (NetworkConfigError, ShimError) as err:
            logger.debug("no garbage is collected yet: %s", err)
            return False
        return True
