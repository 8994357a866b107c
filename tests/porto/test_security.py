"""Who a command runs as, and what it may do: users, capabilities, system calls, devices, kernel settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from porto_api import Client, errors
from tests.porto.support import cgroup_value, refused, result, root_pid, run, shell, spec, start

ALL_OF_ROOT = 0xA8EC77FB
"""What portod lets a container of root's have; CAP_SYS_RESOURCE apart, which not every machine can give."""
SYS_RESOURCE = 1 << 24
ALLOW = "default_action { action: Allow } "
CHOWN, KILL, NET_BIND_SERVICE, NET_ADMIN = 1 << 0, 1 << 5, 1 << 10, 1 << 12


def capabilities(porto: Client, **properties: Any) -> dict[str, int]:
    found = run(porto, "a", ["grep", "^Cap", "/proc/self/status"], **properties)
    values = (line.split(":") for line in found.lines)
    return {name.removeprefix("Cap"): int(value, 16) & ~SYS_RESOURCE for name, value in values}


class TestUsers:
    def test_by_name_and_by_number(self, porto: Client, root: str) -> None:
        script = shell("id -u; id -g; id -G; echo $USER")
        assert run(porto, "a", script, user="nobody").lines == ["65534", "0", "0", "nobody"]
        assert run(porto, "a", script, root=root, user="54321", group="99").lines == ["54321", "99", "99", "54321"]

    def test_supplementary_groups_are_the_users(self, porto: Client, root: str) -> None:
        """Those of a spec are left aside."""
        found = run(porto, "a", ["id", "-G"], root=root, task_cred=(65534, 65534, 5, 6))
        assert found.stdout == "65534\n"

    def test_a_user_has_to_be_known(self, porto: Client) -> None:
        with refused(errors.InvalidValue, "Cannot find user: 54321"):
            start(porto, "a", "true", task_cred=(54321, 99))

    def test_files_belong_to_the_user(self, porto: Client, root: str) -> None:
        os.chmod(f"{root}/tmp", 0o1777)  # noqa: S103
        run(porto, "a", shell("umask 022; echo > /tmp/x"), root=root, user="54321", group="99")
        found = Path(root, "tmp/x").stat()
        assert (found.st_uid, found.st_gid) == (54321, 99)

    def test_somebody_elses_container_isnt_roots(self, porto: Client) -> None:
        where = "Cannot prepare start for container a"
        with refused(errors.Permission, f"{where}: user=root requires chroot"):
            start(porto, "a", "true", owner_user="nobody", user="root")


