"""Signals, capabilities, Porto specs and errors: what the CRI says, as Linux and Porto say it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Any, cast

import pytest
from shim_porto_runtime import capabilities, mounts, names, namespaces, porto_errors, signals, spec, states

from porto_api import errors as porto
from porto_api import rpc_pb2
from shim_core import errors
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented


class TestSignals:
    @pytest.mark.parametrize("name", [n for n in pb.Signal.keys() if n != "SIGNAL_RUNTIME_DEFAULT"])  # noqa: SIM118
    def test_every_signal_of_the_cri_is_one_of_linux(self, name: str) -> None:
        number = signals.stop_signal(cast("pb.Signal", pb.Signal.Value(name)), "SIGKILL")
        assert 1 <= number <= signal.SIGRTMAX
        assert signals.stop_signal(signals.cri(number), "") == number

    @pytest.mark.parametrize(
        ("image", "expected"),
        [("", 15), ("SIGQUIT", 3), ("quit", 3), ("10", 10), ("SIGRTMIN+3", signal.SIGRTMIN + 3), ("RTMAX-1", 63)],
    )
    def test_the_images_signal(self, image: str, expected: int) -> None:
        assert signals.stop_signal(pb.SIGNAL_RUNTIME_DEFAULT, image) == expected

    def test_the_pods_signal_wins(self) -> None:
        assert signals.stop_signal(pb.SIGNAL_SIGUSR1, "SIGQUIT") == signal.SIGUSR1

    @pytest.mark.parametrize("text", ["SIGNOPE", "0", "65", "-1", "SIGRTMIN+99", "RTMAX+1", "SIG_DFL", "²"])
    def test_no_signal(self, text: str) -> None:
        with pytest.raises(InvalidArgument, match="StopSignal of the image"):
            signals.stop_signal(pb.SIGNAL_RUNTIME_DEFAULT, text)


class TestCapabilities:
    def wanted(
        self, add: Iterable[str] = (), drop: Iterable[str] = (), ambient: Iterable[str] = ()
    ) -> tuple[set[str], set[str]]:
        security = pb.LinuxContainerSecurityContext()
        security.capabilities.add_capabilities.extend(add)
        security.capabilities.drop_capabilities.extend(drop)
        security.capabilities.add_ambient_capabilities.extend(ambient)
        bounding, raised = capabilities.wanted(security)
        return set(bounding), set(raised)

    def test_defaults(self) -> None:
        assert self.wanted() == (set(capabilities.DEFAULT), set())

    def test_all_and_names(self) -> None:
        assert self.wanted(drop=["ALL"]) == (set(), set())
        assert self.wanted(add=["ALL"])[0] == set(capabilities.NAMES)
        assert self.wanted(drop=["ALL"], add=["NET_ADMIN", "cap_sys_time"])[0] == {"NET_ADMIN", "SYS_TIME"}
        assert self.wanted(add=["ALL"], drop=["SYS_ADMIN"])[0] == set(capabilities.NAMES) - {"SYS_ADMIN"}
        assert self.wanted(add=["NET_ADMIN"], drop=["CAP_CHOWN"])[0] == (capabilities.DEFAULT | {"NET_ADMIN"}) - {
            "CHOWN"
        }

    def test_ambient_is_bounding_too(self) -> None:
        assert self.wanted(drop=["ALL"], ambient=["NET_ADMIN"]) == ({"NET_ADMIN"}, {"NET_ADMIN"})

    def test_an_unknown_name_is_told(self) -> None:
        with pytest.raises(InvalidArgument, match=r"capabilities\.add_capabilities: no such capability: 'FLY'"):
            self.wanted(add=["FLY"])

    def test_privileged_has_all(self) -> None:
        bounding, _ = capabilities.wanted(pb.LinuxContainerSecurityContext(privileged=True))
        assert bounding == set(capabilities.NAMES)

    def test_masks_are_those_of_the_kernel(self) -> None:
        assert capabilities.mask(["CHOWN"]) == 1
        assert capabilities.mask(["NET_BIND_SERVICE"]) == 0x400
        assert capabilities.mask(capabilities.DEFAULT) == 0xA80425FB
        assert capabilities.names(0x401) == ["CHOWN", "NET_BIND_SERVICE"]


class TestErrors:
    @pytest.mark.parametrize("code", [*rpc_pb2.EError.values(), 999999])
    def test_every_porto_error_becomes_one_of_ours(self, code: int) -> None:
        err = porto_errors.translate(porto.error_for(code, "why"), "starting the container")
        assert isinstance(err, errors.ShimError)
        assert "starting the container" in err.message
        assert "why" in err.message

    def test_some_of_them(self) -> None:
        def code(kind: type[porto.PortoError]) -> errors.Code:
            return porto_errors.translate(kind(), "x").code

        assert code(porto.ContainerDoesNotExist) is errors.Code.NOT_FOUND
        assert code(porto.SocketTimeout) is errors.Code.DEADLINE_EXCEEDED
        assert code(porto.SocketUnavailable) is errors.Code.UNAVAILABLE
        assert code(porto.NoSpace) is errors.Code.RESOURCE_EXHAUSTED
        assert code(porto.Cancelled) is errors.Code.CANCELLED
        assert code(porto.HelperError) is errors.Code.INTERNAL


class TestIds:
    @pytest.mark.parametrize(
        "text", ["***", "*", "self", ".", "/", "a/b", "../../etc", "A", "", "g", "a" * 65, "a\n", "٣"]
    )
    def test_nothing_but_hex_may_be_an_id(self, text: str) -> None:
        assert not names.may_be_id(text)

    def test_an_id_is_asked_for(self) -> None:
        with pytest.raises(InvalidArgument, match="pod_sandbox_id: must not be empty"):
            names.check_id("", "pod_sandbox_id")
        assert names.check_id("ab", "pod_sandbox_id") == "ab"

    def test_an_unknown_id_is_told_in_few_words(self) -> None:
        assert len(str(names.no_such("sandbox", "x\n" * 100_000))) < 200

    def test_names_and_back(self) -> None:
        sandbox, container = names.new_id(), names.new_id()
        for parent in ("", "k8s", "a/b"):
            made = names.Names(parent)
            assert made.parse(made.sandbox(sandbox)) == (sandbox, "")
            assert made.parse(made.pause(sandbox)) == (sandbox, "pause")
            assert made.parse(made.container(sandbox, container)) == (sandbox, container)
            assert made.parse("other") is None
            assert len(made.exec(sandbox, container)) <= 200

    def test_the_longest_name_fits_porto(self) -> None:
        assert len(names.Names("p" * 50).exec(names.new_id(), names.new_id())) <= 200


class TestSpecs:
    def sandbox(self, **fields: Any) -> pb.PodSandboxConfig:
        metadata = pb.PodSandboxMetadata(name="web", namespace="shop", uid="1")
        return pb.PodSandboxConfig(metadata=metadata, **fields)

    def test_a_sandbox(self) -> None:
        net = ("netns", "net-1")
        made = spec.sandbox("n", "a" * 64, "shim", self.sandbox(hostname="web-0"), net, [], hugetlb=True)
        assert made.enable_porto == "none"
        assert (made.net.cfg[0].opt, list(made.net.cfg[0].arg)) == ("netns", ["net-1"])
        assert made.hostname == "web-0"

    @pytest.mark.parametrize("field", ["name", "namespace", "uid"])
    def test_metadata_has_to_be_there(self, field: str) -> None:
        config = self.sandbox()
        config.metadata.ClearField(field)
        with pytest.raises(InvalidArgument, match=rf"metadata\.{field}"):
            spec.check_sandbox(config)

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"hostname": "a b"}, "hostname"),
            ({"hostname": "a" * 65}, "hostname"),
            ({"log_directory": "logs"}, "log_directory"),
            ({"port_mappings": [pb.PortMapping(container_port=65536)]}, r"port_mappings\[0\]\.container_port"),
            ({"port_mappings": [pb.PortMapping(host_port=-1)]}, r"port_mappings\[0\]\.host_port"),
        ],
    )
    def test_a_sandbox_nobody_can_have(self, fields: dict[str, object], expected: str) -> None:
        with pytest.raises(InvalidArgument, match=expected):
            spec.check_sandbox(self.sandbox(**fields))

    def test_resolv_conf(self) -> None:
        dns = pb.DNSConfig(servers=["10.0.0.10"], searches=["a", "b"], options=["ndots:5"])
        assert namespaces.resolv_conf(dns, "host") == "nameserver 10.0.0.10\nsearch a b\noptions ndots:5\n"
        assert namespaces.resolv_conf(pb.DNSConfig(), "host") == "host"
        for word in ("a\nnameserver 6.6.6.6", "", "a b", "a;b"):
            with pytest.raises(InvalidArgument, match=r"dns_config\.searches"):
                namespaces.resolv_conf(pb.DNSConfig(searches=[word]), "")

    @pytest.mark.parametrize("path", ["/abs", "../x", "a/../../b", "a\0"])
    def test_a_log_stays_in_its_directory(self, path: str) -> None:
        config = pb.ContainerConfig(log_path=path)
        config.metadata.name = config.image.image = "x"
        with pytest.raises(InvalidArgument, match="log_path"):
            spec.check_container(config)

    def test_requests_are_no_guarantees(self) -> None:
        config = pb.ContainerConfig()
        config.linux.resources.cpu_shares = 512
        config.linux.resources.cpu_quota = 50_000
        config.linux.resources.memory_limit_in_bytes = 1 << 20
        made = spec.container("n", "a" * 64, "s", config, "/r", mounts.Plan(), hugetlb=True)
        assert (made.cpu_limit, made.memory_limit) == (0.5, 1 << 20)
        # Of which Porto makes cpu.shares; a weight would only multiply them.
        assert int(made.cpu_guarantee * 1024) == 512
        assert not made.HasField("cpu_weight")
        assert not made.HasField("memory_guarantee")

    def test_windows_is_not_ignored(self) -> None:
        with pytest.raises(Unimplemented, match="windows"):
            spec.check_sandbox(self.sandbox(windows=pb.WindowsPodSandboxConfig()))


@pytest.mark.parametrize(("status", "code"), [(0, 0), (3 << 8, 3), (9, 137), (15, 143), (11 | 0x80, 139)])
def test_exit_codes(status: int, code: int) -> None:
    assert os.WIFEXITED(status) or os.WIFSIGNALED(status)
    assert states.exit_code(status) == code


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (porto.Unknown("No such process: kill 17"), True),
        (porto.Unknown("No such file or directory: Cannot open /proc/17/ns/ipc"), True),
        (porto.Unknown("Task is not running"), True),
        (porto.Unknown("No such file or directory: open /etc/passwd"), False),
        (porto.InvalidValue("No such process"), False),
    ],
)
def test_what_comes_of_a_process_that_has_just_ended(error: porto.PortoError, gone: bool) -> None:
    assert porto_errors.is_of_gone_process(error) is gone
