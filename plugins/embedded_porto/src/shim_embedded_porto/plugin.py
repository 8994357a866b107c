"""The shim's plugin: with ``portoshim --embedded`` the daemon runs beside the shim, as a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator

from shim_core.config import AbsolutePath, PortoshimSection, Section
from shim_core.context import CallContext
from shim_core.errors import StartupError
from shim_core.hookspecs import hookimpl
from shim_core.types import Shim
from shim_embedded_porto.supervisor import Supervisor

NEEDED = ("crun", "tar")
_CGROUP = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)


class EmbeddedPortoSection(Section):
    """Where the embedded Porto works. Of use with ``--embedded`` only."""

    section: ClassVar[str] = "EmbeddedPorto"

    place: AbsolutePath = Field(
        "/var/lib/portoshim-porto/place",
        description="Layers, volumes and storages: Porto's default place. Not on an overlay file system.",
    )
    socket: AbsolutePath = Field("/run/portoshim-porto.sock", description="Where it serves Porto's protocol.")
    state_dir: AbsolutePath = Field(
        "/var/lib/portoshim-porto/state", description="What it remembers of containers and volumes."
    )
    cgroup: str = Field(
        "porto-embedded",
        description="The containers' cgroup, below the root of every hierarchy; of its own for each of a machine.",
    )

    @field_validator("cgroup")
    @classmethod
    def _cgroup_name(cls, value: str) -> str:
        if not _CGROUP.fullmatch(value):
            raise ValueError("must be a name, or several joined by slashes, of letters, digits, '-', '_' and '.'")
        return value


class EmbeddedPorto:
    """Runs the stand-in for portod when the shim is called with ``--embedded``, and does nothing otherwise."""

    def __init__(self) -> None:
        self._settings: EmbeddedPortoSection | None = None
        self._logs_dir = ""
        self._supervisor: Supervisor | None = None

    @hookimpl
    def shim_config_section(self) -> type[Section]:
        return EmbeddedPortoSection

    @hookimpl
    def shim_configure(self, shim: Shim) -> None:
        self._settings = shim.config.get(EmbeddedPortoSection) if shim.embedded else None
        self._logs_dir = shim.config.get(PortoshimSection).logs_dir

    @hookimpl
    def runtime_endpoint(self) -> str | None:
        return self._settings.socket if self._settings is not None else None

    @hookimpl(tryfirst=True)
    def shim_startup(self) -> None:
        if self._settings is None:
            return
        if os.geteuid() != 0:
            raise StartupError("--embedded: containers take root; run portoshim as root")
        if missing := [name for name in NEEDED if shutil.which(name) is None]:
            raise StartupError(
                f"--embedded: {' and '.join(missing)} not found; install the package: apt install crun tar"
            )
        supervisor = Supervisor(
            self._settings.socket,
            [
                *("--place", self._settings.place, "--state", self._settings.state_dir),
                *("--cgroup", self._settings.cgroup, "--log", os.path.join(self._logs_dir, "embedded-porto.log")),
            ],
        )
        supervisor.start()
        self._supervisor = supervisor

    @hookimpl(trylast=True)
    def shim_shutdown(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.stop()

    @hookimpl
    def runtime_info(self, context: CallContext) -> Mapping[str, str] | None:
        if self._settings is None or self._supervisor is None:
            return None
        return {
            "embeddedPorto": json.dumps(
                {
                    "place": self._settings.place,
                    "socket": self._settings.socket,
                    "pid": self._supervisor.pid,
                    "restarts": self._supervisor.restarts,
                }
            )
        }
