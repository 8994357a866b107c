"""critest as a child process: which specs there are, one run of them against a CRI socket, and what came of it.

:mod:`tools.critest` puts it to work. What a run found is read from ginkgo's JSON report, never from its text.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tools.node import critest_path

EXCLUDED: Mapping[str, str] = {
    "Image Manager public image with digest should be pulled and removed [Conformance]": (
        "pulls one image of a public registry by its digest; an image that is made here can't have that digest"
    ),
    **{
        f"AppArmor runtime should {context}": "AppArmor is absent: not in this kernel, and Porto doesn't know it"
        for context in (
            "support deprecated apparmor_profile field should fail with an unloaded apparmor_profile",
            "support deprecated apparmor_profile field should enforce a apparmor_profile blocking writes",
            "support deprecated apparmor_profile field should enforce a permissive deprecated profile",
            "support apparmor field should fail with an unloaded apparmor_profile",
            "support apparmor field should enforce a apparmor_profile blocking writes",
            "support apparmor field should enforce a permissive deprecated profile",
            "prefer new apparmor field should fail with an unloaded apparmor_profile",
            "prefer new apparmor field should enforce a apparmor_profile blocking writes",
            "prefer new apparmor field should work with apparmor profile",
        )
    },
}
"""Specs that aren't run, each with the reason. The suite makes its SELinux specs only where SELinux is enabled."""

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"

RPC_TIMEOUT_S = 60
"""On top of what a call itself may take (the grace period of a stop). The suite's own default is 300 s, for each call
that hangs."""
_GRACE_S = 30.0
"""For what a spec cleans up after it was stopped."""
_INTERRUPT_S = 40.0
"""For critest to end after SIGINT: the grace, and the report."""
_PREFIX = "[k8s.io] "
_SKIPPED_BY_ITSELF = "benchmark"  # critest does that: benchmarks aren't validation
_SHIM_RECORD = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}) (?:WARNING|ERROR|CRITICAL) ")


class SuiteError(Exception):
    """critest can't be run; says what is missing."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What became of one spec."""

    name: str
    state: str
    seconds: float = 0.0
    message: str = ""
    """Of a failure: what was wrong, and where the spec is. Of a skip: the suite's reason."""
    node_log: tuple[str, ...] = ()
    """Of a failure: warnings and errors that the node logged meanwhile."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the suite."""

    side: str
    seed: int
    seconds: float
    specs: tuple[Spec, ...]
    note: str = ""
    """Why it ended early; empty when it ran to its end."""
    left_behind: tuple[str, ...] = ()
    """Pods that were there after the run."""

    def of(self, state: str) -> list[Spec]:
        return [spec for spec in self.specs if spec.state == state]

    @property
    def ok(self) -> bool:
        """True when every spec passed or was skipped by the suite itself, and nothing was left behind."""
        return not (self.of(FAILED) or self.of(NOT_RUN) or self.note or self.left_behind)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Run:
        specs = tuple(Spec(**{**spec, "node_log": tuple(spec["node_log"])}) for spec in value["specs"])
        return cls(**{**value, "specs": specs, "left_behind": tuple(value["left_behind"])})


@dataclass(frozen=True)
class Suite:
    """critest with the options that all its runs share.

    :param directory: for reports, logs and what specs write. :param focus: regular expressions of specs to run.
    :param websocket: stream over WebSocket rather than SPDY/3.1. :param timeout_s: for a whole run.
    """

    directory: Path
    focus: Sequence[str] = ()
    skip: Sequence[str] = ()
    websocket: bool = False
    timeout_s: float = 1800.0
    excluded: Mapping[str, str] = field(default_factory=lambda: EXCLUDED)

    def names(self) -> list[str]:
        """The specs that a run will run, by name.

        :raises SuiteError: there is no critest, or it doesn't accept an expression.
        """
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "report.json"
            command = [_program(), "-ginkgo.dry-run", f"-ginkgo.json-report={report}", *self._filters()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if not report.exists():
                raise SuiteError(f"critest can't list its specs:\n{(done.stdout + done.stderr)[-2000:]}")
            return [_name(entry) for entry in _specs(report) if entry["State"] == PASSED]

    def run(self, side: str, socket: str, seed: int, node_log: Path, node_ended: Callable[[], int | None]) -> Run:
        """Run it once, in the random order that the seed gives.

        :param side: whose run it is. :param socket: the CRI socket. :param node_log: where the node logs.
        :param node_ended: its exit status should it end meanwhile, which ends the run.
        """
        names = self.names()
        report = self.directory / f"{side}-{seed}.json"
        log_path = self.directory / f"{side}-{seed}.log"
        report.unlink(missing_ok=True)
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        started = time.monotonic()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                self._command(socket, seed, report),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(scratch)},
                start_new_session=True,
            )
            try:
                note = self._wait(process, node_ended, _Progress(log_path, len(names)))
            finally:
                _end_group(process)
        seconds = time.monotonic() - started
        if not note and (status := node_ended()) is not None:
            note = f"the node ended with status {status}"
        if not report.exists():
            note = note or f"critest ended with status {process.returncode} and no report:\n{_tail(log_path)}"
            return Run(side, seed, seconds, tuple(Spec(name, NOT_RUN) for name in names), note)
        found = {_name(entry): _spec(entry, node_log) for entry in _specs(report)}
        specs = tuple(found.get(name) or Spec(name, NOT_RUN) for name in names)
        reasons = json.loads(report.read_text())[0].get("SpecialSuiteFailureReasons") or []
        return Run(side, seed, seconds, specs, note or "; ".join(reasons))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _filters(self) -> list[str]:
        skips = [*self.skip, *(_quoted(name) for name in self.excluded)]
        return [*(f"-ginkgo.skip={text}" for text in skips), *(f"-ginkgo.focus={text}" for text in self.focus)]

    def _command(self, socket: str, seed: int, report: Path) -> list[str]:
        endpoint = f"unix://{socket}"
        command = [
            _program(),
            f"-config={self.directory}/no-crictl.yaml",
            f"-runtime-endpoint={endpoint}",
            f"-image-endpoint={endpoint}",
            f"-runtime-service-timeout={RPC_TIMEOUT_S}s",
            f"-image-service-timeout={RPC_TIMEOUT_S}s",
            "-ginkgo.randomize-all",
            f"-ginkgo.seed={seed}",
            f"-ginkgo.timeout={self.timeout_s:.0f}s",
            f"-ginkgo.grace-period={_GRACE_S}s",
            "-ginkgo.poll-progress-after=90s",
            "-ginkgo.poll-progress-interval=60s",
            "-ginkgo.no-color",
            f"-ginkgo.json-report={report}",
        ]
        if self.websocket:
            command += ["-websocket-exec", "-websocket-attach", "-websocket-portforward"]
        return [*command, *self._filters()]

    def _wait(self, process: subprocess.Popen[bytes], node_ended: Callable[[], int | None], progress: _Progress) -> str:
        """Wait for the end, and see to it that there is one; why it had to be forced."""
        deadline = time.monotonic() + self.timeout_s + 2 * _GRACE_S
        while True:
            try:
                process.wait(0.5)
                return ""
            except subprocess.TimeoutExpired:
                progress.show()
            if (status := node_ended()) is not None:
                note = f"the node ended with status {status}"
            elif time.monotonic() > deadline:
                note = f"not done after {self.timeout_s:.0f} s, and did not end by itself"
            else:
                continue
            process.send_signal(signal.SIGINT)  # the report is written on the way out
            try:
                process.wait(_INTERRUPT_S)
            except subprocess.TimeoutExpired:
                note += "; critest had to be killed"
            return note


