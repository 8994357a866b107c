"""A container's file system: its root, what is mounted there, and what it can write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import eventually, refused, root_pid, run, shell, spec, start

MOUNTS = {
    "/": "overlay",
    "/dev": "tmpfs",
    "/dev/pts": "devpts",
    "/dev/shm": "tmpfs",
    "/dev/hugepages": "hugetlbfs",
    "/proc": "proc",
    "/proc/bus": "proc",
    "/proc/irq": "proc",
    "/proc/sys": "proc",
    "/run": "tmpfs",
    "/run/lock": "tmpfs",
    "/sys": "sysfs",
}

PROBE = """
for path in /x /tmp/x /dev/x /dev/shm/x /run/x /etc/x /etc/resolv.conf /proc/sys/kernel/hostname /proc/sysrq-trigger \
    /sys/kernel/x; do
    if echo x 2>/dev/null > $path; then echo $path; fi
done
"""


class TestRootOfItsOwn:
    def test_mounts(self, porto: Client, root: str, embedded: bool) -> None:
        found = run(porto, "a", ["cat", "/proc/self/mountinfo"], root=root)
        mounts = {line.split()[4]: line.split(" - ")[1].split()[0] for line in found.lines}
        mounts.pop("/run/portod.socket")
        mounts.pop("/etc/resolv.conf")
        for point in ("/sys/kernel/debug", "/sys/kernel/debug/tracing", "/sys/kernel/tracing"):
            mounts.pop(point, None)  # portod shows the kernel's traces
        if "/dev/hugepages" not in mounts:
            mounts["/dev/hugepages"] = "hugetlbfs"  # where the kernel has them
        assert mounts == MOUNTS

    def test_what_can_be_written(self, porto: Client, root: str) -> None:
        writable = ["/x", "/tmp/x", "/dev/x", "/dev/shm/x", "/run/x", "/etc/x", "/etc/resolv.conf"]
        assert run(porto, "a", shell(PROBE), root=root).lines == writable
        assert Path(root, "x").exists()
        assert not Path(root, "run/x").exists()

    def test_read_only(self, porto: Client, root: str) -> None:
        Path(root, "etc/resolv.conf").touch()
        writable = ["/dev/x", "/dev/shm/x", "/run/x", "/etc/resolv.conf"]
        assert run(porto, "a", shell(PROBE), root=root, root_readonly=True).lines == writable

    def test_read_only_and_nothing_to_bind_files_over(self, porto: Client, root: str, tmp_path: Path) -> None:
        with refused(errors.Unknown, "Read-only file system: mknod(/etc/resolv.conf, 0100644, 0)"):
            start(porto, "a", root=root, root_readonly=True)
        (tmp_path / "own").write_text("own\n")
        binds = [f"{tmp_path}/own /etc/resolv.conf"]
        found = run(porto, "a", ["cat", "/etc/resolv.conf"], root=root, bind=binds, resolv_conf="keep")
        assert found.stdout == "own\n"

    def test_a_read_only_volume_and_nothing_to_bind_files_over(self, porto: Client, base_layer: str) -> None:
        made = rpc_pb2.TVolumeSpec(backend="overlay", layers=[base_layer], read_only=True)
        made.links.add(container="a", container_root=True)
        with refused(errors.Unknown, "Read-only file system: mknod(/etc/resolv.conf, 0100644, 0)"):
            porto.create_from_spec(spec("a", "true"), [made], start=True)

    def test_devices(self, porto: Client, root: str) -> None:
        script = "cd /dev; for d in null zero full random urandom tty console; do stat -c '%n %t:%T %a' $d; done"
        assert run(porto, "a", shell(script), root=root).lines == [
            *("null 1:3 666", "zero 1:5 666", "full 1:7 666", "random 1:8 666", "urandom 1:9 666"),
            *("tty 5:0 666", "console 1:3 666"),
        ]
        links = run(porto, "a", shell("for name in ptmx fd stdin; do readlink /dev/$name; done"), root=root)
        assert links.lines == ["pts/ptmx", "/proc/self/fd", "/proc/self/fd/0"]

    def test_directories_of_run_are_there(self, porto: Client, root: str) -> None:
        os.makedirs(f"{root}/run/a/b")
        Path(root, "run/a").chmod(0o750)
        Path(root, "run/a/file").touch()
        found = run(porto, "a", shell("cd /run; find a lock | sort; stat -c %a a lock"), root=root)
        assert found.lines == ["a", "a/b", "lock", "750", "1777"]

    def test_the_old_root_is_out_of_reach(self, porto: Client, root: str) -> None:
        found = run(porto, "a", shell("ls /proc/1/root/; cd /..; pwd; ls -d /../home"), root=root)
        assert "work" in found.lines
        assert found.lines[-2:] == ["/", "/../home"]

    def test_one_in_another(self, porto: Client, root: str) -> None:
        start(porto, "p", root=root)
        os.makedirs(f"{root}/inner/bin")
        os.link(f"{root}/bin/busybox", f"{root}/inner/bin/busybox")
        found = run(porto, "p/a", ["/bin/busybox", "ls", "/"], root="/inner")
        assert "bin" in found.lines
        assert "work" not in found.lines
        assert porto.get_property("p", "root_path") == root

    def test_one_that_is_not_there(self, porto: Client) -> None:
        with refused(errors.Unknown, "No such file or directory: Cannot open /not/there"):
            start(porto, "a", root="/not/there")


class TestMachinesRoot:
    def test_it_is_the_machines(self, porto: Client, tmp_path: Path) -> None:
        run(porto, "a", shell(f"echo hello > {tmp_path}/file"))
        assert (tmp_path / "file").read_text() == "hello\n"

    def test_read_only(self, porto: Client, tmp_path: Path) -> None:
        found = run(porto, "a", shell(f"echo hello > {tmp_path}/file"), root_readonly=True)
        assert "Read-only file system" in found.stderr
        assert not (tmp_path / "file").exists()

    def test_mounts_stay_inside(self, porto: Client, tmp_path: Path) -> None:
        start(porto, "a", shell(f"mount -t tmpfs tmpfs {tmp_path} && touch {tmp_path}/x && sleep 1000"))
        pid = root_pid(porto, "a")
        eventually(lambda: Path(f"/proc/{pid}/root{tmp_path}/x").exists())
        assert not (tmp_path / "x").exists()


class TestFiles:
    def test_names(self, porto: Client, root: str) -> None:
        found = run(
            porto,
            "a",
            shell("hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf"),
            root=root,
            hostname="inside",
            etc_hosts="1.2.3.4 other\n",
            resolv_conf="nameserver 9.9.9.9;search x.y",
        )
        assert found.lines == ["inside", "inside", "1.2.3.4 other", "nameserver 9.9.9.9", "search x.y"]
        # They are the container's alone.
        assert not Path(root, "etc/resolv.conf").exists() or not Path(root, "etc/resolv.conf").read_text()

    def test_the_machines_resolver(self, porto: Client, root: str) -> None:
        content = Path("/etc/resolv.conf").read_text()
        assert run(porto, "a", ["cat", "/etc/resolv.conf"], root=root).stdout == content
        Path(root, "etc/resolv.conf").write_text("own\n")
        assert run(porto, "a", ["cat", "/etc/resolv.conf"], root=root, resolv_conf="keep").stdout == "own\n"

    def test_the_resolver_of_a_running_one(self, porto: Client, root: str) -> None:
        start(porto, "a", root=root)
        porto.set_property("a", "resolv_conf", "nameserver 8.8.8.8")
        path = f"/proc/{root_pid(porto, 'a')}/root/etc/resolv.conf"
        assert Path(path).read_text() == "nameserver 8.8.8.8"

    def test_links(self, porto: Client, root: str) -> None:
        links = {"/new/link": "/etc", "/other": "/tmp/x"}
        found = run(porto, "a", shell("readlink -f /new/link; readlink /other"), root=root, symlink=links)
        assert found.lines == ["/etc", "tmp/x"]
        assert os.path.realpath(f"{root}/new/link") == f"{root}/etc"


class TestBinds:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        (tmp_path / "file").write_text("hello\n")
        return tmp_path

    def test_a_directory_and_a_file(self, porto: Client, root: str, source: Path) -> None:
        script = shell("cat /mnt/file /new/place; echo more >> /mnt/file")
        binds = [f"{source} /mnt", f"{source}/file /new/place"]
        assert run(porto, "a", script, root=root, bind=binds).stdout == "hello\nhello\n"
        assert (source / "file").read_text() == "hello\nmore\n"
        assert Path(root, "new/place").read_bytes() == b""

    def test_read_only(self, porto: Client, root: str, source: Path) -> None:
        found = run(porto, "a", shell("echo x > /mnt/x"), root=root, bind=[f"{source} /mnt ro"])
        assert "Read-only file system" in found.stderr

    def test_flags(self, porto: Client, root: str, source: Path) -> None:
        binds = [f"{source} /mnt nosuid noexec"]
        script = shell("grep ' /mnt ' /proc/self/mountinfo | cut -d' ' -f6")
        assert set(run(porto, "a", script, root=root, bind=binds).stdout.strip().split(",")) >= {
            *("nosuid", "nodev", "noexec"),
        }

    def test_a_source_that_is_not_there(self, porto: Client, root: str) -> None:
        with pytest.raises(errors.PortoError, match="No such file or directory"):
            start(porto, "a", root=root, bind=["/not/there /mnt"])

    def test_on_the_machines_root(self, porto: Client, source: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        target = tmp_path_factory.mktemp("target")
        assert run(porto, "a", ["cat", f"{target}/file"], bind=[f"{source} {target}"]).stdout == "hello\n"
        assert os.listdir(target) == []

    @pytest.mark.parametrize("path", ["/proc", "/sys"])
    def test_not_of_the_kernels(self, porto: Client, root: str, path: str) -> None:
        with refused(errors.Permission, "filesystem type is not allowed for write access"):
            start(porto, "a", root=root, bind=[f"{path} /mnt"])

    def test_a_target_cant_lead_outside(self, porto: Client, root: str, source: Path) -> None:
        """Links in the container's root are followed in the root."""
        outside = source / "outside"
        outside.mkdir()
        os.symlink(outside, f"{root}/link")
        porto.create_from_spec(spec("a", ["ls", f"{outside}"], root=root, bind=[f"{source} /link"]))
        try:
            porto.start("a")
        except errors.PortoError:
            pass  # to refuse is as good
        assert os.listdir(outside) == []
