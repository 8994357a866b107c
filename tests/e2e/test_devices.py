"""Devices: those that were asked for, and no others. Named by path, and by CDI."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.pods import Pods, failure
from tools.node import Node

pytestmark = pytest.mark.root

FUSE, LOOP = "/dev/fuse", "/dev/loop-control"


@pytest.fixture(scope="module")
def pods(node: Node, busybox: str) -> Iterator[Pods]:
    """One for all tests of this file: none of them minds the others' containers."""
    made = Pods(node, busybox)
    yield made
    made.remove_all()


@pytest.fixture(scope="module")
def sandbox(pods: Pods) -> str:
    return pods.run()


@pytest.fixture(scope="module")
def privileged(pods: Pods) -> str:
    config = pods.config()
    config.linux.security_context.privileged = True
    return pods.run(config)


def device(host_path: str, container_path: str | None = None, permissions: str = "rwm") -> pb.Device:
    return pb.Device(host_path=host_path, container_path=container_path or host_path, permissions=permissions)


def user(uid: int) -> pb.LinuxContainerConfig:
    security = pb.LinuxContainerSecurityContext(run_as_user=pb.Int64Value(value=uid))
    return pb.LinuxContainerConfig(security_context=security)


def number(path: str) -> str:
    """A device's numbers as ls prints them."""
    status = os.stat(path)
    return f"{os.major(status.st_rdev)}, {os.minor(status.st_rdev):3d}"


