"""The command ``portoshim``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from shim_core import __version__, daemon, log, plugins
from shim_core.config import DEFAULT_PATH
from shim_core.errors import PluginError, ShimError, StartupError
from shim_core.types import Command

EXIT_FAILED = 1
"""What was asked for could not be done."""
EXIT_STARTUP = 2
"""A mistake in configuration, plugins or environment that the operator has to mend."""

_OWN_COMMANDS = frozenset({"config", "plugins"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # Which subcommands there are depends on the plugins, and those on the configuration.
    early, rest = _options().parse_known_args(argv)
    log.set_up_stderr(debug=early.debug)
    options = daemon.Options(
        config_path=early.config, socket_path=early.socket, debug=early.debug, embedded=early.embedded
    )
    try:
        commands = _commands(options, rest)
        arguments = _parser(commands).parse_args(argv)
        if arguments.command is None:
            daemon.serve(options)
        elif arguments.command == "config":
            _config(options, arguments.what)
        elif arguments.command == "plugins":
            _plugins(options)
        else:
            return commands[arguments.command].run(arguments)
    except StartupError as err:
        print(f"portoshim: {err}", file=sys.stderr)
        return EXIT_STARTUP
    except ShimError as err:
        print(f"portoshim: {err.message}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _options() -> argparse.ArgumentParser:
    """What may stand before a subcommand."""
    parser = argparse.ArgumentParser(prog="portoshim", add_help=False, allow_abbrev=False)
    # One dash works as well: the Go portoshim took both.
    parser.add_argument("--config", "-config", metavar="PATH", help=f"configuration file (default: {DEFAULT_PATH})")
    parser.add_argument("--debug", "-debug", action="store_true", help="log every call with its request")
    parser.add_argument("--embedded", action="store_true", help="bring an embedded Porto, for machines without portod")
    parser.add_argument("--socket", metavar="PATH", help="serve here rather than on Portoshim.Socket")
    parser.add_argument("--version", action="version", version=f"portoshim {__version__}")
    return parser


def _parser(brought: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portoshim",
        description="A CRI server for Porto: kubelet and crictl connect to its socket. Without a command it serves.",
        allow_abbrev=False,
        parents=[_options()],
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    config = commands.add_parser("config", help="print the configuration")
    config.add_argument("what", choices=("default", "dump"), help="all keys with their defaults, or what is in force")
    commands.add_parser("plugins", help="list the plugins in use and the hooks they answer")
    for command in brought.values():
        command.add_arguments(commands.add_parser(command.name, help=command.help, allow_abbrev=False))
    return parser


def _commands(options: daemon.Options, rest: Sequence[str]) -> dict[str, Command]:
    """The subcommands of plugins, by name, if the rest of the command line is about them.

    :raises StartupError: the plugins can't be asked, or two bring the same one.
    """
    word = next((item for item in rest if not item.startswith("-")), None)
    if not rest or word in _OWN_COMMANDS:
        return {}
    try:
        answers = daemon.assemble(options).manager.hook.shim_command()
    except StartupError:
        if word is None:
            return {}  # --help must not depend on a good configuration
        raise
    found: dict[str, Command] = {}
    for answer in answers:
        for command in [answer] if isinstance(answer, Command) else answer:
            if command.name in found or command.name in _OWN_COMMANDS:
                raise PluginError(
                    f"the command {command.name} is brought twice: disable one of the plugins (Plugins.Disabled)"
                )
            found[command.name] = command
    return dict(sorted(found.items()))


def _config(options: daemon.Options, what: str) -> None:
    if what == "default":
        print(daemon.default_config().describe(), end="")
    else:
        print(daemon.assemble(options).config.dump(), end="")


def _plugins(options: daemon.Options) -> None:
    assembly = daemon.assemble(options)
    for plugin in assembly.plugins:
        print(f"{plugin.name}  {plugin.distribution} {plugin.version}")
        for hook in plugins.hooks_of(assembly.manager, plugin):
            print(f"    {hook}")


if __name__ == "__main__":
    sys.exit(main())
