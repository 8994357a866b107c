"""Finds a Go that can build the test tools; where there is none, brings the pinned one from the Go module proxy.

Prints the path of the program. Debian's own Go is too old for cri-tools.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

HERE = Path(__file__).parent.parent / "tests" / "tools"
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
# Of golang.org/toolchain, by version and architecture: go.mod and these lines change together.
SHA256 = {
    "1.26.2-amd64": "5c28763f43da5409ea590cf3c3fb1442c6c4e668d8f6af8c44a621a23f39a006",
    "1.26.2-arm64": "acb5cab2ad9d639b79b9e086a42bbff7c8931e2ceb0fd241c993e29378007e67",
}
TIMEOUT_S = 60.0


class ToolchainError(Exception):
    """There is no Go, and none can be brought."""


def find() -> Path:
    """:raises ToolchainError: there is none for this machine, or the download fails."""
    wanted = wanted_version()
    installed = shutil.which("go")
    if installed is not None and _version_of(installed) >= _numbers(wanted):
        return Path(installed)
    brought = HERE / "go" / wanted / "bin" / "go"
    if not brought.exists():
        _bring(wanted, brought.parent.parent)
    return brought


def wanted_version() -> str:
    """The version in go.mod."""
    match = re.search(r"^go (\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def _version_of(program: str) -> list[int]:
    answer = subprocess.run([program, "env", "GOVERSION"], capture_output=True, text=True, check=False)
    return _numbers(answer.stdout)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _bring(version: str, place: Path) -> None:
    architecture = MACHINES.get(platform.machine(), platform.machine())
    wanted = SHA256.get(f"{version}-{architecture}")
    if wanted is None:
        raise ToolchainError(f"no Go {version} for {architecture} is pinned in {__file__}")
    proxy = re.split("[,|]", os.environ.get("GOPROXY", ""))[0]
    if not proxy.startswith("https:"):
        proxy = "https://proxy.golang.org"
    name = f"v0.0.1-go{version}.linux-{architecture}"
    url = f"{proxy}/golang.org/toolchain/@v/{name}.zip"
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        archive = Path(directory, "toolchain.zip")
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, archive.open("wb") as file:  # noqa: S310
                while chunk := answer.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as err:
            raise ToolchainError(f"{url}: {err}") from err
        if digest.hexdigest() != wanted:
            raise ToolchainError(f"{url}: has sha256 {digest.hexdigest()}, expected {wanted}")
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(directory)
        root = Path(directory, f"golang.org/toolchain@{name}")
        # Module archives know no modes.
        for program in [*root.glob("bin/*"), *root.glob("pkg/tool/*/*")]:
            program.chmod(0o755)
        root.rename(place)


if __name__ == "__main__":
    try:
        print(find())
    except ToolchainError as err:
        sys.exit(f"{err}")
