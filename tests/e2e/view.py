"""What a process sees of itself and its container: told by a script that runs in there, in one go."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BUSYBOX = "/bin/busybox"
END = "@@end"
_NAMESPACES = ("net", "ipc", "uts", "pid", "mnt", "user")
_OCTAL = re.compile(r"\\([0-7]{3})")


def script(probes: Sequence[str] = (), then: str = "") -> str:
    """A shell script that tells everything about its shell.

    :param probes: commands whose output and success are to be told as well. :param then: what to do in the end.
    """
    lines = [
        f"B={BUSYBOX}",
        "p() { echo; echo @@$1; }",
        "p status; $B cat /proc/$$/status",
        "p environ; $B base64 /proc/$$/environ",
        "p cmdline; $B base64 /proc/$$/cmdline",
        "p cwd; $B readlink -n /proc/$$/cwd | $B base64",
        "p mountinfo; $B cat /proc/$$/mountinfo",
        "p hostname; $B cat /proc/sys/kernel/hostname",
        "p oom; $B cat /proc/$$/oom_score_adj",
        f"p namespaces; for n in {' '.join(_NAMESPACES)}; do $B readlink /proc/$$/ns/$n; done",
        "p terminals; for n in 0 1 2; do [ -t $n ] && echo $n; done",
        "p input; $B readlink /proc/$$/fd/0",
    ]
    for number, probe in enumerate(probes):
        lines.append(f"p probe{number}; ( {probe} ) 2>&1; r=$?; echo; echo ended $r")
    return "\n".join([*lines, f"echo; echo {END}", then])


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    root: str
    point: str
    options: frozenset[str]
    propagation: Mapping[str, str]
    """``shared`` and ``master``: peer groups."""
    kind: str


@dataclass(frozen=True)
class View:
    """What the script has told."""

    status: Mapping[str, str]
    environment: Mapping[bytes, bytes]
    arguments: tuple[bytes, ...]
    cwd: str
    mounts: tuple[Mount, ...]
    hostname: str
    oom_score_adj: int
    namespaces: Mapping[str, str]
    terminals: tuple[str, ...]
    input: str
    probes: tuple[tuple[str, int], ...]
    """Output and exit status of each."""

    def mount(self, point: str) -> Mount:
        """What is mounted last at a path."""
        found = [mount for mount in self.mounts if mount.point == point]
        assert found, f"nothing is mounted at {point!r}"
        return found[-1]

    def capabilities(self, kind: str) -> int:
        """``Inh``, ``Prm``, ``Eff``, ``Bnd``, ``Amb``."""
        return int(self.status[f"Cap{kind}"], 16)

    def ids(self, kind: str) -> list[int]:
        return [int(word) for word in self.status[kind].split()]


def parse(text: str) -> View:
    """A script's output."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.startswith("@@"):
            lines = sections.setdefault(line.removeprefix("@@"), [])
        else:
            lines.append(line)
    assert "end" in sections, text[-2000:]

    def plain(name: str) -> list[str]:
        return [line for line in sections[name] if line]

    def encoded(name: str) -> bytes:
        return base64.b64decode("".join(sections[name]))

    pairs = (item.partition(b"=") for item in encoded("environ").split(b"\0") if item)
    return View(
        status={name: value.strip() for name, _, value in (line.partition(":") for line in plain("status"))},
        environment={name: value for name, _, value in pairs},
        arguments=tuple(encoded("cmdline").split(b"\0")[:-1]),
        cwd=encoded("cwd").decode(),
        mounts=tuple(mount_of(line) for line in plain("mountinfo")),
        hostname=plain("hostname")[0],
        oom_score_adj=int(plain("oom")[0]),
        namespaces=dict(zip(_NAMESPACES, plain("namespaces"), strict=True)),
        terminals=tuple(plain("terminals")),
        input="".join(plain("input")),
        probes=tuple(_probe(lines) for name, lines in sections.items() if name.startswith("probe")),
    )


def mount_of(line: str) -> Mount:
    """A line of mountinfo (proc(5))."""
    fields = line.split(" ")
    dash = fields.index("-")
    optional = (item.partition(":") for item in fields[6:dash])
    return Mount(
        root=_unescaped(fields[3]),
        point=_unescaped(fields[4]),
        options=frozenset(fields[5].split(",")),
        propagation={name: group for name, _, group in optional},
        kind=fields[dash + 1],
    )


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def _probe(lines: list[str]) -> tuple[str, int]:
    ended = next(line for line in reversed(lines) if line.startswith("ended "))
    position = len(lines) - 1 - lines[::-1].index(ended)
    return "\n".join(lines[:position]).strip("\n"), int(ended.removeprefix("ended "))
