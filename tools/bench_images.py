"""``make bench``, the pulls: the same images from the same registry, on this shim and on containerd in turn.

Each round has images of its own, which share nothing, and starts with an idle disk. Nothing is removed meanwhile: ext4
is slow to make files for a minute after many were deleted. Memory is the server's peak while it pulls; portod's own tar
is not counted, it needs a few MiB.

::

    python -m tools.bench_images [--rounds N] [--quick]
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shim_core.cri.v1 import api_pb2 as pb
from tools import images, stage
from tools.node import Node
from tools.peer import Containerd
from tools.registry import LocalRegistry
from tools.scratch import scratch

if TYPE_CHECKING:
    from tools.bench import Side, Table

_MIB = 1024 * 1024
# A stage's own directory is in memory, and images are to be written to a disk; Porto takes no /var/tmp.
_DISK = "/var/lib"
_PULL_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """An image to be pulled. Half of its bytes can't be compressed, and its files have 64 KiB, as images' do."""

    name: str
    size_mib: int
    layers: int

    def push(self, registry: LocalRegistry, number: int) -> str:
        """Push one image of the kind; its reference."""
        files = max(self.size_mib * 16 // self.layers, 1)
        image = images.big(self.size_mib * _MIB, self.layers, files_per_layer=files, seed=self.size_mib + number)
        repository = f"bench/pull-{self.size_mib}-{number}"
        images.push(image, registry, repository)
        return f"{registry.address}/{repository}"


SAMPLES = (Sample("64 MiB in 8 layers", 64, 8), Sample("1 GiB in 32 layers", 1024, 32))


def measure_pulls(table: Table, rounds: int, samples: tuple[Sample, ...] = SAMPLES) -> None:
    """Add the rows of all samples to a table."""
    with ExitStack() as stack:
        directory = stack.enter_context(scratch(_DISK))
        registry = stack.enter_context(LocalRegistry(directory / "registry"))
        node = stack.enter_context(Node(directory / "node", registry=registry))
        sides: dict[str, Side] = {"portoshim": node}
        if (missing := Containerd.missing()) is None:
            sides["containerd"] = stack.enter_context(Containerd(directory / "peer", registry, node))
        else:
            print(f"bench: no containerd to compare with: {missing}", file=sys.stderr)
        # Connections, certificates and code that is loaded with the first pull are not what is measured.
        name = Sample("warm", 1, 2).push(registry, 0)
        for side in sides.values():
            _pull(side, name)
        for sample in samples:
            for number in range(rounds):
                name = sample.push(registry, number)
                # Who comes first has the registry read its disk.
                for side_name in sorted(sides, reverse=number % 2 == 0):
                    _measure(table, sample, side_name, sides[side_name], name)


def _measure(table: Table, sample: Sample, side_name: str, side: Side, name: str) -> None:
    os.sync()
    _reset_peak(side.pid)
    with table.timed(f"PullImage, {sample.name}", side_name):
        _pull(side, name)
    table.row(f"peak memory of it, {sample.name}", "MiB").add(side_name, _peak_mib(side.pid))


def _pull(side: Side, name: str) -> None:
    side.cri.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=name)), timeout=_PULL_TIMEOUT_S)


def _reset_peak(pid: int) -> None:
    """Let the peak of a process's memory begin anew (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> int:
    """Measure the pulls alone, and print them."""
    from tools.bench import Table, render

    parser = argparse.ArgumentParser(prog="python -m tools.bench_images", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="images of each size")
    parser.add_argument("--quick", action="store_true", help="small images alone")
    options = parser.parse_args()
    if not stage.on_stage() and "PORTO_SOCKET" not in os.environ:
        sys.exit("the benchmark runs on a stage: make bench")
    table = Table()
    measure_pulls(table, options.rounds, SAMPLES[:1] if options.quick else SAMPLES)
    porto = "a real portod" if "PORTO_SOCKET" in os.environ else "the embedded Porto"
    print(render(table, f"{porto}, Linux {os.uname().release}, {os.cpu_count()} cores"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
