"""Finding plugins (stevedore) and registering them (pluggy).

A distribution names its plugin class under the entry-point group ``shim.plugins``; installing it is enough. Whatever is
wrong with one stops the start, with the name of its distribution: a node must not run with half its plugins.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pluggy
from stevedore import NamedExtensionManager

from shim_core.errors import PluginError
from shim_core.hookspecs.image import ImageSpec
from shim_core.hookspecs.lifecycle import LifecycleSpec
from shim_core.hookspecs.network import NetworkSpec
from shim_core.hookspecs.registry import RegistrySpec
from shim_core.hookspecs.runtime import RuntimeSpec
from shim_core.hookspecs.streaming import StreamingSpec

NAMESPACE = "shim.plugins"
SPECS: tuple[type, ...] = (RuntimeSpec, ImageSpec, NetworkSpec, RegistrySpec, StreamingSpec, LifecycleSpec)

logger = logging.getLogger("shim.core.plugins")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that is in use."""

    name: str
    distribution: str
    version: str
    instance: object

    def __str__(self) -> str:
        return f"plugin {self.name} ({self.distribution} {self.version})"


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows all hooks and holds no plugin."""
    manager = pluggy.PluginManager("shim")
    for spec in SPECS:
        manager.add_hookspecs(spec)
    return manager


def hook_names() -> frozenset[str]:
    """Every hook there is."""
    return frozenset(name for spec in SPECS for name, _ in inspect.getmembers(spec, inspect.isfunction))


def discover(disabled: Iterable[str] = (), order: Sequence[str] = ()) -> list[Plugin]:
    """Load the installed plugins and make an instance of each; those asked first come first.

    :param disabled: names that are not even imported.
    :param order: names to be asked first; the rest follows by name.
    :raises PluginError: one can't be loaded, or two have the same name.
    """
    found = _entry_points()
    for setting, names in (("Disabled", disabled), ("Order", order)):
        for name in names:
            if name not in found:
                close = difflib.get_close_matches(name, found, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                logger.warning("Plugins.%s: no plugin %s is installed%s", setting, name, hint)
    wanted = [name for name in (*order, *sorted(found)) if name in found and name not in set(disabled)]
    wanted = list(dict.fromkeys(wanted))

    def on_failure(_manager: object, entry: importlib.metadata.EntryPoint, err: BaseException) -> None:
        # stevedore's cache forgets whose entry point it was.
        owner = " ".join(found[entry.name])
        reason = f"{type(err).__name__}: {err}"
        raise PluginError(f"plugin {entry.name} of {owner} can't be loaded from {entry.value}: {reason}") from err

    extensions: NamedExtensionManager[object] = NamedExtensionManager(
        NAMESPACE, names=wanted, name_order=True, on_load_failure_callback=on_failure
    )
    plugins = []
    for extension in extensions:
        distribution, version = found[extension.name]
        try:
            instance = extension.plugin()
        except Exception as err:
            raise PluginError(f"plugin {extension.name} of {distribution} {version} can't be created: {err}") from err
        plugins.append(Plugin(extension.name, distribution, version, instance))
    return plugins


def register(manager: pluggy.PluginManager, plugins: Sequence[Plugin]) -> None:
    """Register plugins so that the first of them is asked first.

    :raises PluginError: a hook that doesn't exist, or with arguments it doesn't have.
    """
    # pluggy asks the plugin that was registered last first.
    for plugin in reversed(plugins):
        unmarked = [name for name in sorted(hook_names()) if _is_unmarked(plugin.instance, name)]
        if unmarked:
            raise PluginError(f"{plugin}: {', '.join(unmarked)} must be marked with @hookimpl")
        try:
            manager.register(plugin.instance, plugin.name)
            manager.check_pending()
        except pluggy.PluginValidationError as err:
            raise PluginError(f"{plugin}: {_one_line(err)}{_suggest(plugin.instance)}") from err
        except ValueError as err:
            raise PluginError(f"{plugin}: {err}") from err


def hooks_of(manager: pluggy.PluginManager, plugin: Plugin) -> list[str]:
    """The hooks a registered plugin answers."""
    return sorted(caller.name for caller in manager.get_hookcallers(plugin.instance) or ())


def _entry_points() -> dict[str, tuple[str, str]]:
    """Name → distribution and version of every installed plugin."""
    found: dict[str, tuple[str, str]] = {}
    for entry in importlib.metadata.entry_points(group=NAMESPACE):
        dist = entry.dist
        owner = (dist.name, dist.version) if dist is not None else ("an unknown distribution", "?")
        if entry.name in found and found[entry.name] != owner:
            both = " and ".join(sorted({found[entry.name][0], owner[0]}))
            raise PluginError(f"two plugins are called {entry.name}, from {both}: uninstall one of them")
        found[entry.name] = owner
    return found


def _is_unmarked(instance: object, name: str) -> bool:
    function = getattr(instance, name, None)
    return callable(function) and not hasattr(function, "shim_impl")


def _suggest(instance: object) -> str:
    names = hook_names()
    for name, function in inspect.getmembers(instance, callable):
        if hasattr(function, "shim_impl") and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            return f"; did you mean {close[0]}?" if close else ""
    return ""


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())
