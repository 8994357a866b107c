"""How a session ended, as the client is told on the error stream.

Clients of ``v4.channel.k8s.io`` and later read a Kubernetes ``Status`` (JSON); those before it read a text, and nothing
means success.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Status:
    """An outcome in both forms."""

    json: bytes
    text: bytes
    summary: str
    """For the log."""


def success() -> Status:
    """It went well; for a command: it exited with 0."""
    return Status(_encode({"metadata": {}, "status": "Success"}), b"", "success")


def exited(code: int) -> Status:
    """The command ended with this exit code, 0 included. Clients take 0 to 255; anything else becomes 255."""
    if code == 0:
        return success()
    code = code if 0 < code < 256 else 255
    message = f"command terminated with non-zero exit code: {code}"
    status = {
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }
    return Status(_encode(status), message.encode(), f"exit code {code}")


def failed(message: str) -> Status:
    """The session could not start or go on; the message is the client's to read."""
    text = f"Internal error occurred: {message}"
    status = {"metadata": {}, "status": "Failure", "message": text, "reason": "InternalError", "code": 500}
    return Status(_encode(status), text.encode("utf-8", "replace"), f"failed: {message}")


def _encode(status: dict[str, Any]) -> bytes:
    return json.dumps(status, separators=(",", ":")).encode()
