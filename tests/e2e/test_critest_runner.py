"""The runner of the conformance suite: it always ends, tells what it saw, and removes nothing that isn't its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools import critest, critest_images, critest_suite, critest_surroundings, stage
from tools.critest_suite import EXCLUDED, FAILED, NOT_RUN, PASSED, SKIPPED, Run, Spec, Suite, SuiteError
from tools.node import critest_path

needs_critest = pytest.mark.skipif(critest_path() is None, reason="critest could not be built")

# A program in critest's place. It knows three specs, and does with `run` what a test wants.
FAKE = """\
#!{python}
import json, os, signal, sys, time
options = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
def entry(text, state, **more):
    return {{"ContainerHierarchyTexts": ["[k8s.io] Things"], "LeafNodeText": text, "LeafNodeType": "It",
            "State": state, "RunTime": 1_500_000_000, "StartTime": "2026-01-02T03:04:05.123456789+02:00",
            "EndTime": "2026-01-02T03:04:06.5+02:00", **more}}
def report(*entries, reasons=()):
    with open(options["ginkgo.json-report"], "w") as file:
        json.dump([{{"SpecReports": entries, "SpecialSuiteFailureReasons": list(reasons)}}], file)
if "-ginkgo.dry-run" in sys.argv:
    report(*(entry(name, "passed") for name in ("one", "two", "three", "benchmark")))
    sys.exit(0)
{run}
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Suite]:
    """A suite of three specs, whose program runs some Python."""

    def make(run: str, **options: Any) -> Suite:
        program = tmp_path / "critest"
        program.write_text(FAKE.format(python=sys.executable, run=textwrap.dedent(run)))
        program.chmod(0o755)
        monkeypatch.setattr(critest_suite, "critest_path", lambda: str(program))
        return Suite(tmp_path, **options)

    return make


def go(suite: Suite, node_ended: Callable[[], int | None] = lambda: None) -> Run:
    return suite.run("side", "/run/no.sock", 7, suite.directory / "node.log", node_ended)


def test_what_became_of_each_spec(suite: Callable[..., Suite]) -> None:
    made = suite(
        """
        at = {"FileName": "/home/x/cri-tools/pkg/validate/pod.go", "LineNumber": 12}
        report(
            entry("one", "passed"),
            entry("two", "failed", Failure={"Message": "wrong", "Location": at},
                  AdditionalFailures=[{"State": "failed", "Failure": {"Message": "and not removed", "Location": at}}]),
            entry("three", "skipped", Failure={"Message": "not announced"}),
        )
        sys.exit(1)
        """
    )
    done = go(made)
    assert [(spec.name, spec.state) for spec in done.specs] == [
        ("Things one", PASSED),
        ("Things two", FAILED),
        ("Things three", SKIPPED),
    ]
    assert done.specs[1].message == "wrong\n(validate/pod.go:12)\nand not removed\n(validate/pod.go:12)"
    assert done.specs[1].seconds == 1.5
    assert done.specs[2].message == "not announced"
    assert done.note == ""
    assert not done.ok
    assert Run.from_json(json.loads(json.dumps(done.to_json()))) == done


def test_a_spec_that_was_not_come_to_is_no_skip(suite: Callable[..., Suite]) -> None:
    made = suite(
        """
        report(entry("one", "passed"), entry("two", "timedout", Failure={"Message": "A suite timeout occurred"}),
               entry("three", "skipped"), reasons=["Suite Timeout Elapsed"])
        """
    )
    done = go(made)
    assert [spec.state for spec in done.specs] == [PASSED, FAILED, NOT_RUN]
    assert done.specs[1].message.startswith("timedout:\nA suite timeout occurred")
    assert done.note == "Suite Timeout Elapsed"


def test_a_spec_that_is_not_in_the_report(suite: Callable[..., Suite]) -> None:
    done = go(suite('report(entry("one", "passed"), entry("two", "passed"))'))
    assert [spec.state for spec in done.specs] == [PASSED, PASSED, NOT_RUN]
    assert not done.ok


