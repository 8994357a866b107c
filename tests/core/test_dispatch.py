"""What the log says about a call: enough to find it again, and no secret."""

from __future__ import annotations

import pytest

from shim_core import hookimpl, testing
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.dispatch import Dispatcher, methods, redacted, summary

SECRET = "S3CR3T"
BY_RPC = {method.rpc: method for method in methods()}


def test_the_cri_has_37_and_6_calls() -> None:
    services = [method.service for method in methods()]
    assert (services.count("RuntimeService"), services.count("ImageService")) == (37, 6)


def test_what_the_cri_marks_as_secret_is_not_written() -> None:
    auth = pb.AuthConfig(
        username="me", password=SECRET, auth=SECRET, identity_token=SECRET, registry_token=SECRET, server_address="a"
    )
    text = redacted(pb.PullImageRequest(image=pb.ImageSpec(image="busybox"), auth=auth))
    assert SECRET not in text
    assert "busybox" in text
    assert text.count("<redacted>") == 4


def test_environment_values_are_not_written() -> None:
    config = pb.ContainerConfig(envs=[pb.KeyValue(key="TOKEN", value=SECRET.encode())], command=["sh"])
    text = redacted(pb.CreateContainerRequest(config=config))
    assert SECRET not in text
    assert "TOKEN" in text


def test_long_texts_are_shortened() -> None:
    text = redacted(pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(annotations={"a": "x" * 200_000})))
    assert "<200002 characters>" in text
    assert len(text) < 1000


def test_a_summary_names_what_the_call_is_about() -> None:
    metadata = pb.PodSandboxMetadata(name="web", namespace="shop", attempt=2)
    request = pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(metadata=metadata))
    assert summary(request) == "name=shop/web attempt=2"
    assert summary(pb.StopContainerRequest(container_id="a" * 64, timeout=5)) == "container_id=aaaaaaaaaaaaa timeout=5s"
    assert summary(pb.PullImageRequest(image=pb.ImageSpec(image="busybox"))) == "image=busybox"


def test_one_line_in_and_one_out(caplog: pytest.LogCaptureFixture) -> None:
    class Plugin:
        @hookimpl
        def cri_stop_container(self) -> pb.StopContainerResponse:
            return pb.StopContainerResponse()

        @hookimpl
        def cri_list_containers(self) -> pb.ListContainersResponse:
            return pb.ListContainersResponse()

    dispatcher = Dispatcher(testing.manager(plugin=Plugin()))
    with caplog.at_level("INFO", "shim"):
        dispatcher.call(BY_RPC["StopContainer"], pb.StopContainerRequest(container_id="c1"), testing.context())
        dispatcher.call(BY_RPC["ListContainers"], pb.ListContainersRequest(), testing.context())
    assert [record.message.split(" OK ")[0] for record in caplog.records] == [
        "[test] StopContainer container_id=c1",
        "[test] StopContainer",
    ]


def test_an_abandoned_call_is_not_begun() -> None:
    class Plugin:
        @hookimpl
        def cri_version(self) -> None:
            raise AssertionError("must not be asked")

    context = testing.context()
    context.cancel()
    with pytest.raises(Exception, match="cancelled"):
        Dispatcher(testing.manager(plugin=Plugin())).call(BY_RPC["Version"], pb.VersionRequest(), context)
