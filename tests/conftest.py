"""Run as root, the tests move onto a stage: namespaces of their own that take everything with them when they end.

With ``PORTO_SOCKET`` set they stay where they are: portod has to see the namespaces the tests make.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tools`, with --import-mode=importlib

from tools import stage

# How long an example takes tells how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile(
    "portoshim", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("portoshim")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    needs_stage = os.geteuid() == 0 and not stage.on_stage() and "PORTO_SOCKET" not in os.environ
    # Workers of pytest-xdist are started each on a stage of its own, by `make test`.
    if not needs_stage or config.option.collectonly or config.getoption("tx", None):
        return
    # Give the command its real standard streams back before this process becomes another.
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    root = str(config.rootpath)
    os.chdir(config.invocation_params.dir)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "tools.stage", sys.executable, "-m", "pytest", *config.invocation_params.args]
    os.execve(sys.executable, command, environment)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: run `sudo make test`")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)
