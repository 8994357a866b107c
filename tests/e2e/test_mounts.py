"""Mounts and volumes, seen from inside."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, failure
from tools import images
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root


@pytest.fixture
def sandbox(pods: Pods) -> str:
    return pods.run()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A shared mount of the node with a directory in it."""
    path = tmp_path / "shared"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "shared", str(path)], check=True)
    subprocess.run(["mount", "--make-rshared", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-R", "-l", str(path)], check=False)


def mount(container_path: str, host_path: Path | str, **fields: Any) -> pb.Mount:
    return pb.Mount(container_path=container_path, host_path=str(host_path), **fields)


def test_directories_and_files(pods: Pods, sandbox: str, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/file").write_text("hello\n")
    container = pods.container(
        sandbox,
        "sleep", "1000",
        mounts=[mount("/data", tmp_path / "dir"), mount("/one/file", tmp_path / "dir/file", readonly=True)],
    )  # fmt: skip
    assert pods.shell(container, "cat /data/file /one/file") == "hello\nhello\n"
    pods.shell(container, "echo from inside > /data/new")
    assert (tmp_path / "dir/new").read_text() == "from inside\n"
    assert pods.exec(container, "sh", "-c", "echo x > /one/file").exit_code != 0
    assert [m.container_path for m in pods.status(container).mounts] == ["/data", "/one/file"]


def test_a_symlink_on_the_host_is_followed(pods: Pods, sandbox: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("real\n")
    (tmp_path / "link").symlink_to("real")
    container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/data", tmp_path / "link")])
    assert pods.shell(container, "cat /data/file") == "real\n"


def test_a_missing_directory_is_made(pods: Pods, sandbox: str, tmp_path: Path) -> None:
    container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/data", tmp_path / "not/there")])
    pods.shell(container, "touch /data/x")
    assert (tmp_path / "not/there/x").exists()


def test_mounts_within_mounts_in_any_order(pods: Pods, sandbox: str, tmp_path: Path) -> None:
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    mounts = [mount("/a/b/c", tmp_path / "inner"), mount("/a/b", tmp_path / "outer")]
    container = pods.container(sandbox, "sleep", "1000", mounts=mounts)
    assert pods.shell(container, "cat /a/b/which /a/b/c/which") == "outerinner"


def test_a_target_never_leads_to_the_host(
    pods: Pods, sandbox: str, registry: LocalRegistry, node: Node, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    links = images.layer(
        [images.File("link", link=str(canary)), images.File("up", link="../../../../../../.." + str(canary))]
    )
    images.push(images.busybox(extra=[links]), registry, "public/links", ["1"])
    image = pb.ImageSpec(image=pull(node, f"{registry.address}/public/links:1"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("x")
    mounts = [mount("/link/a", tmp_path / "data"), mount("/up/b", tmp_path / "data/file")]
    container = pods.container(sandbox, "sleep", "1000", image=image, mounts=mounts)
    pods.shell(container, "ls /link/a/file /up/b")
    assert list(canary.iterdir()) == []


def test_the_hosts_dev_and_sys(pods: Pods, sandbox: str) -> None:
    container = pods.container(
        sandbox,
        "sleep",
        "1000",
        mounts=[mount("/host/sys", "/sys", readonly=True), mount("/host/dev", "/dev", readonly=True)],
    )
    pods.shell(container, "ls /host/sys/kernel; ls /host/dev/null")
    container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/sys", "/sys")])
    assert "rw" in pods.shell(container, "grep ' /sys ' /proc/mounts | tail -1").split()[3].split(",")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"container_path": "relative"}, "container_path"),
        ({"container_path": "/"}, "container_path"),
        ({"container_path": "/a/../../b"}, "container_path"),
        ({"container_path": "/.portoshim"}, "container_path"),
        ({"host_path": ""}, "host_path"),
        ({"host_path": "relative"}, "host_path"),
        ({"recursive_read_only": True}, "recursive_read_only"),
        ({"recursive_read_only": True, "readonly": True, "propagation": pb.PROPAGATION_HOST_TO_CONTAINER}, "recursive"),
        ({"image_sub_path": "x"}, "image_sub_path"),
        ({"propagation": 7}, "propagation"),
    ],
)
def test_a_mount_nobody_can_have(pods: Pods, sandbox: str, fields: dict[str, Any], expected: str) -> None:
    wanted: dict[str, Any] = {"container_path": "/data", "host_path": "/tmp", **fields}
    code, text = failure(pods.create, sandbox, "true", mounts=[pb.Mount(**wanted)])
    assert code == "INVALID_ARGUMENT"
    assert f"mounts[0].{expected}" in text


class TestPropagation:
    def mounted_later(self, path: Path) -> None:
        (path / "later").mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "later", str(path / "later")], check=True)
        (path / "later/file").touch()

    @pytest.mark.parametrize(
        ("propagation", "seen"),
        [
            (pb.PROPAGATION_PRIVATE, False),
            (pb.PROPAGATION_HOST_TO_CONTAINER, True),
            (pb.PROPAGATION_BIDIRECTIONAL, True),
        ],
    )
    def test_from_the_host(self, pods: Pods, shared: Path, propagation: int, seen: bool) -> None:
        config = pods.config()
        config.linux.security_context.privileged = True
        sandbox = pods.run(config)
        privileged = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(privileged=True))
        container = pods.container(
            sandbox, "sleep", "1000", linux=privileged, mounts=[mount("/data", shared, propagation=propagation)]
        )
        self.mounted_later(shared)
        assert (pods.exec(container, "ls", "/data/later/file").exit_code == 0) is seen

    @pytest.mark.parametrize(
        ("propagation", "seen"),
        [
            (pb.PROPAGATION_PRIVATE, False),
            (pb.PROPAGATION_HOST_TO_CONTAINER, False),
            (pb.PROPAGATION_BIDIRECTIONAL, True),
        ],
    )
    def test_to_the_host(self, pods: Pods, shared: Path, propagation: int, seen: bool) -> None:
        config = pods.config()
        config.linux.security_context.privileged = True
        sandbox = pods.run(config)
        privileged = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(privileged=True))
        container = pods.container(
            sandbox, "sleep", "1000", linux=privileged, mounts=[mount("/data", shared, propagation=propagation)]
        )
        pods.shell(container, "mkdir /data/inside && mount -t tmpfs x /data/inside && touch /data/inside/file")
        assert (shared / "inside/file").exists() is seen

    def test_a_mount_that_is_not_shared_cannot_be_bidirectional(self, pods: Pods, sandbox: str, tmp_path: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "x", str(tmp_path)], check=True)
        subprocess.run(["mount", "--make-private", str(tmp_path)], check=True)
        try:
            wanted = mount("/data", tmp_path, propagation=pb.PROPAGATION_BIDIRECTIONAL)
            code, text = failure(pods.create, sandbox, "true", mounts=[wanted])
            assert (code, "not a shared mount" in text) == ("INVALID_ARGUMENT", True)
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_read_only_all_the_way_down(self, pods: Pods, sandbox: str, shared: Path) -> None:
        self.mounted_later(shared)
        plain = pods.container(sandbox, "sleep", "1000", mounts=[mount("/data", shared, readonly=True)])
        assert pods.exec(plain, "touch", "/data/x").exit_code != 0
        assert pods.exec(plain, "touch", "/data/later/x").exit_code == 0
        recursive = mount("/data", shared, readonly=True, recursive_read_only=True)
        container = pods.container(sandbox, "sleep", "1000", mounts=[recursive])
        assert b"Read-only" in pods.exec(container, "touch", "/data/later/x").stderr


