"""Profiles and their filters: checked by an interpreter of the filter language, and by the kernel."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shim_porto_runtime.seccomp import bpf, compile_profile, default_profile, parse
from shim_porto_runtime.seccomp.profile import ALLOW, KILL_PROCESS, Condition, Profile, Rule, errno_action

from shim_core.errors import InvalidArgument

TABLE = {
    "SCMP_ARCH_X86_64": {"read": 0, "write": 1, "open": 2, "clone": 56, "personality": 135, "newest": 450},
    "SCMP_ARCH_X86": {"read": 3, "write": 4, "open": 5, "clone": 120},
    "SCMP_ARCH_X32": {"read": 0x40000000, "write": 0x40000001},
}
AUDIT = {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0xC000003E}
EPERM = errno_action(1)


def run(program: bytes, audit: int, number: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    """What the kernel would return: classic BPF over struct seccomp_data."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments)
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        opcode, true, false, value = code[position]
        position += 1
        if opcode == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif opcode == 0x54:
            accumulator &= value
        elif opcode == 0x06:
            return int(value)
        elif opcode == 0x05:
            position += value
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}[opcode]
            position += true if holds else false


def holds(condition: Condition, arguments: tuple[int, ...]) -> bool:
    argument, value = arguments[condition.index], condition.value
    return {
        "SCMP_CMP_NE": argument != value,
        "SCMP_CMP_LT": argument < value,
        "SCMP_CMP_LE": argument <= value,
        "SCMP_CMP_EQ": argument == value,
        "SCMP_CMP_GE": argument >= value,
        "SCMP_CMP_GT": argument > value,
        "SCMP_CMP_MASKED_EQ": argument & value == condition.value_two,
    }[condition.operator]


def expected(profile: Profile, architecture: str, number: int, arguments: tuple[int, ...]) -> int:
    known = {number: name for name, number in TABLE[architecture].items()}
    rules = [rule for rule in profile.rules if known.get(number) in rule.names]
    for rule in rules:
        if not rule.conditions:
            return rule.action
        if all(holds(condition, arguments) for condition in rule.conditions):
            return rule.action
    if number > max(TABLE[architecture].values()) and profile.unknown_action is not None:
        return profile.unknown_action
    return profile.default_action


values = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1]))
operators = st.sampled_from(
    ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"]
)
conditions = st.builds(Condition, st.integers(0, 5), operators, values, values)
actions = st.sampled_from([ALLOW, EPERM, errno_action(38), KILL_PROCESS])
names = st.lists(st.sampled_from([*TABLE["SCMP_ARCH_X86_64"], "no_such_call"]), min_size=1, max_size=4)
rules = st.builds(Rule, names.map(tuple), actions, st.lists(conditions, max_size=3).map(tuple))
profiles = st.builds(
    Profile, actions, st.lists(rules, min_size=1, max_size=8).map(tuple), unknown_action=st.none() | actions
)
arguments = st.tuples(*[values] * 6)


@settings(max_examples=500)
@given(
    profiles,
    st.sampled_from(list(TABLE)),
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 56, 57, 120, 135, 450, 451, 999]),
    arguments,
)
def test_a_filter_does_what_the_profile_says(
    profile: Profile, architecture: str, number: int, args: tuple[int, ...]
) -> None:
    program = compile_profile(profile, TABLE, "x86_64")
    if architecture == "SCMP_ARCH_X32":
        number += 0x40000000
    assert run(program, AUDIT[architecture], number, args) == expected(profile, architecture, number, args)


@given(conditions, arguments)
def test_a_condition_met_exactly(condition: Condition, args: tuple[int, ...]) -> None:
    """Random values are hardly ever equal: here they are, or nearly."""
    for delta in (-1, 0, 1, 2**32, -(2**32)):
        near = list(args)
        near[condition.index] = (condition.value + delta) % 2**64
        profile = Profile(EPERM, (Rule(("read",), ALLOW, (condition,)),))
        program = compile_profile(profile, TABLE, "x86_64")
        wanted = ALLOW if holds(condition, tuple(near)) else EPERM
        assert run(program, AUDIT["SCMP_ARCH_X86_64"], 0, tuple(near)) == wanted


def test_another_architecture_is_killed() -> None:
    program = compile_profile(Profile(EPERM, (Rule(("read",), ALLOW),)), TABLE, "x86_64")
    assert run(program, 0xC00000B7, 0) == KILL_PROCESS


