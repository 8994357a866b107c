"""How values are read and written: what is accepted, what it reads back as, and what is refused."""

from __future__ import annotations

import pytest

from porto_api import Client, errors
from tests.porto.support import refused

GIB, MIB = 1 << 30, 1 << 20

ACCEPTED = [
    # Sizes
    *(("memory_limit", value, str(size)) for value, size in [
        ("0", 0), ("64M", 64 * MIB), ("64m", 64 * MIB), ("64MB", 64 * MIB), ("64MiB", 64 * MIB), ("64 M", 64 * MIB),
        (" 64M ", 64 * MIB), ("1.5G", 3 * GIB // 2), ("2T", 2 << 40), ("1P", 1 << 50), ("1E", 1 << 60),
        ("1048576", MIB), ("1048576B", MIB), ("-1", (1 << 64) - 1), ("18446744073709551615", (1 << 64) - 1),
    ]),
    ("stdout_limit", "10k", "10240"), ("stdout_limit", "0x10", "16"), ("stdout_limit", "+5", "5"),
    # Whether
    ("respawn", "true", "true"), ("respawn", " true", "true"), ("respawn", "false", "false"),
    # Numbers
    ("aging_time", " 5 ", "5"), ("aging_time", "4294967296", "4294967296"),
    ("oom_score_adj", "-1000", "-1000"), ("oom_score_adj", "1000", "1000"),
    ("thread_limit", "1k", "1024"), ("max_respawns", "5", "5"), ("max_respawns", "-1", ""),
    # Durations
    ("respawn_delay", "100ms", "100000000ns"), ("respawn_delay", "1.5s", "1500000000ns"),
    ("respawn_delay", "5us", "5000ns"), ("respawn_delay", "100", "100ns"), ("respawn_delay", "1 s", "1000000000ns"),
    ("cpu_period", "1ms", "1000000"), ("cpu_period", "1s", "1000000000"), ("cpu_period", "0.5s", "500000000"),
    # Power
    ("cpu_limit", "0.5c", "0.5c"), ("cpu_limit", "1.25c", "1.25c"), ("cpu_limit", "1.1234567891c", "1.123456789c"),
    ("cpu_limit", "500000000ns", "0.5c"), ("cpu_limit", "0", "0c"), ("cpu_limit", "", "0c"),
    ("cpu_weight", "2", "2"), ("cpu_weight", "0.01", "0.01"), ("cpu_weight", "1.234567", "1.23"),
    ("cpu_weight", "1.5x", "1"),
    *(("cpu_policy", value, value) for value in ("rt", "high", "normal", "batch", "idle")),
    ("cpu_set", "0", "0"), ("cpu_set", "", ""), ("cpu_set", "all", ""), ("cpu_set", "node 0", "node 0"),
    ("cpu_set", "jail 1", "jail 1"),
    *(("io_policy", value, value) for value in ("none", "rt", "high", "normal", "batch", "idle", "")),
    ("io_limit", "fs r: 1000", "fs r: 1000"), ("io_limit", "b w: 2K; a: 1M", "a: 1048576; b w: 2048"),
    # Modes
    ("umask", "0", "0"), ("umask", "22", "022"), ("umask", "0777", "0777"),
    ("virt_mode", "os", "os"), ("virt_mode", "docker", "app"), ("cgroupfs", "ro", "ro"),
    ("enable_porto", "none", "false"), ("enable_porto", "full", "true"), ("enable_porto", "read-only", "read-only"),
    ("enable_porto", "child-only", "child-only"),
    # Users
    ("user", "nobody", "nobody"), ("user", "0", "0"), ("user", "99999", "99999"),
    ("group", "nogroup", "nogroup"), ("group", "0", "root"), ("group", "99999", "99999"),
    ("owner_user", "nobody", "nobody"),
    # Lists and maps
    ("command_argv", "a b\tc\t\td", "a b\tc\td"), ("command", "  ls  ", "ls"),
    ("env", "A=1; B=2", "A=1;B=2"), ("env", "A=1\\;2;B=3", "A=1\\;2;B=3"), ("env", "A=1;A=2", "A=2"),
    ("env", "A", "A"), ("env", "A=", "A="), ("env", "A=x=y", "A=x=y"), ("env", "A='x y';", "A='x y'"),
    ("capabilities", "KILL;CHOWN", "CHOWN;KILL"), ("capabilities", "CHOWN; KILL ;", "CHOWN;KILL"),
    ("capabilities", "NOPE", ""), ("capabilities_ambient", "CHOWN", "CHOWN"),
    ("bind", "/etc /mnt", "/etc /mnt "), ("bind", "/a /b;/c /d ro", "/a /b ;/c /d ro"),
    ("bind", "/a /b ro,nosuid", "/a /b ro,nosuid"), ("bind", "/a\\ b /c", "/a\\ b /c "),
    ("symlink", "a: /b; /c: d", "/c: d; a: /b; "), ("symlink", "/a/../b: c", "/b: c; "),
    ("devices", "/dev/null rw", "/dev/null rwm /dev/null 0666 root root; "),
    ("devices", "/dev/null r /dev/foo 0600 nobody nogroup", "/dev/null rm /dev/foo 0600 nobody nogroup; "),
    ("devices", "/dev/null -", "/dev/null -? /dev/null 0666 root root; "), ("devices", "/dev/nope rw?", ""),
    ("ulimit", "nofile: 1000 2000", "nofile: 1000 2000; "), ("ulimit", "nofile: 10", "nofile: 10 10; "),
    ("ulimit", "core: unlimited", "core: unlimited unlimited; "),
    ("ulimit", "data: 1G 2G", "data: 1073741824 2147483648; "),
    ("sysctl", "net/ipv4/ip_forward: 1; a: b", "a: b; net/ipv4/ip_forward: 1"),
    ("labels", "TEST.b: 1; TEST.a: x@y", "TEST.a: x@y; TEST.b: 1"),
    ("controllers", "memory;cpu", "memory;cpu"), ("volumes_required", "/x;/y", "/x;/y"),
    # Networks
    ("net", "none", "none"), ("net", "inherited", "inherited"), ("net", "container /", "container /"),
    ("net", "L3 veth0; MTU veth0 9000", "L3 veth0;MTU veth0 9000"),
    ("ip", "eth0 10.0.0.1/24; eth0 fc00::1/64", "eth0 10.0.0.1/24;eth0 fc00::1/64"),
    ("ip_limit", "10.0.0.0/8", "10.0.0.0/8"), ("ip_limit", "none", "none"),
    ("default_gw", "eth0 10.0.0.1", "eth0 10.0.0.1"),
    ("net_limit", "default: 1M", "default: 1048576"), ("net_tos", "CS3", "CS3"),
    ("hostname", "a.b", "a.b"), ("resolv_conf", "nameserver 1.1.1.1\nsearch x", "nameserver 1.1.1.1;search x"),
    ("resolv_conf", "default", "inherit"), ("resolv_conf", "", "keep"),
    ("etc_hosts", "1.2.3.4 x\n::1 y\n", "1.2.3.4 x\n::1 y"),
    # Paths
    ("root", "/tmp/", "/tmp/"), ("cwd", "/a/../b", "/a/../b"),
    ("stdout_path", "/dev/null", "/dev/null"), ("stdout_path", "../x", "../x"),
    ("private", "ünï\ncode", "ünï\ncode"), ("place", "/place;***", "/place;***"),
    ("seccomp", "default_action { action: Errno value: 1 }", "default_action { action: Errno value: 1 } "),
]  # fmt: skip

REFUSED = [
    *(("memory_limit", value, message) for value, message in [
        ("1", "Should be at least 1048576"), ("", "Bad value: "), ("abc", "Bad value: abc"),
        ("64Mi", "Bad value unit: Mi"), ("1,5G", "Bad value unit: ,5G"), ("-1.5", "Negative: -1.5"),
        ("99999999999999999999", "Too big: 99999999999999999999"), ("1000000E", "Too big: 1000000E"),
    ]),
    ("aging_time", "x", "Bad uint64 value: x"), ("aging_time", "1h", "Bad uint64 value: 1h"),
    ("oom_score_adj", "1001", "out of range"), ("oom_score_adj", "1.5", "Bad int value: 1.5"),
    ("respawn_delay", "1m", "Unknown unit: m"), ("respawn_delay", "-1s", "Negative: -1s"),
    ("cpu_period", "999999", "cpu period out of range"), ("cpu_period", "2s", "cpu period out of range"),
    ("cpu_limit", "abc", "Invalid cpu power unit in 'abc'"), ("cpu_limit", "1 c", "Invalid cpu power unit in '1 c'"),
    ("cpu_limit", "-1c", "Bad value: -1"), ("cpu_limit", "50%", "Invalid cpu power unit in '50%'"),
    ("cpu_weight", "0.001", "out of range"), ("cpu_weight", "101", "out of range"), ("cpu_weight", "", "Bad value: "),
    ("cpu_policy", "Normal", "Unknown cpu policy: Normal"), ("cpu_set", "9999", "invalid cpu_set: 9999"),
    ("cpu_set", "jail 0", "invalid cpu_set: jail 0"), ("cpu_set", "1-0", "invalid cpu_set: 1-0"),
    ("umask", "8", "Bad base-8 value: 8"), ("virt_mode", "x", "Unknown: x"),
    ("cgroupfs", "", "Unknown cgroupfs value: "),
    ("enable_porto", "True", "Unknown access level: True"),
    ("user", "nosuchuser", "Cannot find user: nosuchuser"), ("group", "nosuchgroup", "Cannot find group: nosuchgroup"),
    ("owner_user", "99999", "Cannot find user: 99999"),
    ("capabilities_ambient", "CAP_CHOWN", 'Unknown flag "CAP_CHOWN"'), ("controllers", "nope", 'Unknown flag "nope"'),
    ("bind", "/etc", "Invalid bind mount /etc"), ("bind", "/etc /mnt bla", 'Unknown flag "bla"'),
    ("symlink", "a", "Invalid format"), ("sysctl", "a", "Invalid format"),
    ("devices", "/dev/null", "Invalid device config: /dev/null"), ("devices", "/dev/null x", "Invalid access: x"),
    ("devices", "/etc rw", "Device path not in /dev: /etc"),
    ("devices", "/dev/../etc/passwd r", "Non-normalized device path: /dev/../etc/passwd"),
    ("devices", "preset nope", "Undefined device preset nope"),
    ("ulimit", "nofile", "Invalid ulimit: nofile"), ("ulimit", "x: 1", "Invalid ulimit: x: 1"),
    ("net", "bla", "Unknown net option: bla"), ("net", "none;inherited", "net=none must be the only option"),
    ("net", "", "Configuration is not specified"), ("net", "MTU veth0 1500", "Link not found: veth0"),
    ("ip", "eth0", "Invalid ip format"), ("default_gw", "eth0", "Invalid gateway format"),
    ("ip_limit", "any;none", "wrong format"), ("net_limit", "default 1M", "Invalid format"),
    ("net_tos", "CS8", "Invalud ToS: CS8"),
    ("seccomp", "bla", "invalid seccomp profile"), ("seccomp_name", "nope", "unkown seccomp profile nope"),
    ("private", "x" * 5000, "Private value is too long, max 4096 bytes"),
    ("stdout_path", "/dev/fd/x", "Cannot set 1 stream as /dev/fd/x: Bad int value: x"),
]  # fmt: skip


def _ids(cases: list[tuple[str, str, str]]) -> list[str]:
    return [f"{name}={value[:20]}" for name, value, _ in cases]


@pytest.mark.parametrize(("name", "value", "shown"), ACCEPTED, ids=_ids(ACCEPTED))
def test_accepted(porto: Client, name: str, value: str, shown: str) -> None:
    porto.create("a")
    porto.set_property("a", name, value)
    assert porto.get_property("a", name) == shown


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=_ids(REFUSED))
def test_refused(porto: Client, name: str, value: str, message: str) -> None:
    porto.create("a")
    before = porto.get_property("a", name)
    with refused(errors.InvalidValue, message):
        porto.set_property("a", name, value)
    assert porto.get_property("a", name) == before


