"""What a container is made of, apart from any container."""

from __future__ import annotations

import pytest
from shim_embedded_porto import capabilities, names, paths
from shim_embedded_porto.credentials import ROOT
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.settings import binds, cpusets, devices, environment, networks, sysctls, ulimits


class TestEnvironment:
    def test_what_is_set_first_stays_unless_it_is_overwritten(self) -> None:
        made = environment.Environment()
        made.merge("A=1;B=1")
        made.merge("B=2;C=2", overwrite=False)
        assert made.values() == {"A": "1", "B": "1", "C": "2"}
        made.merge("A=3")
        assert made.values()["A"] == "3"

    def test_what_is_locked_stays(self) -> None:
        made = environment.Environment()
        made.set("PORTO_NAME", "a", locked=True)
        made.merge("PORTO_NAME=other")
        assert made.values() == {"PORTO_NAME": "a"}

    def test_taken_out(self) -> None:
        made = environment.Environment.parse("A=1;B")
        assert made.values() == {"A": "1"}
        assert made.format() == "A=1;B"

    def test_secrets_are_salted(self) -> None:
        made = environment.Environment.parse("S=hidden", secret=True)
        assert "hidden" not in made.format()
        assert made.format(show_secrets=True) == "S=hidden"
        assert environment.digest("hidden") != environment.digest("hidden")


class TestBinds:
    def test_flags(self) -> None:
        (bind,) = binds.parse("/a /b ro,rec,nosuid")
        assert bind.read_only
        assert bind.flags == {"ro", "rec", "nosuid"}

    def test_blanks_in_paths(self) -> None:
        (bind,) = binds.parse("/with\\ blank /b")
        assert bind.source == "/with blank"
        assert binds.parse(binds.format_all((bind,))) == (bind,)


class TestUlimits:
    @pytest.mark.parametrize(
        ("config", "soft", "hard"), [("nofile: 5", 5, 5), ("nofile: 5 6", 5, 6), ("nofile: 1K 1M", 1024, 1 << 20)]
    )
    def test_one(self, config: str, soft: int, hard: int) -> None:
        limit = ulimits.parse(config)["nofile"]
        assert (limit.soft, limit.hard) == (soft, hard)

    def test_without_limit(self) -> None:
        assert ulimits.parse("core: unlimited")["core"].hard == ulimits.UNLIMITED
        assert ulimits.format_all(ulimits.parse("core: 1 unlimited").values()) == "core: 1 unlimited; "


class TestProcessors:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = cpusets.Topology({0: frozenset({0, 1}), 1: frozenset({2, 3})})
        monkeypatch.setattr(cpusets, "topology", lambda: made)

    def test_jails_keep_out_of_each_others_way(self) -> None:
        spec = cpusets.parse("jail 2")
        first = cpusets.choose_jail(spec, [])
        second = cpusets.choose_jail(spec, [first])
        assert first | second == {0, 1, 2, 3}
        assert len(cpusets.choose_jail(spec, [first, second])) == 2

    def test_a_jail_that_fits_is_kept(self) -> None:
        spec = cpusets.parse("jail 2")
        assert cpusets.choose_jail(spec, [frozenset({1, 2})], frozenset({1, 2})) == {1, 2}

    def test_on_a_node(self) -> None:
        assert cpusets.choose_jail(cpusets.parse("jail 1; node 1"), []) == {2}
        assert cpusets.parse("node 1").candidates() == {2, 3}
        with pytest.raises(Fault, match="invalid cpu_set"):
            cpusets.parse("jail 3; node 1")

    @pytest.mark.parametrize("value", ["0-3", "0,2", "node 0", "jail 1", "jail 1; node 0", ""])
    def test_they_come_back(self, value: str) -> None:
        assert cpusets.parse(value).format() == value


class TestDevices:
    def test_the_later_one_counts(self) -> None:
        base = devices.parse("/dev/null rw", ROOT)
        other = devices.parse("/dev/null -; /dev/zero r", ROOT)
        merged = {device.path: device.allowed for device in devices.merge(base, other)}
        assert merged == {"/dev/null": False, "/dev/zero": True}

    def test_rules_are_of_numbers(self) -> None:
        rules = devices.rules(devices.parse("/dev/null rw; /dev/zero r", ROOT))
        assert rules == {*(("c", "1:3", letter) for letter in "rwm"), ("c", "1:5", "r"), ("c", "1:5", "m")}


class TestNetworks:
    @pytest.mark.parametrize(
        ("value", "inherit", "isolate", "netns", "container"),
        [
            ("inherited", True, False, "", ""),
            ("none", False, True, "", ""),
            ("netns pod", False, False, "pod", ""),
            ("container a/b", False, False, "", "a/b"),
            ("L3 veth0", False, True, "", ""),
            ("tap t0", True, False, "", ""),
        ],
    )
    def test_kinds(self, value: str, inherit: bool, isolate: bool, netns: str, container: str) -> None:
        found = networks.parse(networks.split(value))
        assert (found.inherit, found.isolate, found.netns, found.container) == (inherit, isolate, netns, container)

    @pytest.mark.parametrize("value", ["inherited;none", "netns a;netns b c", "macvlan eth0", "macvlan eth0 m bla", ""])
    def test_what_doesnt_go_together(self, value: str) -> None:
        with pytest.raises(Fault):
            networks.parse(networks.split(value))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("net.core.somaxconn", True),
        ("net.ipv4.conf.eth0.rp_filter", True),
        ("net.nope", False),
        ("vm.swappiness", False),
    ],
)
def test_settings_of_a_network(name: str, wanted: bool) -> None:
    assert sysctls.of_network(name) is wanted


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "normal"),
        [("/a/../b", "/b"), ("//a//b/", "/a/b"), ("/..", "/"), ("a/./b", "a/b"), ("/", "/"), ("..", "..")],
    )
    def test_normal(self, path: str, normal: str) -> None:
        assert paths.normal(path) == normal

    @pytest.mark.parametrize(
        ("base", "path", "inner"), [("/r", "/r/x", "/x"), ("/r", "/r", "/"), ("/r", "/rx", ""), ("/", "/x", "/x")]
    )
    def test_seen_from_a_root(self, base: str, path: str, inner: str) -> None:
        assert paths.inner(base, path) == inner

    @pytest.mark.parametrize(("path", "wanted"), [("/a/b", True), ("/a", True), ("/ab", False), ("/", False)])
    def test_inside(self, path: str, wanted: bool) -> None:
        assert paths.inside(path, "/a") is wanted


class TestCapabilities:
    def test_they_come_back(self) -> None:
        assert capabilities.parse(capabilities.format_set(capabilities.ROOT)) == capabilities.ROOT

    def test_unknown_ones_end_a_lenient_list(self) -> None:
        assert capabilities.parse_leniently("CHOWN;nope;KILL") == capabilities.mask("CHOWN")
        with pytest.raises(Fault):
            capabilities.parse("CHOWN;nope")


@pytest.mark.parametrize("name", ["_import_x", "a b", "", ".", "..", "a\n"])
def test_names_layers_cant_have(name: str) -> None:
    with pytest.raises(Fault):
        names.check_storage(name)
