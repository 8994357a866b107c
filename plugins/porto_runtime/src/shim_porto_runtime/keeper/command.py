"""The command ``portoshim-keeper``: for a unit of its own, and for people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from shim_core import errors
from shim_porto_runtime.keeper.client import KeeperClient
from shim_porto_runtime.keeper.connection import keeper_command

DEFAULT_DIRECTORY = "/var/lib/portoshim/keeper"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = _parser().parse_args(argv)
    client = KeeperClient(arguments.directory)
    try:
        if arguments.command == "run":
            _run(arguments)
        elif arguments.command == "status":
            return _status(client)
        elif arguments.command == "hand-over":
            client.hand_over()
        elif arguments.command == "stop":
            client.stop(force=arguments.force)
    except errors.ShimError as err:
        print(f"portoshim-keeper: {err.message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portoshim-keeper",
        description="Owns the streams of all containers and writes their logs. portoshim starts it by itself.",
    )
    parser.add_argument(
        "--directory", default=DEFAULT_DIRECTORY, help="where its socket is: StateDir/keeper (default: %(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run in the foreground; take over from a keeper that runs already",
        description="Run in the foreground, and take over from a keeper that runs already. In a unit of its own set "
        "KillMode=process and TimeoutStopSec=1: asked to end, it stays until the last container has ended, and its "
        "worker outlives it until the next one takes over.",
    )
    run.add_argument("--idle-exit", type=float, default=float("inf"), metavar="SECONDS", help="end when idle this long")
    run.add_argument("--log", default="", metavar="FILE", help="write messages there and not to standard error")
    commands.add_parser("status", help="show the keeper and its containers")
    commands.add_parser("hand-over", help="have the installed code take over from the keeper that runs")
    stop = commands.add_parser("stop", help="end it")
    stop.add_argument("--force", action="store_true", help="even if containers use it: they get SIGPIPE")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    """Become the keeper, without what this command has imported."""
    log = os.path.abspath(arguments.log) if arguments.log else ""
    command = keeper_command(os.path.abspath(arguments.directory), log, arguments.idle_exit, "run")
    os.execve(command[0], command, {"PATH": os.defpath, "LC_ALL": "C"})


def _status(client: KeeperClient) -> int:
    stats = client.stats()
    if stats is None:
        print("not running")
        return 3  # as `systemctl status` says it
    print(f"worker {stats.pid}, holder {stats.holder_pid}, build {stats.build}, {stats.resident_bytes >> 10} KiB")
    for container in client.list():
        state = "running" if container.running else "ended"
        extras = [
            "terminal" if container.tty else "",
            f"{container.clients} attached" if container.clients else "",
            f"{container.dropped_bytes} bytes dropped" if container.dropped_bytes else "",
        ]
        print(" ".join(filter(None, [container.id, state, container.log, *extras])))
    return 0
