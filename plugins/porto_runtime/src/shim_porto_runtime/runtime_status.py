"""Version, Status, RuntimeConfig."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from porto_api import PortoError
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.types import RuntimeCondition
from shim_porto_runtime import capabilities, linux, spec
from shim_porto_runtime.porto_errors import porto_errors

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

KUBELET_API_VERSION = "0.1.0"
"""What kubelet asks for and wants to hear back."""

_LOOK_TIMEOUT_S = 5.0


def version(rt: Runtime, request: pb.VersionRequest, context: CallContext) -> pb.VersionResponse:
    """Version."""
    with porto_errors("asking Porto for its version"):
        tag, _ = rt.porto.version(timeout_s=context.remaining_s(rt.porto.timeout_s))
    return pb.VersionResponse(
        version=KUBELET_API_VERSION, runtime_name=rt.runtime_name, runtime_version=tag, runtime_api_version="v1"
    )


def status(rt: Runtime, request: pb.StatusRequest, context: CallContext) -> pb.StatusResponse:
    """Status: every plugin's conditions, NetworkReady false when no plugin speaks for the network."""
    conditions = list(_flat(rt.hooks.runtime_conditions(context=context)))
    if not any(condition.type == "NetworkReady" for condition in conditions):
        message = "no plugin provides pod networks; install shim-cni-net"
        conditions.append(RuntimeCondition("NetworkReady", False, "NoNetworkPlugin", message))
    features = pb.RuntimeHandlerFeatures(recursive_read_only_mounts=linux.has_mount_setattr())
    response = pb.StatusResponse(
        runtime_handlers=[pb.RuntimeHandler(name=name, features=features) for name in sorted(spec.HANDLERS)],
        features=pb.RuntimeFeatures(supplemental_groups_policy=True, mount_options=True),
    )
    for condition in sorted(conditions, key=lambda c: c.type != "RuntimeReady"):
        response.status.conditions.add(
            type=condition.type, status=condition.status, reason=condition.reason, message=condition.message
        )
    if request.verbose:
        for info in rt.hooks.runtime_info(context=context):
            response.info.update(info)
    return response


def condition(rt: Runtime, context: CallContext) -> RuntimeCondition:
    """RuntimeReady: whether portod answers, and pods can run in the parent container."""
    timeout_s = context.remaining_s(_LOOK_TIMEOUT_S)
    parent = rt.names.parent
    try:
        if not parent:
            rt.porto.version(timeout_s=timeout_s)
            return RuntimeCondition("RuntimeReady", True)
        found = rt.porto.get([parent], ["state", "capabilities"], timeout_s=timeout_s)[parent]
    except PortoError as err:
        return RuntimeCondition("RuntimeReady", False, "PortoUnavailable", f"portod does not answer: {err}")
    problem = _problem_of_parent(found)
    if problem:
        return RuntimeCondition("RuntimeReady", False, "ParentContainer", f"Porto.ParentContainer {parent}: {problem}")
    return RuntimeCondition("RuntimeReady", True)


def _problem_of_parent(found: Mapping[str, str | PortoError]) -> str:
    """Why pods can't run in it, if so. To Porto no container can be allowed more than those above it."""
    state, allowed = found["state"], found["capabilities"]
    if isinstance(state, PortoError) or isinstance(allowed, PortoError):
        return str(state if isinstance(state, PortoError) else allowed)
    if state not in ("running", "meta"):
        return f"it is {state}; start it"
    missing = capabilities.INIT_NEEDS - {name.strip() for name in allowed.split(";")}
    return f"it lacks the capabilities {', '.join(sorted(missing))}; set its property capabilities" if missing else ""


def info(rt: Runtime) -> dict[str, str]:
    """What ``crictl info`` shows of this plugin."""
    return {
        "porto": json.dumps(
            {
                "socket": rt.porto.path,
                "pauseImage": rt.pause_image or "none",
                "stateDir": str(rt.directories.state),
                "volumesDir": str(rt.directories.volumes),
                "sandboxes": len(rt.records.sandboxes.all()),
                "containers": len(rt.records.containers.all()),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
    }


def runtime_config(rt: Runtime, request: pb.RuntimeConfigRequest, context: CallContext) -> pb.RuntimeConfigResponse:
    """RuntimeConfig: Porto keeps its own cgroup tree, by writing to cgroupfs."""
    return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=pb.CGROUPFS))


def _flat(answers: Iterable[RuntimeCondition | Iterable[RuntimeCondition]]) -> Iterable[RuntimeCondition]:
    for answer in answers:
        if isinstance(answer, RuntimeCondition):
            yield answer
        else:
            yield from answer
