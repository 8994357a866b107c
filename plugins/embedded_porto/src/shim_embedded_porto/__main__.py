"""``python -m shim_embedded_porto``: the daemon by itself."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from logging.handlers import WatchedFileHandler
from pathlib import Path

DEFAULT_CGROUP = "porto-embedded"


def default_cgroup() -> str:
    """Where the containers' cgroups go: below the stage's own, when tests run on one."""
    stage = os.environ.get("SHIM_STAGE_CGROUP", "")
    return f"{stage}/porto" if stage else DEFAULT_CGROUP


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shim_embedded_porto", description="A stand-in for portod: Porto's protocol, containers by crun."
    )
    parser.add_argument("--socket", required=True, help="the Unix socket to serve")
    parser.add_argument("--place", required=True, help="the directory for layers, volumes and storages")
    parser.add_argument("--state", help="the directory for what is remembered (default: PLACE/porto_state)")
    parser.add_argument("--cgroup", default=default_cgroup(), help="the cgroup for containers (default: %(default)s)")
    parser.add_argument("--log", help="the file to log to (default: standard error)")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process, which has started it, does")
    parser.add_argument("--ready", type=int, metavar="FD", help="write a byte there and close it, once serving")
    parser.add_argument("--destroy-all", action="store_true", help="destroy all containers and volumes, and end")
    arguments = parser.parse_args()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if arguments.log:
        # Whoever started us sees why we don't start.
        handlers[0].setLevel(logging.ERROR)
        handlers.append(WatchedFileHandler(arguments.log))
    logging.basicConfig(
        handlers=handlers,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("shim").setLevel(arguments.log_level)

    from shim_embedded_porto.daemon import run
    from shim_embedded_porto.porto import Options

    place = os.path.abspath(arguments.place)
    options = Options(
        socket=os.path.abspath(arguments.socket),
        place=place,
        state=Path(os.path.abspath(arguments.state or f"{place}/porto_state")),
        cgroup=arguments.cgroup,
    )
    return run(options, destroy_all=arguments.destroy_all, parent=arguments.parent, ready=arguments.ready)


if __name__ == "__main__":
    sys.exit(main())
