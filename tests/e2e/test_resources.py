"""Limits, statistics, metrics and events: as set, as measured, as they happen."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cgroups import in_force
from tests.e2e.pods import Pods, failure, until
from tests.e2e.test_lifecycle import porto_socket
from tools.node import Node

pytestmark = pytest.mark.root

MIB = 1024 * 1024


def linux(**resources: Any) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**resources))


def update(pods: Pods, container: str, **resources: Any) -> None:
    wanted = pb.LinuxContainerResources(**resources)
    pods.cri.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted))


@pytest.fixture
def sandbox(pods: Pods) -> str:
    return pods.run()


class TestLimits:
    def test_memory(self, pods: Pods, sandbox: str) -> None:
        # It looks for the end of a line that has none.
        container = pods.container(sandbox, "tail", "/dev/zero", linux=linux(memory_limit_in_bytes=32 * MIB))
        status = pods.exited(container)
        assert (status.exit_code, status.reason) == (137, "OOMKilled")

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, {"memory": None, "quota_us": None, "processes": None}),
            ({"memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 64 * MIB}, {"memory": 64 * MIB}),
            ({"cpu_quota": 25000, "cpu_period": 50000}, {"quota_us": 25000, "period_us": 50000}),
            ({"cpu_quota": 25000}, {"quota_us": 25000, "period_us": 100000}),
            ({"cpu_quota": -1}, {"quota_us": None}),
            ({"cpu_shares": 2}, {"shares": 2}),
            ({"cpu_shares": 102}, {"shares": 102}),
            ({"cpu_shares": 1025}, {"shares": 1025}),
            ({"cpu_shares": 262144}, {"shares": 262144}),
            ({"cpuset_cpus": "0", "cpuset_mems": "0"}, {"cpus": "0"}),
            ({"unified": {"pids.max": "8"}}, {"processes": 8}),
            ({"unified": {"pids.max": "max"}}, {"processes": None}),
            ({"unified": {"memory.max": str(32 * MIB)}}, {"memory": 32 * MIB}),
            ({"unified": {"cpu.max": "30000 60000"}}, {"quota_us": 30000, "period_us": 60000}),
            ({"unified": {"cpu.max": "max 60000"}}, {"quota_us": None}),
            ({"unified": {"cpu.weight": "50"}}, {"shares": 512}),
            ({"unified": {"cpuset.cpus": "0", "cpuset.mems": "0"}}, {"cpus": "0"}),
            # What kubelet says of every container, on a node with cgroup v2.
            ({"unified": {"memory.oom.group": "1", "memory.swap.max": "0"}}, {}),
        ],
    )
    def test_are_those_of_the_kernel(
        self, pods: Pods, node: Node, sandbox: str, fields: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        container = pods.container(sandbox, linux=linux(**fields))
        with Client(porto_socket(node)) as porto:
            found = dataclasses.asdict(in_force(porto, f"{sandbox}/{container}"))
        assert {name: found[name] for name in expected} == expected

    def test_huge_pages(self, pods: Pods, node: Node, sandbox: str) -> None:
        # kubelet names all sizes there are, with 0 for what a container doesn't ask for.
        none = [pb.HugepageLimit(page_size="2MB", limit=0), pb.HugepageLimit(page_size="1GB", limit=0)]
        some = [pb.HugepageLimit(page_size="2MB", limit=4 * MIB)]
        with Client(porto_socket(node)) as porto:
            limited = "hugetlb" in porto.get_property("/", "cgroups")
            container = pods.container(sandbox, linux=linux(hugepage_limits=none))
            assert in_force(porto, f"{sandbox}/{container}").huge_pages == (0 if limited else None)
            if limited:
                update(pods, container, hugepage_limits=some)
                assert in_force(porto, f"{sandbox}/{container}").huge_pages == 4 * MIB

    def test_the_oom_killers_order(self, pods: Pods, sandbox: str) -> None:
        script = "cat /proc/self/oom_score_adj; exec sleep 1000"
        container = pods.container(sandbox, "sh", "-c", script, linux=linux(oom_score_adj=321))
        assert pods.shell(container, "cat /proc/self/oom_score_adj") == "321\n"
        pods.stop(container)
        assert pods.log(container) == "321\n"

    @pytest.mark.parametrize(("group", "lives"), [("1", False), ("0", True)])
    def test_all_processes_or_one_are_killed(self, pods: Pods, sandbox: str, group: str, lives: bool) -> None:
        script = "(head -c 200m /dev/zero | tail | wc -c); echo lives; sleep 1000"
        limits = linux(memory_limit_in_bytes=32 * MIB, unified={"memory.oom.group": group})
        container = pods.container(sandbox, "sh", "-c", script, linux=limits)
        if lives:
            until(lambda: "lives" in pods.log(container))
            assert pods.status(container).state == pb.CONTAINER_RUNNING
        else:
            assert pods.exited(container).reason == "OOMKilled"

    def test_update(self, pods: Pods, node: Node, sandbox: str) -> None:
        container = pods.container(
            sandbox,
            linux=linux(memory_limit_in_bytes=64 * MIB, cpu_quota=50000, cpu_period=100000, oom_score_adj=100),
        )
        # kubelet repeats what has not changed, also what Porto couldn't change now.
        update(pods, container, memory_limit_in_bytes=128 * MIB, cpu_shares=2048, oom_score_adj=100)
        found = pods.status(container).resources.linux
        assert (found.memory_limit_in_bytes, found.cpu_shares, found.cpu_quota) == (128 * MIB, 2048, 50000)
        with Client(porto_socket(node)) as porto:
            now = in_force(porto, f"{sandbox}/{container}")
            assert (now.memory, now.shares, now.quota_us) == (128 * MIB, 2048, 50000)
            update(pods, container, cpu_period=50000)
            assert in_force(porto, f"{sandbox}/{container}").quota_us == 50000
            update(pods, container, cpu_quota=-1, memory_limit_in_bytes=-1)
            now = in_force(porto, f"{sandbox}/{container}")
            assert (now.memory, now.quota_us) == (None, None)
        assert pods.status(container).resources.linux.memory_limit_in_bytes == -1

    def test_update_before_the_start(self, pods: Pods, sandbox: str) -> None:
        container = pods.create(sandbox, "cat", "/proc/self/oom_score_adj", linux=linux(oom_score_adj=1))
        update(pods, container, oom_score_adj=7)
        pods.exited(pods.start(container))
        assert pods.log(container) == "7\n"

    @pytest.mark.parametrize(
        ("fields", "code", "expected"),
        [
            ({"oom_score_adj": 5}, "FAILED_PRECONDITION", "linux.oom_score_adj"),
            ({"memory_limit_in_bytes": 1}, "INVALID_ARGUMENT", "linux.memory_limit_in_bytes"),
            ({"memory_swap_limit_in_bytes": 64 * MIB}, "UNIMPLEMENTED", "linux.memory_swap_limit_in_bytes"),
            ({"unified": {"io.max": "x"}}, "UNIMPLEMENTED", "linux.unified"),
        ],
    )
    def test_an_update_that_cannot_be(
        self, pods: Pods, sandbox: str, fields: dict[str, Any], code: str, expected: str
    ) -> None:
        container = pods.container(sandbox)
        wanted = pb.LinuxContainerResources(**fields)
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
        found, text = failure(pods.cri.UpdateContainerResources, request)
        assert (found, expected in text) == (code, True), text

    def test_no_update_of_what_has_ended(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "true")
        pods.exited(container)
        request = pb.UpdateContainerResourcesRequest(container_id=container)
        assert failure(pods.cri.UpdateContainerResources, request)[0] == "FAILED_PRECONDITION"
        request.windows.SetInParent()
        assert failure(pods.cri.UpdateContainerResources, request)[0] == "UNIMPLEMENTED"

    def test_update_is_all_or_nothing(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, linux=linux(memory_limit_in_bytes=64 * MIB))
        wanted = pb.LinuxContainerResources(memory_limit_in_bytes=128 * MIB, cpuset_cpus="0-9999")
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=wanted)
        code, text = failure(pods.cri.UpdateContainerResources, request)
        assert code == "INVALID_ARGUMENT", text
        assert pods.status(container).resources.linux.memory_limit_in_bytes == 64 * MIB

    def test_of_a_pod_from_the_start(self, pods: Pods, node: Node) -> None:
        config = pods.config()
        config.linux.resources.MergeFrom(
            pb.LinuxContainerResources(
                memory_limit_in_bytes=64 * MIB, cpu_quota=50000, cpu_period=100000, cpu_shares=512
            )
        )
        config.linux.overhead.MergeFrom(
            pb.LinuxContainerResources(memory_limit_in_bytes=16 * MIB, cpu_quota=10000, cpu_period=50000)
        )
        sandbox = pods.run(config)
        with Client(porto_socket(node)) as porto:
            found = in_force(porto, sandbox)
            assert (found.memory, found.quota_us, found.shares) == (80 * MIB, 70000, 512)
            more = pb.LinuxContainerResources(memory_limit_in_bytes=128 * MIB)
            request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox, resources=more)
            pods.cri.UpdatePodSandboxResources(request)
            found = in_force(porto, sandbox)
            assert (found.memory, found.quota_us, found.shares) == (144 * MIB, 70000, 512)
        stats = pods.cri.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=sandbox)).stats
        memory = stats.linux.memory
        assert memory.available_bytes.value == 144 * MIB - memory.working_set_bytes.value
        request.resources.cpu_period = 1
        code, text = failure(pods.cri.UpdatePodSandboxResources, request)
        assert (code, "resources.cpu_period" in text) == ("INVALID_ARGUMENT", True)
        pods.stop_sandbox(sandbox)
        request.resources.cpu_period = 0
        assert failure(pods.cri.UpdatePodSandboxResources, request)[0] == "FAILED_PRECONDITION"

    def test_of_a_pod(self, pods: Pods, sandbox: str) -> None:
        wanted = pb.LinuxContainerResources(memory_limit_in_bytes=256 * MIB)
        request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox, resources=wanted)
        pods.cri.UpdatePodSandboxResources(request)
        script = "head -c 400m /dev/zero | tail | wc -c"
        assert pods.exited(pods.container(sandbox, "sh", "-c", script)).exit_code == 137

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"memory_limit_in_bytes": -2}, "memory_limit_in_bytes"),
            ({"memory_limit_in_bytes": 1}, "memory_limit_in_bytes"),
            ({"cpu_period": 10}, "cpu_period"),
            ({"cpu_quota": 1}, "cpu_quota"),
            ({"cpu_shares": -1}, "cpu_shares"),
            ({"oom_score_adj": 1001}, "oom_score_adj"),
            ({"cpuset_cpus": "0-"}, "cpuset_cpus"),
            ({"cpuset_cpus": "0;1"}, "cpuset_cpus"),
            ({"cpuset_cpus": "1-0"}, "cpuset_cpus"),
            ({"cpuset_cpus": "999"}, "cpuset_cpus"),
            ({"cpuset_mems": "999"}, "cpuset_mems"),
            ({"memory_limit_in_bytes": 2**63 - 1}, "memory_limit_in_bytes"),
            ({"hugepage_limits": [pb.HugepageLimit(page_size="2MB", limit=2**64 - 1)]}, "hugepage_limits"),
            ({"unified": {"pids.max": "many"}}, "unified"),
            ({"unified": {"pids.max": "0"}}, "unified"),
            ({"unified": {"pids.max": "9" * 18}}, "unified"),
            ({"unified": {"memory.max": "0"}}, "unified"),
            ({"unified": {"cpu.max": "1 2 3"}}, "unified"),
            ({"unified": {"cpu.max": "max 1"}}, "unified"),
            ({"unified": {"cpu.weight": "10001"}}, "unified"),
            ({"unified": {"memory.oom.group": "2"}}, "unified"),
        ],
    )
    def test_values_nobody_can_have(self, pods: Pods, sandbox: str, fields: dict[str, Any], expected: str) -> None:
        code, text = failure(pods.create, sandbox, "true", linux=linux(**fields))
        assert (code, f"linux.resources.{expected}" in text) == ("INVALID_ARGUMENT", True)

    def test_what_porto_cannot_limit(self, pods: Pods, sandbox: str) -> None:
        for fields in (
            {"memory_swap_limit_in_bytes": 64 * MIB},
            {"hugepage_limits": [pb.HugepageLimit(page_size="1GB", limit=1)]},
            {"unified": {"io.max": "x"}},
            {"unified": {"memory.swap.max": "1048576"}},
        ):
            assert failure(pods.create, sandbox, "true", linux=linux(**fields))[0] == "UNIMPLEMENTED"

    def test_processes(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, linux=linux(unified={"pids.max": "8"}))
        answer = pods.exec(container, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; wait")
        assert b"fork" in answer.stderr


class TestStatistics:
    def test_a_busy_container(self, pods: Pods, sandbox: str) -> None:
        script = "head -c 20m /dev/zero > /dev/shm/x; while :; do :; done"
        container = pods.container(sandbox, "sh", "-c", script, linux=linux(memory_limit_in_bytes=128 * MIB))

        def stats() -> pb.ContainerStats:
            answer: pb.ContainerStats = pods.cri.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
            return answer

        first = until(stats, lambda s: s.memory.usage_bytes.value > 20 * MIB)
        second = until(stats, lambda s: s.cpu.usage_nano_cores.value > 100_000_000)
        assert second.cpu.usage_core_nano_seconds.value > first.cpu.usage_core_nano_seconds.value > 0
        assert second.cpu.usage_nano_cores.value < 3_000_000_000
        memory = second.memory
        assert 20 * MIB < memory.working_set_bytes.value <= memory.usage_bytes.value
        assert memory.available_bytes.value == pytest.approx(128 * MIB - memory.working_set_bytes.value)
        assert memory.page_faults.value > 0
        assert second.attributes.metadata.name == pods.status(container).metadata.name

    def test_a_writable_layer(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox)
        pods.shell(container, "head -c 3m /dev/zero > /file; mkdir /dir; touch /dir/a /dir/b")

        def layer() -> pb.FilesystemUsage:
            request = pb.ContainerStatsRequest(container_id=container)
            answer: pb.FilesystemUsage = pods.cri.ContainerStats(request).stats.writable_layer
            return answer

        found = until(layer, lambda used: used.used_bytes.value > 0)
        assert 3 * MIB <= found.used_bytes.value < 5 * MIB
        assert 4 <= found.inodes_used.value < 40
        info = pods.cri.ImageFsInfo(pb.ImageFsInfoRequest())
        assert info.container_filesystems[0].used_bytes.value >= found.used_bytes.value
        assert info.image_filesystems[0].used_bytes.value > 0

    def test_a_pod(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "sh", "-c", "while :; do :; done")
        address = pods.sandbox_status(sandbox).network.ip
        pods.shell(container, f"ping -c 1 -w 5 {address} >/dev/null; true")
        stats = pods.cri.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=sandbox)).stats
        assert [c.attributes.id for c in stats.linux.containers] == [container]
        assert stats.linux.process.process_count.value >= 2
        assert stats.linux.network.default_interface.name == "eth0"
        assert stats.linux.cpu.usage_core_nano_seconds.value > 0
        assert stats.linux.memory.usage_bytes.value > 0
        listed = pods.cri.ListPodSandboxStats(pb.ListPodSandboxStatsRequest()).stats
        assert sandbox in {item.attributes.id for item in listed}

    @pytest.mark.parametrize("network", [pb.POD, pb.NODE])
    def test_a_network_has_a_default_interface(self, pods: Pods, network: pb.NamespaceMode) -> None:
        """Or there is none: kubelet takes the address of whatever it gets. The node's counters are not a pod's."""
        config = pods.config()
        config.linux.security_context.namespace_options.network = network
        sandbox = pods.run(config)
        linux = pods.cri.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=sandbox)).stats.linux
        assert linux.HasField("network") is linux.network.HasField("default_interface") is (network == pb.POD)
        answer = pods.cri.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())
        (metrics,) = [pod.metrics for pod in answer.pod_metrics if pod.pod_sandbox_id == sandbox]
        assert any("network" in metric.name for metric in metrics) is (network == pb.POD)

    def test_filters_and_streams_agree(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, labels={"which": "this"})
        pods.container(pods.run(), labels={"which": "other"})
        wanted = pb.ContainerStatsFilter(label_selector={"which": "this"})
        unary = pods.cri.ListContainerStats(pb.ListContainerStatsRequest(filter=wanted)).stats
        stream = pods.cri.StreamContainerStats(pb.StreamContainerStatsRequest(filter=wanted))
        streamed = [item for message in stream for item in message.container_stats]
        assert [s.attributes.id for s in unary] == [s.attributes.id for s in streamed] == [container]

    def test_unknown_ones(self, pods: Pods) -> None:
        assert failure(pods.cri.ContainerStats, pb.ContainerStatsRequest(container_id="a" * 64))[0] == "NOT_FOUND"
        assert failure(pods.cri.PodSandboxStats, pb.PodSandboxStatsRequest(pod_sandbox_id="a" * 64))[0] == "NOT_FOUND"

    def test_metrics_are_described(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox)
        described = pods.cri.ListMetricDescriptors(pb.ListMetricDescriptorsRequest()).descriptors
        keys = {item.name: list(item.label_keys) for item in described}
        for pod in pods.cri.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()).pod_metrics:
            for metric in [*pod.metrics, *(m for c in pod.container_metrics for m in c.metrics)]:
                assert len(metric.label_values) == len(keys[metric.name])
            if pod.pod_sandbox_id == sandbox:
                assert [c.container_id for c in pod.container_metrics] == [container]
                assert "container_network_receive_bytes_total" in {m.name for m in pod.metrics}

    def test_metrics_of_a_limited_container(self, pods: Pods, sandbox: str) -> None:
        script = "exec 3</dev/null 4</dev/null; nc -l -p 999 & while :; do :; done"
        limits = linux(
            cpu_period=100_000,
            cpu_quota=20_000,
            cpu_shares=512,
            memory_limit_in_bytes=64 * MIB,
            memory_swap_limit_in_bytes=64 * MIB,
            unified={"pids.max": "50"},
        )
        container = pods.container(sandbox, "sh", "-c", script, linux=limits)

        def measured() -> dict[str, int]:
            answer = pods.cri.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())
            (of_pod,) = [item for item in answer.pod_metrics if item.pod_sandbox_id == sandbox]
            (of_container,) = [item for item in of_pod.container_metrics if item.container_id == container]
            found = [*of_pod.metrics, *of_container.metrics]
            return {metric.name.removeprefix("container_"): metric.value.value for metric in found}

        def busy(found: dict[str, int]) -> bool:
            return found["cpu_cfs_throttled_periods_total"] > 2 and found["sockets"] == 1

        found = until(measured, busy)
        assert found["cpu_cfs_periods_total"] >= found["cpu_cfs_throttled_periods_total"]
        expected = {
            "spec_cpu_period": 100_000,
            "spec_cpu_quota": 20_000,
            "spec_cpu_shares": 512,
            "spec_memory_limit_bytes": 64 * MIB,
            "spec_memory_swap_limit_bytes": 64 * MIB,
            "threads_max": 50,
            "start_time_seconds": pods.status(container).started_at // 10**9,
        }
        assert {name: found[name] for name in expected} == expected
        # The shell has two files beside its standard streams, nc the same and its socket.
        assert found["file_descriptors"] == 5 + 6
        assert found["ulimits_soft"] > 0
        assert 0 < found["memory_kernel_usage"] < found["memory_max_usage_bytes"] <= 64 * MIB
        assert 0 < found["fs_inodes_free"] <= found["fs_inodes_total"]
        assert 0 <= found["fs_usage_bytes"] < found["fs_limit_bytes"]
        described = pods.cri.ListMetricDescriptors(pb.ListMetricDescriptorsRequest()).descriptors
        missing = {item.name.removeprefix("container_") for item in described} - found.keys()
        # What depends on the node: disks that count, pressure, huge pages.
        assert not [name for name in missing if not name.startswith(("fs_", "blkio_", "pressure_", "hugetlb_"))]


class TestStreamingLists:
    def test_each_thing_once(self, pods: Pods, sandbox: str, node: Node) -> None:
        containers = {pods.create(sandbox, "true") for _ in range(5)}
        cri = node.cri
        stream = cri.StreamContainers(pb.StreamContainersRequest())
        found = [c.id for message in stream for c in message.containers]
        assert len(found) == len(set(found))
        assert containers <= set(found)
        stream = cri.StreamPodSandboxes(pb.StreamPodSandboxesRequest(filter=pb.PodSandboxFilter(id=sandbox)))
        assert [s.id for message in stream for s in message.pod_sandboxes] == [sandbox]
        stream = cri.StreamImages(pb.StreamImagesRequest())
        streamed = sorted(i.id for message in stream for i in message.images)
        assert streamed == sorted(i.id for i in cri.ListImages(pb.ListImagesRequest()).images)
        stream = cri.StreamPodSandboxStats(pb.StreamPodSandboxStatsRequest())
        assert sandbox in {s.attributes.id for message in stream for s in message.pod_sandbox_stats}
        stream = cri.StreamPodSandboxMetrics(pb.StreamPodSandboxMetricsRequest())
        assert sandbox in {s.pod_sandbox_id for message in stream for s in message.pod_sandbox_metrics}


@pytest.mark.parametrize("rpc", ["CheckpointContainer", "CheckpointPod", "RestorePod"])
def test_checkpoints_are_not_to_be_had(node: Node, rpc: str) -> None:
    request = getattr(pb, f"{rpc}Request")()
    code, text = failure(getattr(node.cri, rpc), request)
    assert (code, "CRIU" in text) == ("UNIMPLEMENTED", True)


class TestEvents:
    @pytest.fixture
    def events(self, node: Node, pods: Pods) -> Iterator[list[tuple[str, int]]]:
        """What a subscriber has heard so far: ids and kinds."""
        heard: list[tuple[str, int]] = []
        faults: list[AssertionError] = []
        stream = node.cri.GetContainerEvents(pb.GetEventsRequest())

        def listen() -> None:
            try:
                for event in stream:
                    heard.append((event.container_id, event.container_event_type))
                    # kubelet passes over one that doesn't tell of its pod.
                    assert event.pod_sandbox_status.metadata.uid, event
            except grpc.RpcError:
                pass
            except AssertionError as err:
                faults.append(err)

        thread = threading.Thread(target=listen)
        thread.start()
        # That something is heard says that the subscription stands; the tests look for their own events only.
        other = pods.run()

        def happens() -> bool:
            pods.remove(pods.create(other, "true"))
            return bool(heard)

        until(happens)
        yield heard
        stream.cancel()
        thread.join()
        assert not faults

    def test_a_life(self, pods: Pods, events: list[tuple[str, int]]) -> None:
        sandbox = pods.run()
        container = pods.container(sandbox, "sh", "-c", "exit 3")
        until(lambda: (container, pb.CONTAINER_STOPPED_EVENT) in events)
        pods.remove(container)
        pods.remove_sandbox(sandbox)
        until(lambda: (sandbox, pb.CONTAINER_DELETED_EVENT) in events)
        life = [
            pb.CONTAINER_CREATED_EVENT,
            pb.CONTAINER_STARTED_EVENT,
            pb.CONTAINER_STOPPED_EVENT,
            pb.CONTAINER_DELETED_EVENT,
        ]
        assert [kind for which, kind in events if which == container] == life
        assert [kind for which, kind in events if which == sandbox] == life

    def test_what_several_clients_do_at_once_happens_once(self, pods: Pods, events: list[tuple[str, int]]) -> None:
        sandbox = pods.run()
        container = pods.container(sandbox)

        def at_once(call: Callable[[str], None], name: str) -> None:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(call, [name] * 8))

        at_once(pods.stop, container)
        at_once(pods.remove, container)
        at_once(pods.stop_sandbox, sandbox)
        at_once(pods.remove_sandbox, sandbox)
        until(lambda: (sandbox, pb.CONTAINER_DELETED_EVENT) in events)
        last = pods.run()
        until(lambda: (last, pb.CONTAINER_STARTED_EVENT) in events)
        for which in (sandbox, container):
            kinds = [kind for name, kind in events if name == which]
            assert len(kinds) == len(set(kinds)) == 4

    def test_ends_at_once_are_heard_of_after_the_start(self, pods: Pods, events: list[tuple[str, int]]) -> None:
        sandbox = pods.run()
        made = [pods.container(sandbox, "true", name=f"c{number}") for number in range(20)]
        until(lambda: all((container, pb.CONTAINER_STOPPED_EVENT) in events for container in made))
        for container in made:
            life = [pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT, pb.CONTAINER_STOPPED_EVENT]
            assert [kind for which, kind in events if which == container] == life

    def test_a_client_that_does_not_listen_costs_nobody(self, pods: Pods, node: Node) -> None:
        stream = node.cri.GetContainerEvents(pb.GetEventsRequest())
        sandbox = pods.run()
        for _ in range(10):
            pods.remove(pods.create(sandbox, "true"))
        stream.cancel()
