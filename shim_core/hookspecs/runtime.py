"""One hook for each call of CRI's RuntimeService.

Common to all: requests and responses are the messages of ``shim_core.cri.v1.api_pb2``; errors are raised from
:mod:`shim_core.errors`; a hook may run in any of many threads at once. The first answer wins, and no answer at all
is UNIMPLEMENTED to the client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shim_core.hookspecs import hookspec

if TYPE_CHECKING:
    from shim_core.context import CallContext
    from shim_core.cri.v1 import api_pb2 as pb


class RuntimeSpec:
    """Hooks of ``runtime.v1.RuntimeService``."""

    @hookspec(firstresult=True)
    def cri_version(self, request: pb.VersionRequest, context: CallContext) -> pb.VersionResponse | None:
        """Name and version of the runtime, and of the API it speaks.

        :raises Unavailable: the runtime can't be asked.
        """

    @hookspec(firstresult=True)
    def cri_run_pod_sandbox(
        self, request: pb.RunPodSandboxRequest, context: CallContext
    ) -> pb.RunPodSandboxResponse | None:
        """Create and start a sandbox; READY when it returns.

        Not idempotent in the CRI, but kubelet repeats it with the same metadata: the same attempt of the same pod is
        the same sandbox, never a second one.

        :raises InvalidArgument: a field can't be honoured.   :raises Unavailable: try again.
        """

    @hookspec(firstresult=True)
    def cri_stop_pod_sandbox(
        self, request: pb.StopPodSandboxRequest, context: CallContext
    ) -> pb.StopPodSandboxResponse | None:
        """Kill what runs in the sandbox and give its addresses back. Idempotent; an unknown id is success.

        :raises Unavailable: something is left to reclaim; the call must be repeated.
        """

    @hookspec(firstresult=True)
    def cri_remove_pod_sandbox(
        self, request: pb.RemovePodSandboxRequest, context: CallContext
    ) -> pb.RemovePodSandboxResponse | None:
        """Remove the sandbox and all its containers, running or not. Idempotent; an unknown id is success."""

    @hookspec(firstresult=True)
    def cri_pod_sandbox_status(
        self, request: pb.PodSandboxStatusRequest, context: CallContext
    ) -> pb.PodSandboxStatusResponse | None:
        """State, network and metadata of one sandbox.

        :raises NotFound: no such sandbox: kubelet takes it for gone. Any other error blocks the pod's sync.
        """

    @hookspec(firstresult=True)
    def cri_list_pod_sandbox(
        self, request: pb.ListPodSandboxRequest, context: CallContext
    ) -> pb.ListPodSandboxResponse | None:
        """Sandboxes that match all parts of the filter. Asked every second: cheap, or the node is not ready.

        :raises Unavailable: rather than an empty list when the runtime can't be asked.
        """

    @hookspec(firstresult=True)
    def cri_stream_pod_sandboxes(
        self, request: pb.StreamPodSandboxesRequest, context: CallContext
    ) -> Iterator[pb.StreamPodSandboxesResponse] | None:
        """As ``cri_list_pod_sandbox``, in messages of limited size; each sandbox once."""

    @hookspec(firstresult=True)
    def cri_create_container(
        self, request: pb.CreateContainerRequest, context: CallContext
    ) -> pb.CreateContainerResponse | None:
        """Create a container in a READY sandbox. The same attempt of the same name is the same container.

        :raises InvalidArgument: a field can't be honoured; the message names it.
        :raises NotFound: no such sandbox or image.   :raises FailedPrecondition: the sandbox is not READY.
        """

    @hookspec(firstresult=True)
    def cri_start_container(
        self, request: pb.StartContainerRequest, context: CallContext
    ) -> pb.StartContainerResponse | None:
        """Start a created container.

        :raises NotFound: no such container.   :raises FailedPrecondition: it is not in state CREATED.
        """

    @hookspec(firstresult=True)
    def cri_stop_container(
        self, request: pb.StopContainerRequest, context: CallContext
    ) -> pb.StopContainerResponse | None:
        """Send the stop signal, wait ``timeout`` seconds (0: none), kill. Idempotent; an unknown id is success."""

    @hookspec(firstresult=True)
    def cri_remove_container(
        self, request: pb.RemoveContainerRequest, context: CallContext
    ) -> pb.RemoveContainerResponse | None:
        """Remove a container, killing it if it runs. Idempotent; an unknown id is success."""

    @hookspec(firstresult=True)
    def cri_list_containers(
        self, request: pb.ListContainersRequest, context: CallContext
    ) -> pb.ListContainersResponse | None:
        """Containers that match all parts of the filter. Asked every second: cheap, or the node is not ready.

        :raises Unavailable: rather than an empty list when the runtime can't be asked.
        """

    @hookspec(firstresult=True)
    def cri_stream_containers(
        self, request: pb.StreamContainersRequest, context: CallContext
    ) -> Iterator[pb.StreamContainersResponse] | None:
        """As ``cri_list_containers``, in messages of limited size; each container once."""

    @hookspec(firstresult=True)
    def cri_container_status(
        self, request: pb.ContainerStatusRequest, context: CallContext
    ) -> pb.ContainerStatusResponse | None:
        """State, times (nanoseconds since the epoch), exit code and mounts of one container.

        :raises NotFound: no such container: kubelet takes it for gone. Any other error blocks the pod's sync.
        """

    @hookspec(firstresult=True)
    def cri_update_container_resources(
        self, request: pb.UpdateContainerResourcesRequest, context: CallContext
    ) -> pb.UpdateContainerResourcesResponse | None:
        """Change limits of a container, all of them or none. Zero and empty fields stay as they are.

        :raises NotFound: no such container.   :raises InvalidArgument: a value can't be set; nothing was.
        """

    @hookspec(firstresult=True)
    def cri_reopen_container_log(
        self, request: pb.ReopenContainerLogRequest, context: CallContext
    ) -> pb.ReopenContainerLogResponse | None:
        """Open the log file anew, after kubelet has renamed it. After an error there is no new file.

        :raises NotFound: no such container.   :raises FailedPrecondition: it doesn't run.
        """

    @hookspec(firstresult=True)
    def cri_exec_sync(self, request: pb.ExecSyncRequest, context: CallContext) -> pb.ExecSyncResponse | None:
        """Run a command in a container and return what it wrote, at most 16 MiB in all.

        :raises DeadlineExceeded: ``timeout`` seconds have passed (0: none); the process is gone.
        :raises NotFound: no such container.   :raises FailedPrecondition: it doesn't run.
        """

    @hookspec(firstresult=True)
    def cri_exec(self, request: pb.ExecRequest, context: CallContext) -> pb.ExecResponse | None:
        """An absolute URL at which the client can run a command in a container, once."""

    @hookspec(firstresult=True)
    def cri_attach(self, request: pb.AttachRequest, context: CallContext) -> pb.AttachResponse | None:
        """An absolute URL at which the client can attach to a container's own streams, once."""

    @hookspec(firstresult=True)
    def cri_port_forward(self, request: pb.PortForwardRequest, context: CallContext) -> pb.PortForwardResponse | None:
        """An absolute URL at which the client can reach ports of a sandbox, once."""

    @hookspec(firstresult=True)
    def cri_container_stats(
        self, request: pb.ContainerStatsRequest, context: CallContext
    ) -> pb.ContainerStatsResponse | None:
        """What one container uses.

        :raises NotFound: no such container.
        """

    @hookspec(firstresult=True)
    def cri_list_container_stats(
        self, request: pb.ListContainerStatsRequest, context: CallContext
    ) -> pb.ListContainerStatsResponse | None:
        """What containers use: those that run and match the filter."""

    @hookspec(firstresult=True)
    def cri_stream_container_stats(
        self, request: pb.StreamContainerStatsRequest, context: CallContext
    ) -> Iterator[pb.StreamContainerStatsResponse] | None:
        """As ``cri_list_container_stats``, in messages of limited size."""

    @hookspec(firstresult=True)
    def cri_pod_sandbox_stats(
        self, request: pb.PodSandboxStatsRequest, context: CallContext
    ) -> pb.PodSandboxStatsResponse | None:
        """What one sandbox and its containers use.

        :raises NotFound: no such sandbox.
        """

    @hookspec(firstresult=True)
    def cri_list_pod_sandbox_stats(
        self, request: pb.ListPodSandboxStatsRequest, context: CallContext
    ) -> pb.ListPodSandboxStatsResponse | None:
        """What sandboxes use: those that match the filter."""

    @hookspec(firstresult=True)
    def cri_stream_pod_sandbox_stats(
        self, request: pb.StreamPodSandboxStatsRequest, context: CallContext
    ) -> Iterator[pb.StreamPodSandboxStatsResponse] | None:
        """As ``cri_list_pod_sandbox_stats``, in messages of limited size."""

    @hookspec(firstresult=True)
    def cri_update_runtime_config(
        self, request: pb.UpdateRuntimeConfigRequest, context: CallContext
    ) -> pb.UpdateRuntimeConfigResponse | None:
        """kubelet has learnt the node's pod CIDR. Idempotent."""

    @hookspec(firstresult=True)
    def cri_status(self, request: pb.StatusRequest, context: CallContext) -> pb.StatusResponse | None:
        """RuntimeReady, NetworkReady, handlers and features. Answered even when the runtime is away."""

    @hookspec(firstresult=True)
    def cri_checkpoint_container(
        self, request: pb.CheckpointContainerRequest, context: CallContext
    ) -> pb.CheckpointContainerResponse | None:
        """Write a container's state to a file."""

    @hookspec(firstresult=True)
    def cri_checkpoint_pod(
        self, request: pb.CheckpointPodRequest, context: CallContext
    ) -> pb.CheckpointPodResponse | None:
        """Write a pod's state to a directory."""

    @hookspec(firstresult=True)
    def cri_restore_pod(self, request: pb.RestorePodRequest, context: CallContext) -> pb.RestorePodResponse | None:
        """Run a pod from a checkpoint."""

    @hookspec(firstresult=True)
    def cri_get_container_events(
        self, request: pb.GetEventsRequest, context: CallContext
    ) -> Iterator[pb.ContainerEventResponse] | None:
        """Containers created, started, stopped, deleted, until the client leaves. A slow client costs nobody else."""

    @hookspec(firstresult=True)
    def cri_list_metric_descriptors(
        self, request: pb.ListMetricDescriptorsRequest, context: CallContext
    ) -> pb.ListMetricDescriptorsResponse | None:
        """The metrics that ``cri_list_pod_sandbox_metrics`` may hold."""

    @hookspec(firstresult=True)
    def cri_list_pod_sandbox_metrics(
        self, request: pb.ListPodSandboxMetricsRequest, context: CallContext
    ) -> pb.ListPodSandboxMetricsResponse | None:
        """Metrics of all sandboxes, as cAdvisor named them."""

    @hookspec(firstresult=True)
    def cri_stream_pod_sandbox_metrics(
        self, request: pb.StreamPodSandboxMetricsRequest, context: CallContext
    ) -> Iterator[pb.StreamPodSandboxMetricsResponse] | None:
        """As ``cri_list_pod_sandbox_metrics``, in messages of limited size."""

    @hookspec(firstresult=True)
    def cri_runtime_config(
        self, request: pb.RuntimeConfigRequest, context: CallContext
    ) -> pb.RuntimeConfigResponse | None:
        """The cgroup driver kubelet has to use."""

    @hookspec(firstresult=True)
    def cri_update_pod_sandbox_resources(
        self, request: pb.UpdatePodSandboxResourcesRequest, context: CallContext
    ) -> pb.UpdatePodSandboxResourcesResponse | None:
        """kubelet has changed the resources of a whole pod."""
