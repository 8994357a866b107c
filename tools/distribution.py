"""Pushing to a registry by the distribution API: as much of a client as tools and tests need."""

from __future__ import annotations

import re
import urllib.parse
from types import TracebackType

import requests

_TIMEOUT_S = 60.0


class Distribution:
    """One repository of a registry, for writing. Basic and token authentication are found out.

    :param credentials: user and password. :param client: certificate and key of the client, PEM.
    """

    def __init__(
        self,
        url: str,
        repository: str,
        credentials: tuple[str, str] | None = None,
        ca_path: str | None = None,
        client: tuple[str, str] | None = None,
    ) -> None:
        self._base = f"{url}/v2/{repository}"
        self._repository = repository
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = ca_path or True
        self._session.cert = client
        self._log_in(url, credentials)

    def put_blob(self, digest: str, data: bytes) -> None:
        """Upload a blob unless the registry has it."""
        if self._session.head(f"{self._base}/blobs/{digest}", timeout=_TIMEOUT_S).ok:
            return
        started = self._session.post(f"{self._base}/blobs/uploads/", timeout=_TIMEOUT_S)
        started.raise_for_status()
        where = urllib.parse.urljoin(started.url, started.headers["Location"])
        done = self._session.put(
            where,
            params={"digest": digest},
            data=data,
            headers={"Content-Type": "application/octet-stream"},
            timeout=_TIMEOUT_S,
        )
        done.raise_for_status()

    def put_manifest(self, name: str, document: bytes, media_type: str) -> None:
        """Upload a manifest or an index under a tag or its digest."""
        url = f"{self._base}/manifests/{name}"
        self._session.put(
            url, data=document, headers={"Content-Type": media_type}, timeout=_TIMEOUT_S
        ).raise_for_status()

    def delete_manifest(self, digest: str) -> None:
        """Remove a manifest by its digest."""
        self._session.delete(f"{self._base}/manifests/{digest}", timeout=_TIMEOUT_S).raise_for_status()

    def __enter__(self) -> Distribution:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.close()

    def _log_in(self, url: str, credentials: tuple[str, str] | None) -> None:
        answer = self._session.get(f"{url}/v2/", timeout=_TIMEOUT_S)
        challenge = answer.headers.get("WWW-Authenticate", "")
        if answer.status_code != requests.codes.unauthorized:
            answer.raise_for_status()
        elif challenge.lower().startswith("basic"):
            self._session.auth = credentials
        else:
            fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
            query = {"service": fields.get("service", ""), "scope": f"repository:{self._repository}:pull,push,delete"}
            token = self._session.get(fields["realm"], params=query, auth=credentials, timeout=_TIMEOUT_S)
            token.raise_for_status()
            self._session.headers["Authorization"] = f"Bearer {token.json()['token']}"