def test_named_architectures_leave_the_others_out_but_never_the_machines_own() -> None:
    profile = Profile(ALLOW, (Rule(("read",), EPERM),), architectures=("SCMP_ARCH_X86", "SCMP_ARCH_MIPS"))
    program = compile_profile(profile, TABLE, "x86_64")
    assert run(program, AUDIT["SCMP_ARCH_X86_64"], 0) == EPERM
    assert run(program, AUDIT["SCMP_ARCH_X86"], 3) == EPERM


def test_everything_allowed_is_no_filter() -> None:
    assert compile_profile(Profile(ALLOW, ()), TABLE, "x86_64") == b""


def test_a_machine_without_a_table_is_told() -> None:
    with pytest.raises(InvalidArgument, match="riscv64"):
        compile_profile(default_profile(()), TABLE, "riscv64")


class TestParse:
    def parse(self, tree: object) -> Profile:
        return parse(json.dumps(tree).encode(), "profile web.json")

    def test_a_whole_profile(self) -> None:
        made = self.parse(
            {
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrnoRet": 38,
                "architectures": ["SCMP_ARCH_X86_64"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [
                    {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                    {"names": ["open"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0, "args": [
                        {"index": 1, "value": 5, "valueTwo": 6, "op": "SCMP_CMP_MASKED_EQ"}]},
                ],
            }
        )  # fmt: skip
        assert made.default_action == errno_action(38)
        assert made.flags == 2
        assert made.rules == (
            Rule(("read", "write"), ALLOW),
            Rule(("open",), errno_action(0), (Condition(1, "SCMP_CMP_MASKED_EQ", 5, 6),)),
        )

    def test_two_conditions_on_one_argument_are_alternatives(self) -> None:
        args = [{"index": 0, "value": v, "op": "SCMP_CMP_EQ"} for v in (1, 2)]
        made = self.parse(
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"], "action": "SCMP_ACT_KILL", "args": args}]}
        )
        assert [rule.conditions[0].value for rule in made.rules] == [1, 2]

    @pytest.mark.parametrize(
        ("tree", "expected"),
        [
            ([], "must be a JSON object"),
            ({}, "defaultAction"),
            ({"defaultAction": "SCMP_ACT_NOTIFY"}, "SCMP_ACT_NOTIFY' is not supported"),
            ({"defaultAction": ["x"]}, "defaultAction"),
            ({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}, "listenerPath"),
            ({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}, "flags"),
            ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}, "syscalls: must be a list"),
            ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [1]}, r"syscalls\[0\]: must be a JSON object"),
            ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG"}]}, r"syscalls\[0\]\.names"),
            (
                {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["x"], "action": "SCMP_ACT_LOG", "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}]},
                r"syscalls\[0\]\.args\[0\]\.index",
            ),
            (
                {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["x"], "action": "SCMP_ACT_LOG", "args": [{"index": 0, "op": "=="}]}]},
                r"args\[0\]\.op",
            ),
            (
                {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["x"], "action": "SCMP_ACT_LOG", "args": [
                        {"index": 0, "op": "SCMP_CMP_EQ", "value": -1}]}]},
                r"args\[0\]\.value",
            ),
            ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5000}, "defaultErrnoRet"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_named(self, tree: object, expected: str) -> None:
        with pytest.raises(InvalidArgument, match=f"profile web.json.*{expected}"):
            self.parse(tree)

    @pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000, b" " * 5_000_000])
    def test_what_is_no_profile(self, data: bytes) -> None:
        with pytest.raises(InvalidArgument, match="profile"):
            parse(data, "profile")


