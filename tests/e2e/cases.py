"""What a random container configuration is made of: where it runs, what it says, and what is to be seen of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from hypothesis import strategies as st

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cgroups import InForce
from tests.e2e.view import BUSYBOX, View

MIB = 1024 * 1024
COMMAND = (BUSYBOX, "sh", "-c", "exec sleep 1000", "argv0")
"""What a container runs; a script takes the place of the one in it."""

PODS = ("plain", "privileged", "node")
DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CDI_KIND = "vendor.example/any"


@dataclass(frozen=True)
class Surroundings:
    """What configurations may refer to on the node."""

    directory: Path
    """Of everything here."""
    image: str
    data_image: str
    cdi: Path
    """The node's directory of CDI files."""

    @property
    def sources(self) -> dict[str, Path]:
        """Host directories by kind, each with a file ``marker`` that says which one it is."""
        return {name: self.directory / name for name in ("plain", "shared", "strict", "nested", "odd name;\n\\é")}

    @property
    def file(self) -> Path:
        return self.directory / "plain" / "marker"

    @property
    def seccomp(self) -> Path:
        return self.directory / "seccomp.json"

    def make(self) -> None:
        for name, path in self.sources.items():
            path.mkdir()
            options = "mode=0777" + (",nosuid,nodev,noexec" if name == "strict" else "")
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "any", str(path)], check=True)
            subprocess.run(["mount", "--make-shared" if name == "shared" else "--make-private", str(path)], check=True)
            (path / "marker").write_text(name.partition(" ")[0] + "\n")
            below = path / "below"
            below.mkdir()
            if name == "nested":
                subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0777", "any", str(below)], check=True)
            (below / "here").mkdir()  # to be mounted over, where everything is read-only
        rule = {"names": ["chmod", "fchmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
        self.seccomp.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
        (self.directory / "broken.json").write_text("{")
        self.cdi.mkdir(exist_ok=True)
        devices = [
            {"name": "good", "containerEdits": {"env": ["CDI=yes"], "additionalGids": [4321]}},
            {"name": "bad", "containerEdits": {"hooks": [{"hookName": "poststop", "path": "/bin/true"}]}},
        ]
        (self.cdi / "any.json").write_text(json.dumps({"cdiVersion": "0.7.0", "kind": CDI_KIND, "devices": devices}))

    def clean(self) -> None:
        (self.cdi / "any.json").unlink(missing_ok=True)
        for path in self.sources.values():
            subprocess.run(["umount", "-R", "-l", str(path)], check=False)


@dataclass(frozen=True)
class Seen:
    """All that can be told of one container that runs."""

    view: View
    status: pb.ContainerStatus
    limits: InForce
    pod: View
    """Of a plain container of the same pod."""
    target: View
    """Of the container that others join."""

    is_exec: bool
    """``view`` is of a process that was run later on."""


@dataclass
class Case:
    """A configuration, and what is to become of it."""

    around: Surroundings
    pod: str
    config: pb.ContainerConfig = field(default_factory=pb.ContainerConfig)
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    """Field and status code of each."""
    checks: list[Callable[[Seen], None]] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    variables: dict[bytes, bytes] = field(default_factory=dict)
    """The environment beyond what every container has."""
    targets: set[str] = field(default_factory=set)
    """Where something is mounted, or a device made."""
    joins: bool = False
    """It joins the processes of a container that has to be there."""

    @property
    def security(self) -> pb.LinuxContainerSecurityContext:
        return self.config.linux.security_context

    @property
    def resources(self) -> pb.LinuxContainerResources:
        return self.config.linux.resources

    def probe(self, command: str, expected: Callable[[str, int], bool]) -> None:
        """Run a command inside and look at its output and its exit status."""
        number = len(self.probes)
        self.probes.append(command)

        def check(seen: Seen) -> None:
            output, code = seen.view.probes[number]
            assert expected(output, code), (command, output, code)

        self.checks.append(check)

    def __repr__(self) -> str:
        shown = text_format.MessageToString(self.config, as_utf8=True)
        return f"in a {self.pod} pod:\n{shown[:6000]}mistakes: {self.mistakes}"


Draw = Callable[[st.SearchStrategy[Any]], Any]
Wish = Callable[[Draw, Case], None]


def equal(found: object, expected: object, what: str) -> None:
    assert found == expected, (what, found, expected)


def contained(item: object, container: Any, what: str) -> None:
    assert item in container, (what, item, container)
