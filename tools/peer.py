"""containerd as a peer to measure against: Debian's, with the same registry, CNI configuration and images."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from shim_core.testing import CriClient
from tools.node import CNI_BIN, PAUSE, Node
from tools.registry import LocalRegistry

_CONFIG = """
version = 2
root = "{here}/root"
state = "{here}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{here}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{registry}/{pause}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_bin}"
    conf_dir = "{here}/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{here}/certs.d"
"""
_STOP_TIMEOUT_S = 30.0
_HOSTS = 'server = "https://{registry}"\n[host."https://{registry}"]\n  ca = "{ca}"\n'


class Containerd:
    """containerd with its CRI plugin, below one directory. Use it on a stage."""

    name = "containerd"

    def __init__(self, directory: Path, registry: LocalRegistry, node: Node) -> None:
        self.directory = directory
        self.registry = registry
        self._cni = node.cni_config()
        self._process: subprocess.Popen[bytes] | None = None
        self.cri = CriClient(self.socket)

    @staticmethod
    def missing() -> str | None:
        """Why it can't be used here; None when it can."""
        absent = [name for name in ("containerd", "runc") if shutil.which(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exit_status(self) -> int | None:
        """As :meth:`tools.node.Node.exit_status`."""
        return None if self._process is None else self._process.poll()

    @property
    def socket(self) -> str:
        """The CRI socket."""
        return str(self.directory / "containerd.sock")

    @property
    def log_path(self) -> Path:
        return self.directory / "log"

    @property
    def pod_logs(self) -> Path:
        return self.directory / "pods"

    def start(self) -> None:
        here, registry = self.directory, self.registry
        for name in ("cni", "pods", *(f"certs.d/{address}" for address in registry.addresses)):
            (here / name).mkdir(parents=True, exist_ok=True)
        # A subnet of its own: both peers live on one machine.
        text = (
            json.dumps(self._cni)
            .replace("10.88.", "10.89.")
            .replace('"cni0"', '"cni1"')
            .replace("leases", "leases-peer")
        )
        (here / "cni" / "10-bridge.conflist").write_text(text)
        for address in registry.addresses:
            hosts = _HOSTS.format(registry=address, ca=registry.ca_path)
            (here / "certs.d" / address / "hosts.toml").write_text(hosts)
        config = here / "config.toml"
        config.write_text(_CONFIG.format(here=here, registry=registry.address, pause=PAUSE, cni_bin=CNI_BIN))
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(["containerd", "--config", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.cri.wait_ready(0.5)
                return
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log_path.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"containerd does not serve:\n{tail}") from None

    def stop(self) -> None:
        self.cri.close()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Containerd:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