class TestCapabilities:
    def test_of_root(self, porto: Client, root: str) -> None:
        wanted = {"Prm": ALL_OF_ROOT, "Eff": ALL_OF_ROOT, "Bnd": ALL_OF_ROOT, "Inh": 0, "Amb": 0}
        assert capabilities(porto) == wanted
        assert capabilities(porto, root=root) == wanted

    def test_of_another_user(self, porto: Client, root: str) -> None:
        found = capabilities(porto, root=root, user="54321")
        assert found == {"Prm": 0, "Eff": 0, "Bnd": ALL_OF_ROOT, "Inh": 0, "Amb": 0}

    def test_a_few(self, porto: Client, root: str) -> None:
        found = capabilities(porto, root=root, capabilities=["CHOWN", "KILL"])
        assert found == {"Prm": CHOWN | KILL, "Eff": CHOWN | KILL, "Bnd": CHOWN | KILL, "Inh": 0, "Amb": 0}

    def test_none(self, porto: Client, root: str) -> None:
        assert set(capabilities(porto, root=root, capabilities=[]).values()) == {0}

    def test_ambient_ones(self, porto: Client, root: str) -> None:
        found = capabilities(porto, root=root, user="54321", capabilities_ambient=["NET_BIND_SERVICE"])
        ambient = NET_BIND_SERVICE
        assert found == {"Prm": ambient, "Eff": ambient, "Bnd": ALL_OF_ROOT, "Inh": ambient, "Amb": ambient}

    def test_ambient_ones_are_bounded(self, porto: Client, root: str) -> None:
        with refused(
            errors.Permission,
            "Cannot prepare start for container a: Ambient capabilities out of bounds: NET_BIND_SERVICE",
        ):
            capabilities(porto, root=root, capabilities=["CHOWN"], capabilities_ambient=["NET_BIND_SERVICE"])

    def test_they_are_bounded_by_the_parents(self, porto: Client) -> None:
        start(porto, "p", "", capabilities=["CHOWN"])
        porto.create("p/a")
        porto.set_property("p/a", "capabilities", "CHOWN;KILL")
        assert porto.get_property("p/a", "capabilities_allowed") == "CHOWN"

    def test_some_take_a_namespace_or_a_limit(self, porto: Client, root: str) -> None:
        owned = {"owner_user": "nobody", "root": root}
        assert not capabilities(porto, **owned)["Bnd"] & NET_ADMIN
        assert capabilities(porto, **owned, net="none")["Bnd"] & NET_ADMIN

    def test_they_can_be_asked_for(self, porto: Client) -> None:
        porto.create("a")
        porto.set_property("a", "capabilities", "KILL")
        assert porto.get_property("a", "capabilities[KILL]") == "true"
        assert porto.get_property("a", "capabilities[CHOWN]") == "false"

    def test_it_may_gain_privileges(self, porto: Client) -> None:
        assert run(porto, "a", ["grep", "NoNewPrivs", "/proc/self/status"]).stdout == "NoNewPrivs:\t0\n"


class TestSystemCalls:
    MKDIR = "rules {{ syscall: 'mkdir' action {{ {0} }} }} rules {{ syscall: 'mkdirat' action {{ {0} }} }}"

    def _run(self, porto: Client, root: str, profile: str, script: str) -> list[str]:
        porto.create("a")
        porto.set_property("a", "root", root)
        porto.set_property("a", "seccomp", profile)
        porto.set_property("a", "command_argv", f"sh\t-c\t{script}")
        porto.start("a")
        porto.wait(["a"], 60)
        return porto.get_property("a", "stdout").splitlines()

    def test_an_error(self, porto: Client, root: str) -> None:
        profile = ALLOW + self.MKDIR.format("action: Errno value: 5")
        found = self._run(porto, root, profile, "mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status")
        assert found == ["mkdir: can't create directory '/tmp/x': Input/output error", "Seccomp:\t2"]

    def test_the_end(self, porto: Client, root: str) -> None:
        profile = ALLOW + self.MKDIR.format("action: Kill")
        assert self._run(porto, root, profile, "mkdir /tmp/x; echo $?") == ["159"]

    def test_by_argument(self, porto: Client, root: str) -> None:
        profile = (
            ALLOW + "rules { syscall: 'kill' action { action: Errno value: 5 } "
            "args { index: 1 compare: Eq value: 10 } }"
        )
        found = self._run(porto, root, profile, "kill -10 $$ 2>&1; kill -0 $$ && echo fine")
        assert found == ["sh: can't kill pid 2: Input/output error", "fine"] or found[1:] == ["fine"]
        assert "Input/output error" in found[0]

    def test_a_call_that_is_none(self, porto: Client) -> None:
        porto.create("a")
        with refused(errors.InvalidValue, "unkonwn syscall nosuchcall"):
            porto.set_property(
                "a",
                "seccomp",
                "default_action { action: Allow } rules { syscall: 'nosuchcall' action { action: Kill } }",
            )

    def test_children_inherit(self, porto: Client, root: str) -> None:
        porto.create("p")
        porto.set_property("p", "seccomp", ALLOW + self.MKDIR.format("action: Errno value: 5"))
        porto.set_property("p", "root", root)
        porto.start("p")
        assert "Input/output error" in run(porto, "p/a", ["mkdir", "/tmp/x"]).stderr


