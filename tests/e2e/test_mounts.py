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


@pytest.fixture(scope="module")
def pods(node: Node, busybox: str) -> Iterator[Pods]:
    """One for all tests of this file: none of them minds the others' containers."""
    made = Pods(node, busybox)
    yield made
    made.remove_all()


@pytest.fixture(scope="module")
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


def volume(image: str, **fields: Any) -> pb.Mount:
    return pb.Mount(**{"container_path": "/data", "image": pb.ImageSpec(image=image), "readonly": True, **fields})


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


def test_the_hosts_dev_proc_and_sys(pods: Pods, sandbox: str) -> None:
    container = pods.container(
        sandbox,
        "sleep",
        "1000",
        mounts=[
            mount("/host/sys", "/sys", readonly=True),
            mount("/host/dev", "/dev", readonly=True),
            mount("/host/proc", "/proc", readonly=True),
        ],
    )
    pods.shell(container, "ls /host/sys/kernel; echo x > /host/dev/null; ls /host/proc/1/status")
    container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/sys", "/sys")])
    assert "rw" in flags(pods, container, "/sys")


def test_the_hosts_dev_in_place_of_the_containers_own(pods: Pods, sandbox: str, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    mounts = [mount("/dev/termination-log", tmp_path / "log"), mount("/dev", "/dev")]
    container = pods.container(sandbox, "sleep", "1000", mounts=mounts)
    assert pods.shell(container, "ls /dev | grep -c loop").strip() != "0"
    pods.shell(container, "echo x > /dev/null; echo ended > /dev/termination-log; echo x > /dev/shm/x")
    assert (tmp_path / "log").read_text() == "ended\n"
    assert not Path("/dev/shm/x").exists(), "the pod has a /dev/shm of its own"
    Path("/dev/termination-log").unlink()  # made to be mounted over, as everywhere


def test_a_device_over_one_of_the_runtimes(pods: Pods, sandbox: str) -> None:
    container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/dev/random", "/dev/zero")])
    assert pods.shell(container, "head -c2 /dev/random | od -An -tx1") == " 00 00\n"


def test_the_host_as_a_whole(pods: Pods, sandbox: str) -> None:
    container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/host", "/")])
    pods.shell(container, "chroot /host sh -c 'echo x > /dev/null; cat /proc/self/status > /dev/null'")


def flags(pods: Pods, container: str, path: str) -> set[str]:
    """The options of what is mounted at a path."""
    return set(pods.shell(container, f"grep ' {path} ' /proc/mounts | tail -1").split()[3].split(","))


OPTIONS = {"nosuid", "nodev", "noexec"}


class TestFlags:
    @pytest.fixture
    def strict(self, tmp_path: Path) -> Iterator[Path]:
        """A filesystem of the host without set-uid, devices and programs, and one with them below it."""
        path = tmp_path / "strict"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec", "strict", str(path)], check=True)
        yield path
        subprocess.run(["umount", "-R", "-l", str(path)], check=False)

    def test_those_of_the_host_stay(self, pods: Pods, sandbox: str, strict: Path, tmp_path: Path) -> None:
        (tmp_path / "lax").mkdir()
        mounts = [mount("/strict", strict), mount("/lax", tmp_path / "lax")]
        container = pods.container(sandbox, "sleep", "1000", mounts=mounts)
        assert flags(pods, container, "/strict") >= OPTIONS
        assert not flags(pods, container, "/lax") & {"nodev", "noexec", "ro"}

    def test_those_of_mounts_below_stay_too(self, pods: Pods, sandbox: str, strict: Path) -> None:
        (strict / "below").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "below", str(strict / "below")], check=True)
        container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/strict", strict, readonly=True)])
        assert flags(pods, container, "/strict") >= {*OPTIONS, "ro"}
        assert not flags(pods, container, "/strict/below") & {*OPTIONS, "ro"}

    def test_a_read_only_filesystem_of_the_host(self, pods: Pods, sandbox: str, strict: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(strict)], check=True)
        container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/strict", strict)])
        assert b"Read-only" in pods.exec(container, "touch", "/strict/x").stderr

    @pytest.mark.parametrize("option", sorted(OPTIONS))
    @pytest.mark.parametrize("propagation", [pb.PROPAGATION_PRIVATE, pb.PROPAGATION_BIDIRECTIONAL])
    def test_those_asked_for(
        self, pods: Pods, sandbox: str, shared: Path, option: str, propagation: pb.MountPropagation
    ) -> None:
        wanted = mount("/data", shared, propagation=propagation, mount_options=[option])
        container = pods.container(sandbox, "sleep", "1000", mounts=[wanted])
        assert flags(pods, container, "/data") & OPTIONS == {option}

    def test_one_nobody_knows(self, pods: Pods, sandbox: str, tmp_path: Path) -> None:
        code, text = failure(pods.create, sandbox, "true", mounts=[mount("/x", tmp_path, mount_options=["sync"])])
        assert (code, "mounts[0].mount_options" in text) == ("UNIMPLEMENTED", True)


