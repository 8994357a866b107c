"""Hooks of the daemon's own life: configuration, start, health, stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shim_core.hookspecs import hookspec

if TYPE_CHECKING:
    from shim_core.config import Section
    from shim_core.context import CallContext
    from shim_core.types import Command, RuntimeCondition, Shim


class LifecycleSpec:
    """Hooks that every plugin may answer."""

    @hookspec
    def shim_config_section(self) -> type[Section] | Sequence[type[Section]] | None:
        """The configuration keys of this plugin. Asked before the file is read; all answers count.

        :returns: subclasses of :class:`shim_core.config.Section`. Sections of one name are joined; the same key from
            two plugins stops the start.
        """

    @hookspec(historic=True)
    def shim_configure(self, shim: Shim) -> None:
        """The configuration is read and checked. Keep what you need of it; open nothing yet.

        :raises ConfigError: a value that only this plugin can judge is wrong; the start stops with its message.
        """

    @hookspec
    def shim_command(self) -> Command | Sequence[Command] | None:
        """Subcommands of ``portoshim`` that this plugin brings, such as ``portoshim images``. All answers count.

        Asked after ``shim_configure``, when the command line names something the core doesn't know. The command runs in
        a process of its own, perhaps beside the daemon; ``shim_startup`` is not called there. Two of one name are a
        mistake that the operator has to mend.
        """

    @hookspec(firstresult=True)
    def runtime_endpoint(self) -> str | None:
        """The socket of the container runtime, from a plugin that runs one itself (the embedded one).

        Asked at start-up, after ``shim_configure``. None: as configured.
        """

    @hookspec
    def shim_startup(self) -> None:
        """Open what is needed and recover what an earlier run left. Calls are served afterwards.

        A runtime that is away is no reason to fail: answer UNAVAILABLE and recover when it is back.

        :raises StartupError: the daemon can't work, and the operator has to mend something.
        """

    @hookspec
    def shim_shutdown(self) -> None:
        """No call is being served any more: close and flush. Containers stay as they are. Must not raise."""

    @hookspec
    def runtime_conditions(self, context: CallContext) -> RuntimeCondition | Sequence[RuntimeCondition] | None:
        """This plugin's part of the node's health, such as ``RuntimeReady`` or ``NetworkReady``. All answers count.

        Asked every few seconds: look, don't work.
        """

    @hookspec
    def runtime_info(self, context: CallContext) -> Mapping[str, str] | None:
        """What this plugin adds to the verbose status (``crictl info``): JSON texts by name. No secrets."""
