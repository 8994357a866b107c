"""``make demo``: a pod from pull to removal, every step shown with what came back and how long it took.

An embedded Porto, a docker-registry with TLS and token authentication, a busybox image built on the spot; the steps go
through the real crictl where it could be built, and through a small client in Python otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from shim_core.cri.v1 import api_pb2 as pb
from tools import images, stage
from tools.node import PAUSE, Node, crictl_path
from tools.registry import LocalRegistry

LABELS = {"io.kubernetes.pod.name": "hello", "io.kubernetes.pod.namespace": "demo"}  # as kubelet has them
SANDBOX = {
    "metadata": {"name": "hello", "namespace": "demo", "uid": "demo-1"},
    "hostname": "hello",
    "labels": LABELS,
    "linux": {},
}
SCRIPT = "echo Hello from $(hostname), $(ip -4 -o address show eth0 | tr -s ' ' | cut -d' ' -f4); exec sleep 1000"


class Steps:
    """Runs steps one by one and shows them."""

    def __init__(self) -> None:
        self.number = 0

    def run(self, title: str, step: Callable[[], str]) -> str:
        """Carry out a step; what it returned, which is also shown."""
        self.number += 1
        print(f"\n{self.number:2}. {title}", flush=True)
        started = time.monotonic()
        output = step().rstrip()
        took_ms = (time.monotonic() - started) * 1000
        if output:
            print(textwrap.indent(output, "      | "))
        print(f"      {took_ms:.0f} ms", flush=True)
        return output.strip()


class Crictl:
    """The steps through the real crictl."""

    def __init__(self, node: Node, directory: Path) -> None:
        self._node = node
        self._directory = directory

    def _call(self, *arguments: str) -> str:
        done = self._node.crictl(*arguments, check=False)
        if done.returncode:
            sys.exit(f"crictl {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def title(self, *words: str) -> str:
        return "crictl " + " ".join(words)

    def version(self) -> str:
        return self._call("version")

    def pull(self, image: str, user: str, password: str) -> str:
        return self._call("pull", "--creds", f"{user}:{password}", image)

    def runp(self, sandbox: pb.PodSandboxConfig) -> str:
        return self._call("runp", self._file("pod.json", _sandbox_json(sandbox)))

    def inspectp(self, sandbox_id: str) -> str:
        return str(json.loads(self._call("inspectp", sandbox_id))["status"]["network"]["ip"])

    def create(self, sandbox_id: str, container: pb.ContainerConfig, sandbox: pb.PodSandboxConfig) -> str:
        config = {
            "metadata": {"name": container.metadata.name},
            "image": {"image": container.image.image},
            "command": list(container.command),
            "log_path": container.log_path,
            "labels": LABELS,
            "linux": {},
        }
        path = self._file("container.json", config)
        return self._call("create", sandbox_id, path, self._file("pod.json", _sandbox_json(sandbox)))

    def start(self, container_id: str) -> str:
        return self._call("start", container_id)

    def ps(self) -> str:
        return self._call("ps")

    def logs(self, container_id: str) -> str:
        return self._call("logs", container_id)

    def execute(self, container_id: str, *command: str) -> str:
        return self._call("exec", container_id, *command)

    def stop(self, container_id: str) -> str:
        return self._call("stop", "--timeout", "1", container_id)

    def rm(self, container_id: str) -> str:
        return self._call("rm", container_id)

    def stopp(self, sandbox_id: str) -> str:
        return self._call("stopp", sandbox_id)

    def rmp(self, sandbox_id: str) -> str:
        return self._call("rmp", sandbox_id)

    def rmi(self, image: str) -> str:
        return self._call("rmi", image)

    def _file(self, name: str, content: Mapping[str, object]) -> str:
        path = self._directory / name
        path.write_text(json.dumps(content))
        return str(path)


class PythonClient:
    """The same steps by calls of the CRI, where there is no crictl."""

    def __init__(self, node: Node, directory: Path) -> None:
        self._node = node

    def title(self, *words: str) -> str:
        return " ".join(words)

    def version(self) -> str:
        return str(self._node.cri.Version(pb.VersionRequest()))

    def pull(self, image: str, user: str, password: str) -> str:
        auth = pb.AuthConfig(username=user, password=password)
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=auth)
        return str(self._node.cri.PullImage(request).image_ref)

    def runp(self, sandbox: pb.PodSandboxConfig) -> str:
        return str(self._node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=sandbox)).pod_sandbox_id)

    def inspectp(self, sandbox_id: str) -> str:
        status = self._node.cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id)).status
        return str(status.network.ip)

    def create(self, sandbox_id: str, container: pb.ContainerConfig, sandbox: pb.PodSandboxConfig) -> str:
        request = pb.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=container, sandbox_config=sandbox)
        return str(self._node.cri.CreateContainer(request).container_id)

    def start(self, container_id: str) -> str:
        self._node.cri.StartContainer(pb.StartContainerRequest(container_id=container_id))
        return container_id

    def ps(self) -> str:
        found = self._node.cri.ListContainers(pb.ListContainersRequest()).containers
        return "\n".join(f"{c.id[:13]}  {c.metadata.name}  {pb.ContainerState.Name(c.state)}" for c in found)

    def logs(self, container_id: str) -> str:
        status = self._node.cri.ContainerStatus(pb.ContainerStatusRequest(container_id=container_id)).status
        return Path(status.log_path).read_text()

    def execute(self, container_id: str, *command: str) -> str:
        answer = self._node.cri.ExecSync(pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=10))
        return str((answer.stdout + answer.stderr).decode())

    def stop(self, container_id: str) -> str:
        self._node.cri.StopContainer(pb.StopContainerRequest(container_id=container_id, timeout=1))
        return container_id

    def rm(self, container_id: str) -> str:
        self._node.cri.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id))
        return container_id

    def stopp(self, sandbox_id: str) -> str:
        self._node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox_id))
        return f"Stopped sandbox {sandbox_id}"

    def rmp(self, sandbox_id: str) -> str:
        self._node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id))
        return f"Removed sandbox {sandbox_id}"

    def rmi(self, image: str) -> str:
        self._node.cri.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))
        return f"Deleted: {image}"


def main() -> int:
    """Run the demonstration; 0 when every step went well and nothing is left."""
    if not stage.on_stage():
        sys.exit("the demonstration runs on a stage: make demo")
    directory = Path(os.environ["SHIM_STAGE_DIR"])
    steps = Steps()
    with LocalRegistry(directory / "registry", auth="token", public=["pause"]) as registry:
        image = f"{registry.address}/demo/busybox:1"

        def build() -> str:
            images.push(images.pause(), registry, *_repository(PAUSE))
            return f"{image} {images.push(images.busybox(), registry, 'demo/busybox', ['1'])}"

        steps.run("build a busybox image and push it to a registry with TLS and token authentication", build)
        with Node(directory / "node", registry=registry) as node:
            crictl = crictl_path()
            if crictl is None:
                print("\n    (crictl could not be built: a Python client makes the same calls)")
            client = Crictl(node, directory) if crictl else PythonClient(node, directory)
            before = _leftovers(node)
            _pod(steps, client, node, registry, image)
            node.crictl("rmi", "--all", check=False) if crictl else None
            left = steps.run("look for anything left behind", lambda: _difference(before, _leftovers(node)))
    print("\nA pod has come and gone." if left == "nothing" else "\nSomething was left behind.")
    return 0 if left == "nothing" else 1


def _pod(steps: Steps, client: Crictl | PythonClient, node: Node, registry: LocalRegistry, image: str) -> None:
    assert registry.credentials is not None
    user, password = registry.credentials
    sandbox = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="hello", namespace="demo", uid="demo-1"),
        hostname="hello",
        log_directory=str(node.pod_logs),
    )
    container = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="greeter"),
        image=pb.ImageSpec(image=image),
        command=["sh", "-c", SCRIPT],
        log_path="greeter.log",
    )
    run, title = steps.run, client.title
    run(title("version"), client.version)
    run(title("pull", "--creds", f"{user}:***", image), lambda: client.pull(image, user, password))
    sandbox_id = run(title("runp", "pod.json"), lambda: client.runp(sandbox))
    run(title("inspectp", f"{sandbox_id[:13]}", "(the address CNI gave)"), lambda: client.inspectp(sandbox_id))
    container_id = run(
        title("create", f"{sandbox_id[:13]}", "container.json", "pod.json"),
        lambda: client.create(sandbox_id, container, sandbox),
    )
    run(title("start", container_id[:13]), lambda: client.start(container_id))
    run(title("ps"), client.ps)
    run(title("logs", container_id[:13]), lambda: _until(lambda: client.logs(container_id)))
    run(
        title("exec", container_id[:13], "sh", "-c", "'id; ps'"),
        lambda: client.execute(container_id, "sh", "-c", "id; ps"),
    )
    run(title("stop", "--timeout", "1", container_id[:13]), lambda: client.stop(container_id))
    run(title("rm", container_id[:13]), lambda: client.rm(container_id))
    run(title("stopp", sandbox_id[:13]), lambda: client.stopp(sandbox_id))
    run(title("rmp", sandbox_id[:13]), lambda: client.rmp(sandbox_id))
    run(title("rmi", image), lambda: client.rmi(image))


def _until(look: Callable[[], str], timeout_s: float = 10.0) -> str:
    """What ``look`` returns once it returns anything."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _leftovers(node: Node) -> dict[str, set[str]]:
    """What a pod may leave on a machine, by kind."""
    netns = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-o", "link", "show", "type", "veth"], capture_output=True, text=True, check=True)
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False).stdout
    leases = node.directory / "leases"
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "network namespace": set(netns.split()),
        "veth": {line.split()[1] for line in links.stdout.splitlines()},
        "address": {path.name for path in leases.glob("*/[0-9]*")},
        "mount": {mount for mount in mounts if mount.startswith(str(node.directory))},
        "volume": {path.name for path in (node.directory / "volumes").glob("*")},
        "firewall rule": {line for line in rules.splitlines() if line.startswith("-A") and "10.88." in line},
        "container cgroup": {
            str(path)
            for path in Path("/sys/fs/cgroup").glob(f"*/{os.environ['SHIM_STAGE_CGROUP']}/porto*/*")
            if path.is_dir()
        },
        "process": {_name(pid) for pid in os.listdir("/proc") if pid.isdecimal() and _name(pid) in ("pause", "sleep")},
    }


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _difference(before: dict[str, set[str]], after: dict[str, set[str]]) -> str:
    found = [f"{kind}: {item}" for kind, items in after.items() for item in sorted(items - before[kind])]
    return "\n".join(found) or "nothing"


def _repository(reference: str) -> tuple[str, list[str]]:
    repository, _, tag = reference.partition(":")
    return repository, [tag]


def _sandbox_json(sandbox: pb.PodSandboxConfig) -> dict[str, object]:
    return {**SANDBOX, "log_directory": sandbox.log_directory}


if __name__ == "__main__":
    sys.exit(main())
