"""Compiles portoshim-init, the static helper that becomes a container's command, and tabulates the system calls.

The numbers of system calls come from the C library's headers: seccomp profiles name them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DIRECTORY = Path("src/shim_porto_runtime/init")
# Headers by the names that seccomp profiles have for architectures; all that a kernel of this machine's kind runs.
HEADERS = {
    "x86_64": {
        "SCMP_ARCH_X86_64": "asm/unistd_64.h",
        "SCMP_ARCH_X86": "asm/unistd_32.h",
        "SCMP_ARCH_X32": "asm/unistd_x32.h",
    },
    "aarch64": {"SCMP_ARCH_AARCH64": "asm/unistd.h"},
}
FLAGS = ["-static", "-Os", "-s", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]


class InitBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Builds for wheels, editable ones too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("a C compiler is needed to build portoshim-init: apt-get install gcc libc6-dev")
        directory = Path(self.root) / DIRECTORY
        partial = directory / f".partial.{os.getpid()}"  # a running installation never sees half a file
        try:
            subprocess.run([compiler, *FLAGS, "-o", str(partial), str(directory / "init.c")], check=True)
            partial.replace(directory / "portoshim-init")
            partial.write_text(json.dumps(_syscalls(compiler), separators=(",", ":")))
            partial.replace(directory / "syscalls.json")
        finally:
            partial.unlink(missing_ok=True)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        build_data["artifacts"] += [str(DIRECTORY / name) for name in ("portoshim-init", "syscalls.json")]


def _syscalls(compiler: str) -> dict[str, dict[str, int]]:
    """System calls by architecture and name."""
    tables = {}
    for architecture, header in HEADERS.get(platform.machine(), {}).items():
        defined = _preprocess(compiler, "-dM", f"#include <{header}>\n")
        names = sorted(set(re.findall(r"^#define __NR_([a-z]\w*) ", defined, re.MULTILINE)) - {"syscalls"})
        source = f"#define __X32_SYSCALL_BIT 0x40000000\n#include <{header}>\n" + "".join(
            f"{name} = (__NR_{name})\n" for name in names
        )
        values = re.findall(r"^(\w+) = (.*)$", _preprocess(compiler, "-P", source), re.MULTILINE)
        # A value may be a sum: (0x40000000 + 12).
        tables[architecture] = {name: eval(text, {"__builtins__": {}}) for name, text in values}  # noqa: S307
    return tables


def _preprocess(compiler: str, option: str, source: str) -> str:
    command = [compiler, "-E", option, "-x", "c", "-"]
    return subprocess.run(command, input=source, check=True, capture_output=True, text=True).stdout
