"""Users, capabilities, seccomp, masked paths: what a container asked for is what it has, seen from inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shim_porto_runtime import capabilities

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, failure
from tests.e2e.test_lifecycle import porto_socket
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root


def linux(**fields: Any) -> pb.LinuxContainerConfig:
    """A configuration with this security context; plain numbers for the fields that wrap them."""
    security = pb.LinuxContainerSecurityContext()
    for name in ("run_as_user", "run_as_group"):
        if name in fields:
            getattr(security, name).value = fields.pop(name)
    security.MergeFrom(pb.LinuxContainerSecurityContext(**fields))
    return pb.LinuxContainerConfig(security_context=security)


def capability(**lists: list[str]) -> pb.Capability:
    return pb.Capability(**{f"{name}_capabilities": value for name, value in lists.items()})


@pytest.fixture
def sandbox(pods: Pods) -> str:
    return pods.run()


class TestUser:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, "0:0:0"),
            ({"run_as_user": 1000}, "1000:100:100 200"),
            ({"run_as_user": 4242}, "4242:0:0"),
            ({"run_as_user": 1000, "run_as_group": 7}, "1000:7:7 200"),
            ({"run_as_username": "web"}, "1000:100:100 200"),
            ({"run_as_user": 1000, "supplemental_groups": [5, 6]}, "1000:100:5 6 100 200"),
            (
                {"run_as_user": 1000, "supplemental_groups": [5], "supplemental_groups_policy": pb.Strict},
                "1000:100:5 100",
            ),
        ],
    )
    def test_as_asked_in_container_exec_and_status(
        self, pods: Pods, sandbox: str, fields: dict[str, Any], expected: str
    ) -> None:
        script = "grep -E '^(Uid|Gid|Groups):' /proc/self/status"
        container = pods.container(sandbox, "sh", "-c", f"{script}; exec sleep 1000", linux=linux(**fields))

        def parsed(text: str) -> str:
            lines = dict(line.split(":", 1) for line in text.splitlines())
            groups = " ".join(sorted(set(lines["Groups"].split()), key=int))
            return f"{lines['Uid'].split()[0]}:{lines['Gid'].split()[0]}:{groups}"

        assert parsed(pods.shell(container, script)) == expected
        pods.stop(container)
        assert parsed(pods.log(container)) == expected
        user = pods.status(container).user.linux
        assert f"{user.uid}:{user.gid}:{' '.join(map(str, user.supplemental_groups))}" == expected

    def test_the_images_user_command_and_directory(self, pods: Pods, node: Node, registry: LocalRegistry) -> None:
        image = pb.ImageSpec(image=pull(node, f"{registry.address}/public/web:1"))
        sandbox = pods.run()
        container = pods.start(pods.create(sandbox, image=image))
        assert pods.exited(container).exit_code == 0
        assert pods.log(container) == "from cmd\n"
        assert pods.output(sandbox, "sh", "-c", "id -u; pwd; echo $HOME", image=image) == "1000\n/work/here\n/srv\n"
        config = pods.create(sandbox, image=image, args=["only", "args"])
        pods.exited(pods.start(config))
        assert pods.log(config) == "only args\n"
        status = node.cri.ImageStatus(pb.ImageStatusRequest(image=image)).image
        assert (status.username, status.HasField("uid")) == ("web", False)

    def test_a_group_without_a_user_is_refused(self, pods: Pods, sandbox: str) -> None:
        code, text = failure(pods.create, sandbox, "true", linux=linux(run_as_group=5))
        assert (code, "run_as_group" in text) == ("INVALID_ARGUMENT", True)


class TestEnvironment:
    def test_exactly_what_was_asked_for(self, pods: Pods, sandbox: str) -> None:
        values = {
            "SEMICOLON": "a;b\\;c",
            "SPACES": " a  b ",
            "LINES": "one\ntwo",
            "EMPTY": "",
            "UNICODE": "é",
            "EQUALS": "a=b",
        }
        envs = [pb.KeyValue(key=key, value=value.encode()) for key, value in values.items()]
        container = pods.container(sandbox, "sleep", "1000", envs=envs)
        raw = pods.exec(container, "sh", "-c", "cat /proc/self/environ").stdout.decode()
        found = dict(item.split("=", 1) for item in raw.split("\0") if item)
        for extra in ("SHLVL", "PWD", "OLDPWD", "_"):
            found.pop(extra, None)
        hostname = found.pop("HOSTNAME")
        assert hostname == pods.shell(container, "hostname").strip()
        assert found == {
            **values,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
        }

    def test_nothing_of_porto_is_seen(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox)
        assert "PORTO" not in pods.shell(container, "env")
        assert pods.exec(container, "ls", "/run/portod.socket").exit_code != 0
        assert "porto" not in pods.shell(
            container, "ls /run /dev; grep -v portoshim /proc/self/mountinfo | grep porto || true"
        )

    def test_the_working_directory_is_made(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "sh", "-c", "pwd; exec sleep 1000", working_dir="/not/there/yet")
        assert pods.shell(container, "pwd") == "/not/there/yet\n"


class TestCapabilities:
    def bits(self, pods: Pods, container: str) -> dict[str, int]:
        text = pods.shell(container, "grep ^Cap /proc/self/status")
        return {line.split(":")[0]: int(line.split(":")[1], 16) for line in text.splitlines()}

    @pytest.mark.parametrize(
        ("lists", "expected"),
        [
            ({}, capabilities.DEFAULT),
            ({"drop": ["ALL"]}, frozenset()),
            ({"drop": ["ALL"], "add": ["NET_ADMIN"]}, frozenset({"NET_ADMIN"})),
            ({"add": ["SYS_ADMIN"], "drop": ["CHOWN"]}, (capabilities.DEFAULT | {"SYS_ADMIN"}) - {"CHOWN"}),
        ],
    )
    def test_root(self, pods: Pods, sandbox: str, lists: dict[str, list[str]], expected: frozenset[str]) -> None:
        found = self.bits(pods, pods.container(sandbox, linux=linux(capabilities=capability(**lists))))
        wanted = capabilities.mask(expected)
        assert found == {"CapInh": 0, "CapPrm": wanted, "CapEff": wanted, "CapBnd": wanted, "CapAmb": 0}

    def test_others_have_none_but_ambient_ones(self, pods: Pods, sandbox: str) -> None:
        plain = self.bits(pods, pods.container(sandbox, linux=linux(run_as_user=1000)))
        assert (plain["CapEff"], plain["CapPrm"], plain["CapAmb"]) == (0, 0, 0)
        lists = pb.Capability(add_ambient_capabilities=["NET_BIND_SERVICE"])
        raised = self.bits(pods, pods.container(sandbox, linux=linux(run_as_user=1000, capabilities=lists)))
        assert raised["CapAmb"] == raised["CapEff"] == raised["CapInh"] == 0x400

    def test_privileged(self, pods: Pods) -> None:
        config = pods.config()
        config.linux.security_context.privileged = True
        sandbox = pods.run(config)
        container = pods.container(sandbox, linux=linux(privileged=True))
        # What the node itself may not do, nobody on it may.
        own = int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if "CapBnd" in line).split()[1], 16
        )
        assert self.bits(pods, container)["CapEff"] == capabilities.mask(capabilities.NAMES) & own
        pods.shell(container, "mkdir -p /mnt && mount -t tmpfs x /mnt")
        assert "kmsg" in pods.shell(container, "ls /dev")
        pods.shell(container, "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def test_a_privileged_container_needs_a_privileged_sandbox(self, pods: Pods, sandbox: str) -> None:
        code, text = failure(pods.create, sandbox, "true", linux=linux(privileged=True))
        assert (code, "privileged" in text) == ("INVALID_ARGUMENT", True)


class TestNoNewPrivileges:
    @pytest.mark.parametrize("wanted", [True, False])
    def test_as_asked(self, pods: Pods, sandbox: str, wanted: bool) -> None:
        container = pods.container(sandbox, linux=linux(no_new_privs=wanted))
        assert f"NoNewPrivs:\t{int(wanted)}" in pods.shell(container, "cat /proc/self/status")


class TestSeccomp:
    def status(self, pods: Pods, container: str) -> str:
        return next(
            line for line in pods.shell(container, "cat /proc/self/status").splitlines() if line.startswith("Seccomp:")
        )

    def test_unconfined_unless_asked(self, pods: Pods, sandbox: str) -> None:
        assert self.status(pods, pods.container(sandbox)) == "Seccomp:\t0"

    def test_the_default_profile(self, pods: Pods, sandbox: str) -> None:
        profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
        lists = pb.Capability(add_capabilities=["SYS_CHROOT"])
        container = pods.container(sandbox, linux=linux(seccomp=profile, capabilities=lists))
        assert self.status(pods, container) == "Seccomp:\t2"
        assert pods.exec(container, "unshare", "-U", "true").exit_code != 0
        assert "NoNewPrivs:\t0" in pods.shell(container, "cat /proc/self/status")

    def test_a_profile_of_the_node(self, pods: Pods, sandbox: str, tmp_path: Path) -> None:
        path = tmp_path / "no-chmod.json"
        rule = {"names": ["chmod", "fchmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
        path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
        profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=str(path))
        container = pods.container(sandbox, linux=linux(seccomp=profile))
        answer = pods.exec(container, "chmod", "777", "/tmp")
        assert b"Function not implemented" in answer.stderr

    @pytest.mark.parametrize("content", [None, "{", "[]", '{"defaultAction": "SCMP_ACT_NOTIFY"}'])
    def test_a_profile_that_cannot_be_used(self, pods: Pods, sandbox: str, tmp_path: Path, content: str | None) -> None:
        path = tmp_path / "profile.json"
        if content is not None:
            path.write_text(content)
        profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=str(path))
        code, text = failure(pods.create, sandbox, "true", linux=linux(seccomp=profile))
        assert (code, "seccomp" in text) == ("INVALID_ARGUMENT", True)

    def test_what_porto_does_not_have(self, pods: Pods, sandbox: str) -> None:
        profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="x")
        code, text = failure(pods.create, sandbox, "true", linux=linux(apparmor=profile))
        assert (code, "apparmor" in text) == ("UNIMPLEMENTED", True)
        code, text = failure(pods.create, sandbox, "true", linux=linux(selinux_options=pb.SELinuxOption(type="t")))
        assert (code, "selinux" in text) == ("UNIMPLEMENTED", True)


class TestThePauseProcess:
    """A pod's own process is as the pod's security context has it."""

    def status(self, pods: Pods, node: Node, sandbox: str) -> dict[str, str]:
        with Client(porto_socket(node)) as porto:
            pid = porto.get_property(f"{sandbox}/pause", "root_pid")
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        mounts = Path(f"/proc/{pid}/mounts").read_text().splitlines()
        root = next(line.split()[3] for line in mounts if line.split()[1] == "/")
        return {**found, "root": root.split(",")[0], "environment": Path(f"/proc/{pid}/environ").read_text()}

    def test_unless_asked(self, pods: Pods, node: Node, sandbox: str) -> None:
        found = self.status(pods, node, sandbox)
        # The image has a user.
        assert (found["Uid"].split()[0], found["Gid"].split()[0], found["Seccomp"]) == ("65535", "65535", "0")
        assert {found[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"0" * 16}
        assert found["root"] == "rw"
        assert "PORTO" not in found["environment"]

    def test_as_asked(self, pods: Pods, node: Node) -> None:
        config = pods.config()
        security = config.linux.security_context
        security.run_as_user.value, security.run_as_group.value = 4242, 7
        security.supplemental_groups.extend([5, 6])
        security.readonly_rootfs = True
        # As kubelet has it for every pod.
        security.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        found = self.status(pods, node, pods.run(config))
        assert (found["Uid"].split()[0], found["Gid"].split()[0], found["Seccomp"]) == ("4242", "7", "2")
        assert found["Groups"].split() == ["5", "6", "7"]
        assert found["root"] == "ro"

    @pytest.mark.parametrize(
        ("fields", "code", "expected"),
        [
            ({"run_as_group": 1}, "INVALID_ARGUMENT", "run_as_group"),
            ({"run_as_user": -1}, "INVALID_ARGUMENT", "run_as_user"),
            ({"supplemental_groups": [-1]}, "INVALID_ARGUMENT", "supplemental_groups"),
            ({"selinux_options": pb.SELinuxOption(level="s0")}, "UNIMPLEMENTED", "selinux_options"),
            (
                {"apparmor": pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="x")},
                "UNIMPLEMENTED",
                "apparmor",
            ),
            (
                {"seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="/not/there")},
                "INVALID_ARGUMENT",
                "seccomp",
            ),
        ],
    )
    def test_what_cannot_be_had(self, pods: Pods, fields: dict[str, Any], code: str, expected: str) -> None:
        config = pods.config()
        for name in ("run_as_user", "run_as_group"):
            if name in fields:
                getattr(config.linux.security_context, name).value = fields.pop(name)
        config.linux.security_context.MergeFrom(pb.LinuxSandboxSecurityContext(**fields))
        found, text = failure(pods.run, config)
        assert (found, f"linux.security_context.{expected}" in text) == (code, True), text


class TestPaths:
    def test_masked(self, pods: Pods, sandbox: str) -> None:
        masked = ["/proc/timer_list", "/proc/bus", "/proc/not-there", "/etc/passwd"]
        container = pods.container(sandbox, linux=linux(masked_paths=masked))
        assert pods.shell(container, "cat /etc/passwd | wc -c; ls /proc/bus | wc -l") == "0\n0\n"
        assert pods.exec(container, "touch", "/proc/bus/x").exit_code != 0

    def test_read_only(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, linux=linux(readonly_paths=["/etc", "/not-there"]))
        assert pods.exec(container, "touch", "/etc/x").exit_code != 0
        pods.shell(container, "touch /home/x")

    def test_a_read_only_root(self, pods: Pods, sandbox: str, tmp_path: Path) -> None:
        mount = pb.Mount(container_path="/new/place", host_path=str(tmp_path))
        container = pods.container(
            sandbox, "sleep", "1000", linux=linux(readonly_rootfs=True), mounts=[mount], working_dir="/made/for/it"
        )
        for path in ("/", "/etc", "/usr", "/made"):
            answer = pods.exec(container, "touch", f"{path}/x")
            assert b"Read-only file system" in answer.stderr, path
        pods.shell(container, "touch /new/place/x; echo ok > /dev/shm/x; pwd")
        assert (tmp_path / "x").exists()

    def test_a_writable_root_is_not_shared(self, pods: Pods, sandbox: str) -> None:
        one, two = pods.container(sandbox), pods.container(sandbox)
        pods.shell(one, "echo one > /only-here")
        assert pods.exec(two, "ls", "/only-here").exit_code != 0
