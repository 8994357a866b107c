"""Stopping all processes of a container, and of those below it, where they are."""

from __future__ import annotations

import os
import time

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.cgroups.hierarchy import Cgroups, write
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault

_TIMEOUT_S = 300.0
_POLL_S = 0.002


class Freezer:
    """Pauses and resumes containers."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        hierarchy = cgroups.hierarchy("freezer")
        self._v2 = hierarchy is not None and hierarchy.v2

    def frozen(self, ct: Container) -> bool:
        """True when the container's processes stand still, or are about to, whoever wanted it."""
        if self._v2:
            return self.self_freezing(ct) or self.parent_freezing(ct)
        return self._read(ct, "freezer.state") not in ("THAWED", "")

    def self_freezing(self, ct: Container) -> bool:
        """True when the container itself was frozen."""
        return self._read(ct, "cgroup.freeze" if self._v2 else "freezer.self_freezing") == "1"

    def parent_freezing(self, ct: Container) -> bool:
        """True when one above it was frozen."""
        if self._v2:
            return any(self.self_freezing(other) for other in ct.ancestors() if not other.is_root)
        return self._read(ct, "freezer.parent_freezing") == "1"

    def freeze(self, ct: Container) -> None:
        """Returns once everything stands still.

        :raises Fault: the kernel refuses, or something doesn't stop.
        """
        self._write(ct, frozen=True)
        try:
            self._wait(ct, frozen=True)
        except Fault:
            self._write(ct, frozen=False)
            raise

    def thaw(self, ct: Container, *, wait: bool = True) -> None:
        """:raises Fault: Busy: one above it is frozen."""
        self._write(ct, frozen=False)
        if not wait:
            return
        if self.parent_freezing(ct):
            raise Fault(pb.Busy, "parent cgroup is frozen")
        self._wait(ct, frozen=False)

    def _write(self, ct: Container, *, frozen: bool) -> None:
        path = self._cgroups.path(ct, "freezer")
        if self._v2:
            write(f"{path}/cgroup.freeze", "1" if frozen else "0")
        else:
            write(f"{path}/freezer.state", "FROZEN" if frozen else "THAWED")

    def _wait(self, ct: Container, *, frozen: bool) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while self._settled(ct) != frozen:
            if time.monotonic() >= deadline:
                wanted = "FROZEN" if frozen else "THAWED"
                raise Fault(pb.Unknown, f"Freezer {ct.name} timeout waiting {wanted}")
            time.sleep(_POLL_S)

    def _settled(self, ct: Container) -> bool | None:
        """Whether all stand still; None on the way there."""
        if self._v2:
            return "frozen 1" in self._read(ct, "cgroup.events").splitlines()
        return {"FROZEN": True, "THAWED": False}.get(self._read(ct, "freezer.state"))

    def _read(self, ct: Container, knob: str) -> str:
        if ct.is_root and self._v2:
            return ""
        try:
            with open(os.path.join(self._cgroups.path(ct, "freezer"), knob)) as file:
                return file.read().strip()
        except OSError:
            return ""
