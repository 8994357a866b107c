"""A node in a directory: portoshim as its own process, with a CNI network, on an embedded Porto or on a real one.

::

    with Node(directory, registry=registry) as node:
        node.cri.Version(pb.VersionRequest())
        node.crictl("ps", "-a")

It is what the demonstration, the benchmark and the end-to-end tests run. With ``PORTO_SOCKET`` set, pods run on that
portod, otherwise on the embedded one. Use it on a stage (``tools.stage``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from shim_core.testing import CriClient
from tools.registry import LocalRegistry

TOOLS = Path(__file__).parent.parent / "tests" / "tools" / "bin"
CNI_BIN = "/usr/lib/cni"
SUBNET = "10.88.0.0/16"
BRIDGE = "cni0"
PAUSE = "pause:3.9"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class NodeError(Exception):
    """The node doesn't start, with the end of its log; or it doesn't stop."""


def crictl_path() -> str | None:
    """crictl, if it could be built."""
    return _tool_path("crictl")


def critest_path() -> str | None:
    """critest, if it could be built."""
    return _tool_path("critest")


def _tool_path(name: str) -> str | None:
    path = TOOLS / name
    return str(path) if path.exists() else shutil.which(name)


class Node:
    """portoshim with everything around it, below one directory.

    :param registry: where images are pulled from; its CA is trusted, its credentials are not configured.
    :param config: sections and keys to have otherwise: ``{"Images": {"PauseImage": "none"}}``.
    :param debug: have every call in the log. :param foreground: let portoshim log to our standard error as well.
    :param subnet: where pods have their addresses, and ``bridge``: what they hang on; of its own for each node of a
        stage.
    :param python: the interpreter of the environment that portoshim is installed in.
    """

    def __init__(
        self,
        directory: Path,
        *,
        registry: LocalRegistry | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        debug: bool = False,
        foreground: bool = False,
        subnet: str = SUBNET,
        bridge: str = BRIDGE,
        python: str = sys.executable,
    ) -> None:
        self.directory = directory
        self.registry = registry
        self.subnet = subnet
        self.bridge = bridge
        self.porto_socket = os.environ.get("PORTO_SOCKET")
        self._changes = config or {}
        self._debug = debug
        self._foreground = foreground
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._cri: CriClient | None = None

    # -- what users of a node need ---------------------------------------------------------------------------------

    @property
    def socket(self) -> str:
        """The CRI socket."""
        return str(self._changes.get("Portoshim", {}).get("Socket", self.directory / "portoshim.sock"))

    @property
    def cri(self) -> CriClient:
        """A client of the CRI socket."""
        if self._cri is None:
            self._cri = CriClient(self.socket)
        return self._cri

    @property
    def pid(self) -> int:
        """The process of portoshim."""
        if self._process is None:
            raise NodeError("the node is not running")
        return self._process.pid

    def exit_status(self) -> int | None:
        """The exit status of portoshim, should it have ended by itself; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log_path(self) -> Path:
        return self.directory / "log" / "portoshim.log"

    @property
    def config_path(self) -> Path:
        return self.directory / "portoshim.yaml"

    @property
    def pod_logs(self) -> Path:
        """A directory for the logs of pods, as kubelet has /var/log/pods."""
        return self.directory / "pods"

    def crictl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run crictl against the node.

        :raises NodeError: there is no crictl.
        """
        command = self.crictl_command(*arguments)
        return subprocess.run(command, check=check, capture_output=True, text=True, input=stdin)

    def crictl_process(self, *arguments: str) -> subprocess.Popen[str]:
        """Start crictl against the node, its output to be read."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.crictl_command(*arguments), stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def crictl_command(self, *arguments: str) -> list[str]:
        """The command line of a call of crictl's.

        :raises NodeError: there is no crictl.
        """
        program = crictl_path()
        if program is None:
            raise NodeError("crictl could not be built")
        endpoint = f"unix://{self.socket}"
        return [program, "--runtime-endpoint", endpoint, "--image-endpoint", endpoint, "--timeout", "60s", *arguments]

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write the configuration, start portoshim, return when it serves.

        :raises NodeError: it doesn't.
        """
        for name in ("cni", "pods"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(yaml.safe_dump(self.config(), sort_keys=False))
        (self.directory / "cni" / "10-bridge.conflist").write_text(json.dumps(self.cni_config(), indent=2))
        command = [self._python, "-P", "-m", "shim_core.cli", "--config", str(self.config_path)]
        if self.porto_socket is None:
            command.append("--embedded")
        if self._debug:
            command.append("--debug")
        with (self.directory / "stderr").open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=None if self._foreground else stderr,
                stderr=None if self._foreground else stderr,
                start_new_session=True,  # Ctrl-C is for us: pods are removed before portoshim ends
            )
        self._wait_until_serving()

    def stop(self) -> None:
        """End portoshim as systemd does; containers go on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End portoshim as the OOM killer does."""
        self._end(signal.SIGKILL)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End portoshim and close the client."""
        self.stop()
        if self._cri is not None:
            self._cri.close()
            self._cri = None

    def remove_pods(self) -> None:
        """Stop and remove all pods, and all that belongs to the node is given back."""
        from shim_core.cri.v1 import api_pb2 as pb

        for sandbox in self.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items:
            self.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox.id))
            self.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id))

    def __enter__(self) -> Node:
        try:
            self.start()
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            if self._cri is not None:
                self._cri.close()

    # -- configuration ---------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """portoshim.yaml."""
        here = str(self.directory)
        tree: dict[str, Any] = {
            "Portoshim": {
                "Socket": self.socket,
                "LogsDir": f"{here}/log",
                "VolumesDir": f"{here}/volumes",
                "StateDir": f"{here}/state",
            },
            "CNI": {"ConfDir": f"{here}/cni", "BinDir": CNI_BIN},
            "StreamingServer": {"Address": "127.0.0.1", "Port": 0},
        }
        tree["Porto"] = {"CDISpecDirs": [f"{here}/cdi"]}
        if self.porto_socket is None:
            stage = os.environ.get("SHIM_STAGE_CGROUP", "")
            tree["EmbeddedPorto"] = {
                "Place": f"{here}/place",
                "Socket": f"{here}/porto.sock",
                "StateDir": f"{here}/porto",
                "Cgroup": f"{stage}/porto-{zlib.crc32(here.encode()):08x}".lstrip("/"),
            }
        else:
            tree["Porto"]["Socket"] = self.porto_socket
        if self.registry is not None:
            tree["Images"] = {
                "PauseImage": f"{self.registry.address}/{PAUSE}",
                "Registries": [
                    {"Host": address, "CA": str(self.registry.ca_path)} for address in self.registry.addresses
                ],
            }
        for section, keys in self._changes.items():
            tree.setdefault(section, {}).update(keys)
        return tree

    def cni_config(self) -> dict[str, Any]:
        """A bridge with addresses from the subnet, and host ports."""
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": self.subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self.directory / "leases"),
        }
        bridge = {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": False, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]}

    # ----------------------------------------------------------------------------------------------------------------

    def _wait_until_serving(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        with CriClient(self.socket) as probe:
            while time.monotonic() < deadline:
                try:
                    probe.wait_ready(0.2)
                    return
                except TimeoutError:
                    if self._process.poll() is not None:
                        break
        status = self._process.poll()
        tail = (self.directory / "stderr").read_text(errors="replace")[-4000:]
        raise NodeError(f"portoshim does not serve (status {status}):\n{tail}")

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise NodeError(f"portoshim did not stop within {STOP_TIMEOUT_S:.0f} s, and was killed") from None