@pytest.mark.parametrize("value", ["True", "1", "yes", ""])
def test_whether_is_true_or_false(porto: Client, value: str) -> None:
    porto.create("a")
    with refused(errors.Unknown, f"Bad boolean value: {value}"):
        porto.set_property("a", "respawn", value)


def test_a_bare_number_is_a_percentage_of_the_machine(porto: Client) -> None:
    import os

    porto.create("a")
    porto.set_property("a", "cpu_limit", "50")
    assert porto.get_property("a", "cpu_limit") == f"{(os.cpu_count() or 1) / 2:g}c"


def test_other_errors(porto: Client) -> None:
    porto.create("a")
    with refused(errors.DeviceNotFound, "Device /dev/nope does not exists"):
        porto.set_property("a", "devices", "/dev/nope rw")
    with refused(errors.Permission, "root path starts with .."):
        porto.set_property("a", "root", "..")
    with refused(errors.Permission, "'..' not allowed in net namespace path"):
        porto.set_property("a", "net", "netns ../x")
    with refused(errors.Unknown, "Cannot parse address x: Invalid address for specified address family"):
        porto.set_property("a", "ip", "eth0 x")


@pytest.mark.parametrize(
    ("name", "part", "value", "whole"),
    [
        ("env", "B", "2", "A=1;B=2"),
        ("ulimit", "nofile", "5", "nofile: 5 5; "),
        ("net_limit", "eth0", "1K", "default: 1; eth0: 1024"),
        ("io_limit", "b", "1K", "a: 1; b: 1024"),
        ("capabilities", "KILL", "true", "CHOWN;KILL"),
        ("labels", "TEST.b", "2", "TEST.a: 1; TEST.b: 2"),
        ("sysctl", "b", "2", "a: 1; b: 2"),
    ],
)
def test_a_part_can_be_set(porto: Client, name: str, part: str, value: str, whole: str) -> None:
    first = {
        "env": "A=1",
        "ulimit": "nofile: 1",
        "net_limit": "default: 1",
        "io_limit": "a: 1",
        "capabilities": "CHOWN",
    }
    porto.create("a")
    porto.set_property("a", name, {**first, "labels": "TEST.a: 1", "sysctl": "a: 1"}[name])
    porto.set_property("a", f"{name}[{part}]", value)
    assert porto.get_property("a", name) == whole
