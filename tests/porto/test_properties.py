"""Properties: which there are, what they are to begin with, and when they can be had and set."""

from __future__ import annotations

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import refused, spec, start


def words(text: str) -> list[str]:
    return text.split()


ALWAYS = words("""
absolute_name absolute_namespace aging_time bind capabilities capabilities_allowed capabilities_ambient
capabilities_ambient_allowed cgroupfs cgroups change_time children_allowed command command_argv controllers
cpu_guarantee cpu_guarantee_bound cpu_guarantee_total cpu_limit cpu_limit_bound cpu_limit_total cpu_period cpu_policy
cpu_set cpu_set_affinity cpu_weight creation_time cwd default_gw devices devices_explicit enable_fuse enable_porto env
env_secret etc_hosts group hostname id io_guarantee io_limit io_ops_guarantee io_ops_limit io_policy
io_weight ip ip_limit isolate labels level max_respawns memory_limit memory_limit_total net net_guarantee net_limit
net_limit_bound net_limit_soft net_rx_limit net_rx_limit_bound net_tos oom_is_fatal oom_kills oom_kills_total
oom_score_adj owner_containers owner_cred owner_group owner_user parent place place_limit place_usage porto_namespace
pressurize_on_death private resolv_conf respawn respawn_count respawn_delay root root_path root_readonly seccomp
seccomp_name session_info start_error start_time state stderr_path stdin_path stdout_limit stdout_path symlink sysctl
taint task_cred thread_limit time ulimit umask unshare_on_exec user userns virt_mode volumes_linked volumes_owned
volumes_required weak
""")

FROM_THE_START = words("""
anon_usage cache_usage cpu_pressure cpu_throttled cpu_usage cpu_usage_system io_ops io_pressure io_read
io_read_ops io_time io_write io_write_ops major_faults memory_pressure memory_reclaimed memory_usage minor_faults
mlock_usage net_bytes net_class_id net_drops net_limit_soft_stat net_netstat net_overlimits net_packets net_rx_bytes
net_rx_drops net_rx_overlimits net_rx_packets net_snmp net_snmp6 net_tx_bytes net_tx_drops net_tx_packets
process_count root_pid shmem_usage stderr stderr_offset stdout stdout_offset thread_count virtual_memory
""")

AT_THE_END = ["core_dumped", "death_time", "exit_code", "exit_status", "oom_killed"]

DEFAULTS = {
    "aging_time": "86400",
    "capabilities_ambient": "",
    "cgroupfs": "none",
    "children_allowed": "true",
    "command": "",
    "cpu_guarantee": "0c",
    "cpu_limit": "0c",
    "cpu_period": "100000000",
    "cpu_policy": "normal",
    "cpu_weight": "1",
    "enable_porto": "true",
    "env": "",
    "group": "root",
    "hostname": "",
    "io_weight": "1",
    "ip_limit": "any",
    "isolate": "true",
    "labels": "",
    "level": "1",
    "max_respawns": "",
    "memory_limit": "0",
    "net": "inherited",
    "net_tos": "CS0",
    "oom_is_fatal": "true",
    "oom_score_adj": "0",
    "owner_user": "root",
    "parent": "/",
    "private": "",
    "resolv_conf": "inherit",
    "respawn": "false",
    "respawn_count": "0",
    "respawn_delay": "1000000000ns",
    "root": "/",
    "root_path": "/",
    "root_readonly": "false",
    "seccomp": "default_action { action: Allow } ",
    "start_time": "",
    "state": "stopped",
    "stderr_path": "stderr",
    "stdin_path": "/dev/null",
    "stdout_limit": "8388608",
    "stdout_path": "stdout",
    "task_cred": "0 0 0",
    "thread_limit": "10000",
    "time": "0",
    "umask": "02",
    "user": "root",
    "userns": "false",
    "virt_mode": "app",
    "weak": "false",
}

NOT_ON_THIS_KERNEL = ["memory_guarantee", "anon_limit", "recharge_on_pgfault", "memory_lock_policy"]


def test_the_list(porto: Client) -> None:
    listed = {prop.name for prop in porto.properties()}
    # What depends on the kernel may be missing.
    assert {*ALWAYS, *FROM_THE_START, *AT_THE_END} - listed == set()


def test_huge_pages_are_limited_where_the_machine_can(porto: Client) -> None:
    porto.create("a")
    listed = {prop.name for prop in porto.properties()} & {"hugetlb_limit", "hugetlb_usage"}
    if "hugetlb:" in porto.get_property("/", "cgroups"):
        assert len(listed) == 2
        porto.set_property("a", "hugetlb_limit", "4M")
        assert porto.get_property("a", "hugetlb_limit") == "4194304"
        return
    assert not listed
    for call in (
        lambda: porto.set_property("a", "hugetlb_limit", "4M"),
        lambda: porto.get_property("a", "hugetlb_limit"),
        lambda: porto.create_from_spec(spec("b", hugetlb_limit=4 << 20)),
    ):
        with refused(errors.NotSupported, "hugetlb_limit is not supported"):
            call()


