"""``make bench``: this shim, containerd and bare Porto calls, side by side in one run.

Machines are noisy, so nothing here is an absolute figure to compare with another day's: each round does the same thing
on each side, one after the other, and what counts is the ratio of the medians. The floor is what the shim's own Porto
calls and CNI plugins take without it.

::

    python -m tools.bench [--rounds N] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.testing import CriClient
from tools import bench_images, bench_keeper, images, stage
from tools.bench_streaming import measure_streaming
from tools.floor import Floor
from tools.node import PAUSE, Node
from tools.peer import Containerd
from tools.registry import LocalRegistry
from tools.scratch import scratch

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
MARK = "<!-- the table -->"


class Side(Protocol):
    """A CRI server under measurement."""

    @property
    def cri(self) -> CriClient: ...
    @property
    def pid(self) -> int: ...
    @property
    def socket(self) -> str: ...
    @property
    def pod_logs(self) -> Path: ...


@dataclass
class Row:
    """One figure on every side."""

    name: str
    unit: str = "ms"
    values: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def add(self, side: str, value: float) -> None:
        self.values.setdefault(side, []).append(value)

    def median(self, side: str) -> float | None:
        return statistics.median(self.values[side]) if self.values.get(side) else None


class Table:
    """Rows in the order in which they were first measured."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def row(self, name: str, unit: str = "ms") -> Row:
        return self.rows.setdefault(name, Row(name, unit))

    @contextmanager
    def timed(self, name: str, side: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.row(name).add(side, (time.perf_counter() - started) * 1000)


SHIM, PEER, FLOOR = "portoshim", "containerd", "floor"
CNI_ADD, CNI_DEL = "of that, CNI ADD", "of that, CNI DEL"


class Pods:
    """The calls of a pod's life on one side, each timed."""

    def __init__(self, table: Table, name: str, side: Side, image: str) -> None:
        self.table, self.name, self.side, self.image = table, name, side, image
        self._number = 0
        self._lock = threading.Lock()

    def sandbox_config(self, *, host_network: bool = False) -> pb.PodSandboxConfig:
        with self._lock:
            self._number += 1
            name = f"bench-{self.name}-{self._number}"
        logs = self.side.pod_logs / name
        logs.mkdir(parents=True, exist_ok=True)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, namespace="bench", uid=name),
            hostname="" if host_network else name,
            log_directory=str(logs),
            labels={"io.kubernetes.pod.name": name},
        )
        options = config.linux.security_context.namespace_options
        options.pid = pb.CONTAINER
        if host_network:
            options.network = pb.NODE
        return config

    def container_config(self, number: int = 0) -> pb.ContainerConfig:
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=f"c{number}"),
            image=pb.ImageSpec(image=self.image),
            log_path=f"c{number}.log",
            labels={"io.kubernetes.container.name": f"c{number}"},
        )
        config.linux.security_context.namespace_options.pid = pb.CONTAINER
        return config

    def run(self, *, host_network: bool = False) -> tuple[str, pb.PodSandboxConfig]:
        config = self.sandbox_config(host_network=host_network)
        return self.side.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id, config

    def create(
        self,
        sandbox: str,
        config: pb.PodSandboxConfig,
        number: int = 0,
        *,
        command: Sequence[str] = ("sleep", "100000"),
    ) -> str:
        container_config = self.container_config(number)
        container_config.command.extend(command)
        request = pb.CreateContainerRequest(pod_sandbox_id=sandbox, config=container_config, sandbox_config=config)
        container: str = self.side.cri.CreateContainer(request).container_id
        return container

    def start(self, container: str) -> None:
        self.side.cri.StartContainer(pb.StartContainerRequest(container_id=container))

    def exec(self, container: str) -> None:
        self.side.cri.ExecSync(pb.ExecSyncRequest(container_id=container, cmd=["true"], timeout=60))

    def remove(self, sandbox: str) -> None:
        self.side.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox))
        self.side.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox))

    def life(self) -> None:
        """One pod, each call timed."""
        timed, cri = self.table.timed, self.side.cri
        with timed("RunPodSandbox, host network", self.name):
            host, _ = self.run(host_network=True)
        self.remove(host)
        with timed("RunPodSandbox", self.name):
            sandbox, config = self.run()
        with timed("CreateContainer", self.name):
            container = self.create(sandbox, config)
        with timed("StartContainer", self.name):
            self.start(container)
        self.exec(container)
        with timed("ExecSync", self.name):
            self.exec(container)
        with timed("ContainerStatus", self.name):
            cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container))
        with timed("StopContainer", self.name):
            cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
        with timed("RemoveContainer", self.name):
            cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container))
        with timed("StopPodSandbox", self.name):
            cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox))
        with timed("RemovePodSandbox", self.name):
            cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox))

    def whole(self) -> None:
        """One pod up and down again."""
        sandbox, config = self.run()
        self.start(self.create(sandbox, config))
        self.remove(sandbox)