class TestByPath:
    def test_nothing_that_was_not_asked_for_can_be_used(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox)
        fuse = os.stat(FUSE).st_rdev
        answer = pods.exec(
            container,
            "sh",
            "-c",
            f"mknod /dev/x c {os.major(fuse)} {os.minor(fuse)} && head -c0 /dev/x && echo used;"
            "mknod /dev/y b 7 0 && head -c0 /dev/y && echo used",
        )
        assert answer.stdout == b""
        assert b"Operation not permitted" in answer.stderr
        for path in ("null", "zero", "full", "random", "urandom", "tty", "ptmx"):
            assert pods.exec(container, "ls", f"/dev/{path}").exit_code == 0, path

    def test_a_device_where_it_was_asked_for(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "sleep", "1000", devices=[device(FUSE, "/dev/a/b")])
        assert number(FUSE) in pods.shell(container, "ls -l /dev/a/b")
        pods.shell(container, "head -c0 /dev/a/b")
        assert pods.exec(container, "ls", FUSE).exit_code != 0

    def test_only_for_the_container_that_asked(self, pods: Pods, sandbox: str) -> None:
        pods.container(sandbox, "sleep", "1000", devices=[device(FUSE)])
        fuse = os.stat(FUSE).st_rdev
        for other in (pods.container(sandbox), pods.container(sandbox, "sleep", "1000", devices=[device(LOOP)])):
            script = f"ls {FUSE}; mknod /dev/x c {os.major(fuse)} {os.minor(fuse)}; head -c0 /dev/x && echo used"
            assert pods.exec(other, "sh", "-c", script).stdout == b""

    @pytest.mark.parametrize(
        ("permissions", "reads", "writes"), [("r", 1, 0), ("w", 0, 1), ("rw", 1, 1), ("rwm", 1, 1)]
    )
    def test_permissions(self, pods: Pods, sandbox: str, permissions: str, reads: int, writes: int) -> None:
        # The other container of the pod has them all.
        pods.container(sandbox, "sleep", "1000", devices=[device("/dev/loop7", permissions="rw")])
        container = pods.container(sandbox, "sleep", "1000", devices=[device("/dev/loop7", "/dev/x", permissions)])
        found = pods.shell(container, "head -c0 /dev/x; echo $?; sh -c ': >> /dev/x'; echo $?").split()
        assert [status == "0" for status in found] == [bool(reads), bool(writes)]

    def test_a_directory_of_devices(self, pods: Pods, sandbox: str) -> None:
        container = pods.container(sandbox, "sleep", "1000", devices=[device("/dev/net", "/dev/others")])
        assert pods.shell(container, "ls /dev/others") == "tun\n"

    def test_a_privileged_container_has_all_and_what_it_asks_for(self, pods: Pods, privileged: str) -> None:
        security = pb.LinuxContainerSecurityContext(privileged=True)
        linux = pb.LinuxContainerConfig(security_context=security)
        plain = pods.container(privileged, "sleep", "1000", devices=[device(FUSE, "/dev/x")])
        assert pods.exec(plain, "ls", FUSE).exit_code != 0
        container = pods.container(privileged, "sleep", "1000", linux=linux, devices=[device(LOOP, "/dev/renamed")])
        pods.shell(container, f"head -c0 {FUSE}; head -c0 /dev/renamed; head -c0 /dev/x && exit 1; true")
        # Such as it would be had it come later.
        pods.shell(container, "mknod /dev/later b 7 99 && head -c0 /dev/later || [ ! -e /sys/block/loop99 ]")

    @pytest.mark.parametrize(
        ("wanted", "code", "expected"),
        [
            (device("/dev/nothing"), "INVALID_ARGUMENT", "devices[0].host_path"),
            (device("relative", "/dev/x"), "INVALID_ARGUMENT", "devices[0].host_path"),
            (device("/dev/../etc/passwd", "/dev/x"), "INVALID_ARGUMENT", "devices[0].host_path"),
            (device("/etc/passwd", "/dev/x"), "UNIMPLEMENTED", "devices[0].host_path"),
            (device("/dev/pts/0", "/dev/x"), "INVALID_ARGUMENT", "devices[0].host_path"),
            (device("/dev/pts", "/dev/x"), "INVALID_ARGUMENT", "devices[0].host_path"),
            (device(FUSE, "x"), "INVALID_ARGUMENT", "devices[0].container_path"),
            (device(FUSE, "/x"), "UNIMPLEMENTED", "devices[0].container_path"),
            (device(FUSE, "/dev/null"), "INVALID_ARGUMENT", "devices[0].container_path"),
            (device(FUSE, "/dev/shm/x"), "INVALID_ARGUMENT", "devices[0].container_path"),
            (device(FUSE, "/dev/fd/3"), "INVALID_ARGUMENT", "devices[0].container_path"),
            (device(FUSE, permissions="rx"), "INVALID_ARGUMENT", "devices[0].permissions"),
        ],
    )
    def test_what_cannot_be_had(self, pods: Pods, sandbox: str, wanted: pb.Device, code: str, expected: str) -> None:
        found, text = failure(pods.create, sandbox, "true", devices=[wanted])
        assert found == code
        assert expected in text

    def test_two_at_one_place(self, pods: Pods, sandbox: str) -> None:
        code, text = failure(pods.create, sandbox, "true", devices=[device(FUSE, "/dev/x"), device(LOOP, "/dev/x")])
        assert (code, "devices" in text) == ("INVALID_ARGUMENT", True)


KIND = "vendor.example/thing"


