"""Limits: from the CRI's to Porto's, applied over one another, for containers and pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_porto_runtime import resources

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented

MIB = 1024 * 1024
Limits = pb.LinuxContainerResources


def spec_of(limits: Limits, *, hugetlb: bool = True) -> rpc_pb2.TContainerSpec:
    spec = rpc_pb2.TContainerSpec(name="x")
    resources.into_spec(limits, spec, hugetlb=hugetlb)
    return spec


class TestSpec:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, {}),
            ({"memory_limit_in_bytes": 5 * MIB}, {"memory_limit": 5 * MIB}),
            ({"memory_limit_in_bytes": -1}, {"memory_limit": 0}),
            ({"cpu_quota": 50000}, {"cpu_limit": 0.5, "cpu_period": 100_000_000}),
            ({"cpu_quota": 50000, "cpu_period": 25000}, {"cpu_limit": 2.0, "cpu_period": 25_000_000}),
            ({"cpu_quota": -1}, {"cpu_limit": 0.0, "cpu_period": 100_000_000}),
            ({"cpu_period": 25000}, {"cpu_period": 25_000_000}),
            ({"oom_score_adj": -5}, {"oom_score_adj": -5}),
            ({"unified": {"pids.max": "max"}}, {"thread_limit": 0}),
            ({"unified": {"memory.oom.group": "0"}}, {"oom_is_fatal": False}),
            ({"unified": {"hugetlb.2MB.max": "max"}}, {"hugetlb_limit": 0}),
            ({"unified": {"hugetlb.2MB.max": "0"}}, {"hugetlb_limit": 1}),
        ],
    )
    def test_what_porto_is_told(self, fields: dict[str, Any], expected: dict[str, Any]) -> None:
        made = spec_of(Limits(**fields))
        found = {field.name: value for field, value in made.ListFields() if field.name != "name"}
        assert found == expected

    @given(st.integers(2, 262144))
    def test_shares_come_out_exactly(self, shares: int) -> None:
        cores = spec_of(Limits(cpu_shares=shares)).cpu_guarantee
        # As Porto does: to nanoseconds of processor time a second, then to shares, each time cut off.
        assert 1024 * int(cores * 10**9) // 10**9 == shares

    def test_cpus(self) -> None:
        made = spec_of(Limits(cpuset_cpus="0"))
        assert (made.cpu_set.policy, made.cpu_set.list) == ("set", "0")

    @pytest.mark.parametrize(
        ("limit", "hugetlb", "expected"),
        [(0, True, 1), (0, False, None), (4 * MIB, True, 4 * MIB), (4 * MIB, False, 4 * MIB)],
    )
    def test_huge_pages(self, limit: int, hugetlb: bool, expected: int | None) -> None:
        limits = Limits(
            hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=limit), pb.HugepageLimit(page_size="1GB")]
        )
        knob = Limits(unified={"hugetlb.2MB.max": str(limit)})
        for made in (spec_of(limits, hugetlb=hugetlb), spec_of(knob, hugetlb=hugetlb)):
            assert (made.hugetlb_limit if made.HasField("hugetlb_limit") else None) == expected


class TestChecks:
    def test_the_field_is_named_as_the_call_has_it(self) -> None:
        with pytest.raises(InvalidArgument, match=r"^overhead\.cpu_period: 1: must be"):
            resources.check(Limits(cpu_period=1), "overhead")

    def test_swap_is_seen_with_the_limit_in_force(self) -> None:
        old = Limits(memory_limit_in_bytes=64 * MIB, memory_swap_limit_in_bytes=64 * MIB)
        resources.check(Limits(memory_limit_in_bytes=64 * MIB), in_force=old)
        both = Limits(memory_limit_in_bytes=128 * MIB, memory_swap_limit_in_bytes=128 * MIB)
        resources.check(both, in_force=old)
        with pytest.raises(Unimplemented, match="memory_swap_limit_in_bytes"):
            resources.check(Limits(memory_limit_in_bytes=128 * MIB), in_force=old)

    @pytest.mark.parametrize(("swap", "memory"), [(0, 0), (0, 64 * MIB), (64 * MIB, 64 * MIB), (-1, 0), (-1, -1)])
    def test_no_swap_of_its_own(self, swap: int, memory: int) -> None:
        resources.check(Limits(memory_limit_in_bytes=memory, memory_swap_limit_in_bytes=swap))

    @pytest.mark.parametrize(("swap", "memory"), [(1, 0), (128 * MIB, 64 * MIB), (-1, 64 * MIB)])
    def test_swap_porto_cannot_give(self, swap: int, memory: int) -> None:
        with pytest.raises(Unimplemented, match="memory_swap_limit_in_bytes"):
            resources.check(Limits(memory_limit_in_bytes=memory, memory_swap_limit_in_bytes=swap))

    def test_no_swap_on_a_node_that_has_some(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = Limits(unified={"memory.swap.max": "0"})
        monkeypatch.setattr(resources, "_node_has_swap", lambda: False)
        resources.check(limits)
        monkeypatch.setattr(resources, "_node_has_swap", lambda: True)
        with pytest.raises(Unimplemented, match=r"memory\.swap\.max"):
            resources.check(limits)

    def test_processors_and_memory_nodes_of_the_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = {"cpu/online": "0-3,8", "node/has_memory": "0-1"}
        monkeypatch.setattr(resources, "_of_machine", machine.__getitem__)
        for cpus in ("0", "1-3", "0,8", "3,0-1"):
            resources.check(Limits(cpuset_cpus=cpus))
        for cpus in ("4", "0-8", "0-", "", " 0", "0 ", "٣", "-1", "1--2"):
            if cpus:
                with pytest.raises(InvalidArgument, match="cpuset_cpus"):
                    resources.check(Limits(cpuset_cpus=cpus))
        resources.check(Limits(cpuset_mems="0-1"))
        with pytest.raises(Unimplemented, match="cpuset_mems"):
            resources.check(Limits(cpuset_mems="1"))
        with pytest.raises(InvalidArgument, match="cpuset_mems"):
            resources.check(Limits(cpuset_mems="2"))

    @pytest.mark.parametrize("value", ["", "-1", "1.5", "٣", "0x10", "9" * 19, " 5", "five"])
    def test_numbers_in_unified(self, value: str) -> None:
        for name in ("pids.max", "memory.max", "cpu.weight", "hugetlb.2MB.max"):
            with pytest.raises(InvalidArgument, match=r"linux\.resources\.unified\['"):
                resources.check(Limits(unified={name: value}))


class TestOneOverTheOther:
    def test_nothing_leaves_things_as_they_are(self) -> None:
        old = Limits(memory_limit_in_bytes=5 * MIB, unified={"pids.max": "5"})
        assert resources.merged(old, Limits()) == old
        assert resources.changes(old, old) == Limits()

    def test_what_is_said_wins(self) -> None:
        old = Limits(
            cpu_shares=5,
            cpu_quota=7000,
            unified={"pids.max": "5", "memory.max": "max"},
            hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=1), pb.HugepageLimit(page_size="1GB")],
        )
        new = Limits(
            cpu_shares=6, unified={"pids.max": "6"}, hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=2)]
        )
        both = resources.merged(old, new)
        assert (both.cpu_shares, both.cpu_quota) == (6, 7000)
        assert dict(both.unified) == {"pids.max": "6", "memory.max": "max"}
        assert {limit.page_size: limit.limit for limit in both.hugepage_limits} == {"2MB": 2, "1GB": 0}
        assert old.cpu_shares == 5, "the record's own isn't touched"
        changed = resources.changes(old, both)
        assert changed == Limits(
            cpu_shares=6, unified={"pids.max": "6"}, hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=2)]
        )

    def test_quota_and_period_go_together(self) -> None:
        old = Limits(cpu_quota=20000, cpu_period=50000)
        both = resources.merged(old, Limits(cpu_period=100000))
        assert spec_of(resources.changes(old, both)).cpu_limit == pytest.approx(0.2)

    @given(
        *(
            st.builds(
                Limits,
                cpu_shares=st.sampled_from((0, 2, 1024)),
                memory_limit_in_bytes=st.sampled_from((0, -1, 64 * MIB)),
                cpuset_cpus=st.sampled_from(("", "0")),
                unified=st.dictionaries(st.sampled_from(("pids.max", "cpu.weight")), st.sampled_from(("1", "2"))),
            )
            for _ in range(2)
        )
    )
    def test_changes_lead_from_one_to_the_other(self, old: Limits, new: Limits) -> None:
        both = resources.merged(old, new)
        assert resources.merged(old, resources.changes(old, both)) == both


class TestPods:
    def test_the_overhead_is_added_to_what_limits(self) -> None:
        limits = Limits(memory_limit_in_bytes=64 * MIB, cpu_quota=50000, cpu_shares=512, oom_score_adj=5)
        overhead = Limits(memory_limit_in_bytes=16 * MIB, cpu_quota=10000, cpu_period=50000, cpu_shares=100)
        total = resources.of_pod(limits, overhead)
        assert (total.memory_limit_in_bytes, total.cpu_quota, total.cpu_shares) == (80 * MIB, 70000, 512)
        assert total.oom_score_adj == 0, "no process of the sandbox's own container has one"

    def test_it_limits_nothing_by_itself(self) -> None:
        overhead = Limits(memory_limit_in_bytes=16 * MIB, cpu_quota=10000)
        assert resources.of_pod(Limits(), overhead) == Limits()
        assert resources.of_pod(Limits(memory_limit_in_bytes=-1), overhead).memory_limit_in_bytes == -1


def test_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources._members(resources._of_machine("cpu/online"), "x")
    assert resources._of_machine("not/there") == "0"
