"""From a container to what the kernel and crun are told, without any of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shim_embedded_porto import kernel, launch, oci, plans
from shim_embedded_porto.cgroups.control import Control, resolve_disk, scheduling
from shim_embedded_porto.cgroups.devices import program
from shim_embedded_porto.cgroups.hierarchy import Cgroups, Hierarchy
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.keeper import _mapping as mapping
from shim_embedded_porto.settings import binds, devices
from shim_embedded_porto.tree import Tree


@pytest.fixture
def tree() -> Tree:
    return Tree("/work", {"freezer", "cpuacct"}, {"memory", "cpu"})


def add(tree: Tree, name: str) -> Container:
    with tree.lock:
        return tree.add(name, superuser=True)


class TestConfigOfCrun:
    def config(self, ct: Container, **options: object) -> dict[str, object]:
        arguments = {"binds": [], "files": [], "joins_pid_namespace": True, "hugetlb": False, **options}
        return oci.config(ct, "/bundle", **arguments)  # type: ignore[arg-type]

    def test_namespaces(self, tree: Tree) -> None:
        linux = self.config(add(tree, "a"))["linux"]
        assert isinstance(linux, dict)
        assert {entry["type"]: entry.get("path") for entry in linux["namespaces"]} == {
            "mount": None,
            "network": "/bundle/ns-net",
            "pid": "/bundle/ns-pid",
        }

    def test_mounts_in_their_order(self, tree: Tree) -> None:
        config = self.config(
            add(tree, "a"), binds=list(binds.parse("/x /dev/shm ro;/y /data rec")), files=["/etc/hosts"], hugetlb=True
        )
        mounts = config["mounts"]
        assert isinstance(mounts, list)
        targets = [mount["destination"] for mount in mounts]
        # What was asked for goes over what every container has.
        assert targets[-3:] == ["/dev/shm", "/data", "/etc/hosts"]
        assert targets.index("/dev") < targets.index("/dev/pts")
        assert mounts[-3]["options"] == ["bind", "ro", "nodev", "slave"]
        assert mounts[-2]["options"] == ["rbind", "rw", "nodev", "rslave"]

    def test_devices_crun_doesnt_make_by_itself(self, tree: Tree) -> None:
        ct = add(tree, "a")
        linux = self.config(ct)["linux"]
        assert isinstance(linux, dict)
        assert [device["path"] for device in linux["devices"]] == ["/dev/console"]

    def test_it_is_told_nothing_of_cgroups_and_rights(self, tree: Tree) -> None:
        config = self.config(add(tree, "a"))
        assert isinstance(config["linux"], dict)
        assert not {"resources", "cgroupsPath", "seccomp"} & set(config["linux"])


def test_nodes_of_cruns_that_arent_the_containers(tree: Tree) -> None:
    from shim_embedded_porto.credentials import ROOT

    ct = add(tree, "a")
    assert plans._nodes(ct) == (["/dev/core"], [])
    ct.devices = devices.parse("/dev/zero -; /dev/null rw /dev/null 0600 1 2", ROOT)
    unwanted, nodes = plans._nodes(ct)
    assert unwanted == ["/dev/core", "/dev/null", "/dev/zero"]
    assert [(node["path"], node["mode"] & 0o777, node["uid"], node["gid"]) for node in nodes] == [
        ("/dev/null", 0o600, 1, 2)
    ]


class TestMountNamespaces:
    def test_when_it_needs_one(self, tree: Tree) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        assert plans.new_mount_namespace(a)
        b.isolate = False
        assert not plans.new_mount_namespace(b)
        b.binds = binds.parse("/x /y")
        assert plans.new_mount_namespace(b)
        b.virt_mode = "job"
        with pytest.raises(Fault, match="Cannot change mount-namespace"):
            plans.new_mount_namespace(b)

    def test_a_meta_container_without_anything_takes_no_process(self, tree: Tree) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        assert plans.needs_task(a)
        b.isolate = False
        assert not plans.needs_task(b)
        b.net_inherit = False
        assert plans.needs_task(b)


@pytest.mark.parametrize("status", [0, 3 << 8, 128 << 8, 255 << 8, 9, 15, 6 | 128, 34])
def test_statuses_pass_through_an_init(status: int) -> None:
    assert launch.decode(launch.encode(status) << 8) == status


@pytest.mark.parametrize(
    ("user", "lines"),
    [
        (0, ["0 0 1", "1 1 4294967294"]),
        (1, ["0 1 1", "2 2 4294967293"]),
        (1000, ["0 1000 1", "1 1 999", "1001 1001 4294966294"]),
    ],
)
def test_mappings_of_users(user: int, lines: list[str]) -> None:
    assert mapping(user).splitlines() == lines


class TestCgroups:
    @pytest.fixture
    def cgroups(self, tmp_path: Path) -> Cgroups:
        hierarchies = [
            Hierarchy(str(tmp_path / names.replace(",", "-")), frozenset(names.split(",")))
            for names in ("freezer", "memory", "cpu,cpuacct", "pids")
        ]
        for hierarchy in hierarchies:
            os.makedirs(f"{hierarchy.mount}/base")
        return Cgroups(hierarchies, "base")

    def test_names(self, cgroups: Cgroups, tree: Tree, tmp_path: Path) -> None:
        """A slash below one that has the controller too, else a percent sign."""
        _, b, c = add(tree, "a"), add(tree, "a/b"), add(tree, "a/b/c")
        assert cgroups.path(c, "freezer") == f"{tmp_path}/freezer/base/a/b/c"
        assert cgroups.path(c, "memory") == f"{tmp_path}/memory/base/a"
        c.controllers.add("memory")
        assert cgroups.path(c, "memory") == f"{tmp_path}/memory/base/a/b%c"
        b.controllers.add("memory")
        assert cgroups.path(c, "memory") == f"{tmp_path}/memory/base/a/b/c"
        c.virt_mode = "job"
        assert cgroups.path(c, "freezer") == f"{tmp_path}/freezer/base/a/b"

    def test_making_and_removing(self, cgroups: Cgroups, tree: Tree, tmp_path: Path) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        b.controllers.add("cpu")
        for ct in (a, b):
            cgroups.create(ct)
        # One hierarchy for two controllers: who has the one has the other.
        assert {"cpu", "cpuacct"} <= b.controllers
        made = {os.path.relpath(path, tmp_path) for path, _, _ in os.walk(tmp_path)}
        assert {"freezer/base/a/b", "memory/base/a", "cpu-cpuacct/base/a/b"} <= made
        assert "memory/base/a/b" not in made
        for ct in (b, a):
            cgroups.remove(ct)
        assert all(not os.listdir(f"{hierarchy.mount}/base") for hierarchy in cgroups.hierarchies)

    def test_a_base_somebody_has_removed(self, cgroups: Cgroups, tree: Tree) -> None:
        for hierarchy in cgroups.hierarchies:
            os.rmdir(f"{hierarchy.mount}/base")
        cgroups.create(add(tree, "a"))

    @pytest.mark.parametrize(
        ("limit_cores", "period_ms", "quota"),
        [(0.5, 100, 50_000), (1.5, 100, 150_000), (0.001, 100, 1000), (0.5, 10, 5000)],
    )
    def test_quotas(
        self, cgroups: Cgroups, tree: Tree, tmp_path: Path, limit_cores: float, period_ms: int, quota: int
    ) -> None:
        ct = self._with_cpu(cgroups, tree)
        ct.cpu_limit = ct.cpu_limit_bound = int(limit_cores * 10**9)
        ct.cpu_period_ns = period_ms * 10**6
        Control(cgroups, tree.all).cpu_limit(ct)
        directory = tmp_path / "cpu-cpuacct/base/a"
        assert (directory / "cpu.cfs_quota_us").read_text() == str(quota)
        assert (directory / "cpu.cfs_period_us").read_text() == str(period_ms * 1000)

    @pytest.mark.parametrize(
        ("guarantee_cores", "weight", "policy", "shares"),
        [
            *((0, 100, "normal", 2), (1, 100, "normal", 1024), (1, 200, "normal", 2048), (1, 100, "high", 16384)),
            *((1, 100, "idle", 2), (1000, 10000, "rt", 1024 * 256)),
        ],
    )
    def test_shares(
        self, cgroups: Cgroups, tree: Tree, tmp_path: Path, guarantee_cores: int, weight: int, policy: str, shares: int
    ) -> None:
        ct = self._with_cpu(cgroups, tree)
        ct.cpu_guarantee, ct.cpu_weight, ct.cpu_policy = guarantee_cores * 10**9, weight, policy
        Control(cgroups, tree.all).cpu_shares(ct)
        assert (tmp_path / "cpu-cpuacct/base/a/cpu.shares").read_text() == str(shares)

    @staticmethod
    def _with_cpu(cgroups: Cgroups, tree: Tree) -> Container:
        ct = add(tree, "a")
        cgroups.create(ct)
        for knob in ("cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
            Path(cgroups.path(ct, "cpu"), knob).touch()
        return ct

    def test_priorities(self, tree: Tree) -> None:
        ct = add(tree, "a")
        assert scheduling(ct) == (0, 0)
        ct.cpu_weight = 10000
        assert scheduling(ct)[1] == -20
        ct.cpu_weight = 1
        assert scheduling(ct)[1] == 19


def test_a_program_for_devices_ends_in_a_verdict() -> None:
    code = program([("c", "1:3", "r"), ("c", "136:*", "w"), ("b", "8:0", "m")])
    assert len(code) % 8 == 0
    assert code[-8] == 0x95  # exit


def test_disks(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="Disk not found: nosuchdisk"):
        resolve_disk("nosuchdisk", "/")


class TestLookingInRoots:
    """Nothing leads out of a directory that is to be a root."""

    def test_links_and_dots(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        (root / "etc").mkdir(parents=True)
        outside.mkdir()
        (outside / "file").write_text("outside")
        (root / "etc/file").write_text("inside")
        (root / "absolute").symlink_to("/etc/file")
        (root / "dots").symlink_to("../../../etc/file")
        (root / "out").symlink_to(outside / "file")
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in ("absolute", "dots", "../../etc/file"):
                with open(kernel.open_in(fd, name, os.O_RDONLY)) as file:
                    assert file.read() == "inside"
            with pytest.raises(FileNotFoundError):
                kernel.open_in(fd, "out", os.O_RDONLY)
        finally:
            os.close(fd)
