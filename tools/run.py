"""``make run``: portoshim in the foreground on its socket, with something to pull and the crictl commands to try.

It runs with the machine's network, in mount and PID namespaces of its own: when it ends, by Ctrl-C or by force, pods
and mounts end with it. With ``PORTO_SOCKET`` set, pods run on that portod instead, and without these namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from shim_core.config import PortoshimSection
from tools import images, stage
from tools.node import Node, NodeError, crictl_path
from tools.registry import LocalRegistry
from tools.scratch import unmount_below

SOCKET = PortoshimSection.model_fields["socket"].default
DIRECTORY = Path("/var/lib/portoshim-run")
BRIDGE = "portoshim0"
IMAGE = "busybox"


def main() -> int:
    """Serve until SIGINT or SIGTERM; the exit status."""
    if "PORTO_SOCKET" not in os.environ and not stage.on_stage():
        command = ["-P", "-m", "tools.run"]
        os.chdir(Path(__file__).parent.parent)
        os.environ["PYTHONPATH"] = os.getcwd()
        return stage.main([stage.HOST_NETWORK, sys.executable, *command])
    # Both ends of a Ctrl-C: the terminal tells every process of the group, and the stage passes it on.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    _clean_up()
    DIRECTORY.mkdir(mode=0o755)
    try:
        with LocalRegistry(DIRECTORY / "registry") as registry:
            images.push(images.busybox(), registry, IMAGE, ["1"])
            with _node(registry) as node:
                print(_introduction(node, f"{registry.address}/{IMAGE}:1"), flush=True)
                signal.sigwait(ends)
                print("\nstopping: pods are removed", flush=True)
                node.remove_pods()
    except NodeError as err:
        print(err, file=sys.stderr)
        return 1
    finally:
        _clean_up()
    return 0


def _node(registry: LocalRegistry) -> Node:
    config = {
        "Portoshim": {"Socket": SOCKET},
        "Images": {
            "PauseImage": "none",
            "Registries": [{"Host": address, "CA": str(registry.ca_path)} for address in registry.addresses],
        },
    }
    return Node(DIRECTORY, registry=registry, config=config, bridge=BRIDGE, foreground=True)


def _clean_up() -> None:
    """Remove what this run, or one that was killed, has left on the machine."""
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, check=False)
    if left := unmount_below(DIRECTORY):
        raise NodeError(f"{left[0]} can't be unmounted: {DIRECTORY} is left as it is")
    if DIRECTORY.exists():
        shutil.rmtree(DIRECTORY)


def _introduction(node: Node, image: str) -> str:
    """Write the files for crictl; what to do with them."""
    pod = {
        "metadata": {"name": "hello", "namespace": "default", "uid": "hello-1", "attempt": 0},
        "hostname": "hello",
        "labels": {"io.kubernetes.pod.name": "hello", "io.kubernetes.pod.namespace": "default"},
        "log_directory": str(node.pod_logs),
        "linux": {},
    }
    container = {
        "metadata": {"name": "greeter"},
        "image": {"image": image},
        "command": ["sh", "-c", "echo Hello from $(hostname); exec sleep 100000"],
        "log_path": "greeter.log",
        "labels": {"io.kubernetes.pod.name": "hello", "io.kubernetes.pod.namespace": "default"},
        "linux": {},
    }
    for name, content in (("pod.json", pod), ("container.json", container)):
        (DIRECTORY / name).write_text(json.dumps(content, indent=2) + "\n")
    endpoint = f"unix://{node.socket}"
    config = f"runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\n"
    (DIRECTORY / "crictl.yaml").write_text(config)
    program = crictl_path() or "crictl"
    return f"""
portoshim serves {endpoint}. In another terminal, as root:

    cd {DIRECTORY}
    alias crictl='{program} --config {DIRECTORY}/crictl.yaml'

    crictl info
    crictl pull {image}
    POD=$(crictl runp pod.json)
    CONTAINER=$(crictl create $POD container.json pod.json)
    crictl start $CONTAINER
    crictl ps
    crictl logs $CONTAINER
    crictl exec -it $CONTAINER sh
    crictl inspectp $POD
    crictl stopp $POD
    crictl rmp $POD

Ctrl-C ends it and removes the pods.
"""


if __name__ == "__main__":
    sys.exit(main())
