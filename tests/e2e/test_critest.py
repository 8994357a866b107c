"""The CRI conformance suite as a whole, once and in random order: each of its specs is a test here.

What isn't run is skipped with the reason: ``tools.critest_suite.EXCLUDED``. The suite itself skips the specs of what a
runtime doesn't announce; :data:`NOT_ANNOUNCED` says which may be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tools.critest_suite import EXCLUDED, PASSED, SKIPPED, Run, Suite
from tools.node import critest_path

RUN_TIMEOUT_S = 900
"""Some eight times what it takes."""
# The first test waits for the whole run.
pytestmark = [pytest.mark.root, pytest.mark.timeout(RUN_TIMEOUT_S + 300)]

ROOT = Path(__file__).parent.parent.parent
NOT_ANNOUNCED = {
    "Security Context UserNamespaces": "Porto can't map a pod's users to a range of the node's",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" not in metafunc.fixturenames:
        return
    specs: list[object] = [pytest.param(name, marks=pytest.mark.skip(reason)) for name, reason in EXCLUDED.items()]
    if critest_path() is not None:
        specs += sorted(Suite(Path(tempfile.gettempdir())).names())  # it lists them in random order
    metafunc.parametrize("spec", specs, ids=str)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of all specs."""
    return run(tmp_path_factory.mktemp("critest"))


def test_spec(spec: str, whole: Run) -> None:
    (found,) = [one for one in whole.specs if one.name == spec]
    if found.state == SKIPPED and any(spec.startswith(start) for start in NOT_ANNOUNCED):
        pytest.skip(found.message)
    assert found.state == PASSED, "\n".join([f"with seed {whole.seed}:", found.message, *found.node_log])


def test_all_of_it_ran_and_left_nothing(whole: Run) -> None:
    assert whole.note == ""
    assert whole.left_behind == ()
    assert len(whole.specs) > 100


def test_streaming_over_websocket(tmp_path: Path) -> None:
    done = run(tmp_path, "--streaming", "websocket", "--focus", "Streaming")
    assert [(spec.name, spec.message) for spec in done.specs if spec.state != PASSED] == []
    assert len(done.specs) == 5
    assert done.ok


def run(directory: Path, *arguments: str) -> Run:
    """Run the suite as ``make critest`` does: as a process, so that nothing it does or holds up is ours."""
    if critest_path() is None:
        reason = "critest could not be built: `make prepare` says why"
        if "PORTOSHIM_CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    report = directory / "report.json"
    command = [sys.executable, "-m", "tools.critest", f"--report={report}", "--timeout=12", *arguments]
    if "PORTO_SOCKET" not in os.environ:
        # A stage of its own: its embedded Porto and that of other tests would share the cgroups of ours.
        command = [sys.executable, "-m", "tools.stage", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert report.exists(), done.stdout + done.stderr
    (only,) = json.loads(report.read_text())
    return Run.from_json(only)
