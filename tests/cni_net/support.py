"""What the tests of this area share: a node to put pods on, plugins that do as they are told, and a look at what is
left afterwards.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pluggy
from shim_cni_net.networking import Networking
from shim_cni_net.plugin import CniNet

from shim_core import config as configuration
from shim_core import testing
from shim_core.context import CallContext
from shim_core.types import NetworkAttachment, NetworkSandbox, Shim
from tools import stage

REAL_PLUGINS = "/usr/lib/cni"
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")

# Reads the configuration, notes the call, then does what the file beside it says for this command.
_FAKE = """\
#!/bin/sh
calls="$0.calls"
mkdir -p "$calls"
call="$calls/$(date +%s%N)-$$-$CNI_COMMAND"
cat > "$call.stdin"
printf '%s\\n' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_IFNAME" "$CNI_ARGS" "$CNI_PATH" > "$call.tmp"
mv "$call.tmp" "$call.call"
if [ -e "$0.$CNI_COMMAND" ]; then . "$0.$CNI_COMMAND"; fi
if [ "$CNI_COMMAND" = ADD ]; then cat "$0.result"; fi
"""

RESULT: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0}],
}


@dataclass(frozen=True)
class Noted:
    """A call that a fake plugin has noted."""

    command: str
    container_id: str
    netns: str
    ifname: str
    args: str
    path: str
    stdin: dict[str, Any]


class FakePlugin:
    """A plugin made of shell: ``plugin.on("DEL", "exit 1")`` tells it what to do."""

    def __init__(self, directory: Path, name: str, result: Mapping[str, Any] = RESULT) -> None:
        self.path = directory / name
        # In one step: another thread's fork may hold a file open that is being written, and exec then says "busy".
        temporary = directory / f".{name}"
        temporary.write_text(_FAKE)
        temporary.chmod(0o755)
        temporary.rename(self.path)
        self.returns(result)

    def returns(self, result: Mapping[str, Any]) -> None:
        """What ADD prints."""
        self._beside("result").write_text(json.dumps(result))

    def on(self, command: str, shell: str | None) -> None:
        """What to do for a command, in shell; None: nothing."""
        if shell is None:
            self._beside(command).unlink(missing_ok=True)
        else:
            self._beside(command).write_text(shell + "\n")

    def calls(self, *commands: str) -> list[Noted]:
        """The calls so far, in order; those of the given commands."""
        noted = []
        for path in sorted(self._beside("calls").glob("*.call")):
            command, container_id, netns, ifname, args, search_path = path.read_text().split("\n")[:6]
            if not commands or command in commands:
                stdin = json.loads(path.with_suffix(".stdin").read_bytes() or b"{}")
                noted.append(Noted(command, container_id, netns, ifname, args, search_path, stdin))
        return noted

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")


class Node:
    """A node with the plugin on it, and nothing else.

    :param keys: of the section CNI.
    """

    def __init__(self, directory: Path, *, bin_dirs: Sequence[str] = (), runtime: object = None, **keys: Any) -> None:
        self.directory = directory
        self.conf = directory / "net.d"
        self.bin = directory / "bin"
        self.state = directory / "state"
        self.netns = Path("/run/netns") if os.geteuid() == 0 else directory / "netns"
        for path in (self.conf, self.bin):
            path.mkdir(parents=True, exist_ok=True)
        self.tree = {
            "Portoshim": {"StateDir": str(self.state)},
            "CNI": {
                "ConfDir": str(self.conf),
                "BinDir": [str(self.bin), *bin_dirs],
                "NetnsDir": str(self.netns),
                **keys,
            },
        }
        self._runtime = runtime
        self.plugin = CniNet()
        self.manager: pluggy.PluginManager = testing.manager()

    def start(self) -> Node:
        """Start the daemon, or the next run of it."""
        self.plugin = CniNet()
        others = {} if self._runtime is None else {"runtime": self._runtime}
        self.manager = testing.manager(cni_net=self.plugin, **others)
        sections = [*configuration.CORE_SECTIONS, *self.manager.hook.shim_config_section()]
        shim = Shim(config=configuration.parse(self.tree, sections), hooks=self.manager.hook)
        self.manager.hook.shim_configure.call_historic(kwargs={"shim": shim})
        self.manager.hook.shim_startup()
        return self

    def stop(self) -> None:
        self.manager.hook.shim_shutdown()

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def networking(self) -> Networking:
        return self.plugin._networking

    def attach(self, sandbox: NetworkSandbox, context: CallContext | None = None) -> NetworkAttachment:
        attachment = self.manager.hook.network_attach(sandbox=sandbox, context=context or testing.context())
        assert isinstance(attachment, NetworkAttachment)
        return attachment

    def detach(self, sandbox: NetworkSandbox, context: CallContext | None = None) -> bool:
        answer = self.manager.hook.network_detach(sandbox=sandbox, context=context or testing.context())
        assert isinstance(answer, bool)
        return answer

    def status(self, sandbox: NetworkSandbox) -> NetworkAttachment | None:
        answer: NetworkAttachment | None = self.manager.hook.network_status(sandbox=sandbox, context=testing.context())
        return answer

    def recovered(self, timeout_s: float = 60.0) -> bool:
        """Wait for what start-up does in the background."""
        assert self.plugin._recovery is not None
        return self.plugin._recovery.wait(timeout_s)

    def fake(self, name: str = "fake", result: Mapping[str, Any] = RESULT) -> FakePlugin:
        return FakePlugin(self.bin, name, result)

    def write(self, name: str, tree: Mapping[str, Any]) -> Path:
        """Put a file into ConfDir, in one step."""
        path = self.conf / name
        temporary = self.conf / f".{name}.tmp"
        temporary.write_text(json.dumps(tree))
        temporary.rename(path)
        return path

    def network(self, *plugins: Mapping[str, Any] | str, version: str = "1.0.0", **keys: Any) -> Path:
        """The pods' network, of these plugins; a name alone will do."""
        objects = [{"type": plugin} if isinstance(plugin, str) else dict(plugin) for plugin in plugins]
        return self.write("10-net.conflist", {"name": "net", "cniVersion": version, "plugins": objects, **keys})


