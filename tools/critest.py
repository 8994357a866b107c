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
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import grpc
import yaml

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.testing import CriClient
from tools import critest_images, stage
from tools.critest_suite import FAILED, NOT_RUN, PASSED, SKIPPED, Run, Spec, Suite, SuiteError
from tools.node import Node, NodeError
from tools.peer import Containerd
from tools.registry import LocalRegistry, RegistryError

SHIM, PEER = "portoshim", "containerd"
SUBNET, BRIDGE = "10.87.0.0/16", "cni-critest"
HOSTS = Path("/etc/hosts")

_RPC_TIMEOUT_S = 60.0
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's PROC_PID_INIT_INO
_SHARED_MEMORY = Path("/proc/sysvipc/shm")
_SEGMENT_BYTES = 1048576  # what the HostIpc specs make
_MESSAGE_LINES = 6


class Side(Protocol):
    """A CRI server under test."""

    @property
    def cri(self) -> CriClient: ...
    @property
    def socket(self) -> str: ...
    @property
    def log_path(self) -> Path: ...

    def exit_status(self) -> int | None: ...


# -- what surrounds a run ----------------------------------------------------------------------------------------------


@contextmanager
def hosts_lead_here(names: Sequence[str], directory: Path) -> Iterator[None]:
    """Have names resolve to this machine, for all in this mount namespace.

    :raises SuiteError: they don't, even so.
    """
    file = directory / "hosts"
    file.write_text(f"127.0.0.1 {' '.join(names)}\n{HOSTS.read_text()}")
    subprocess.run(["mount", "--bind", str(file), str(HOSTS)], check=True)
    try:
        for name in names:
            found = {info[4][0] for info in socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)}
            if found != {"127.0.0.1"}:
                raise SuiteError(f"{name} leads to {found} despite {HOSTS}: see /etc/nsswitch.conf")
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(HOSTS)], check=True)


@contextmanager
def no_shared_memory_left() -> Iterator[None]:
    """Remove the segments that the suite makes on the host and leaves there."""
    before = {row["shmid"] for row in _segments()}
    yield
    for row in _segments():
        # A pid of 0 is one of another PID namespace: not ours to remove.
        made_here = row["cpid"] != 0 and not Path(f"/proc/{row['cpid']}").exists()
        if row["shmid"] not in before and row["size"] == _SEGMENT_BYTES and row["nattch"] == 0 and made_here:
            subprocess.run(["ipcrm", "-m", str(row["shmid"])], check=False)


def _segments() -> list[dict[str, int]]:
    head, *rows = _SHARED_MEMORY.read_text().splitlines()
    names = head.split()
    return [dict(zip(names, map(int, row.split()), strict=True)) for row in rows]


def remove_pods(side: Side) -> tuple[str, ...]:
    """Remove the pods that are there; their names, and what went wrong."""
    try:
        pods = side.cri.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=_RPC_TIMEOUT_S).items
    except grpc.RpcError as err:
        return (f"unknown: ListPodSandbox: {_said(err)}",)
    found = []
    for pod in pods:
        name = pod.metadata.name
        try:
            side.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=_RPC_TIMEOUT_S)
            side.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=_RPC_TIMEOUT_S)
            found.append(name)
        except grpc.RpcError as err:
            found.append(f"{name}, which can't be removed: {_said(err)}")
    return tuple(found)


def _said(err: grpc.RpcError) -> str:
    return f"{err.code().name}: {err.details()}"


def version(side: Side) -> str:
    """Name and version of a CRI server, as it says them."""
    answer = side.cri.Version(pb.VersionRequest(), timeout=_RPC_TIMEOUT_S)
    return f"{answer.runtime_name} {answer.runtime_version}"


def run(suite: Suite, name: str, side: Side, seed: int) -> Run:
    """One run, and nothing of it left."""
    with no_shared_memory_left():
        done = suite.run(name, side.socket, seed, side.log_path, side.exit_status)
        return replace(done, left_behind=remove_pods(side))


# -- what is told of it ------------------------------------------------------------------------------------------------


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
    lines = spec.message.splitlines()
    shown = lines[:_MESSAGE_LINES] + (["..."] if len(lines) > _MESSAGE_LINES else [])
    return [f"    {line}" for line in (*shown, *spec.node_log)]


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
    _check_surroundings(options)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # pods and the registry are on this machine
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(
            prefix="critest-", dir=os.environ.get("SHIM_STAGE_DIR"), ignore_cleanup_errors=True
        )
        directory = Path(stack.enter_context(temporary))
        output = Path(options.output) if options.output else directory / "output"
        output.mkdir(parents=True, exist_ok=True)
        suite = Suite(
            output.resolve(), options.focus, options.skip, options.streaming == "websocket", options.timeout * 60
        )
        if options.list:
            print("\n".join(suite.names()))
            return []
        stack.enter_context(hosts_lead_here(critest_images.HOSTS, directory))
        registry = stack.enter_context(LocalRegistry(directory / "registry", names=critest_images.HOSTS, port=443))
        critest_images.push(registry)
        node = Node(directory / "node", registry=registry, config=options.set, debug=True, subnet=SUBNET, bridge=BRIDGE)
        stack.callback(_keep_log, node.log_path, output / f"{SHIM}.log")
        runs = []
        with node:
            runs += _runs(suite, SHIM, node, options)
        if options.compare:
            peer = Containerd(directory / "peer", registry, Node(directory / "unused"))
            stack.callback(_keep_log, peer.log_path, output / f"{PEER}.log")
            with peer:
                runs += _runs(suite, PEER, peer, options)
            print(f"\n{comparison(runs[0], next(done for done in runs if done.side == PEER))}")
        if options.report:
            Path(options.report).write_text(json.dumps([done.to_json() for done in runs], indent=1))
        return runs


def _runs(suite: Suite, name: str, side: Side, options: argparse.Namespace) -> list[Run]:
    about = version(side)
    runs = []
    for number in range(options.repeat):
        seed = options.seed + number
        print(f"critest: {name} ({about}), seed {seed} ...", file=sys.stderr, flush=True)
        runs.append(run(suite, name, side, seed))
        print(summary(runs[-1], about, suite), flush=True)
        if side.exit_status() is not None:
            break  # what comes after would fail as a whole
    return runs


def _check_surroundings(options: argparse.Namespace) -> None:
    if not stage.on_stage() and "PORTO_SOCKET" not in os.environ and not options.list:
        raise SuiteError("it runs on a stage: make critest")
    # PORTO_SOCKET alone says nothing of namespaces: this machine's own /etc/hosts must not be hidden.
    if os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE and not options.list:
        raise SuiteError("it changes mounts and listens on port 443: run it, and portod, in namespaces of their own")
    absent = [name for name in ("docker-registry", "gcc", "ipcmk", "ipcrm", "mount") if shutil.which(name) is None]
    if absent:
        raise SuiteError(f"not installed: {', '.join(absent)}")
    if options.compare and (missing := Containerd.missing()) is not None:
        raise SuiteError(missing)


def _keep_log(log: Path, kept: Path) -> None:
    if log.exists():
        shutil.copyfile(log, kept)


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
    sys.exit(main())