def test_no_report(suite: Callable[..., Suite]) -> None:
    done = go(suite('print("panic: out of order", flush=True); sys.exit(2)'))
    assert {spec.state for spec in done.specs} == {NOT_RUN}
    assert "status 2" in done.note
    assert "panic: out of order" in done.note


def test_a_report_of_an_earlier_run_is_not_taken_for_this_ones(suite: Callable[..., Suite]) -> None:
    made = suite("sys.exit(2)")
    (made.directory / "side-7.json").write_text('[{"SpecReports": []}]')
    assert "no report" in go(made).note


def test_a_suite_that_hangs_is_ended(suite: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(critest_suite, "_GRACE_S", 0.1)
    monkeypatch.setattr(critest_suite, "_INTERRUPT_S", 0.5)
    pid = "open(os.path.join(os.path.dirname(sys.argv[0]), 'pid'), 'w').write(str(os.getpid()))"
    made = suite(f"signal.signal(signal.SIGINT, signal.SIG_IGN); {pid}; time.sleep(600)", timeout_s=0.1)
    started = time.monotonic()
    done = go(made)
    assert time.monotonic() - started < 30
    assert "had to be killed" in done.note
    assert {spec.state for spec in done.specs} == {NOT_RUN}
    with pytest.raises(ProcessLookupError):
        os.kill(int((made.directory / "pid").read_text()), 0)


def test_a_node_that_ends_ends_the_run(suite: Callable[..., Suite]) -> None:
    made = suite(
        """
        def interrupted(*_):
            report(entry("one", "passed"), entry("two", "interrupted"), entry("three", "skipped"))
            sys.exit(1)
        signal.signal(signal.SIGINT, interrupted)
        open(os.path.join(os.path.dirname(sys.argv[0]), "ready"), "w")
        time.sleep(600)
        """
    )
    ready = made.directory / "ready"
    done = go(made, lambda: -9 if ready.exists() else None)
    assert done.note == "the node ended with status -9"
    assert [spec.state for spec in done.specs] == [PASSED, FAILED, NOT_RUN]


def test_a_node_that_ended_is_told_even_if_the_suite_was_faster(suite: Callable[..., Suite]) -> None:
    assert go(suite('report(entry("one", "failed"))'), lambda: 1).note == "the node ended with status 1"


def test_what_the_node_logged_meanwhile(suite: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    made = suite('report(entry("one", "failed"), entry("two", "passed"), entry("three", "passed"))')
    (made.directory / "node.log").write_text(
        "2026-01-02T01:04:05.122 ERROR shim.x before\n"
        "2026-01-02T01:04:05.123 WARNING shim.x at its start\n"
        "2026-01-02T01:04:06.000 INFO shim.x nothing\n"
        "2026-01-02T01:04:06.500 ERROR shim.x at its end\n"
        "Traceback (most recent call last):\n"
        "2026-01-02T01:04:06.501 ERROR shim.x after\n"
    )
    assert [line.rpartition("shim.x ")[2] for line in go(made).specs[0].node_log] == ["at its start", "at its end"]


def test_options_of_critest(suite: Callable[..., Suite]) -> None:
    made = suite(
        'print(" ".join(sys.argv[1:])); report(entry("one", "passed"))', focus=["a", "b"], skip=["c"], websocket=True
    )
    go(made)
    said = (made.directory / "side-7.log").read_text()
    for option in ("-ginkgo.focus=a", "-ginkgo.focus=b", "-ginkgo.skip=c", "-ginkgo.seed=7", "-ginkgo.randomize-all"):
        assert option in said
    for option in ("-websocket-exec", "-websocket-attach", "-websocket-portforward"):
        assert option in said
    assert "-runtime-endpoint=unix:///run/no.sock" in said


def test_no_critest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(critest_suite, "critest_path", lambda: None)
    with pytest.raises(SuiteError, match="make prepare"):
        Suite(tmp_path).names()


# -- the real one ------------------------------------------------------------------------------------------------------


@needs_critest
def test_exclusions_are_names_of_specs(tmp_path: Path) -> None:
    everything = set(Suite(tmp_path, excluded={}).names())
    assert set(EXCLUDED) <= everything
    assert set(Suite(tmp_path).names()) == everything - set(EXCLUDED)


@needs_critest
def test_an_expression_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SuiteError):
        Suite(tmp_path, focus=["("]).names()


@needs_critest
def test_images_are_those_that_critest_names() -> None:
    path = critest_path()
    assert path is not None
    program = Path(path).read_bytes()
    for reference in critest_images.all_images():
        assert reference.removesuffix(":latest").encode() in program, reference


# -- what is told ------------------------------------------------------------------------------------------------------


def test_summary() -> None:
    dump = "    {\n        s: {\n        },\n    }\n"
    message = f"Unexpected error:\n    <*status.Error | 0x1>: \n    rpc error\n{dump}occurred"
    specs = (Spec("good", PASSED), Spec("bad", FAILED, 2.0, message, ("a line of the node",)), Spec("ugly", NOT_RUN))
    done = Run("portoshim", 5, 61.0, specs, "it was stopped", ("pod1",))
    text = critest.summary(done, "porto 5", Suite(Path("/"), excluded={"never": "a reason"}))
    assert text.splitlines() == [
        "FAILED bad (2.0 s)",
        "    Unexpected error:",
        "        <*status.Error | 0x1>: ",
        "        rpc error",
        "    occurred",
        "    a line of the node",
        "excluded never: a reason",
        "left behind: pod1",
        "ended early: it was stopped",
        "",
        "portoshim (porto 5), seed 5: 1 passed, 1 failed, 0 skipped, 1 not run in 61 s",
    ]


def test_comparison() -> None:
    ours = Run("portoshim", 1, 1.0, (Spec("a", PASSED), Spec("b", FAILED), Spec("c", PASSED)))
    theirs = Run("containerd", 1, 1.0, (Spec("c", SKIPPED), Spec("b", FAILED), Spec("a", PASSED)))
    assert critest.comparison(ours, theirs).splitlines()[2:] == ["| c | passed | skipped |"]
    assert "agree" in critest.comparison(ours, ours)


def test_settings() -> None:
    options = critest._parser().parse_args(["--set", "A.B=[x]", "--set", "A.C=1", "--set", "D.E=none"])
    assert options.set == {"A": {"B": ["x"], "C": 1}, "D": {"E": "none"}}
    assert critest._parser().parse_args([]).set == {}


def test_not_in_the_machines_own_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTO_SOCKET", "/run/portod.socket")
    monkeypatch.setattr(critest_surroundings, "_INITIAL_PID_NAMESPACE", os.readlink("/proc/self/ns/pid"))
    with pytest.raises(SuiteError, match="namespaces of their own"):
        critest_surroundings.check(peer=False)
    monkeypatch.delenv("PORTO_SOCKET")
    monkeypatch.setattr(stage, "on_stage", lambda: False)
    with pytest.raises(SuiteError, match="make critest"):
        critest_surroundings.check(peer=False)


# -- nothing but its own is removed ------------------------------------------------------------------------------------


@pytest.mark.root
def test_mounts_go_before_files_and_originals_stay(tmp_path: Path) -> None:
    """A bind mount of a tree with mounts, such as /sys: neither its files nor its mounts are ours."""
    original, copy = tmp_path / "original", tmp_path / "run" / "with space" / "copy"
    inner = original / "inner"
    for directory in (original, copy):
        directory.mkdir(parents=True)
    mount("-t", "tmpfs", "none", str(original))
    inner.mkdir()
    mount("-t", "tmpfs", "none", str(inner))
    mount("--make-rshared", str(original))
    (original / "file").touch()
    (inner / "file").touch()
    mount("--rbind", str(original), str(copy))
    assert len(critest_surroundings.mounts_below(tmp_path / "run")) == 2

    critest_surroundings.remove_tree(tmp_path / "run")

    assert not (tmp_path / "run").exists()
    assert (original / "file").exists()
    assert (inner / "file").exists()
    assert inner.is_mount()
    subprocess.run(["umount", "--recursive", str(original)], check=True)


@pytest.mark.root
def test_hosts_lead_here_and_back(tmp_path: Path) -> None:
    before = critest_surroundings.HOSTS.read_text()
    with critest_surroundings.hosts_lead_here(["registry.example.org", "other.example.org"], tmp_path):
        assert "127.0.0.1 registry.example.org other.example.org\n" in critest_surroundings.HOSTS.read_text()
    assert critest_surroundings.HOSTS.read_text() == before


@pytest.mark.root
def test_shared_memory_of_the_suite_is_removed_and_no_other() -> None:
    other = make_segment(4096)
    with critest_surroundings.no_shared_memory_left():
        made = make_segment(1048576)
        assert {made, other} <= segments()
    assert made not in segments()
    assert other in segments()
    subprocess.run(["ipcrm", "-m", str(other)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def make_segment(size: int) -> int:
    said = subprocess.run(["ipcmk", "-M", str(size)], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\d+", said)
    assert found is not None
    return int(found[0])


def segments() -> set[int]:
    return {row["shmid"] for row in critest_surroundings._segments()}


# -- the shell of the images -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``/bin/sh`` of the images."""
    if not Path("/bin/busybox").exists():
        pytest.skip("busybox-static is not installed")
    path = tmp_path_factory.mktemp("shell") / "sh"
    path.write_bytes(critest_images.program("sh"))
    path.chmod(0o755)
    return path


def say(shell: Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
    # Under the name it has in the images: busybox goes by it.
    done = subprocess.run(["sh", *arguments], executable=shell, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


class TestShell:
    def test_a_command_is_looked_for_in_path_though_it_is_an_applet(self, shell: Path, tmp_path: Path) -> None:
        own = tmp_path / "ls"
        own.write_text("#!/bin/sh\necho own ls: $*\n")
        own.chmod(0o755)
        found = say(shell, "-c", "ls one /two", env={"PATH": f"/nowhere:{tmp_path}"})
        assert found == (0, "own ls: one /two\n", "")

    def test_one_that_may_not_be_executed(self, shell: Path, tmp_path: Path) -> None:
        (tmp_path / "ls").touch(mode=0o644)
        found = say(shell, "-c", "ls", env={"PATH": str(tmp_path)})
        assert found == (126, "", "sh: ls: Permission denied\n")

    def test_one_that_is_masked_by_a_device(self, shell: Path, tmp_path: Path) -> None:
        (tmp_path / "ls").symlink_to("/dev/null")
        found = say(shell, "-c", "ls", env={"PATH": str(tmp_path)})
        assert found == (126, "", "sh: ls: Permission denied\n")

    def test_one_that_is_not_there(self, shell: Path) -> None:
        assert say(shell, "-c", "no-such-command") == (127, "", "sh: no-such-command: not found\n")

    @pytest.mark.parametrize(
        ("script", "output"),
        [
            ("echo built in", "built in\n"),
            ("A=1; echo $A", "1\n"),
            ("echo 'quoted  text' | cat", "quoted  text\n"),
            ("exit 0", ""),
            ("", ""),
        ],
    )
    def test_all_else_is_busyboxs(self, shell: Path, script: str, output: str) -> None:
        assert say(shell, "-c", script) == (0, output, "")

    def test_from_standard_input(self, shell: Path) -> None:
        assert say(shell, input="echo -n hello\n") == (0, "hello", "")

    def test_arguments_of_a_script(self, shell: Path) -> None:
        assert say(shell, "-c", 'echo "$1"', "name", "first") == (0, "first\n", "")