def test_descriptions_tell_what_can_be_set_when(porto: Client) -> None:
    by_name = {prop.name: prop for prop in porto.properties()}
    assert by_name["memory_limit"].desc == "Memory limit [bytes] (dynamic)"
    assert by_name["memory_limit"].dynamic
    assert by_name["state"].desc == "container state (ro)"
    assert by_name["state"].read_only
    assert by_name["command"].desc == "Command executed upon container start"


def test_defaults(porto: Client) -> None:
    porto.create("a")
    assert porto.get(["a"], list(DEFAULTS))["a"] == DEFAULTS


@pytest.mark.parametrize("state", ["stopped", "running", "meta", "dead"])
def test_what_can_be_had_in_which_state(porto: Client, state: str) -> None:
    if state == "stopped":
        porto.create("a")
    else:
        start(porto, "a", {"meta": "", "dead": "true"}.get(state, "sleep 1000"))
    if state == "dead":
        porto.wait(["a"], 60)
    expected = {}
    if state == "stopped":
        expected = {name: f"{name} is not available in stopped state" for name in FROM_THE_START}
    if state == "dead":
        expected["root_pid"] = "container isn't running"
    else:
        expected.update((name, f"{name} available only in dead state") for name in AT_THE_END)
    answer = porto.get(["a"], [*ALWAYS, *FROM_THE_START, *AT_THE_END])["a"]
    found = {}
    for name, value in answer.items():
        if isinstance(value, errors.PortoError):
            assert isinstance(value, errors.InvalidState), (name, value)
            found[name] = value.message
    assert found == expected


def test_what_is_read_only(porto: Client) -> None:
    porto.create("a")
    for prop in porto.properties():
        if prop.read_only:
            with refused(errors.InvalidValue, f"{prop.name} is read-only"):
                porto.set_property("a", prop.name, "1")


def test_what_can_be_changed_while_it_runs(porto: Client) -> None:
    start(porto, "a")
    for prop in porto.properties():
        if not prop.read_only and not prop.dynamic:
            with refused(errors.InvalidState, f"{prop.name} could be set only in stopped state"):
                porto.set_property("a", prop.name, "")


def test_what_can_be_changed_when_it_is_dead(porto: Client) -> None:
    start(porto, "a", "true")
    porto.wait(["a"], 60)
    with refused(errors.InvalidState, "memory_limit cannot be set in dead state"):
        porto.set_property("a", "memory_limit", "1G")
    for name, value in (("private", "x"), ("aging_time", "100"), ("weak", "false"), ("respawn_delay", "5000ns")):
        porto.set_property("a", name, value)
        assert porto.get_property("a", name) == value


@pytest.mark.parametrize("name", ["nope", "", "NOPE", "memory_limit "])
def test_a_property_that_is_none(porto: Client, name: str) -> None:
    porto.create("a")
    with refused(errors.InvalidProperty, f"Unknown container property: {name}"):
        porto.get_property("a", name)
    with refused(errors.InvalidProperty, f"Invalid property {name}"):
        porto.set_property("a", name, "1")


@pytest.mark.parametrize("name", NOT_ON_THIS_KERNEL)
def test_what_takes_another_kernel(porto: Client, name: str) -> None:
    if name in {prop.name for prop in porto.properties()}:
        pytest.skip("this kernel has it")
    porto.create("a")
    with refused(errors.NotSupported, f"{name} is not supported"):
        porto.set_property("a", name, "1")


def test_only_what_was_set(porto: Client) -> None:
    porto.create("a")
    porto.set_property("a", "private", "x")
    answer = porto.get(["a"], ["private", "cpu_limit", "anon_usage"], real=True)["a"]
    assert answer["private"] == "x"
    unset, usage = answer["cpu_limit"], answer["anon_usage"]
    assert isinstance(unset, errors.NoValue)
    assert unset.message == "Property not set"
    assert isinstance(usage, errors.InvalidState)
    assert usage.message == "Not available in stopped state"


def test_times(porto: Client) -> None:
    start(porto, "a", "true")
    porto.wait(["a"], 60)
    raw = {name: int(porto.get_property("a", f"{name}[raw]")) for name in ("creation_time", "start_time", "death_time")}
    assert raw["creation_time"] <= raw["start_time"] <= raw["death_time"]
    with refused(errors.InvalidValue, "What x?"):
        porto.get_property("a", "creation_time[x]")
    text = porto.get_property("a", "creation_time")
    assert len(text) == len("2026-01-01 00:00:00")


def test_a_part_of_what_has_none(porto: Client) -> None:
    porto.create("a")
    with refused(errors.InvalidValue, "Invalid subscript for property"):
        porto.get_property("a", "private[x]")


def test_data_is_properties(porto: Client) -> None:
    """The calls of old clients."""
    request = rpc_pb2.TContainerRequest()
    request.getData.name, request.getData.data = "/", "state"
    assert porto.call(request).getData.value == "meta"