class _Progress:
    """A line that counts, on a terminal."""

    def __init__(self, log: Path, total: int) -> None:
        self._log = log
        self._total = total

    def show(self) -> None:
        if sys.stderr.isatty():
            done = self._log.read_bytes().count("\N{BULLET}".encode())  # ginkgo's mark of a spec that is done
            print(f"\r{done}/{self._total} ", end="", file=sys.stderr, flush=True)


def _program() -> str:
    path = critest_path()
    if path is None:
        raise SuiteError("critest could not be built: `make prepare` says why")
    return path


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group; its leader is a child of ours."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _specs(report: Path) -> list[dict[str, Any]]:
    """The entries of a ginkgo report that are specs, not set-up steps nor benchmarks."""
    entries = json.loads(report.read_text())[0]["SpecReports"] or []
    return [entry for entry in entries if entry["LeafNodeType"] == "It" and _SKIPPED_BY_ITSELF not in _name(entry)]


def _name(entry: Mapping[str, Any]) -> str:
    return " ".join([*(entry["ContainerHierarchyTexts"] or []), entry["LeafNodeText"]]).removeprefix(_PREFIX)


def _quoted(name: str) -> str:
    """A regular expression that matches that text, in Go's syntax too."""
    return re.sub(r"([^\w\s])", r"\\\1", name, flags=re.ASCII)


def _spec(entry: Mapping[str, Any], node_log: Path) -> Spec:
    name, state, seconds = _name(entry), entry["State"], entry["RunTime"] / 1e9
    failure = entry.get("Failure") or {}
    message = failure.get("Message", "")
    if state == PASSED:
        return Spec(name, PASSED, seconds)
    if state in ("skipped", "pending"):
        # A spec that skips itself says why. One that ginkgo didn't come to has no reason, or none of the spec's.
        by_itself = state == "skipped" and message and not message.startswith("Spec skipped because")
        return Spec(name, SKIPPED if by_itself else NOT_RUN, seconds, message)
    more = [extra["Failure"] for extra in entry.get("AdditionalFailures") or []]
    texts = [_failure_text(one) for one in (failure, *more)]
    if state != FAILED:  # timed out, interrupted, panicked, aborted
        texts.insert(0, f"{state}:")
    return Spec(name, FAILED, seconds, "\n".join(texts), _excerpt(node_log, entry["StartTime"], entry["EndTime"]))


def _failure_text(failure: Mapping[str, Any]) -> str:
    location = failure.get("Location") or {}
    path = str(location.get("FileName", "")).rpartition("/pkg/")[2]
    text = failure.get("Message", "").strip()
    if forwarded := failure.get("ForwardedPanic"):
        text = f"{text}: {forwarded}"
    return f"{text}\n({path}:{location.get('LineNumber', '')})"


def _excerpt(log: Path, start: str, end: str, lines: int = 5) -> tuple[str, ...]:
    """Warnings and errors of portoshim's log between two points of time; the last few."""
    if not log.exists():
        return ()
    first, last = _moment(start), _moment(end)
    found = []
    for line in log.read_text(errors="replace").splitlines():
        match = _SHIM_RECORD.match(line)
        if match and first <= datetime.fromisoformat(match[1]).astimezone() <= last:
            found.append(line)
    return tuple(found[-lines:])


def _moment(text: str) -> datetime:
    """A time as Go writes it, cut to milliseconds: that is what the log has."""
    moment = datetime.fromisoformat(re.sub(r"(\.\d{1,6})\d*", r"\1", text))
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:]