def sandbox(number: int = 1, **fields: Any) -> NetworkSandbox:
    """A sandbox as the runtime tells of it."""
    values = {"sandbox_id": f"{number:064x}", "name": f"pod-{number}", "namespace": "default", "uid": f"uid-{number}"}
    return NetworkSandbox(**{**values, **fields})


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Wait for a condition; whether it has come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return condition()
        time.sleep(0.01)
    return True


def run(*argv: str, netns: str = "", timeout_s: float = 30.0) -> str:
    """What a command prints, run here or in a network namespace."""
    inside = ["nsenter", f"--net={netns}"] if netns else []
    done = subprocess.run([*inside, *argv], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
    return done.stdout


def in_netns(action: Callable[[], T], netns: str) -> T:
    """What an action returns in a network namespace, if one is named: in a thread, since they have namespaces."""

    def enter_and_act() -> T:
        if netns:
            with open(netns) as file:
                assert _libc.setns(file.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        return action()

    # One that has ended takes the namespace along.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(enter_and_act).result()


def footprint(*directories: Path | str) -> dict[str, Any]:
    """What pods may leave on a node: namespaces, interfaces, rules, leases and records."""
    rules = [line for line in run("nft", "list", "ruleset").splitlines() if not line.lstrip().startswith("#")]
    return {
        "namespaces": sorted(os.listdir("/run/netns")),
        "interfaces": sorted(link["ifname"] for link in json.loads(run("ip", "-j", "link"))),
        "rules": [_without_counters(line) for line in rules],
        "files": sorted(
            str(path)
            for directory in directories
            for path in Path(directory).rglob("*")
            # Which address was given out last, and locks, are no lease.
            if path.is_file() and not path.name.startswith("last_reserved_ip") and path.name != "lock"
        ),
    }


def clean_stage() -> None:
    """Take away all that pods and plugins may have left on the stage; elsewhere nothing is touched."""
    if not stage.on_stage():
        return
    for name in os.listdir("/run/netns"):
        subprocess.run(["umount", "-l", f"/run/netns/{name}"], check=False, capture_output=True)
        Path("/run/netns", name).unlink()
    links = json.loads(run("ip", "-j", "link"))
    for link in links:
        if link["ifname"] != "lo":
            subprocess.run(["ip", "link", "del", link["ifname"]], check=False, capture_output=True)
    run("nft", "flush", "ruleset")
    for path in Path("/var/lib/cni").iterdir():
        shutil.rmtree(path)


def settles(expected: Mapping[str, Any], *directories: Path | str) -> dict[str, Any]:
    """The footprint, once it is as expected or has had the time to: the kernel removes interfaces by and by."""
    until(lambda: footprint(*directories) == expected, timeout_s=30.0)
    return footprint(*directories)


def commands(plugins: Sequence[FakePlugin]) -> Iterator[tuple[str, str]]:
    """All calls of several plugins in the order they were made: name and command."""
    noted = [
        (path.name, plugin.path.name, path.name.rpartition("-")[2].removesuffix(".call"))
        for plugin in plugins
        for path in plugin._beside("calls").glob("*.call")
    ]
    for _, name, command in sorted(noted):
        yield name, command


def _without_counters(line: str) -> str:
    words = line.split()
    while "counter" in words:
        at = words.index("counter")
        del words[at : at + 5]
    return " ".join(words)