def warm_up(sides: list[Pods]) -> list[Pods]:
    """A pod on each side: what is done once is not measured. Those sides that can make one."""
    able = []
    for pods in sides:
        try:
            pods.whole()
            able.append(pods)
        except grpc.RpcError as err:
            if pods.name == SHIM:
                raise
            print(f"bench: {pods.name} can't make pods here: {err.details()}", file=sys.stderr)
    return able


def measure_lives(table: Table, sides: list[Pods], floor: Floor, rounds: int) -> None:
    """A pod's life, alternating between the sides."""
    floor.pod(Table())
    for _ in range(rounds):
        for pods in sides:
            pods.life()
        floor.pod(table)


def measure_lists(table: Table, sides: list[Pods], floor: Floor, count: int, rounds: int) -> None:
    """Lists and statuses with so many containers, ten in a pod; memory and CPU of a kubelet-like poll."""
    made = []
    for pods in sides:
        for _ in range(count // 10):
            sandbox, config = pods.run()
            made.append((pods, sandbox))
            for number in range(10):
                pods.start(pods.create(sandbox, config, number))
    for _ in range(rounds):
        for pods in sides:
            cri = pods.side.cri
            with table.timed(f"ListContainers, {count} containers", pods.name):
                found = cri.ListContainers(pb.ListContainersRequest()).containers
            assert len(found) >= count
            with table.timed(f"ListPodSandbox, {count // 10} pods", pods.name):
                cri.ListPodSandbox(pb.ListPodSandboxRequest())
            with table.timed(f"ContainerStatus of {count} containers", pods.name):
                for container in found[:count]:
                    cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container.id))
        floor.states(table, f"ListContainers, {count} containers")
    for pods in sides:
        table.row(f"memory with {count} containers", "MiB").add(pods.name, tree_memory_mib(pods.side.pid))
        table.row(f"CPU of a poll each second, {count} containers", "ms/s").add(pods.name, poll_cost(pods))
    for pods, sandbox in made:
        pods.remove(sandbox)


def measure_throughput(table: Table, sides: list[Pods], pods_each: int) -> None:
    """Pods up and down per second, one at a time and eight at once."""
    for at_once in (1, 8):
        for pods in sides:
            started = time.perf_counter()
            in_parallel(pods.whole, pods_each, at_once)
            rate = pods_each / (time.perf_counter() - started)
            table.row(f"pods up and down, {at_once} at once", "pods/s").add(pods.name, rate)


def measure_networking(table: Table, node: Node) -> None:
    """What the shim took to connect and disconnect pods, as it logged it; the plugins' own time is the floor."""
    log = node.log_path.read_text()
    for row, words in ((CNI_ADD, r"is attached: \S+"), (CNI_DEL, "is detached")):
        for took_ms in re.findall(rf"shim\.cni_net .* {words}, ([\d.]+) ms", log):
            table.row(row).add(SHIM, float(took_ms))


def measure_keeper(table: Table, containers: int, seconds: float) -> None:
    """The stream keeper and as many conmons, in the columns of the shim and its peer."""
    for row in bench_keeper.rows(containers, seconds):
        name, _, unit = row.name.rpartition(", ")
        made = table.row(f"logs: {name} (conmon for containerd)", unit)
        made.add(SHIM, row.ours)
        if row.conmon is not None:
            made.add(PEER, row.conmon)


def in_parallel(step: Callable[[], None], times: int, at_once: int) -> None:
    left = threading.Semaphore(times)
    errors: list[Exception] = []

    def work() -> None:
        while not errors and left.acquire(blocking=False):
            try:
                step()
            except Exception as err:
                errors.append(err)

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def tree_memory_mib(pid: int) -> float:
    """Memory of a process and what it has started, shared pages counted once (PSS)."""
    total = 0
    for member in descendants(pid):
        try:
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def descendants(pid: int) -> list[int]:
    """The servers of one side: the process, its children, and helpers that have become daemons of their own.

    Containers are left out, and so is portod, embedded or not: what is measured is the CRI server.
    """
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        root = Path(f"/proc/{pid}/cmdline").read_bytes()
        shim = b"shim_core" in root
        mine = int(entry) == pid or (parent == pid and "shim_embedded_porto" not in command)
        # The embedded Porto has a keeper as well.
        helper = ("keeper" in command and "porto-keeper" not in command) if shim else "containerd-shim" in command
        if mine or helper:
            found.append(int(entry))
    return found


def poll_cost(pods: Pods, seconds: int = 10) -> float:
    """CPU milliseconds a second that kubelet's two lists each second cost the server."""
    before = cpu_ms(pods.side.pid)
    started = time.monotonic()
    for beat in range(seconds):
        pods.side.cri.ListPodSandbox(pb.ListPodSandboxRequest())
        pods.side.cri.ListContainers(pb.ListContainersRequest())
        time.sleep(max(started + beat + 1 - time.monotonic(), 0))
    return (cpu_ms(pods.side.pid) - before) / seconds