class TestImageVolumes:
    @pytest.fixture
    def data(self, registry: LocalRegistry, node: Node) -> str:
        files = [
            images.File("dir/file", b"from an image\n"),
            images.File("top", b"top\n"),
            images.File("escape", link="/etc"),
        ]
        images.push(images.build([images.layer(files)], {}), registry, "public/data", ["1"])
        return pull(node, f"{registry.address}/public/data:1")

    def test_an_image_is_a_volume(self, pods: Pods, sandbox: str, data: str) -> None:
        wanted = pb.Mount(container_path="/data", image=pb.ImageSpec(image=data), readonly=True)
        container = pods.container(sandbox, "sleep", "1000", mounts=[wanted])
        assert pods.shell(container, "cat /data/dir/file") == "from an image\n"
        assert b"Read-only" in pods.exec(container, "touch", "/data/x").stderr
        pods.remove(container)

    def test_a_part_of_it(self, pods: Pods, sandbox: str, data: str) -> None:
        wanted = pb.Mount(container_path="/data", image=pb.ImageSpec(image=data), image_sub_path="dir")
        container = pods.container(sandbox, "sleep", "1000", mounts=[wanted])
        assert pods.shell(container, "ls /data") == "file\n"

    def test_a_part_that_is_not_there_or_elsewhere(self, pods: Pods, sandbox: str, data: str) -> None:
        for path, code in (("nothing", "NOT_FOUND"), ("../x", "INVALID_ARGUMENT"), ("/dir", "INVALID_ARGUMENT")):
            wanted = pb.Mount(container_path="/data", image=pb.ImageSpec(image=data), image_sub_path=path)
            assert failure(pods.create, sandbox, "true", mounts=[wanted])[0] == code
        wanted = pb.Mount(container_path="/data", image=pb.ImageSpec(image=data), image_sub_path="escape")
        assert failure(pods.create, sandbox, "true", mounts=[wanted])[0] == "NOT_FOUND"

    def test_an_image_that_is_not_here(self, pods: Pods, sandbox: str) -> None:
        wanted = pb.Mount(container_path="/data", image=pb.ImageSpec(image="nowhere.example/x:1"))
        assert failure(pods.create, sandbox, "true", mounts=[wanted])[0] == "NOT_FOUND"


