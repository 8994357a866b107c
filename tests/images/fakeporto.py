"""As much of portod as images need: layers, made by the tar of this machine as Porto makes them.

It is a server of Porto's protocol, so that the client and its error handling are the real ones. What it unpacks with
the same arguments as portod, and what it does about whiteouts afterwards, is what portod does too.
"""

from __future__ import annotations

import shutil
import socketserver
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from porto_api import framing, rpc_pb2

_TAR = [
    "tar", "--numeric-owner", "--preserve-permissions", "--xattrs", "--xattrs-include=security.capability",
    "--xattrs-include=trusted.overlay.*", "--xattrs-include=user.*", "--no-auto-compress", "--extract",
]  # fmt: skip


class FakePorto:
    """Serves on ``directory``/portod.socket; layers are below ``directory``/place/porto_layers."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "place"
        self.layers_dir = self.place / "porto_layers"
        self.layers_dir.mkdir(parents=True)
        self.path = str(directory / "portod.socket")
        self.private: dict[str, str] = {}
        self.busy: set[str] = set()
        self.imports: list[str] = []
        self.tar_says = ""
        """When not empty, imports fail, and this is what tar has said."""
        self.before_import: Callable[[str], None] = lambda _name: None
        self.after_import: Callable[[str], None] = lambda _name: None
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def start(self) -> None:
        Path(self.path).unlink(missing_ok=True)
        self._server = _Server(self.path, self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Go away, as a portod that is stopped."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def layers(self) -> set[str]:
        """The layers there are."""
        return {path.name for path in self.layers_dir.iterdir() if not path.name.startswith("_")}

    def answer(self, request: rpc_pb2.TContainerRequest) -> rpc_pb2.TContainerResponse:
        response = rpc_pb2.TContainerResponse(error=rpc_pb2.Success)
        if request.HasField("importLayer"):
            self._import(request.importLayer, response)
        elif request.HasField("removeLayer"):
            self._remove(request.removeLayer.layer, response)
        elif request.HasField("listLayers"):
            for name in sorted(self.layers()):
                response.layers.layers.add(
                    name=name,
                    owner_user="root",
                    owner_group="root",
                    last_usage=0,
                    private_value=self.private.get(name, ""),
                )
        elif request.HasField("getlayerprivate"):
            name = request.getlayerprivate.layer
            if name in self.layers():
                response.layer_private.private_value = self.private.get(name, "")
            else:
                response.error = rpc_pb2.LayerNotFound
        else:
            response.error = rpc_pb2.InvalidMethod
        return response

    def _import(self, request: rpc_pb2.TLayerImportRequest, response: rpc_pb2.TContainerResponse) -> None:
        self.before_import(request.layer)
        if self.tar_says:
            response.error, response.errorMsg = rpc_pb2.Unknown, f"helper: tar ... stderr: {self.tar_says}"
            return
        temporary, final = self.layers_dir / f"_import_{request.layer}", self.layers_dir / request.layer
        with self._lock:
            if final.exists() or temporary.exists():
                response.error, response.errorMsg = rpc_pb2.LayerAlreadyExists, "Layer already exists"
                return
            temporary.mkdir(0o775)
        with open(request.tarball, "rb") as archive:
            done = subprocess.run(_TAR, stdin=archive, cwd=temporary, capture_output=True, check=False)
        if done.returncode:
            shutil.rmtree(temporary)
            response.error, response.errorMsg = rpc_pb2.HelperError, done.stderr.decode()[:500]
            return
        with self._lock:
            temporary.rename(final)
            self.private[request.layer] = request.private_value
            self.imports.append(request.layer)
        self.after_import(request.layer)

    def _remove(self, name: str, response: rpc_pb2.TContainerResponse) -> None:
        with self._lock:
            if name in self.busy:
                response.error, response.errorMsg = rpc_pb2.Busy, "in use by volume"
            elif not (self.layers_dir / name).exists():
                response.error, response.errorMsg = rpc_pb2.LayerNotFound, f"Layer {name} not found"
            else:
                shutil.rmtree(self.layers_dir / name)
                self.private.pop(name, None)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, porto: FakePorto) -> None:
        self.porto = porto
        super().__init__(path, _Handler)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        decoder = framing.Decoder()
        try:
            while data := self.request.recv(65536):
                for payload in decoder.feed(data):
                    request = rpc_pb2.TContainerRequest.FromString(payload)
                    self.request.sendall(framing.encode(self.server.porto.answer(request)))
        except OSError:
            pass  # the client has gone