class TestPlaces:
    """Where things can be mounted, and where not."""

    @pytest.mark.parametrize("path", ["/a b", "/a;b", "/a\nb", "/é", "/a\\b", "/run/x", "/var/run/x", "/mnt//x/./y"])
    def test_any_name(self, pods: Pods, sandbox: str, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").write_text("here\n")
        container = pods.container(sandbox, "sleep", "1000", mounts=[mount(path, tmp_path)])
        assert pods.exec(container, "cat", f"{path}/file").stdout == b"here\n"

    @pytest.mark.parametrize(
        ("path", "is_file"),
        [
            ("/proc", False),
            ("/proc/self", False),
            ("/proc/sys/kernel", False),
            ("/proc/1/attr/exec", True),
            ("/sys/none", False),
            ("/sys/kernel", True),
            ("/dev/fd/9", True),
            ("/dev/stdout", True),
            ("/dev/shm", True),
            ("/etc/passwd", False),
            ("/etc/passwd/x", False),
            ("/etc", True),
            ("/bin/sh", False),
            ("/.portoshim/init", True),
            ("/" + "x" * 256, False),
            ("/x" * 2000, False),
        ],
    )
    def test_impossible_ones(self, pods: Pods, sandbox: str, tmp_path: Path, path: str, is_file: bool) -> None:
        source = tmp_path / "source"
        source.touch() if is_file else source.mkdir()
        code, text = failure(pods.create, sandbox, "true", mounts=[mount(path, source)])
        assert (code, "mounts[0].container_path" in text) == ("INVALID_ARGUMENT", True), text

    def test_numbers_in_proc(self, pods: Pods, sandbox: str, tmp_path: Path) -> None:
        (tmp_path / "cpuinfo").write_text("one\n")
        container = pods.container(sandbox, "sleep", "1000", mounts=[mount("/proc/cpuinfo", tmp_path / "cpuinfo")])
        assert pods.shell(container, "cat /proc/cpuinfo") == "one\n"

    def test_numbers_in_the_proc_of_another_container(
        self, pods: Pods, sandbox: str, registry: LocalRegistry, node: Node, tmp_path: Path
    ) -> None:
        """That is mounted after everything else: a link that leads there changes nothing."""
        links = images.layer([images.File("numbers", link="/proc/cpuinfo")])
        images.push(images.busybox(extra=[links]), registry, "public/numbers", ["1"])
        image = pb.ImageSpec(image=pull(node, f"{registry.address}/public/numbers:1"))
        target = pb.LinuxContainerConfig()
        options = target.security_context.namespace_options
        options.pid, options.target_id = pb.TARGET, pods.container(sandbox)
        (tmp_path / "cpuinfo").write_text("one\n")
        for path in ("/proc/cpuinfo", "/numbers"):
            mounts = [mount(path, tmp_path / "cpuinfo")]
            code, text = failure(pods.create, sandbox, "true", mounts=mounts, image=image, linux=target)
            assert (code, "mounts[0].container_path" in text) == ("UNIMPLEMENTED", True)

    def test_two_at_one_place(self, pods: Pods, sandbox: str, tmp_path: Path) -> None:
        wanted = [mount("/x", tmp_path), mount("/y", tmp_path), mount("/x/", tmp_path)]
        code, text = failure(pods.create, sandbox, "true", mounts=wanted)
        assert (code, "mounts[2].container_path" in text) == ("INVALID_ARGUMENT", True)

    def test_below_mounts_of_every_kind(self, pods: Pods, sandbox: str, shared: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "which").write_text(name)
        (shared / "two").mkdir()
        mounts = [
            mount("/shared/two", tmp_path / "two"),
            mount("/shared/one", tmp_path / "one"),
            mount("/shared", shared, propagation=pb.PROPAGATION_BIDIRECTIONAL),
        ]
        container = pods.container(sandbox, "sleep", "1000", mounts=mounts)
        assert pods.shell(container, "cat /shared/one/which /shared/two/which") == "onetwo"

    def test_over_the_pods_own_files(self, pods: Pods, tmp_path: Path) -> None:
        sandbox = pods.run(dns_config=pb.DNSConfig(servers=["10.0.0.10"]))
        (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.99\n")
        wanted = mount("/etc/resolv.conf", tmp_path / "resolv.conf")
        assert "10.0.0.99" in pods.output(sandbox, "cat", "/etc/resolv.conf", mounts=[wanted])
        # What somebody mounts at /etc is theirs, but where it has the same files.
        (tmp_path / "hosts").touch()
        found = pods.output(
            sandbox, "sh", "-c", "ls /etc; grep -c localhost /etc/hosts", mounts=[mount("/etc", tmp_path)]
        )
        assert found == "hosts\nresolv.conf\n2\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "resolv.conf"]


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
        container = pods.container(sandbox, "sleep", "1000", mounts=[volume(data)])
        assert pods.shell(container, "cat /data/dir/file") == "from an image\n"
        assert b"Read-only" in pods.exec(container, "touch", "/data/x").stderr
        (mounted,) = pods.status(container).mounts
        known = pods.cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=data))).image
        assert (mounted.image.image, mounted.image.image_ref) == (data, known.id)
        pods.remove(container)

    def test_it_is_never_writable(self, pods: Pods, sandbox: str, data: str) -> None:
        code, text = failure(pods.create, sandbox, "true", mounts=[volume(data, readonly=False)])
        assert (code, "mounts[0].readonly" in text) == ("INVALID_ARGUMENT", True)

    def test_a_part_of_it(self, pods: Pods, sandbox: str, data: str) -> None:
        wanted = volume(data, image_sub_path="dir")
        container = pods.container(sandbox, "sleep", "1000", mounts=[wanted])
        assert pods.shell(container, "ls /data") == "file\n"

    def test_a_part_that_is_not_there_or_elsewhere(self, pods: Pods, sandbox: str, data: str) -> None:
        for path, code in (("nothing", "NOT_FOUND"), ("../x", "INVALID_ARGUMENT"), ("/dir", "INVALID_ARGUMENT")):
            wanted = volume(data, image_sub_path=path)
            assert failure(pods.create, sandbox, "true", mounts=[wanted])[0] == code
        wanted = volume(data, image_sub_path="escape")
        assert failure(pods.create, sandbox, "true", mounts=[wanted])[0] == "NOT_FOUND"

    def test_an_image_that_is_not_here(self, pods: Pods, sandbox: str) -> None:
        wanted = volume("nowhere.example/x:1")
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