class TestDefault:
    def outcome(self, name: str, capabilities: tuple[str, ...] = (), arguments: tuple[int, ...] = (0,) * 6) -> int:
        program = compile_profile(default_profile(capabilities), machine="x86_64")
        return run(program, AUDIT["SCMP_ARCH_X86_64"], bpf.syscalls()["SCMP_ARCH_X86_64"][name], arguments)

    @pytest.mark.parametrize("name", ["read", "openat", "futex", "execve", "clone", "ptrace", "setgroups", "socket"])
    def test_what_programs_need_is_allowed(self, name: str) -> None:
        assert self.outcome(name) == ALLOW

    @pytest.mark.parametrize("name", ["mount", "unshare", "bpf", "kexec_load", "keyctl", "io_uring_setup", "reboot"])
    def test_what_harms_the_node_is_not(self, name: str) -> None:
        assert self.outcome(name) == EPERM

    def test_a_capability_gives_its_calls_back(self) -> None:
        assert self.outcome("mount", ("SYS_ADMIN",)) == ALLOW
        assert self.outcome("bpf", ("SYS_ADMIN",)) == ALLOW
        assert self.outcome("clone3", ("SYS_ADMIN",)) == ALLOW
        assert self.outcome("reboot", ("SYS_ADMIN",)) == EPERM
        assert self.outcome("keyctl", ("SYS_ADMIN",)) == EPERM

    def test_arguments_decide_where_they_have_to(self) -> None:
        assert self.outcome("clone", arguments=(0x10000000, 0, 0, 0, 0, 0)) == EPERM  # CLONE_NEWUSER
        assert self.outcome("clone", arguments=(0x003D0F00, 0, 0, 0, 0, 0)) == ALLOW  # a thread
        assert self.outcome("clone3") == errno_action(38)
        assert self.outcome("socket", arguments=(40, 0, 0, 0, 0, 0)) == EPERM
        assert self.outcome("personality", arguments=(0x20000, 0, 0, 0, 0, 0)) == ALLOW
        assert self.outcome("personality", arguments=(0x1, 0, 0, 0, 0, 0)) == EPERM

    def test_what_is_newer_than_this_package_does_not_exist(self) -> None:
        program = compile_profile(default_profile(()), machine="x86_64")
        newest = max(bpf.syscalls()["SCMP_ARCH_X86_64"].values())
        assert run(program, AUDIT["SCMP_ARCH_X86_64"], newest + 1) == errno_action(38)
        assert run(program, AUDIT["SCMP_ARCH_X86"], 5000) == errno_action(38)


@pytest.mark.root
class TestKernel:
    """portoshim-init loads the filter for real."""

    def run(
        self, tmp_path: Path, profile: Profile, *options: str, command: list[str]
    ) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "filter"
        path.write_bytes(compile_profile(profile))
        with resources.as_file(resources.files("shim_porto_runtime") / "init" / "portoshim-init") as init:
            return subprocess.run(
                [str(init), "-S", str(path), *options, "--", *command], capture_output=True, text=True, check=False
            )

    def test_a_denied_call_fails_and_others_go_on(self, tmp_path: Path) -> None:
        profile = Profile(ALLOW, (Rule(("mkdir", "mkdirat"), errno_action(38)),))
        done = self.run(tmp_path, profile, command=["sh", "-c", f"echo hi; mkdir {tmp_path}/x"])
        assert done.stdout == "hi\n"
        assert "Function not implemented" in done.stderr

    @pytest.mark.parametrize("options", [[], ["-u", "1000", "-g", "1000", "-G", ""], ["-n"], ["-b", "0"]])
    def test_the_default_profile_lets_programs_run(self, tmp_path: Path, options: list[str]) -> None:
        done = self.run(
            tmp_path,
            default_profile(()),
            *options,
            command=["sh", "-c", "grep -E 'NoNew|Seccomp:' /proc/self/status; unshare -U true"],
        )
        assert "Seccomp:\t2" in done.stdout
        assert f"NoNewPrivs:\t{1 if '-n' in options else 0}" in done.stdout
        assert "Operation not permitted" in done.stderr

    def test_a_profile_has_to_allow_nothing_but_what_the_command_does(self, tmp_path: Path) -> None:
        """Other runtimes need setuid and more in every profile."""
        denied = ("setresuid", "setresgid", "capset", "prctl", "setgroups", "seccomp")
        profile = Profile(ALLOW, (Rule(denied, KILL_PROCESS),))
        done = self.run(tmp_path, profile, "-u", "1000", "-g", "1000", "-G", "7", "-b", "0", command=["/bin/true"])
        assert done.returncode == 0, done.stderr

    def test_no_capability_is_left_over(self, tmp_path: Path) -> None:
        for options in (["-u", "1000", "-g", "1000", "-b", "0"], ["-b", "1"]):
            done = self.run(tmp_path, default_profile(()), *options, command=["grep", "Cap", "/proc/self/status"])
            left = {line.split()[1] for line in done.stdout.splitlines()}
            assert left <= {"0" * 16, "0" * 15 + "1"}, done.stdout

    def test_a_broken_filter_stops_the_start(self, tmp_path: Path) -> None:
        path = tmp_path / "filter"
        path.write_bytes(os.urandom(17))
        with resources.as_file(resources.files("shim_porto_runtime") / "init" / "portoshim-init") as init:
            done = subprocess.run(
                [str(init), "-S", str(path), "--", "true"], capture_output=True, text=True, check=False
            )
        assert (done.returncode, done.stderr) == (125, "seccomp: not a filter")
