"""A real registry on this machine: Debian's docker-registry, with TLS and every kind of authentication.

::

    with LocalRegistry(directory, auth="token") as registry:
        registry.address        # "localhost:41231"
        registry.ca_path        # what a client has to trust
        registry.credentials    # ("user", "a password")
"""

from __future__ import annotations

import re
import secrets
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import yaml

from tools.certificates import Certificate, CertificateAuthority
from tools.tokenserver import TokenServer, write_trust

Auth = Literal["none", "basic", "token"]

_LISTENING = re.compile(r'listening on [^"\s]*:(\d+)')
_START_TIMEOUT_S = 30.0
_PROGRAM = "docker-registry"


class RegistryError(Exception):
    """The registry can't be started; holds what it said."""


class LocalRegistry:
    """docker-registry as a child process, its data below ``directory``.

    :param auth: ``none``; ``basic`` (htpasswd); ``token`` (a :class:`~tools.tokenserver.TokenServer` comes with it).
    :param tls: HTTPS with a certificate of a private CA; otherwise plain HTTP.
    :param names: host names and addresses in the certificate; the first one is the one in :attr:`address`.
    :param listen: the address to listen on. :param port: 0 for any.
    :param client_auth: demand a certificate from clients; :meth:`client_certificate` issues one.
    :param public: with ``token``: patterns of repositories that anybody may pull.
    :param mirror_of: be a pull-through cache of the registry at this URL.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        auth: Auth = "none",
        tls: bool = True,
        names: Sequence[str] = ("localhost", "127.0.0.1"),
        listen: str = "127.0.0.1",
        port: int = 0,
        client_auth: bool = False,
        public: Sequence[str] = (),
        authority: CertificateAuthority | None = None,
        mirror_of: str | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.auth: Auth = auth
        self.names = tuple(names)
        self.port = port
        self.authority = authority
        self.token_server: TokenServer | None = None
        self.credentials: tuple[str, str] | None = None
        self.push_certificate: Certificate | None = None
        """With ``client_auth``: a certificate for whoever fills the registry."""
        self._tls = tls
        self._listen = listen
        self._client_auth = client_auth
        self._public = tuple(public)
        self._mirror_of = mirror_of
        self._process: subprocess.Popen[bytes] | None = None

    # -- what clients need -----------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Host and port, as they stand in an image reference."""
        return self.addresses[0]

    @property
    def addresses(self) -> tuple[str, ...]:
        """The same for each of its names. A reference has no port where it is the usual one."""
        usual = self.port == (443 if self._tls else 80)
        return tuple(name if usual else f"{name}:{self.port}" for name in self.names)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    @property
    def ca_path(self) -> Path:
        """The certificate of the private CA."""
        if self.authority is None:
            raise RegistryError("a registry without TLS has no CA")
        return self.authority.path

    @property
    def log_path(self) -> Path:
        """What the registry writes: its log, and a line for each request."""
        return self.directory / "registry.log"

    def client_certificate(self, name: str = "client") -> Certificate:
        """A certificate that a registry with ``client_auth`` accepts."""
        assert self.authority is not None
        return self.authority.issue(name, [name], client=True)

    def requests(self, method: str, part: str) -> int:
        """How many requests of that method the registry has answered with 2xx and had ``part`` in their path."""
        line = re.compile(rf'"{method} [^ "]*{re.escape(part)}[^ "]* HTTP/1\.1" 2\d\d ')
        return sum(1 for text in self.log_path.read_text(errors="replace").splitlines() if line.search(text))

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, and return once it answers.

        :raises RegistryError: it isn't installed, or doesn't start.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._tls and self.authority is None:
            self.authority = CertificateAuthority(self.directory / "ca")
        config_path = self.directory / "config.yml"
        config_path.write_text(yaml.safe_dump(self._config()))
        # Opened for appending: a registry that is started again continues its log.
        start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [_PROGRAM, "serve", str(config_path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            except FileNotFoundError:
                raise RegistryError(f"{_PROGRAM} is not installed: apt-get install {_PROGRAM}") from None
        if self.token_server is not None:
            self.token_server.start()
        self._wait_until_listening(start)

    def stop(self) -> None:
        """Stop it. Its data stay; :meth:`start` serves them again."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self.token_server is not None:
            self.token_server.stop()
            self.token_server = None

    def __enter__(self) -> LocalRegistry:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        http: dict[str, Any] = {"addr": f"{self._listen}:{self.port}", "secret": secrets.token_hex(16)}
        server = None
        if self._tls:
            assert self.authority is not None
            server = self.authority.issue("server", self.names)
            http["tls"] = {"certificate": str(server.cert_path), "key": str(server.key_path)}
            if self._client_auth:
                http["tls"]["clientcas"] = [str(self.authority.path)]
                self.push_certificate = self.client_certificate("push")
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.directory / "data"), "maxthreads": 100},
                "delete": {"enabled": True},
            },
            "http": http,
        }
        if self._mirror_of is not None:
            config["proxy"] = {"remoteurl": self._mirror_of}
        if self.auth != "none" and self.credentials is None:
            self.credentials = ("user", secrets.token_urlsafe(12))
        if self.auth == "basic":
            config["auth"] = {"htpasswd": {"realm": "portoshim", "path": str(self._write_htpasswd())}}
        elif self.auth == "token":
            config["auth"] = {"token": self._make_token_server(server)}
        return config

    def _write_htpasswd(self) -> Path:
        import bcrypt  # only registries with passwords need it

        assert self.credentials is not None
        user, password = self.credentials
        path = self.directory / "htpasswd"
        path.write_text(f"{user}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4, b'2a')).decode()}\n")
        return path

    def _make_token_server(self, tls: Certificate | None) -> dict[str, Any]:
        assert self.credentials is not None
        user, password = self.credentials
        signers = CertificateAuthority(self.directory / "tokens", "portoshim test token signer")
        signer = signers.issue("signer", ["signer"])
        self.token_server = TokenServer(
            "portoshim test registry",
            {user: password},
            signer,
            public=self._public,
            tls=tls,
            address=self._listen,
            host=self.names[0],
        )
        return {
            "realm": self.token_server.url,
            "service": self.token_server.service,
            "issuer": TokenServer.issuer,
            "rootcertbundle": str(write_trust(self.directory / "tokens" / "trusted.crt", signer)),
        }

    def _wait_until_listening(self, log_start: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        assert self._process is not None
        while True:
            with self.log_path.open("rb") as log:
                log.seek(log_start)
                text = log.read().decode(errors="replace")
            if found := _LISTENING.search(text):
                self.port = int(found[1])
                return
            if self._process.poll() is not None or time.monotonic() >= deadline:
                raise RegistryError(f"{_PROGRAM} doesn't start:\n{text[-2000:]}")
            time.sleep(0.02)
