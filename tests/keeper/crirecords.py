"""Reads CRI logs as kubelet and crictl do: what the keeper wrote has to come back from here byte by byte."""

from __future__ import annotations

import re
from pathlib import Path

_RECORD = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([PF]) (.*)", re.DOTALL)


def read(*files: Path | bytes) -> dict[str, bytes]:
    """The bytes of each stream in the logs, oldest first; fails at anything that is no whole record."""
    streams = {"stdout": b"", "stderr": b""}
    parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    for file in files:
        data = file if isinstance(file, bytes) else file.read_bytes()
        assert data.endswith(b"\n") or not data, f"half a record at the end: {data[-80:]!r}"
        for record in data.split(b"\n")[:-1]:
            match = _RECORD.fullmatch(record)
            assert match is not None, f"not a record: {record[:200]!r}"
            assert len(match[3]) <= 16384
            parts[match[1].decode()].append(match[3] + (b"\n" if match[2] == b"F" else b""))
    for stream, found in parts.items():
        streams[stream] = b"".join(found)
    return streams