def cpu_ms(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def render(table: Table, where: str) -> str:
    """The table as Markdown."""
    lines = [
        f"Measured on {where}.",
        "",
        "| | unit | floor | portoshim | containerd | portoshim : floor | containerd : portoshim |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in table.rows.values():
        floor, shim, peer = (row.median(side) for side in (FLOOR, SHIM, PEER))
        lines.append(
            f"| {row.name} | {row.unit} | {_number(floor)} | {_number(shim)} | {_number(peer)} "
            f"| {_ratio(shim, floor)} | {_ratio(peer, shim)} |"
        )
    return "\n".join(lines)


def targets(table: Table) -> list[str]:
    """What was promised, and what came of it."""

    def added(*names: str) -> float | None:
        parts = [(table.row(n).median(SHIM), table.row(n).median(FLOOR)) for n in names]
        return (
            sum(s - f for s, f in parts if s is not None and f is not None)
            if all(None not in p for p in parts)
            else None
        )

    def of_peer(name: str) -> float | None:
        ours, theirs = table.row(name).median(SHIM), table.row(name).median(PEER)
        return ours / theirs if ours is not None and theirs else None

    pulls = [f"PullImage, {sample.name}" for sample in bench_images.SAMPLES]
    checks: list[tuple[str, float | None, float, str]] = [
        ("added to Run + Create + Start", added("RunPodSandbox", "CreateContainer", "StartContainer"), 10, "ms"),
        ("added to ExecSync", added("ExecSync"), 3, "ms"),
        ("a list of 100 containers", table.row("ListContainers, 100 containers").median(SHIM), 3, "ms"),
        ("memory when idle", table.row("memory when idle", "MiB").median(SHIM), 90, "MiB"),
        *((name, of_peer(name), 1, "of containerd's time") for name in pulls),
    ]
    return [
        f"- {name}: {value:.1f} {unit}, {'within' if value <= limit else '**over**'} the target of {limit:g} {unit}"
        for name, value, limit, unit in checks
        if value is not None
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.1f}"


def main() -> int:
    """Measure, print, and write ``docs/performance.md`` if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="pods on each side")
    parser.add_argument("--quick", action="store_true", help="three rounds and few containers: does it run at all?")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    if not stage.on_stage() and "PORTO_SOCKET" not in os.environ:
        sys.exit("the benchmark runs on a stage: make bench")
    table = Table()
    with ExitStack() as stack:
        directory = stack.enter_context(scratch(os.environ.get("SHIM_STAGE_DIR")))
        registry = stack.enter_context(LocalRegistry(directory / "registry"))
        images.push(images.pause(), registry, *_repository(PAUSE))
        images.push(images.busybox(), registry, "bench/busybox", ["1"])
        image = f"{registry.address}/bench/busybox:1"
        node = stack.enter_context(Node(directory / "node", registry=registry))
        sides = [Pods(table, SHIM, node, image)]
        if (missing := Containerd.missing()) is None:
            sides.append(Pods(table, PEER, stack.enter_context(Containerd(directory / "peer", registry, node)), image))
        else:
            print(f"bench: no containerd to compare with: {missing}", file=sys.stderr)
        for pods in sides:
            pods.side.cri.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=image)))
            table.row("memory when idle", "MiB").add(pods.name, tree_memory_mib(pods.side.pid))
        floor = stack.enter_context(Floor(node, image))
        sides = warm_up(sides)
        measure_lives(table, sides, floor, rounds)
        for count in (10,) if options.quick else (10, 100):
            measure_lists(table, sides, floor, count, rounds)
        measure_throughput(table, sides, 4 if options.quick else 24)
        measure_streaming(table, sides, 10 if options.quick else 100, 1 if options.quick else 3)
        measure_networking(table, node)
    measure_keeper(table, *((20, 3.0) if options.quick else (bench_keeper.CONTAINERS, bench_keeper.SECONDS)))
    bench_images.measure_pulls(table, 1 if options.quick else 3, bench_images.SAMPLES[: 1 if options.quick else None])
    porto = "a real portod" if "PORTO_SOCKET" in os.environ else "the embedded Porto"
    text = "\n".join(
        [render(table, f"{porto}, Linux {os.uname().release}, {os.cpu_count()} cores"), "", *targets(table)]
    )
    print(text)
    if options.write:
        head = DOCUMENT.read_text().split(MARK)[0]
        DOCUMENT.write_text(f"{head}{MARK}\n\n{text}\n")
    return 0


def _repository(reference: str) -> tuple[str, list[str]]:
    repository, _, tag = reference.partition(":")
    return repository, [tag]


if __name__ == "__main__":
    sys.exit(main())
