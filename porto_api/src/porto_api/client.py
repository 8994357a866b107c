"""The client: Porto's calls as methods, over a pool of connections.

Every method takes ``timeout_s`` (seconds until :class:`~porto_api.errors.SocketTimeout`; the client's default when
None) and ``cancel`` (a :class:`~porto_api.cancel.CancelToken`). Errors Porto answers are raised, one class per code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from porto_api import errors, rpc_pb2
from porto_api.cancel import CancelToken
from porto_api.connection import READ_ONLY, Connection, Pool
from porto_api.events import Subscription
from porto_api.storage import StorageCalls

DEFAULT_SOCKET = "/run/portod.socket"


@dataclass(frozen=True, slots=True)
class WaitResult:
    """What ended a wait: a container's name and state, or neither when the time was up."""

    name: str
    state: str
    when: int
    """Seconds since the epoch, by portod's clock."""

    @property
    def timed_out(self) -> bool:
        return not self.name


class Client(StorageCalls):
    """A client of one portod. Safe to use from many threads; calls in parallel use connections of their own.

    :param path: the socket; ``$PORTO_SOCKET`` or ``/run/portod.socket`` when None.
    :param timeout_s: how long a call may take when it names no time of its own.
    """

    def __init__(
        self, path: str | None = None, timeout_s: float = 300.0, *, max_connections: int = 256, max_idle: int = 16
    ) -> None:
        self.path = path or os.environ.get("PORTO_SOCKET") or DEFAULT_SOCKET
        self.timeout_s = timeout_s
        self._pool = Pool(self.path, max_connections, max_idle)

    def __repr__(self) -> str:
        return f"<Client {self.path}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Weak containers made over them are destroyed by portod."""
        self._pool.close()

    def call(
        self,
        request: rpc_pb2.TContainerRequest,
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
        *,
        connection: Connection | None = None,
    ) -> rpc_pb2.TContainerResponse:
        """Carry out one request.

        A request that changes nothing is sent once more when the connection breaks under it; any other is not,
        since portod may have carried it out: the caller sees ``SocketError`` and has to look.

        :param connection: use this one (see :meth:`session`) rather than one of the pool.
        :raises errors.PortoError: what portod answered, or what happened on the way.
        """
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        if connection is not None:
            response = connection.call(request, deadline, cancel)
        else:
            response = self._call_pooled(request, deadline, cancel)
        if response.error != rpc_pb2.Success:
            raise errors.error_for(response.error, response.errorMsg)
        return response

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """A connection of one's own, closed at the end: portod then destroys the weak containers made over it."""
        connection = Connection(self.path)
        connection.connect(time.monotonic() + self.timeout_s)
        try:
            yield connection
        finally:
            connection.close()

    def _call_pooled(
        self, request: rpc_pb2.TContainerRequest, deadline: float, cancel: CancelToken | None
    ) -> rpc_pb2.TContainerResponse:
        try:
            with self._pool.connection(deadline) as connection:
                return connection.call(request, deadline, cancel)
        except errors.SocketError:
            if not _changes_nothing(request):
                raise
        with self._pool.connection(deadline, fresh=True) as connection:
            return connection.call(request, deadline, cancel)

    # -- containers ------------------------------------------------------------------------------------------------

    def create(
        self, name: str, *, weak: bool = False, connection: Connection | None = None, timeout_s: float | None = None
    ) -> None:
        """Create a container, in state ``stopped``. A weak one lives as long as its connection."""
        request = rpc_pb2.TContainerRequest()
        (request.createWeak if weak else request.create).name = name
        self.call(request, timeout_s, connection=connection)

    def create_from_spec(
        self,
        spec: rpc_pb2.TContainerSpec,
        volumes: Iterable[rpc_pb2.TVolumeSpec] = (),
        *,
        start: bool = False,
        connection: Connection | None = None,
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Create a container with its properties and volumes, all or nothing, and start it if asked to."""
        request = rpc_pb2.TContainerRequest()
        request.CreateFromSpec.container.CopyFrom(spec)
        request.CreateFromSpec.volumes.extend(volumes)
        request.CreateFromSpec.start = start
        self.call(request, timeout_s, cancel, connection=connection)

    def update_from_spec(
        self,
        spec: rpc_pb2.TContainerSpec,
        *,
        start: bool = False,
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Set the properties that ``spec`` holds, and start the container if asked to."""
        request = rpc_pb2.TContainerRequest()
        request.UpdateFromSpec.container.CopyFrom(spec)
        request.UpdateFromSpec.start = start
        self.call(request, timeout_s, cancel)

    def list_containers_by(
        self,
        names: Iterable[str] = ("***",),
        *,
        labels: Mapping[str, str] | None = None,
        changed_since: int | None = None,
        properties: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> list[rpc_pb2.TContainer]:
        """Containers as messages: those that match a name mask and all labels.

        :param properties: the fields of spec and status to fill in; everything when empty.
        :param changed_since: seconds since the epoch; older containers come with ``no_changes`` and little else.
        """
        request = rpc_pb2.TContainerRequest()
        for name in names:
            entry = request.ListContainersBy.filters.add()
            entry.name = name
            if changed_since is not None:
                entry.changed_since = changed_since
            for key, value in (labels or {}).items():
                entry.labels.map.add(key=key, val=value)
        request.ListContainersBy.field_options.properties.extend(properties)
        return list(self.call(request, timeout_s).ListContainersBy.containers)

    def destroy(self, name: str, *, timeout_s: float | None = None, cancel: CancelToken | None = None) -> None:
        """Destroy a container in any state, and its children."""
        request = rpc_pb2.TContainerRequest()
        request.destroy.name = name
        self.call(request, timeout_s, cancel)

    def start(self, name: str, *, timeout_s: float | None = None, cancel: CancelToken | None = None) -> None:
        request = rpc_pb2.TContainerRequest()
        request.start.name = name
        self.call(request, timeout_s, cancel)

    def stop(self, name: str, *, kill_after_s: float | None = None, timeout_s: float | None = None) -> None:
        """Stop: SIGTERM, then SIGKILL after ``kill_after_s`` (portod's default: 30). Forgets the exit status."""
        request = rpc_pb2.TContainerRequest()
        request.stop.name = name
        if kill_after_s is not None:
            request.stop.timeout_ms = round(kill_after_s * 1000)
        self.call(request, timeout_s)

    def kill(self, name: str, signal: int, *, timeout_s: float | None = None) -> None:
        """Send a signal to the container's main process."""
        request = rpc_pb2.TContainerRequest()
        request.kill.name = name
        request.kill.sig = signal
        self.call(request, timeout_s)

    def pause(self, name: str, *, timeout_s: float | None = None) -> None:
        request = rpc_pb2.TContainerRequest()
        request.pause.name = name
        self.call(request, timeout_s)

    def resume(self, name: str, *, timeout_s: float | None = None) -> None:
        request = rpc_pb2.TContainerRequest()
        request.resume.name = name
        self.call(request, timeout_s)

    def respawn(self, name: str, *, timeout_s: float | None = None) -> None:
        request = rpc_pb2.TContainerRequest()
        request.Respawn.name = name
        self.call(request, timeout_s)

    def list_containers(
        self, mask: str | None = None, *, changed_since: int | None = None, timeout_s: float | None = None
    ) -> list[str]:
        """Names of containers: all the client can see, or those that match ``mask``."""
        request = rpc_pb2.TContainerRequest()
        request.list.SetInParent()
        if mask is not None:
            request.list.mask = mask
        if changed_since is not None:
            request.list.changed_since = changed_since
        return list(self.call(request, timeout_s).list.name)

    # -- properties ------------------------------------------------------------------------------------------------

    def get(
        self,
        names: Iterable[str],
        variables: Iterable[str],
        *,
        nonblock: bool = False,
        sync: bool = False,
        real: bool = False,
        timeout_s: float | None = None,
        connection: Connection | None = None,
    ) -> dict[str, dict[str, str | errors.PortoError]]:
        """Properties of many containers in one call.

        :param names: names, or masks with ``*`` and ``?`` (``***`` is every container).
        :param sync: refresh cached statistics first. :param real: only what is set, no defaults.
        :returns: by container, by variable: the value, or the error Porto gave for it.
        """
        request = rpc_pb2.TContainerRequest()
        get = request.get
        get.name.extend(names)
        get.variable.extend(variables)
        get.nonblock, get.sync, get.real = nonblock, sync, real
        response = self.call(request, timeout_s, connection=connection)
        return {
            entry.name: {
                item.variable: errors.error_for(item.error, item.errorMsg) if item.HasField("error") else item.value
                for item in entry.keyval
            }
            for entry in response.get.list
        }

    def get_property(
        self, name: str, key: str, *, sync: bool = False, real: bool = False, timeout_s: float | None = None
    ) -> str:
        request = rpc_pb2.TContainerRequest()
        request.getProperty.name = name
        request.getProperty.property = key
        request.getProperty.sync, request.getProperty.real = sync, real
        return self.call(request, timeout_s).getProperty.value

    def set_property(self, name: str, key: str, value: str, *, timeout_s: float | None = None) -> None:
        request = rpc_pb2.TContainerRequest()
        request.setProperty.name = name
        request.setProperty.property = key
        request.setProperty.value = value
        self.call(request, timeout_s)

    def properties(
        self, *, timeout_s: float | None = None
    ) -> list[rpc_pb2.TContainerPropertyListResponse.TContainerPropertyListEntry]:
        """The container properties that this portod knows."""
        request = rpc_pb2.TContainerRequest()
        request.propertyList.SetInParent()
        return list(self.call(request, timeout_s).propertyList.list)

    # -- waiting ---------------------------------------------------------------------------------------------------

    def wait(
        self,
        names: Iterable[str],
        wait_s: float | None = None,
        *,
        cancel: CancelToken | None = None,
    ) -> WaitResult:
        """Wait until one of the containers is stopped, dead, respawning or a meta container with nothing running.

        :param names: names, or masks with ``*`` and ``?``.
        :param wait_s: how long; forever when None, only a look when 0. A time-out is a result, not an error.
        """
        request = self.wait_request(names)
        timeout_s = float(365 * 86400)
        if wait_s is not None:
            request.wait.timeout_ms = round(wait_s * 1000)
            timeout_s = wait_s + self.timeout_s
        answer = self.call(request, timeout_s, cancel).wait
        return WaitResult(answer.name, answer.state, answer.when)

    @staticmethod
    def wait_request(names: Iterable[str]) -> rpc_pb2.TContainerRequest:
        """The request behind :meth:`wait`, for who sends it over a session and polls for the answer."""
        request = rpc_pb2.TContainerRequest()
        request.wait.name.extend(names)
        return request

    def subscribe(
        self, names: Iterable[str] = ("***",), *, labels: Iterable[str] = (), target_state: str | None = None
    ) -> Subscription:
        """Every change of state of the containers that match, as it happens (Porto's AsyncWait).

        :raises errors.SocketUnavailable: portod can't be reached.
        """
        connection = Connection(self.path)
        connection.connect(time.monotonic() + self.timeout_s)
        return Subscription.open(connection, names, labels, target_state, time.monotonic() + self.timeout_s)

    # -- labels ----------------------------------------------------------------------------------------------------

    def find_label(
        self,
        label: str,
        *,
        mask: str | None = None,
        state: str | None = None,
        value: str | None = None,
        timeout_s: float | None = None,
    ) -> list[rpc_pb2.TFindLabelResponse.TFindLabelEntry]:
        """Containers that carry a label. ``label`` may be a mask."""
        request = rpc_pb2.TContainerRequest()
        find = request.FindLabel
        find.label = label
        if mask is not None:
            find.mask = mask
        if state is not None:
            find.state = state
        if value is not None:
            find.value = value
        return list(self.call(request, timeout_s).FindLabel.list)

    def set_label(
        self,
        name: str,
        label: str,
        value: str,
        *,
        prev_value: str | None = None,
        state: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Set a label; only if it had ``prev_value`` and the container is in ``state``, when those are given."""
        request = rpc_pb2.TContainerRequest()
        set_label = request.SetLabel
        set_label.name, set_label.label, set_label.value = name, label, value
        if prev_value is not None:
            set_label.prev_value = prev_value
        if state is not None:
            set_label.state = state
        self.call(request, timeout_s)

    def inc_label(self, name: str, label: str, add: int = 1, *, timeout_s: float | None = None) -> int:
        """Add to a label that holds a number; the new value."""
        request = rpc_pb2.TContainerRequest()
        request.IncLabel.name, request.IncLabel.label, request.IncLabel.add = name, label, add
        return self.call(request, timeout_s).IncLabel.result

    # -- the daemon and its processes ------------------------------------------------------------------------------

    def version(self, *, timeout_s: float | None = None) -> tuple[str, str]:
        """Tag and revision of portod."""
        request = rpc_pb2.TContainerRequest()
        request.version.SetInParent()
        answer = self.call(request, timeout_s).version
        return answer.tag, answer.revision

    def system(self, *, timeout_s: float | None = None) -> rpc_pb2.TGetSystemResponse:
        """portod's own state and counters."""
        request = rpc_pb2.TContainerRequest()
        request.GetSystem.SetInParent()
        return self.call(request, timeout_s).GetSystem

    def attach_process(self, name: str, pid: int, comm: str = "", *, timeout_s: float | None = None) -> None:
        """Move a process into a container."""
        request = rpc_pb2.TContainerRequest()
        request.attachProcess.name, request.attachProcess.pid, request.attachProcess.comm = name, pid, comm
        self.call(request, timeout_s)

    def locate_process(self, pid: int, comm: str = "", *, timeout_s: float | None = None) -> str:
        """The container a process runs in."""
        request = rpc_pb2.TContainerRequest()
        request.locateProcess.pid, request.locateProcess.comm = pid, comm
        return self.call(request, timeout_s).locateProcess.name

    def convert_path(self, path: str, source: str, destination: str, *, timeout_s: float | None = None) -> str:
        """``path`` as seen from container ``source``, as it is seen from container ``destination``."""
        request = rpc_pb2.TContainerRequest()
        convert = request.convertPath
        convert.path, convert.source, convert.destination = path, source, destination
        return self.call(request, timeout_s).convertPath.path


def _changes_nothing(request: rpc_pb2.TContainerRequest) -> bool:
    return all(field.name in READ_ONLY for field, _ in request.ListFields())