class TestDevices:
    def _run(self, porto: Client, root: str, devices: str, script: str) -> list[str]:
        porto.create("a")
        porto.set_property("a", "root", root)
        porto.set_property("a", "devices", devices)
        porto.set_property("a", "command_argv", f"sh\t-c\t{script}")
        porto.start("a")
        porto.wait(["a"], 60)
        return porto.get_property("a", "stdout").splitlines()

    def test_one_more(self, porto: Client, root: str) -> None:
        assert self._run(porto, root, "/dev/full rw /dev/a/b 0600 1 2", "stat -c '%t:%T %a %u:%g' /dev/a/b") == [
            "1:7 600 1:2",
        ]

    def test_to_read_alone(self, porto: Client, root: str) -> None:
        found = self._run(porto, root, "/dev/kmsg r", "stat -c '%t:%T' /dev/kmsg; (: > /dev/kmsg) || echo refused")
        assert found == ["1:b", "refused"]

    def test_no_others(self, porto: Client, root: str) -> None:
        script = "mknod /tmp/k c 1 11 && (: < /tmp/k) && echo open; head -c 1 /dev/zero | wc -c"
        assert self._run(porto, root, "/dev/zero rw", script) == ["1"]

    def test_taken_away(self, porto: Client, root: str) -> None:
        found = self._run(porto, root, "/dev/zero -", "ls /dev/zero 2>&1; ls /dev/null")
        assert found == ["ls: /dev/zero: No such file or directory", "/dev/null"]

    @pytest.mark.parametrize("isolate", [True, False])
    def test_the_usual_ones_otherwise(self, porto: Client, root: str, isolate: bool) -> None:
        start(porto, "p", "")
        porto.create_from_spec(
            spec("p/a", shell("stat -c '%n %t:%T %a %u:%g' /dev/null /dev/zero"), root=root, isolate=isolate)
        )
        porto.set_property("p/a", "devices", "/dev/null rw /dev/null 0600 1 2; /dev/full rw /dev/zero")
        porto.start("p/a")
        assert result(porto, "p/a").lines == ["/dev/null 1:3 600 1:2", "/dev/zero 1:7 666 0:0"]

    def test_while_it_runs(self, porto: Client, root: str) -> None:
        start(porto, "a", root=root)
        node = Path(f"/proc/{root_pid(porto, 'a')}/root/dev/kmsg")
        porto.set_property("a", "devices", "/dev/kmsg r")
        assert node.exists()
        assert "c 1:11 rm" in cgroup_value(porto, "a", "devices", "devices.list").splitlines()
        porto.set_property("a", "devices", "/dev/kmsg -")
        assert not node.exists()


class TestKernelSettings:
    def test_of_namespaces_of_its_own(self, porto: Client) -> None:
        assert (
            run(porto, "a", ["cat", "/proc/sys/kernel/shmmax"], sysctl={"kernel.shmmax": "12345"}).stdout == "12345\n"
        )
        found = run(
            porto, "a", ["cat", "/proc/sys/net/core/somaxconn"], net="none", sysctl={"net.core.somaxconn": "99"}
        )
        assert found.stdout == "99\n"

    @pytest.mark.parametrize(
        ("name", "properties", "reason"),
        [
            ("kernel.shmmax", {"isolate": False}, "requires ipc isolation"),
            ("net.core.somaxconn", {}, "requires net isolation"),
            ("net.nope", {"net": "none"}, "is not allowed"),
            ("vm.swappiness", {}, "is not allowed"),
            ("kernel.hostname", {}, "is not allowed"),
        ],
    )
    def test_of_others(self, porto: Client, name: str, properties: dict[str, Any], reason: str) -> None:
        with refused(errors.Permission, f"Sysctl {name} {reason}"):
            start(porto, "a", sysctl={name: "1"}, **properties)
