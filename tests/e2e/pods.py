"""Short words for making pods in tests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tools.node import Node

T = TypeVar("T")

_numbers = itertools.count(1)


class Pods:
    """Makes sandboxes and containers on a node, and removes them."""

    def __init__(self, node: Node, image: str) -> None:
        self.node = node
        self.cri = node.cri
        self.image = image
        self._sandboxes: list[str] = []
        self._configs: dict[str, pb.PodSandboxConfig] = {}

    def config(self, **fields: Any) -> pb.PodSandboxConfig:
        number = next(_numbers)
        metadata = pb.PodSandboxMetadata(name=f"pod{number}", namespace="test", uid=f"uid-{number}")
        fields.setdefault("log_directory", str(self.node.pod_logs / f"pod{number}"))
        return pb.PodSandboxConfig(metadata=metadata, **fields)

    def run(self, config: pb.PodSandboxConfig | None = None, **fields: Any) -> str:
        """RunPodSandbox; the sandbox's id."""
        config = config or self.config(**fields)
        Path(config.log_directory).mkdir(parents=True, exist_ok=True)
        sandbox: str = self.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id
        self._sandboxes.append(sandbox)
        self._configs[sandbox] = config
        return sandbox

    def adopt(self, sandbox: str, config: pb.PodSandboxConfig) -> None:
        """Put containers into a sandbox that was made otherwise."""
        self._configs[sandbox] = config

    def create(self, sandbox: str, *command: str, name: str | None = None, **fields: Any) -> str:
        """CreateContainer; the container's id."""
        name = name or f"c{next(_numbers)}"
        fields.setdefault("image", pb.ImageSpec(image=self.image))
        fields.setdefault("log_path", f"{name}.log")
        config = pb.ContainerConfig(metadata=pb.ContainerMetadata(name=name), command=command, **fields)
        request = pb.CreateContainerRequest(
            pod_sandbox_id=sandbox, config=config, sandbox_config=self._configs[sandbox]
        )
        container: str = self.cri.CreateContainer(request).container_id
        return container

    def start(self, container: str) -> str:
        self.cri.StartContainer(pb.StartContainerRequest(container_id=container))
        return container

    def container(self, sandbox: str, *command: str, **fields: Any) -> str:
        """A container that runs."""
        return self.start(self.create(sandbox, *(command or ("sleep", "10000")), **fields))

    def status(self, container: str) -> pb.ContainerStatus:
        answer: pb.ContainerStatus = self.cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container)).status
        return answer

    def sandbox_status(self, sandbox: str) -> pb.PodSandboxStatus:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=sandbox)
        answer: pb.PodSandboxStatus = self.cri.PodSandboxStatus(request).status
        return answer

    def exited(self, container: str, timeout_s: float = 60.0) -> pb.ContainerStatus:
        """The status once it has exited."""
        return until(lambda: self.status(container), lambda s: s.state == pb.CONTAINER_EXITED, timeout_s)

    def output(self, sandbox: str, *command: str, **fields: Any) -> str:
        """What a container wrote that ran to its end; it has to end well."""
        container = self.container(sandbox, *command, **fields)
        status = self.exited(container)
        text = self.log(container)
        assert status.exit_code == 0, text
        return text

    def log(self, container: str) -> str:
        """The log of a container as its readers see it, both streams, without stamps."""
        return "".join(text for _, text in self.log_records(container))

    def log_records(self, container: str) -> list[tuple[str, str]]:
        """Stream and text of each log record; a text that wasn't ended by a newline has none."""
        records = []
        for line in Path(self.status(container).log_path).read_bytes().decode().split("\n")[:-1]:
            _, stream, tag, text = line.split(" ", 3)
            records.append((stream, text if tag == "P" else text + "\n"))
        return records

    def log_bytes(self, container: str) -> bytes:
        """As :meth:`log`, whatever the bytes are."""
        found = b""
        for line in Path(self.status(container).log_path).read_bytes().split(b"\n")[:-1]:
            _, _, tag, text = line.split(b" ", 3)
            found += text if tag == b"P" else text + b"\n"
        return found

    def exec(self, container: str, *command: str, timeout: int = 20) -> pb.ExecSyncResponse:
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout)
        answer: pb.ExecSyncResponse = self.cri.ExecSync(request)
        return answer

    def shell(self, container: str, script: str) -> str:
        """What a shell script wrote in a running container; it has to end well."""
        answer = self.exec(container, "sh", "-c", script)
        assert answer.exit_code == 0, answer
        return answer.stdout.decode()

    def stop(self, container: str, timeout: int = 0) -> None:
        self.cri.StopContainer(pb.StopContainerRequest(container_id=container, timeout=timeout))

    def remove(self, container: str) -> None:
        self.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container))

    def stop_sandbox(self, sandbox: str) -> None:
        self.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox))

    def remove_sandbox(self, sandbox: str) -> None:
        self.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox))

    def remove_all(self) -> None:
        for sandbox in self._sandboxes:
            self.stop_sandbox(sandbox)
            self.remove_sandbox(sandbox)
        self._sandboxes.clear()


def until(look: Callable[[], T], condition: Callable[[T], object] = bool, timeout_s: float = 60.0) -> T:
    """What ``look`` returns once it fulfils ``condition``."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if condition(found):
            return found
        assert time.monotonic() < deadline, f"still {found!r} after {timeout_s} s"
        time.sleep(0.01)


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    """Status code and text of a call that has to fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return caught.value.code().name, caught.value.details() or ""