class TestByName:
    @pytest.fixture
    def specs(self, node: Node) -> Iterator[Path]:
        """The directory of the node's CDI files."""
        directory = node.directory / "cdi"
        directory.mkdir(exist_ok=True)
        before = set(directory.iterdir())
        yield directory
        for file in set(directory.iterdir()) - before:
            file.unlink()

    @pytest.fixture
    def describe(self, specs: Path) -> Callable[..., None]:
        """Writes a file with one device, ``vendor.example/thing=one``."""

        def write(file: str = "vendor.json", for_all: dict[str, Any] | None = None, **edits: Any) -> None:
            document = {
                "cdiVersion": "0.7.0",
                "kind": KIND,
                "containerEdits": for_all or {},
                "devices": [{"name": "one", "containerEdits": edits}],
            }
            (specs / file).write_text(json.dumps(document) if file.endswith("json") else yaml.safe_dump(document))

        return write

    def wanted(self, *names: str) -> list[pb.CDIDevice]:
        return [pb.CDIDevice(name=name) for name in names or (f"{KIND}=one",)]

    def test_all_that_a_device_may_need(
        self, pods: Pods, sandbox: str, describe: Callable[..., None], tmp_path: Path
    ) -> None:
        (tmp_path / "lib.so").write_text("library\n")
        tmp_path.chmod(0o755)
        describe(
            for_all={"env": ["FOR_ALL=yes"]},
            env=["NAME=a b=c"],
            deviceNodes=[
                {"path": "/dev/thing0", "hostPath": FUSE, "permissions": "rw"},
                {"path": "/dev/loop7", "type": "b", "major": 7, "minor": 7, "fileMode": 0o604, "uid": 5, "gid": 6},
            ],
            mounts=[
                {"hostPath": str(tmp_path), "containerPath": "/usr/lib/thing", "options": ["ro", "nosuid", "bind"]}
            ],
            additionalGids=[0, 777],
        )
        container = pods.container(sandbox, "sleep", "1000", CDI_devices=self.wanted(), linux=user(1000))
        assert pods.shell(container, 'echo "$FOR_ALL $NAME"; cat /usr/lib/thing/lib.so') == "yes a b=c\nlibrary\n"
        nodes = [line.split()[:6] for line in pods.shell(container, "ls -ln /dev/thing0 /dev/loop7").splitlines()]
        assert [line[0] + " ".join(line[2:4]) for line in nodes] == ["brw----r--5 6", "crw-------1000 100"]
        pods.shell(container, "head -c0 /dev/thing0")
        assert pods.exec(container, "touch", "/usr/lib/thing/x").exit_code != 0
        assert "777" in pods.shell(container, "id -G").split()
        assert 777 in pods.status(container).user.linux.supplemental_groups

    def test_by_annotation_too_and_once(self, pods: Pods, sandbox: str, describe: Callable[..., None]) -> None:
        describe("vendor.yaml", env=["FOUND=yes"])
        annotations = {"cdi.k8s.io/plugin": f"{KIND}=one", "cdi.example/other": "not meant"}
        container = pods.container(sandbox, "sleep", "1000", CDI_devices=self.wanted(), annotations=annotations)
        assert pods.shell(container, "echo $FOUND") == "yes\n"
        container = pods.container(sandbox, "sleep", "1000", annotations=annotations)
        assert pods.shell(container, "echo $FOUND") == "yes\n"
        assert dict(pods.status(container).annotations) == annotations

    def test_a_changed_file_is_read_again(self, pods: Pods, sandbox: str, describe: Callable[..., None]) -> None:
        for value in ("first", "second"):
            describe(env=[f"FOUND={value}"])
            assert pods.output(sandbox, "sh", "-c", "echo $FOUND", CDI_devices=self.wanted()) == f"{value}\n"

    def test_another_container_gets_nothing_of_it(
        self, pods: Pods, sandbox: str, describe: Callable[..., None]
    ) -> None:
        describe(env=["FOUND=yes"], deviceNodes=[{"path": FUSE}], additionalGids=[777])
        pods.container(sandbox, "sleep", "1000", CDI_devices=self.wanted())
        other = pods.container(sandbox)
        assert pods.shell(other, f"echo $FOUND; ls {FUSE} 2>/dev/null; id -G") == "\n0\n"

    @pytest.mark.parametrize(
        ("edits", "code", "expected"),
        [
            ({"hooks": [{"hookName": "createContainer", "path": "/bin/true"}]}, "UNIMPLEMENTED", "hooks"),
            ({"netDevices": [{"hostInterfaceName": "eth1", "name": "eth1"}]}, "UNIMPLEMENTED", "netDevices"),
            ({"intelRdt": {"closID": "x"}}, "UNIMPLEMENTED", "intelRdt"),
            ({"mounts": [{"hostPath": "/not/there", "containerPath": "/x"}]}, "NOT_FOUND", "mounts"),
            ({"mounts": [{"hostPath": "/tmp", "containerPath": "/x", "type": "tmpfs"}]}, "UNIMPLEMENTED", "mounts"),
            (
                {"mounts": [{"hostPath": "/tmp", "containerPath": "/x", "options": ["sync"]}]},
                "UNIMPLEMENTED",
                "mounts.options",
            ),
            ({"mounts": [{"hostPath": "/tmp", "containerPath": "/proc"}]}, "INVALID_ARGUMENT", "mounts"),
            ({"deviceNodes": [{"path": "/dev/nothing"}]}, "INVALID_ARGUMENT", "deviceNodes"),
            ({"deviceNodes": [{"path": FUSE, "major": 1}]}, "UNIMPLEMENTED", "deviceNodes"),
            ({"deviceNodes": [{"path": FUSE, "type": "b"}]}, "INVALID_ARGUMENT", "deviceNodes.type"),
            ({"deviceNodes": [{"path": FUSE, "permissions": "none"}]}, "UNIMPLEMENTED", "deviceNodes.permissions"),
            ({"deviceNodes": [{"path": FUSE, "fileMode": 0o4755}]}, "INVALID_ARGUMENT", "deviceNodes.fileMode"),
            ({"deviceNodes": [{"path": FUSE, "uid": -1}]}, "INVALID_ARGUMENT", "deviceNodes.uid"),
            ({"env": ["=x"]}, "INVALID_ARGUMENT", "env"),
            ({"additionalGids": [2**40]}, "INVALID_ARGUMENT", "additionalGids"),
        ],
    )
    def test_what_cannot_be_done_for_a_device(
        self,
        pods: Pods,
        sandbox: str,
        describe: Callable[..., None],
        edits: dict[str, Any],
        code: str,
        expected: str,
    ) -> None:
        describe(**edits)
        found, text = failure(pods.create, sandbox, "true", CDI_devices=self.wanted())
        assert (found, text.startswith("CDI_devices[0]"), expected in text) == (code, True, True), text

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("{", "double quotes"),
            ("[]", "must be an object"),
            ({"cdiVersion": "9.0.0"}, "cdiVersion"),
            ({"kind": "nothing"}, "kind"),
            ({"unknown": 1}, "unknown"),
            ({"devices": []}, "there are none"),
            ({"devices": [{"name": "one"}, {"name": "one"}]}, "once"),
            ({"devices": [{"name": "one", "containerEdits": {"env": "x"}}]}, "must be an array"),
            ({"devices": [{"name": "one", "containerEdits": {"deviceNodes": [{"hostpath": "/x"}]}}]}, "unknown"),
        ],
    )
    def test_a_broken_file_is_named_when_its_device_is_missed(
        self, pods: Pods, sandbox: str, specs: Path, content: str | dict[str, Any], why: str
    ) -> None:
        good = {"cdiVersion": "0.6.0", "kind": KIND, "devices": [{"name": "one"}]}
        (specs / "broken.json").write_text(content if isinstance(content, str) else json.dumps(good | content))
        code, text = failure(pods.create, sandbox, "true", CDI_devices=self.wanted())
        assert (code, "broken.json" in text, why in text) == ("NOT_FOUND", True, True), text

    def test_one_described_twice_is_not_guessed(self, pods: Pods, sandbox: str, describe: Callable[..., None]) -> None:
        describe("a.json", env=["A=1"])
        describe("b.json", env=["A=2"])
        code, text = failure(pods.create, sandbox, "true", CDI_devices=self.wanted())
        assert (code, "more than once" in text) == ("NOT_FOUND", True)

    @pytest.mark.parametrize(
        "name", ["", "thing", "vendor.example/thing", "vendor.example/thing=", "/thing=x", "a/b=c d"]
    )
    def test_what_is_no_name(self, pods: Pods, sandbox: str, name: str) -> None:
        code, text = failure(pods.create, sandbox, "true", CDI_devices=self.wanted(name, ""))
        assert (code, "CDI_devices" in text) == ("INVALID_ARGUMENT", True)
