"""The plugin: CRI's hooks, each forwarded to the module of its family."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from porto_api import Client, Event
from shim_core import hookimpl
from shim_core.config import PortoshimSection, Section
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import Unavailable, Unimplemented
from shim_core.types import AttachSession, Command, ExecSession, PortForwardSession, RuntimeCondition, Shim
from shim_porto_runtime import (
    cdi,
    container,
    container_status,
    exec,
    metrics,
    recovery,
    runtime_status,
    sandbox,
    sandbox_status,
    spec,
    states,
    stats,
    streaming,
    terminals,
    update,
)
from shim_porto_runtime.abilities import Abilities
from shim_porto_runtime.cri_events import EventHub
from shim_porto_runtime.events import Monitor
from shim_porto_runtime.images import ImageService, ImageSettings
from shim_porto_runtime.images import command as images_command
from shim_porto_runtime.keeper import KeeperClient
from shim_porto_runtime.leftovers import Leftovers
from shim_porto_runtime.lists import batches
from shim_porto_runtime.locks import NamedLocks
from shim_porto_runtime.names import PAUSE, Names
from shim_porto_runtime.records import ContainerState, Records
from shim_porto_runtime.runtime import Directories, Runtime
from shim_porto_runtime.samples import Sampler
from shim_porto_runtime.settings import PortoSection
from shim_porto_runtime.starts import Starts
from shim_porto_runtime.usage import UsageSampler

logger = logging.getLogger("shim.porto_runtime")

_NO_CRIU = "Porto has no CRIU, so nothing can be checkpointed or restored"


class PortoRuntime:
    """CRI's RuntimeService and ImageService on Porto."""

    def __init__(self) -> None:
        self._shim: Shim | None = None
        self._runtime: Runtime | None = None
        self._recovered = threading.Event()

    # -- life ------------------------------------------------------------------------------------------------------

    @hookimpl
    def shim_config_section(self) -> Sequence[type[Section]]:
        return PortoSection, ImageSettings

    @hookimpl
    def shim_configure(self, shim: Shim) -> None:
        self._shim = shim

    @hookimpl
    def shim_command(self) -> Command:
        assert self._shim is not None
        return images_command.make(self._shim)

    @hookimpl
    def shim_startup(self) -> None:
        assert self._shim is not None
        self._runtime = self._assemble(self._shim)
        self._runtime.images.start()
        # Events come over a connection of their own; each time it is made, what was missed is looked up.
        self._runtime.monitor.start()

    @hookimpl
    def shim_shutdown(self) -> None:
        rt, self._runtime = self._runtime, None
        if rt is not None:
            rt.monitor.stop()
            rt.usage.stop()
            rt.images.close()
            rt.porto.close()
            rt.records.close()

    def _assemble(self, shim: Shim) -> Runtime:
        porto_settings = shim.config.get(PortoSection)
        images_settings = shim.config.get(ImageSettings)
        core = shim.config.get(PortoshimSection)
        socket = shim.hooks.runtime_endpoint() or porto_settings.socket
        directories = Directories(Path(core.state_dir), Path(core.volumes_dir))
        directories.prepare()
        names = Names(porto_settings.parent_container)
        porto = Client(socket, porto_settings.socket_timeout)
        records = Records(directories.records)
        return Runtime(
            porto=porto,
            abilities=Abilities(porto),
            cdi=cdi.Registry(porto_settings.cdi_spec_dirs),
            records=records,
            images=ImageService(
                porto,
                shim.hooks,
                images_settings,
                lambda: _layers_in_use(records),
                state_dir=directories.state,
                images_dir=porto_settings.images_dir,
                container_filesystems=lambda: stats.filesystems(self._started),
            ),
            keeper=KeeperClient(directories.state / "keeper"),
            monitor=Monitor(porto, names.masks, self._on_event, self._on_connect),
            events=EventHub(),
            sampler=Sampler(),
            usage=UsageSampler(porto),
            hooks=shim.hooks,
            locks=NamedLocks(),
            starts=Starts(),
            leftovers=Leftovers(),
            names=names,
            directories=directories,
            init=directories.install_init(),
            shim_id=directories.shim_id(),
            runtime_name=porto_settings.runtime_name,
            pause_image="" if images_settings.pause_image == "none" else images_settings.pause_image,
            place=images_settings.place,
        )

    def _on_connect(self) -> None:
        rt = self._runtime
        if rt is None:
            return
        if self._recovered.is_set():
            states.refresh(rt)
            rt.leftovers.clear(rt)
        else:
            recovery.recover(rt)
            self._recovered.set()

    def _on_event(self, event: Event) -> None:
        rt = self._runtime
        parsed = rt.names.parse(event.name) if rt is not None else None
        if rt is None or parsed is None or event.state in states.ALIVE:
            return
        sandbox_id, rest = parsed
        if rt.starts.put_off(rest):
            return
        if (found := rt.records.containers.get(rest)) is not None and found.state is ContainerState.RUNNING:
            states.record_exits(rt, [found])
        elif rest in ("", PAUSE) and (owner := rt.records.sandboxes.get(sandbox_id)) is not None:
            states.refresh_sandbox(rt, owner)

    @property
    def _started(self) -> Runtime:
        """The runtime, whether Porto has been seen yet or not."""
        if self._runtime is None:
            raise Unavailable("portoshim is starting or stopping; try again")
        return self._runtime

    @property
    def _rt(self) -> Runtime:
        """The runtime, once records and Porto agree."""
        rt = self._started
        if not self._recovered.is_set():
            raise Unavailable(f"portod on {rt.porto.path} has not been reached since portoshim started; try again")
        return rt

    # -- health ----------------------------------------------------------------------------------------------------

    @hookimpl
    def runtime_conditions(self, context: CallContext) -> RuntimeCondition:
        return runtime_status.condition(self._started, context)

    @hookimpl
    def runtime_info(self) -> dict[str, str]:
        return runtime_status.info(self._started)

    # -- RuntimeService --------------------------------------------------------------------------------------------

    @hookimpl
    def cri_version(self, request: pb.VersionRequest, context: CallContext) -> pb.VersionResponse:
        return runtime_status.version(self._started, request, context)

    @hookimpl
    def cri_run_pod_sandbox(self, request: pb.RunPodSandboxRequest, context: CallContext) -> pb.RunPodSandboxResponse:
        return sandbox.run(self._rt, request, context)

    @hookimpl
    def cri_stop_pod_sandbox(
        self, request: pb.StopPodSandboxRequest, context: CallContext
    ) -> pb.StopPodSandboxResponse:
        return sandbox.stop(self._rt, request, context)

    @hookimpl
    def cri_remove_pod_sandbox(
        self, request: pb.RemovePodSandboxRequest, context: CallContext
    ) -> pb.RemovePodSandboxResponse:
        return sandbox.remove(self._rt, request, context)

    @hookimpl
    def cri_pod_sandbox_status(
        self, request: pb.PodSandboxStatusRequest, context: CallContext
    ) -> pb.PodSandboxStatusResponse:
        return sandbox_status.sandbox_status(self._rt, request, context)

    @hookimpl
    def cri_list_pod_sandbox(
        self, request: pb.ListPodSandboxRequest, context: CallContext
    ) -> pb.ListPodSandboxResponse:
        return sandbox_status.list_sandboxes(self._rt, request, context)

    @hookimpl
    def cri_create_container(
        self, request: pb.CreateContainerRequest, context: CallContext
    ) -> pb.CreateContainerResponse:
        return container.create(self._rt, request, context)

    @hookimpl
    def cri_start_container(self, request: pb.StartContainerRequest, context: CallContext) -> pb.StartContainerResponse:
        return container.start(self._rt, request, context)

    @hookimpl
    def cri_stop_container(self, request: pb.StopContainerRequest, context: CallContext) -> pb.StopContainerResponse:
        return container.stop(self._rt, request, context)

    @hookimpl
    def cri_remove_container(
        self, request: pb.RemoveContainerRequest, context: CallContext
    ) -> pb.RemoveContainerResponse:
        return container.remove(self._rt, request, context)

    @hookimpl
    def cri_list_containers(self, request: pb.ListContainersRequest, context: CallContext) -> pb.ListContainersResponse:
        return container_status.list_containers(self._rt, request, context)

    @hookimpl
    def cri_container_status(
        self, request: pb.ContainerStatusRequest, context: CallContext
    ) -> pb.ContainerStatusResponse:
        return container_status.container_status(self._rt, request, context)

    @hookimpl
    def cri_reopen_container_log(
        self, request: pb.ReopenContainerLogRequest, context: CallContext
    ) -> pb.ReopenContainerLogResponse:
        return container.reopen_log(self._rt, request, context)

    @hookimpl
    def cri_exec_sync(self, request: pb.ExecSyncRequest, context: CallContext) -> pb.ExecSyncResponse:
        return exec.exec_sync(self._rt, request, context)

    @hookimpl
    def cri_status(self, request: pb.StatusRequest, context: CallContext) -> pb.StatusResponse:
        return runtime_status.status(self._started, request, context)

    @hookimpl
    def cri_runtime_config(self, request: pb.RuntimeConfigRequest, context: CallContext) -> pb.RuntimeConfigResponse:
        return runtime_status.runtime_config(self._started, request, context)

    @hookimpl
    def cri_update_container_resources(
        self, request: pb.UpdateContainerResourcesRequest, context: CallContext
    ) -> pb.UpdateContainerResourcesResponse:
        return update.container_resources(self._rt, request, context)

    @hookimpl
    def cri_update_pod_sandbox_resources(
        self, request: pb.UpdatePodSandboxResourcesRequest, context: CallContext
    ) -> pb.UpdatePodSandboxResourcesResponse:
        return update.sandbox_resources(self._rt, request, context)

    @hookimpl
    def cri_container_stats(self, request: pb.ContainerStatsRequest, context: CallContext) -> pb.ContainerStatsResponse:
        return stats.container_stats(self._rt, request, context)

    @hookimpl
    def cri_list_container_stats(
        self, request: pb.ListContainerStatsRequest, context: CallContext
    ) -> pb.ListContainerStatsResponse:
        return stats.list_container_stats(self._rt, request, context)

    @hookimpl
    def cri_pod_sandbox_stats(
        self, request: pb.PodSandboxStatsRequest, context: CallContext
    ) -> pb.PodSandboxStatsResponse:
        return stats.sandbox_stats(self._rt, request, context)

    @hookimpl
    def cri_list_pod_sandbox_stats(
        self, request: pb.ListPodSandboxStatsRequest, context: CallContext
    ) -> pb.ListPodSandboxStatsResponse:
        return stats.list_sandbox_stats(self._rt, request, context)

    @hookimpl
    def cri_list_metric_descriptors(
        self, request: pb.ListMetricDescriptorsRequest, context: CallContext
    ) -> pb.ListMetricDescriptorsResponse:
        return metrics.descriptors(self._rt, request, context)

    @hookimpl
    def cri_list_pod_sandbox_metrics(
        self, request: pb.ListPodSandboxMetricsRequest, context: CallContext
    ) -> pb.ListPodSandboxMetricsResponse:
        return metrics.list_sandbox_metrics(self._rt, request, context)

    @hookimpl
    def cri_get_container_events(
        self, request: pb.GetEventsRequest, context: CallContext
    ) -> Iterator[pb.ContainerEventResponse]:
        return self._rt.events.subscribe(context)

    # -- streaming lists -------------------------------------------------------------------------------------------

    @hookimpl
    def cri_stream_pod_sandboxes(
        self, request: pb.StreamPodSandboxesRequest
    ) -> Iterator[pb.StreamPodSandboxesResponse]:
        items = sandbox_status.items(self._rt, request.filter)
        return batches(items, lambda batch: pb.StreamPodSandboxesResponse(pod_sandboxes=batch))

    @hookimpl
    def cri_stream_containers(self, request: pb.StreamContainersRequest) -> Iterator[pb.StreamContainersResponse]:
        items = container_status.items(self._rt, request.filter)
        return batches(items, lambda batch: pb.StreamContainersResponse(containers=batch))

    @hookimpl
    def cri_stream_container_stats(
        self, request: pb.StreamContainerStatsRequest
    ) -> Iterator[pb.StreamContainerStatsResponse]:
        items = stats.of_containers(self._rt, request.filter)
        return batches(items, lambda batch: pb.StreamContainerStatsResponse(container_stats=batch))

    @hookimpl
    def cri_stream_pod_sandbox_stats(
        self, request: pb.StreamPodSandboxStatsRequest
    ) -> Iterator[pb.StreamPodSandboxStatsResponse]:
        items = stats.of_sandboxes(self._rt, request.filter)
        return batches(items, lambda batch: pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=batch))

    @hookimpl
    def cri_stream_pod_sandbox_metrics(self) -> Iterator[pb.StreamPodSandboxMetricsResponse]:
        items = metrics.of_sandboxes(self._rt)
        return batches(items, lambda batch: pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=batch))

    # -- what Porto can't do ---------------------------------------------------------------------------------------

    @hookimpl
    def cri_checkpoint_container(self) -> pb.CheckpointContainerResponse:
        raise Unimplemented(f"CheckpointContainer: {_NO_CRIU}")

    @hookimpl
    def cri_checkpoint_pod(self) -> pb.CheckpointPodResponse:
        raise Unimplemented(f"CheckpointPod: {_NO_CRIU}")

    @hookimpl
    def cri_restore_pod(self) -> pb.RestorePodResponse:
        raise Unimplemented(f"RestorePod: {_NO_CRIU}")

    # -- streaming -------------------------------------------------------------------------------------------------

    @hookimpl
    def stream_check(self, session: ExecSession | AttachSession | PortForwardSession) -> bool:
        streaming.check(self._rt, session)
        return True

    @hookimpl
    def stream_terminal(self, session: ExecSession, context: CallContext) -> tuple[int, int] | None:
        return terminals.for_exec(self._rt, session, context)

    @hookimpl
    def stream_exec(self, session: ExecSession, context: CallContext) -> int:
        return exec.stream_exec(self._rt, session, context)

    @hookimpl
    def stream_attach(self, session: AttachSession, context: CallContext) -> bool:
        streaming.attach(self._rt, session, context)
        return True

    @hookimpl
    def stream_port_forward(self, session: PortForwardSession, context: CallContext) -> socket.socket:
        return streaming.port_forward(self._rt, session, context)

    # -- ImageService ----------------------------------------------------------------------------------------------

    @hookimpl
    def cri_list_images(self, request: pb.ListImagesRequest, context: CallContext) -> pb.ListImagesResponse:
        return self._rt.images.list_images(request, context)

    @hookimpl
    def cri_stream_images(
        self, request: pb.StreamImagesRequest, context: CallContext
    ) -> Iterator[pb.StreamImagesResponse]:
        return self._rt.images.stream_images(request, context)

    @hookimpl
    def cri_image_status(self, request: pb.ImageStatusRequest, context: CallContext) -> pb.ImageStatusResponse:
        return self._rt.images.image_status(request, context)

    @hookimpl
    def cri_pull_image(self, request: pb.PullImageRequest, context: CallContext) -> pb.PullImageResponse:
        spec.check_handler(request.image.runtime_handler, "image.runtime_handler")
        return self._rt.images.pull_image(request, context)

    @hookimpl
    def cri_remove_image(self, request: pb.RemoveImageRequest, context: CallContext) -> pb.RemoveImageResponse:
        return self._rt.images.remove_image(request, context)

    @hookimpl
    def cri_image_fs_info(self, request: pb.ImageFsInfoRequest, context: CallContext) -> pb.ImageFsInfoResponse:
        return self._rt.images.image_fs_info(request, context)


def _layers_in_use(records: Records) -> set[str]:
    """Porto layers that some container's root volume stands on."""
    pauses = {layer for sandbox_record in records.sandboxes.all() for layer in sandbox_record.layers}
    return pauses | {layer for container_record in records.containers.all() for layer in container_record.layers}
