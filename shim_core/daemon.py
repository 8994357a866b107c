"""The daemon put together: configuration, plugins, server, and the signals that end it."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from shim_core import config as configuration
from shim_core import log, plugins
from shim_core.config import Config, PluginsSection, PortoshimSection, Section
from shim_core.dispatch import Dispatcher
from shim_core.errors import PluginError
from shim_core.server import Server
from shim_core.types import Shim

logger = logging.getLogger("shim.core")

# Sections that a portoshim.yaml may hold though the plugin that knows them is not in use on this node.
FIRST_PARTY_SECTIONS = {
    "Porto": "shim-porto-runtime",
    "CNI": "shim-cni-net",
    "EmbeddedPorto": "shim-embedded-porto",
    "StreamingServer": "shim-streaming",
    "Images": "shim-porto-runtime and shim-registry-auth",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    config_path: str | None = None
    socket_path: str | None = None
    debug: bool = False
    embedded: bool = False


@dataclass(frozen=True, slots=True)
class Assembly:
    """Plugins that are registered and a configuration they have agreed to. Nothing is running yet."""

    config: Config
    manager: pluggy.PluginManager
    plugins: tuple[plugins.Plugin, ...]


def assemble(options: Options) -> Assembly:
    """Read the configuration, load the plugins, let each check its section.

    :raises StartupError: the operator has to mend something; the text says what.
    """
    tree, path = _read(options)
    if options.socket_path is not None:
        tree["Portoshim"] = {**(tree.get("Portoshim") or {}), "Socket": os.path.abspath(options.socket_path)}
    # Which plugins there are decides which keys are known, so this section is read before the others.
    choice = configuration.parse({k: v for k, v in tree.items() if k == "Plugins"}, [PluginsSection], path)
    disabled = choice.get(PluginsSection).disabled
    found = plugins.discover(disabled, choice.get(PluginsSection).order)
    manager = plugins.new_manager()
    plugins.register(manager, found)

    contributed = [("the core", section) for section in configuration.CORE_SECTIONS]
    for plugin in found:
        contributed += [(str(plugin), section) for section in _sections_of(manager, plugin)]
    configuration.check_collisions(contributed)
    known = {section.section for _, section in contributed}
    absent = {name: dist for name, dist in FIRST_PARTY_SECTIONS.items() if name not in known and name in tree}
    for name, distribution in absent.items():
        logger.warning("%s: the section %s has no effect: %s is not in use", path, name, distribution)
    config = configuration.parse(tree, [section for _, section in contributed], path, ignored=absent)

    shim = Shim(config=config, hooks=manager.hook, embedded=options.embedded)
    manager.hook.shim_configure.call_historic(kwargs={"shim": shim})
    if options.embedded and manager.hook.runtime_endpoint() is None:
        raise PluginError("--embedded: no plugin provides a runtime; install shim-embedded-porto, or enable it")
    return Assembly(config, manager, tuple(found))


def default_config() -> Config:
    """All keys of the core and the installed plugins, with their defaults; no file is read."""
    manager = plugins.new_manager()
    found = plugins.discover()
    plugins.register(manager, found)
    sections = list(configuration.CORE_SECTIONS)
    for plugin in found:
        sections += _sections_of(manager, plugin)
    return configuration.parse({}, sections)


def serve(options: Options) -> None:
    """Run until SIGTERM or SIGINT.

    :raises StartupError: it can't start.
    """
    assembly = assemble(options)
    core = assembly.config.get(PortoshimSection)
    log.set_up(core.logs_dir, debug=options.debug)
    logger.info("configuration: %s", assembly.config.path or "defaults")
    for plugin in assembly.plugins:
        logger.info("using %s", plugin)

    wait_for_the_end = _catch_signals()
    server = Server(Dispatcher(assembly.manager), core.socket)
    try:
        assembly.manager.hook.shim_startup()
        server.start()
        _notify("READY=1")
        wait_for_the_end()
        logger.info("stopping")
        _notify("STOPPING=1")
        server.stop()
    finally:
        _shut_down(assembly)


def _read(options: Options) -> tuple[dict[str, Any], str | None]:
    """The configuration as it stands in the file, and the file's path if there is one."""
    path = options.config_path or configuration.DEFAULT_PATH
    tree = configuration.read_file(path, required=options.config_path is not None)
    section = tree.get("Portoshim")
    named = section.get("ConfigPath") if isinstance(section, dict) else None
    if options.config_path is None and isinstance(named, str) and named != path:
        # The default file may send us to another one; a file given by --config is final.
        path, tree = named, configuration.read_file(named, required=True)
        section = tree.get("Portoshim")
    if section is None or isinstance(section, dict):
        tree["Portoshim"] = {**(section or {}), "ConfigPath": os.path.abspath(path)}
    return tree, path if os.path.exists(path) else None


def _sections_of(manager: pluggy.PluginManager, plugin: plugins.Plugin) -> Sequence[type[Section]]:
    others = [other for other in manager.get_plugins() if other is not plugin.instance]
    answers = manager.subset_hook_caller("shim_config_section", others)()
    sections: list[type[Section]] = []
    for answer in answers:
        sections += [answer] if isinstance(answer, type) else answer
    return sections


def _catch_signals() -> Callable[[], None]:
    """From now on SIGTERM and SIGINT end nothing by themselves; what is returned waits for one."""
    # A pipe, since a signal may be delivered to another thread, or just before this one begins to wait.
    arrived, written = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    # Whoever started us may have had them blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    # logrotate sends it; the log file is followed by name anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    def wait() -> None:
        while os.read(arrived, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass

    return wait


def _shut_down(assembly: Assembly) -> None:
    # One by one, in the order pluggy would call them: a plugin that fails doesn't keep the others from closing.
    for implementation in reversed(assembly.manager.hook.shim_shutdown.get_hookimpls()):
        try:
            implementation.function()
        except Exception:
            logger.exception("the plugin %s failed to shut down", implementation.plugin_name)


def _notify(state: str) -> None:
    """Tell systemd (Type=notify), if it asked to be told: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address.replace("@", "\0", 1))
        except OSError as err:
            logger.warning("can't notify systemd: %s", err)
