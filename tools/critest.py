"""``make critest``: the CRI conformance suite against portoshim, with images that are made here.

::

    python -m tools.critest [--focus RE] [--seed N] [--repeat N] [--streaming websocket] [--compare containerd] ...

All specs run in random order, but for those that :data:`tools.critest_suite.EXCLUDED` names. Images come from a
registry of our own under their real host names: in these namespaces ``/etc/hosts`` leads there. Run it on a stage, or
with ``PORTO_SOCKET`` beside a portod that has namespaces of its own as well.

The exit status is 0 when no spec failed, 1 when one did, 2 when the suite can't be run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from shim_core.cri.v1 import api_pb2 as pb
from tools import critest_images
from tools.critest_suite import FAILED, NOT_RUN, PASSED, SKIPPED, Run, Spec, Suite, SuiteError
from tools.critest_surroundings import (
    Side,
    check,
    directory_of_run,
    hosts_lead_here,
    no_shared_memory_left,
    remove_pods,
)
from tools.node import Node, NodeError
from tools.peer import Containerd
from tools.registry import LocalRegistry, RegistryError

SHIM, PEER = "portoshim", "containerd"
SUBNET, BRIDGE = "10.87.0.0/16", "cni-critest"

_RPC_TIMEOUT_S = 60.0
_MESSAGE_LINES = 16


# -- a run and what is told of it --------------------------------------------------------------------------------------


def version(side: Side) -> str:
    """Name and version of a CRI server, as it says them."""
    answer = side.cri.Version(pb.VersionRequest(), timeout=_RPC_TIMEOUT_S)
    return f"{answer.runtime_name} {answer.runtime_version}"


def run(suite: Suite, name: str, side: Side, seed: int) -> Run:
    """One run, and nothing of it left."""
    with no_shared_memory_left():
        done = suite.run(name, side.socket, seed, side.log_path, side.exit_status)
        return replace(done, left_behind=remove_pods(side))


def summary(done: Run, about: str, suite: Suite) -> str:
    """A run for its readers: what failed and why, what was skipped, the figures."""
    lines = []
    for spec in done.of(FAILED):
        lines += [f"FAILED {spec.name} ({spec.seconds:.1f} s)", *_indented(spec)]
    for spec in done.of(SKIPPED):
        lines.append(f"skipped {spec.name}: {spec.message}")
    if not suite.focus:
        lines += [f"excluded {name}: {reason}" for name, reason in suite.excluded.items()]
    lines += [f"left behind: {pod}" for pod in done.left_behind]
    if done.note:
        lines.append(f"ended early: {done.note}")
    figures = ", ".join(f"{len(done.of(state))} {state}" for state in (PASSED, FAILED, SKIPPED, NOT_RUN))
    lines += ["", f"{done.side} ({about}), seed {done.seed}: {figures} in {done.seconds:.0f} s"]
    return "\n".join(lines)


def _indented(spec: Spec) -> list[str]:
    lines = list(_without_dumps(spec.message.splitlines()))
    shown = lines[:_MESSAGE_LINES] + (["..."] if len(lines) > _MESSAGE_LINES else [])
    return [f"    {line}" for line in (*shown, *spec.node_log)]


def _without_dumps(lines: Iterable[str]) -> Iterator[str]:
    """Leave out what gomega prints of the insides of gRPC errors and protobuf messages."""
    end = ""
    for line in lines:
        text = line.strip()
        if end:
            if line.rstrip(",") == end:
                end = ""
        elif text in ("{", "state: {"):
            end = line[: len(line) - len(line.lstrip())] + "}"
        elif not text.startswith(("unknownFields:", "sizeCache:")):
            yield line


def comparison(ours: Run, theirs: Run) -> str:
    """Where two sides differ, spec by spec."""
    states = {spec.name: spec.state for spec in theirs.specs}
    differing = [
        f"| {spec.name} | {spec.state} | {states.get(spec.name, NOT_RUN)} |"
        for spec in ours.specs
        if spec.state != states.get(spec.name)
    ]
    if not differing:
        return f"{ours.side} and {theirs.side} agree on every spec."
    return "\n".join([f"| spec | {ours.side} | {theirs.side} |", "|---|---|---|", *differing])


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite as told, and print what came of it."""
    options = _parser().parse_args(argv)
    try:
        runs = _main(options)
    except (SuiteError, NodeError, RegistryError, critest_images.ImagesError) as err:
        print(f"critest: {err}", file=sys.stderr)
        return 2
    return 0 if all(done.ok for done in runs if done.side == SHIM) else 1


