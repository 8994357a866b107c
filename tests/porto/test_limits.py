"""Limits: what reaches the kernel, at the start and while a container runs."""

from __future__ import annotations

import os
import subprocess

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import cgroup_value, eventually, refused, result, root_pid, run, shell, start

MIB = 1 << 20
UNLIMITED = str((1 << 63) - 4096)


@pytest.fixture(params=["start", "change"])
def container(request: pytest.FixtureRequest, porto: Client) -> Limited:
    return Limited(porto, running=request.param == "change")


class Limited:
    """A container whose limits are set before its start, or after."""

    def __init__(self, porto: Client, *, running: bool) -> None:
        self.porto = porto
        porto.create("a")
        porto.set_property("a", "command", "sleep 1000")
        if running:
            porto.start("a")
        self.running = running

    def set(self, **properties: str) -> None:
        if not self.running:
            self.porto.stop("a")
        for name, value in properties.items():
            self.porto.set_property("a", name, value)
        if not self.running:
            self.porto.start("a")

    def value(self, controller: str, *knobs: str) -> str:
        return cgroup_value(self.porto, "a", controller, *knobs)


class TestMemory:
    def test_limit(self, container: Limited) -> None:
        container.set(memory_limit="64M")
        assert container.value("memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
        assert container.porto.get_property("a", "memory_limit_total") == str(64 * MIB)
        container.set(memory_limit="32M")
        assert container.value("memory", "memory.limit_in_bytes", "memory.max") == str(32 * MIB)
        container.set(memory_limit="0")
        assert container.value("memory", "memory.limit_in_bytes", "memory.max") in (UNLIMITED, "max")

    def test_less_than_there_is(self, porto: Client) -> None:
        start(porto, "a", shell("dd if=/dev/zero of=/dev/shm/porto-conformance bs=1M count=20 && exec sleep 1000"))
        try:
            eventually(lambda: int(porto.get_property("a", "memory_usage")) > 20 * MIB)
            with refused(errors.Busy, "Memory limit is too low for current memory usage"):
                porto.set_property("a", "memory_limit", "2M")
            assert porto.get_property("a", "memory_limit") == "0"
        finally:
            os.unlink("/dev/shm/porto-conformance")

    def test_the_lowest_on_the_way_up(self, porto: Client) -> None:
        start(porto, "p", "", memory_limit=64 * MIB)
        start(porto, "p/a", memory_limit=128 * MIB)
        assert porto.get_property("p/a", "memory_limit_total") == str(64 * MIB)
        porto.set_property("p", "memory_limit", "256M")
        assert porto.get_property("p/a", "memory_limit_total") == str(128 * MIB)


class TestProcessorTime:
    @pytest.mark.parametrize(
        ("limit", "quota"), [("0.5c", "50000"), ("1c", "100000"), ("0.01c", "1000"), ("1000c", None), ("0c", "-1")]
    )
    def test_limit(self, container: Limited, limit: str, quota: str | None) -> None:
        container.set(cpu_limit=limit)
        cores = os.cpu_count() or 1
        assert container.value("cpu", "cpu.cfs_quota_us") == (quota or str(cores * 100_000))

    def test_period(self, container: Limited) -> None:
        container.set(cpu_limit="0.5c", cpu_period="10ms")
        assert container.value("cpu", "cpu.cfs_period_us") == "10000"
        assert container.value("cpu", "cpu.cfs_quota_us") == "5000"

    @pytest.mark.parametrize(
        ("guarantee", "weight", "policy", "shares"),
        [
            ("0c", "1", "normal", "2"),
            ("1c", "1", "normal", "1024"),
            ("0.5c", "1", "normal", "512"),
            ("1c", "2", "normal", "2048"),
            ("1c", "0.1", "normal", "102"),
            ("1c", "1", "high", "16384"),
            ("1c", "1", "rt", "16384"),
            ("1c", "1", "idle", "2"),
        ],
    )
    def test_shares(self, container: Limited, guarantee: str, weight: str, policy: str, shares: str) -> None:
        container.set(cpu_guarantee=guarantee, cpu_weight=weight, cpu_policy=policy)
        assert container.value("cpu", "cpu.shares") == shares

    @pytest.mark.parametrize(
        ("policy", "weight", "scheduler", "nice"),
        [
            ("normal", "1", os.SCHED_OTHER, 0),
            ("high", "1", os.SCHED_OTHER, -10),
            ("batch", "1", os.SCHED_BATCH, 0),
            ("idle", "1", os.SCHED_IDLE, 0),
            ("normal", "2", os.SCHED_OTHER, -7),
            ("normal", "0.1", os.SCHED_OTHER, 19),
        ],
    )
    def test_priority(self, container: Limited, policy: str, weight: str, scheduler: int, nice: int) -> None:
        container.set(cpu_policy=policy, cpu_weight=weight)
        pid = root_pid(container.porto, "a")
        assert os.sched_getscheduler(pid) == scheduler
        assert os.getpriority(os.PRIO_PROCESS, pid) == nice

    def test_bounds_follow_the_parents(self, porto: Client) -> None:
        start(porto, "p", cpu_limit=1.0)
        start(porto, "p/a", cpu_limit=0.5, controllers=["cpu", *_inherited(porto)])
        start(porto, "p/a/b", cpu_limit=2.0)
        assert porto.get_property("p/a/b", "cpu_limit_bound") == "0.5c"
        porto.set_property("p", "cpu_limit", "0.2c")
        assert self._bounds(porto) == ["0.2c", "0.2c", "0.2c"]
        assert cgroup_value(porto, "p/a/b", "cpu", "cpu.cfs_quota_us") == "20000"
        porto.set_property("p", "cpu_limit", "1.5c")
        assert self._bounds(porto) == ["1.5c", "0.5c", "0.5c"]

    @staticmethod
    def _bounds(porto: Client) -> list[str]:
        return [porto.get_property(name, "cpu_limit_bound") for name in ("p", "p/a", "p/a/b")]

    def test_processors(self, container: Limited) -> None:
        container.set(cpu_set="0")
        assert os.sched_getaffinity(root_pid(container.porto, "a")) == {0}
        assert container.porto.get_property("a", "cpu_set_affinity") == "0"
        container.set(cpu_set="")
        assert len(os.sched_getaffinity(root_pid(container.porto, "a"))) == os.cpu_count()

    def test_a_processor_of_its_own(self, porto: Client) -> None:
        if (os.cpu_count() or 1) < 2:
            pytest.skip("takes two processors")
        for name in ("a", "b"):
            porto.create(name)
            porto.set_property(name, "command", "sleep 1000")
            porto.set_property(name, "cpu_set", "jail 1")
            porto.start(name)
        first, second = (os.sched_getaffinity(root_pid(porto, name)) for name in ("a", "b"))
        assert len(first) == len(second) == 1
        assert first != second


def _inherited(porto: Client) -> list[str]:
    porto.create("probe")
    porto.create("probe/child")
    found = porto.get_property("probe/child", "controllers").split(";")
    porto.destroy("probe")
    return [name for name in found if name != "cpu"]


class TestProcesses:
    def test_limit(self, container: Limited) -> None:
        container.set(thread_limit="5")
        assert container.value("pids", "pids.max") == "5"
        container.set(thread_limit="0")
        assert container.value("pids", "pids.max") == "max"

    def test_no_more_of_them(self, porto: Client) -> None:
        found = run(porto, "a", shell("for i in 1 2 3 4 5 6; do sleep 5 & done; true"), thread_limit=4)
        assert "fork" in found.stderr

    def test_ulimits(self, container: Limited) -> None:
        container.set(ulimit="nofile: 100 200; core: 0")
        with open(f"/proc/{root_pid(container.porto, 'a')}/limits") as file:
            found = {line[:25].strip(): line[26:].split()[:2] for line in file}
        assert found["Max open files"] == ["100", "200"]
        assert found["Max core file size"] == ["0", "0"]


class TestDisks:
    def test_priority(self, container: Limited) -> None:
        for policy, shown in (("rt", "realtime: prio 4"), ("batch", "best-effort: prio 7"), ("idle", "idle")):
            container.set(io_policy=policy)
            command = ["ionice", "-p", str(root_pid(container.porto, "a"))]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == shown

    def test_a_disk_that_is_none(self, container: Limited) -> None:
        with refused(errors.InvalidValue, "Disk not found: nosuchdisk"):
            container.set(io_limit="nosuchdisk r: 1000")

    def test_limit(self, container: Limited) -> None:
        disk = next((name for name in sorted(os.listdir("/sys/block")) if not name.startswith(("loop", "ram"))), None)
        if disk is None:
            pytest.skip("no disk")
        with open(f"/sys/block/{disk}/dev") as file:
            number = file.read().strip()
        container.set(io_limit=f"{disk} r: 1M; {disk} w: 2M", io_ops_limit=f"{disk}: 100")
        throttle = "blkio.throttle"
        assert container.value("blkio", f"{throttle}.read_bps_device") == f"{number} {MIB}"
        assert container.value("blkio", f"{throttle}.write_bps_device") == f"{number} {2 * MIB}"
        assert container.value("blkio", f"{throttle}.read_iops_device") == f"{number} 100"
        if not container.running:
            return
        container.set(io_limit="")
        assert container.value("blkio", f"{throttle}.read_bps_device") == ""


class TestControllers:
    def test_of_the_first_level_and_below(self, porto: Client) -> None:
        start(porto, "p", "")
        start(porto, "p/a")
        start(porto, "p/b", memory_limit=64 * MIB, thread_limit=100)
        above = set(porto.get_property("p", "controllers").split(";"))
        assert above >= {"memory", "cpu", "devices", "freezer"}
        assert not {"memory", "cpu", "pids"} & set(porto.get_property("p/a", "controllers").split(";"))
        assert {"memory", "pids"} <= set(porto.get_property("p/b", "controllers").split(";"))
        parent, child = (porto.get_property(name, "cgroups[memory]") for name in ("p", "p/b"))
        assert child == f"{parent}/b"
        assert porto.get_property("p/a", "cgroups[memory]") == parent

    def test_naming_those_it_has_changes_nothing(self, porto: Client) -> None:
        porto.create("a")
        before = porto.get_property("a", "cpu_guarantee_bound")
        porto.set_property("a", "controllers", "cpu;memory")
        assert porto.get_property("a", "cpu_guarantee_bound") == before
        porto.set_property("a", "controllers", "memory")
        porto.set_property("a", "controllers", "cpu;memory")
        assert porto.get_property("a", "cpu_guarantee_bound") == "0c"

    def test_not_while_it_runs(self, porto: Client) -> None:
        start(porto, "p", "")
        start(porto, "p/a")
        with refused(errors.NotSupported, "Cannot enable controllers in runtime"):
            porto.set_property("p/a", "memory_limit", "64M")

    def test_processes_are_where_they_are_counted(self, porto: Client) -> None:
        start(porto, "a", memory_limit=64 * MIB)
        pid = root_pid(porto, "a")
        for controller in ("memory", "freezer", "cpu"):
            pids = cgroup_value(porto, "a", controller, "cgroup.procs", "tasks").split()
            assert str(pid) in pids


class TestOutOfMemory:
    EAT = "dd if=/dev/zero of=/dev/null bs=200M count=1"

    def test_it_is_the_end(self, porto: Client) -> None:
        start(porto, "a", shell(f"{self.EAT}; sleep 1000"), memory_limit=32 * MIB)
        assert porto.wait(["a"], 60).state == "dead"
        found = porto.get(["a"], ["exit_status", "exit_code", "oom_killed"])["a"]
        assert found == {"exit_status": "9", "exit_code": "-99", "oom_killed": "true"}

    def test_unless_it_is_not_fatal(self, porto: Client) -> None:
        start(porto, "a", shell(f"{self.EAT}; exit 5"), memory_limit=32 * MIB, oom_is_fatal=False)
        assert result(porto, "a").exit_code == 5
        assert porto.get_property("a", "oom_killed") == "false"

    def test_of_the_parent(self, porto: Client) -> None:
        start(porto, "p", "", memory_limit=32 * MIB)
        start(porto, "p/a", self.EAT)
        assert porto.wait(["p/a"], 60).state == "dead"
        assert porto.get_property("p/a", "exit_code") == "-99"

    def test_in_a_child_with_a_limit_of_its_own(self, porto: Client) -> None:
        start(porto, "p")
        start(porto, "p/a", self.EAT, memory_limit=32 * MIB, isolate=False)
        assert porto.wait(["p/a"], 60).state == "dead"
        assert porto.get_property("p/a", "oom_killed") == "true"
        assert porto.get_property("p", "state") == "running"


class TestAccounting:
    def test_time_and_memory(self, porto: Client) -> None:
        start(porto, "p", "")
        script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 1000 & exec sleep 1000"
        start(porto, "p/a", shell(script), memory_limit=256 * MIB)
        eventually(lambda: porto.get_property("p/a", "command_argv") and _sleeps(porto, "p/a"))
        names = ["cpu_usage", "memory_usage", "anon_usage", "minor_faults", "process_count", "thread_count"]
        found = {name: int(str(value)) for name, value in porto.get(["p/a"], names)["p/a"].items()}
        assert found["cpu_usage"] > 10_000_000
        assert found["memory_usage"] > 0
        assert found["anon_usage"] > 0
        assert found["minor_faults"] > 0
        assert found["process_count"] >= 2
        assert found["thread_count"] >= 2
        assert int(porto.get_property("p", "cpu_usage")) >= found["cpu_usage"]
        before = int(porto.get_property("p", "cpu_usage"))
        porto.destroy("p/a")
        assert int(porto.get_property("p", "cpu_usage")) >= before

    def test_throttling(self, porto: Client) -> None:
        start(porto, "a", shell("while :; do :; done"), cpu_limit=0.1)
        eventually(lambda: int(porto.get_property("a", "cpu_throttled")) > 50_000_000)

    def test_names_of_parts(self, porto: Client) -> None:
        start(porto, "a")

        def parts(name: str) -> set[str]:
            return {pair.split(": ")[0] for pair in porto.get_property("a", name).split("; ")}

        assert parts("cpu_pressure") == {"some", "full"}
        assert parts("memory_pressure") == {"some", "full"}
        assert parts("virtual_memory") == {
            *("anon", "code", "count", "data", "file", "huge", "locked", "max_size", "max_used"),
            *("shmem", "size", "stack", "swap", "table", "used"),
        }
        assert "hw" in parts("io_read")
        assert int(porto.get_property("a", "virtual_memory[size]")) > 0

    def test_many_at_once(self, porto: Client) -> None:
        for number in range(5):
            start(porto, f"c{number}")
        found = porto.get(["c*"], ["cpu_usage", "memory_usage", "anon_usage", "io_read", "net_bytes", "state"])
        assert len(found) == 5
        assert all(isinstance(value, str) for values in found.values() for value in values.values())


def _sleeps(porto: Client, name: str) -> bool:
    with open(f"/proc/{root_pid(porto, name)}/comm") as file:
        return file.read() == "sleep\n"


def test_a_limit_in_a_message(porto: Client) -> None:
    """cpu_limit_total and the like are answers, never asked for."""
    start(porto, "a", cpu_limit=0.25)
    (found,) = porto.list_containers_by(["a"], properties=["cpu_limit", "memory_limit_total"])
    assert found.spec.cpu_limit == 0.25
    assert found.status.memory_limit_total > 0
    assert isinstance(found, rpc_pb2.TContainer)
