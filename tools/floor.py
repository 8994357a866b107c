"""The floor: the Porto calls and CNI plugins that a pod needs, made without the shim around them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shim_porto_runtime import mounts, spec

from porto_api import Client, rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from tools.node import CNI_BIN, Node

if TYPE_CHECKING:
    from tools.bench import Table

_NAME = "bench-floor"


class Floor:
    """Makes pods as the shim does, with nothing but Porto's client and the CNI plugins' programs."""

    def __init__(self, node: Node, image: str) -> None:
        self._node = node
        self._porto = Client(node.porto_socket or str(node.directory / "porto.sock"))
        self._layers = self._layers_of(image)
        self._directory = node.directory / "floor"
        self._directory.mkdir()
        self._numbers = itertools.count()

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._porto.close()

    def pod(self, table: Table) -> None:
        """One pod up and down, each of the CRI's calls as what it comes to in Porto."""
        porto, floor = self._porto, "floor"
        with table.timed("RunPodSandbox, host network", floor):
            self._sandbox(_NAME, None)
        porto.destroy(_NAME)
        with table.timed("RunPodSandbox", floor):
            netns = self._attach(table)
            self._sandbox(_NAME, netns)
        name = f"{_NAME}/c"
        with table.timed("CreateContainer", floor):
            self._create(name)
        with table.timed("StartContainer", floor):
            self._start(name)
        self._exec(name)
        with table.timed("ExecSync", floor):
            self._exec(name)
        with table.timed("ContainerStatus", floor):
            porto.get([name], ["state"])
        with table.timed("StopContainer", floor):
            porto.kill(name, 9)
            porto.wait([name])
            porto.get([name], ["exit_status"])
        with table.timed("RemoveContainer", floor):
            porto.destroy(name)
        with table.timed("StopPodSandbox", floor):
            porto.destroy(_NAME)
            self._detach(table)

    def states(self, table: Table, row: str) -> None:
        """What a list needs of Porto: the states of all containers there are."""
        with table.timed(row, "floor"):
            self._porto.get(["*", "*/*"], ["state"])

    def _sandbox(self, name: str, netns: str | None) -> None:
        config = pb.PodSandboxConfig(hostname="bench")
        net = ("netns", netns) if netns else ("inherited",)
        made = spec.sandbox(name, "0" * 64, "bench", config, net, (), hugetlb=False)
        self._porto.create_from_spec(made, start=True)
        root, paused = self._root("pause"), f"{name}/pause"
        pause = spec.pause(paused, "0" * 64, "bench", root, str(self._directory))
        self._porto.create_from_spec(pause, [spec.root_volume(root, paused, self._layers, "")])
        self._start(paused)

    def _create(self, name: str) -> None:
        config = pb.ContainerConfig()
        config.linux.security_context.namespace_options.pid = pb.CONTAINER
        root = self._root("c")
        plan = mounts.Plan([mounts.helper(str(self._directory))])
        made = spec.container(name, "0" * 64, "bench", config, root, plan, hugetlb=False)
        self._porto.create_from_spec(made, [spec.root_volume(root, name, self._layers, "")])

    def _start(self, name: str) -> None:
        update = rpc_pb2.TContainerSpec(name=name, stdout_path="/dev/null")
        update.command_argv.argv.extend(["/bin/busybox", "sleep", "100000"])
        self._porto.update_from_spec(update, start=True)

    def _exec(self, container: str) -> None:
        # As the shim does it: portod destroys it when the connection closes, and nobody waits for that.
        name = f"{container}/e{next(self._numbers)}"
        made = spec.exec_(name, 0, 0)
        made.command_argv.argv.append("/bin/true")
        made.stdout_path = made.stderr_path = made.stdin_path = "/dev/null"
        with self._porto.session() as connection:
            self._porto.create_from_spec(made, start=True, connection=connection)
            self._porto.call(self._porto.wait_request([name]), connection=connection)
            self._porto.get([name], ["exit_status"], connection=connection)

    def _root(self, name: str) -> str:
        path = self._directory / f"root-{name}"
        path.mkdir(exist_ok=True)
        return str(path)

    def _attach(self, table: Table) -> str:
        subprocess.run(["ip", "netns", "add", _NAME], check=True)
        result: dict[str, Any] | None = None
        with table.timed("of that, CNI ADD", "floor"):
            for plugin in self._plugins():
                document = {**plugin, **({"prevResult": result} if result else {})}
                result = json.loads(self._plugin("ADD", document))
        return _NAME

    def _detach(self, table: Table) -> None:
        with table.timed("of that, CNI DEL", "floor"):
            for plugin in reversed(self._plugins()):
                self._plugin("DEL", plugin)
        subprocess.run(["ip", "netns", "del", _NAME], check=True)

    def _plugins(self) -> list[dict[str, Any]]:
        conflist = self._node.cni_config()
        common = {"cniVersion": conflist["cniVersion"], "name": conflist["name"]}
        return [{**plugin, **common} for plugin in conflist["plugins"]]

    def _plugin(self, command: str, document: dict[str, Any]) -> str:
        environment = {
            **os.environ,
            "CNI_COMMAND": command, "CNI_CONTAINERID": _NAME, "CNI_NETNS": f"/run/netns/{_NAME}",
            "CNI_IFNAME": "eth0", "CNI_PATH": CNI_BIN,
        }  # fmt: skip
        program = f"{CNI_BIN}/{document['type']}"
        done = subprocess.run(
            [program], input=json.dumps(document), env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    def _layers_of(self, image: str) -> list[str]:
        from shim_core.testing import CriClient

        with CriClient(self._node.socket) as cri:
            status = cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=image), verbose=True))
        info = json.loads(status.info["info"])
        # An image names its layers from the bottom, Porto from the top.
        return [layer["portoLayer"] for layer in reversed(info["layers"])]
