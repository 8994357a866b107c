"""The command ``portoshim``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shim_core import __version__, daemon, log, plugins
from shim_core.config import DEFAULT_PATH
from shim_core.errors import StartupError

EXIT_STARTUP = 2
"""A mistake in configuration, plugins or environment that the operator has to mend."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = _parser().parse_args(argv)
    log.set_up_stderr(debug=arguments.debug)
    options = daemon.Options(
        config_path=arguments.config,
        socket_path=arguments.socket,
        debug=arguments.debug,
        embedded=arguments.embedded,
    )
    try:
        if arguments.command == "config":
            _config(options, arguments.what)
        elif arguments.command == "plugins":
            _plugins(options)
        else:
            daemon.serve(options)
    except StartupError as err:
        print(f"portoshim: {err}", file=sys.stderr)
        return EXIT_STARTUP
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portoshim",
        description="A CRI server for Porto: kubelet and crictl connect to its socket. Without a command it serves.",
        allow_abbrev=False,
    )
    # One dash works as well: the Go portoshim took both.
    parser.add_argument("--config", "-config", metavar="PATH", help=f"configuration file (default: {DEFAULT_PATH})")
    parser.add_argument("--debug", "-debug", action="store_true", help="log every call with its request")
    parser.add_argument("--embedded", action="store_true", help="bring an embedded Porto, for machines without portod")
    parser.add_argument("--socket", metavar="PATH", help="serve here rather than on Portoshim.Socket")
    parser.add_argument("--version", action="version", version=f"portoshim {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    config = commands.add_parser("config", help="print the configuration")
    config.add_argument("what", choices=("default", "dump"), help="all keys with their defaults, or what is in force")
    commands.add_parser("plugins", help="list the plugins in use and the hooks they answer")
    return parser


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