class TestVolumesOfTheImage:
    def test_they_are_volumes_with_the_images_content(
        self, pods: Pods, sandbox: str, registry: LocalRegistry, node: Node
    ) -> None:
        files = [images.File("vol/file", b"content\n"), images.File("vol/link", link="/etc/passwd")]
        made = images.busybox({"Volumes": {"/vol": {}, "/empty/one": {}, "/../../../etc": {}}}, [images.layer(files)])
        images.push(made, registry, "public/volumes", ["1"])
        image = pb.ImageSpec(image=pull(node, f"{registry.address}/public/volumes:1"))
        container = pods.container(sandbox, "sleep", "1000", image=image)
        assert pods.shell(
            container, "cat /vol/file; readlink /vol/link; grep -c -E ' (/vol|/empty/one) ' /proc/mounts"
        ) == ("content\n/etc/passwd\n2\n")
        pods.shell(container, "echo changed > /vol/file")
        other = pods.container(sandbox, "sleep", "1000", image=image)
        assert pods.shell(other, "cat /vol/file") == "content\n"
        host = node.directory / "volumes" / f"{container}-volumes"
        assert host.exists()
        pods.remove(container)
        assert not host.exists()


class TestWhatAPodShares:
    def test_shared_memory_and_semaphores(self, pods: Pods) -> None:
        sandbox = pods.run()
        options = pb.NamespaceOption(pid=pb.CONTAINER)
        linux = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(namespace_options=options))
        one, two = (pods.container(sandbox, "sleep", "1000", linux=linux) for _ in range(2))
        pods.shell(one, "echo shared > /dev/shm/x")
        assert pods.shell(two, "cat /dev/shm/x") == "shared\n"
        assert pods.shell(one, "readlink /proc/self/ns/ipc") == pods.shell(two, "readlink /proc/self/ns/ipc")
        other = pods.container(pods.run(), "sleep", "1000", linux=linux)
        assert pods.exec(other, "ls", "/dev/shm/x").exit_code != 0
        assert pods.shell(other, "readlink /proc/self/ns/ipc") != pods.shell(two, "readlink /proc/self/ns/ipc")
        assert os.readlink("/proc/self/ns/ipc") not in pods.shell(one, "readlink /proc/self/ns/ipc")

    def test_hosts_hostname_and_resolver(self, pods: Pods, tmp_path: Path) -> None:
        dns = pb.DNSConfig(servers=["10.0.0.10"], searches=["a.example"], options=["ndots:5"])
        sandbox = pods.run(hostname="web-0", dns_config=dns)
        container = pods.container(sandbox)
        assert pods.shell(container, "cat /etc/hostname; hostname") == "web-0\nweb-0\n"
        assert (
            pods.shell(container, "cat /etc/resolv.conf") == "nameserver 10.0.0.10\nsearch a.example\noptions ndots:5\n"
        )
        assert "localhost" in pods.shell(container, "cat /etc/hosts")
        (tmp_path / "hosts").write_text("1.2.3.4 kubelet\n")
        container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/etc/hosts", tmp_path / "hosts")])
        assert pods.shell(container, "cat /etc/hosts") == "1.2.3.4 kubelet\n"
