"""Compiles portoshim-init, the static helper that becomes a container's command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DIRECTORY = Path("src/shim_porto_runtime/init")
FLAGS = ["-static", "-Os", "-s", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]


class InitBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Builds for wheels, editable ones too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("a C compiler is needed to build portoshim-init: apt-get install gcc libc6-dev")
        directory = Path(self.root) / DIRECTORY
        target = directory / "portoshim-init"
        partial = directory / f".portoshim-init.{os.getpid()}"
        try:
            subprocess.run([compiler, *FLAGS, "-o", str(partial), str(directory / "init.c")], check=True)
            partial.replace(target)  # a running installation never sees half a file
        finally:
            partial.unlink(missing_ok=True)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        build_data["artifacts"].append(str(DIRECTORY / "portoshim-init"))