def _main(options: argparse.Namespace) -> list[Run]:
    if not options.list:
        check(peer=options.compare is not None)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # pods and the registry are on this machine
    with ExitStack() as stack:
        directory = stack.enter_context(directory_of_run())
        output = Path(options.output or directory / "output").resolve()
        output.mkdir(parents=True, exist_ok=True)
        suite = Suite(output, options.focus, options.skip, options.streaming == "websocket", options.timeout * 60)
        if options.list:
            print("\n".join(suite.names()))
            return []
        stack.enter_context(hosts_lead_here(critest_images.HOSTS, directory))
        registry = stack.enter_context(LocalRegistry(directory / "registry", names=critest_images.HOSTS, port=443))
        critest_images.push(registry)
        node = Node(directory / "node", registry=registry, config=options.set, debug=True, subnet=SUBNET, bridge=BRIDGE)
        runs = _runs(suite, SHIM, node, options)
        _write(options, runs)
        if options.compare:
            peer = Containerd(directory / "peer", registry, Node(directory / "unused"))
            theirs = _runs(suite, PEER, peer, options)
            print(f"\n{comparison(runs[0], theirs[0])}")
            runs += theirs
            _write(options, runs)
        return runs


def _runs(suite: Suite, name: str, side: Node | Containerd, options: argparse.Namespace) -> list[Run]:
    """The runs that were asked for, on one node, which is up for as long."""
    runs: list[Run] = []
    try:
        with side:
            about = version(side)
            for number in range(options.repeat):
                seed = options.seed + number
                print(f"critest: {name} ({about}), seed {seed} ...", file=sys.stderr, flush=True)
                runs.append(run(suite, name, side, seed))
                print(summary(runs[-1], about, suite), flush=True)
                if side.exit_status() is not None:
                    break  # what comes after would fail as a whole
    except NodeError as err:
        if not runs:
            raise
        print(f"critest: {err}", file=sys.stderr)
        runs[-1] = replace(runs[-1], note="; ".join(filter(None, (runs[-1].note, str(err)))))
    finally:
        if side.log_path.exists():
            shutil.copyfile(side.log_path, suite.directory / f"{name}.log")
    return runs


def _write(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    if options.report:
        Path(options.report).write_text(json.dumps([done.to_json() for done in runs], indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.critest", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--focus", action="append", default=[], metavar="RE", help="run only specs that match; may stand repeatedly")
    add("--skip", action="append", default=[], metavar="RE", help="run no specs that match; may stand repeatedly")
    add("--seed", type=int, default=random.randrange(1, 1 << 31), help="of the order; random unless told")  # noqa: S311 - an order
    add("--repeat", type=int, default=1, metavar="N", help="runs on one node, each with the next seed")
    add("--streaming", choices=("spdy", "websocket"), default="spdy", help="how exec, attach, port-forward stream")
    add("--compare", choices=(PEER,), help="run the same against a peer, and show where it differs")
    add("--timeout", type=float, default=30.0, metavar="MINUTES", help="for each run (%(default).0f)")
    add("--output", metavar="DIR", help="keep reports and logs there")
    add("--report", metavar="FILE", help="write what came of each spec as JSON")
    add("--set", type=_setting, action=_Settings, default={}, metavar="SECTION.KEY=YAML", help="configure portoshim")
    add("--list", action="store_true", help="print the names of the specs, and run none")
    return parser


def _setting(text: str) -> tuple[str, str, Any]:
    name, found, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (found and dot and section and key):
        raise argparse.ArgumentTypeError(f"{text}: must be SECTION.KEY=YAML")
    return section, key, yaml.safe_load(value)


class _Settings(argparse.Action):
    """Collects settings as :class:`Node` takes them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        section, key, value = values
        collected: dict[str, dict[str, Any]] = {
            name: dict(keys) for name, keys in getattr(namespace, self.dest).items()
        }
        collected.setdefault(section, {})[key] = value
        setattr(namespace, self.dest, collected)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # what was started is ended
    sys.exit(main())
