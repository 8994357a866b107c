"""An embedded Porto as a process of its own, to be killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from porto_api import Client, errors

_START_TIMEOUT_S = 20.0


class Daemon:
    """The daemon, and the directory it works in."""

    def __init__(self, directory: Path, *, cgroup: str | None = None) -> None:
        self.directory = directory
        self.socket = str(directory / "portod.socket")
        self.place = directory / "place"
        self.state = directory / "state"
        self.cgroup = cgroup or f"{os.environ['SHIM_STAGE_CGROUP']}/{directory.name}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy_all()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def command(self, *options: str) -> list[str]:
        """The command line, with options."""
        return [
            *(sys.executable, "-m", "shim_embedded_porto", "--socket", self.socket, "--place", str(self.place)),
            *("--state", str(self.state), "--cgroup", self.cgroup, "--log", str(self.log), *options),
        ]

    @property
    def trigger(self) -> Path:
        """The file that has a crashing daemon count its calls."""
        return self.directory / "trigger"

    def arm(self, call: int, *, victim: int = 0, counted: str = "") -> None:
        """Have a crashing daemon count from now on, see :mod:`tests.embedded_porto.crashing`.

        :param victim: who ends at that call. :param counted: ``keeper`` or ``forked``: where calls are counted.
        """
        trigger = self._trigger(counted)
        whole = Path(f"{trigger}.new")
        whole.write_text(f"{call} {victim}")
        whole.rename(trigger)

    def disarm(self, *, counted: str = "") -> int:
        """Have it count no more; how many calls there were, if they were to be counted alone."""
        self._trigger(counted).unlink()
        try:
            return int(Path(f"{self._trigger(counted)}.count").read_text())
        except FileNotFoundError:
            return 0

    def _trigger(self, counted: str) -> Path:
        return self.trigger.with_suffix(f".{counted}" if counted else "")

    def start(self, *, crashing: bool = False) -> None:
        """Start it; returns when it answers.

        :param crashing: one that ends by itself at a moment to be chosen, see :mod:`tests.embedded_porto.crashing`.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        command = self.command("--log-level", "DEBUG")
        environment = None
        if crashing:
            module = command.index("shim_embedded_porto")
            command[module : module + 1] = ["tests.embedded_porto.crashing", str(self.trigger)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                with Client(self.socket) as client:
                    client.version(timeout_s=30)
                return
            except errors.PortoError:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                assert time.monotonic() < deadline, self.log.read_text()[-2000:]
                time.sleep(0.005)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=30)
        self.process = None
        return status

    def kill(self) -> None:
        """End it without any chance to tidy up."""
        self.end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def destroy_all(self) -> None:
        """Remove all containers and volumes, and end."""
        if self.process is not None:
            self.end(signal.SIGINT)
        elif self.state.exists():
            subprocess.run(self.command("--destroy-all"), check=True, timeout=60)

    # -- what it leaves on the machine -----------------------------------------------------------------------------

    def keeper_pid(self) -> int:
        """The process that is the parent of all containers; 0: there is none."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (path / "comm").read_text() == "porto-keeper\n":
                    log = os.readlink(path / "fd/2").removesuffix(" (deleted)")
                    if log == str(self.state / "keeper.log"):
                        return int(path.name)
            except OSError:
                continue
        return 0

    def cgroups(self) -> list[str]:
        """The directories of its cgroups, the base itself included."""
        bases = [*Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}"), *Path("/sys/fs/cgroup").glob(self.cgroup)]
        return sorted(directory for base in bases for directory, _, _ in os.walk(base))

    def mounts(self) -> list[str]:
        """What is mounted in its directory, as this process sees it."""
        with open("/proc/self/mountinfo") as file:
            points = [line.split()[4] for line in file]
        return [point for point in points if point.startswith(f"{self.directory}/")]

    def records(self) -> list[dict[str, object]]:
        """The containers it remembers."""
        return [json.loads(path.read_text()) for path in sorted((self.state / "containers").iterdir())]
