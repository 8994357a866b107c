"""What metrics tell beyond samples: from the texts that Porto gives, of both versions of cgroups."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
from pathlib import Path

import pytest
from shim_porto_runtime import details
from shim_porto_runtime.details import OpenFiles, parse

CGROUPS = "cpu: /c/cpu/porto%a; freezer: /c/freezer/porto/a; unified: /c/unified/porto/a"


def test_of_version_1() -> None:
    found = parse(
        {
            "cgroups": CGROUPS,
            "cpu.stat": "nr_periods 7\nnr_throttled 3\nthrottled_time 1500000000\nnr_bursts 0\n",
            "hugetlb_usage": "0",
            "memory.failcnt": "5\n",
            "memory.kmem.usage_in_bytes": "253952\n",
            "memory.max_usage_in_bytes": "2519040\n",
            "memory.stat": "cache 1\nmapped_file 2\ntotal_cache 3\ntotal_mapped_file 4\n",
            "root_pid": "120",
            "thread_limit": "10000",
        }
    )
    assert (found.cfs_periods, found.cfs_throttled_periods, found.cfs_throttled) == (7, 3, 1_500_000_000)
    assert (found.memory_failures, found.memory_peak, found.kernel_memory, found.mapped_files) == (
        5,
        2519040,
        253952,
        4,
    )
    assert (found.huge_pages, found.thread_limit, found.root_pid) == (0, 10000, 120)
    assert (found.cgroup, found.disks) == ("/c/freezer/porto/a", ())


def test_of_version_2() -> None:
    found = parse(
        {
            "cgroups": "unified: /c/porto/a",
            "cpu.stat": "usage_usec 9\nnr_periods 7\nnr_throttled 3\nthrottled_usec 1500000\n",
            "memory.events": "low 0\nhigh 0\nmax 5\noom 0\noom_kill 0\n",
            "memory.peak": "2519040\n",
            "memory.stat": "anon 1\nkernel 253952\nfile_mapped 4\n",
        }
    )
    assert (found.cfs_periods, found.cfs_throttled_periods, found.cfs_throttled) == (7, 3, 1_500_000_000)
    assert (found.memory_failures, found.memory_peak, found.kernel_memory, found.mapped_files) == (
        5,
        2519040,
        253952,
        4,
    )
    assert (found.huge_pages, found.thread_limit, found.root_pid) == (None, 0, 0)
    assert found.cgroup == "/c/porto/a"


def test_of_nothing() -> None:
    found = parse({"memory.stat": "\n", "thread_limit": "max", "io_read": "", "cgroups": "?"})
    assert details.open_files(found) == OpenFiles(0, 0, None)


def test_disks() -> None:
    name = next((path.name for path in sorted(Path("/sys/class/block").iterdir())), None)
    if name is None:
        pytest.skip("this machine has no block device")
    (found,) = parse(
        {
            "io_read": f"hw: 10; {name}: 9; nonsense",
            "io_read_ops": f"hw: 1; {name}: 2",
            "io_write": f"hw: 10; total_writeback: 0; {name}: 4096",
        }
    ).disks
    assert (found.name, found.read_bytes, found.reads, found.written_bytes, found.writes) == (name, 9, 2, 4096, 0)
    assert f"{found.major}:{found.minor}" == Path("/sys/class/block", name, "dev").read_text().strip()


def test_open_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        Path(os.devnull).open() as null,
        subprocess.Popen(
            ["cat"], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=null, pass_fds=[ours.fileno()]
        ) as cat,
    ):
        assert cat.stdin is not None
        assert cat.stdout is not None
        cat.stdin.write(b"\n")
        assert cat.stdout.read(1) == b"\n"  # its loader has closed the libraries
        below = tmp_path / "below"
        below.mkdir()
        (tmp_path / "cgroup.procs").write_text("")
        (below / "cgroup.procs").write_text(f"{cat.pid}\n{2**22 + 1}\n")  # the second one is no process
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        found = parse({"cgroups": f"freezer: {tmp_path}", "root_pid": str(cat.pid)})
        assert details.open_files(found) == OpenFiles(4, 1, soft)
        monkeypatch.setattr(details, "MAX_OPEN_FILES", 2)
        assert details.open_files(found).files == 2
        cat.communicate()
