"""Who is asking: the process behind a connection, the container it runs in, and what follows from that."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, names, paths, states
from shim_embedded_porto.access import Access
from shim_embedded_porto.capabilities import SET_UID_GID
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import ROOT, Cred
from shim_embedded_porto.errors import Fault, permission
from shim_embedded_porto.tree import Tree

_PORTO_GROUP = "porto"


@dataclass(slots=True)
class Client:
    """One connection's peer."""

    tree: Tree
    container: Container
    pid: int = 0
    start_ticks: int = 0
    """When the process began: tells it from a later one of the same pid."""
    cred: Cred = ROOT
    """In whose name requests are carried out: in a container, its owner's."""
    task_cred: Cred = ROOT
    access: Access = Access.INTERNAL
    comm: str = ""
    namespace: str = ""
    write_namespace: str = ""
    weak: list[Container] = field(default_factory=list)
    """Containers that end with the connection."""

    @property
    def superuser(self) -> bool:
        return self.access >= Access.SUPERUSER

    @property
    def writes(self) -> bool:
        return self.access > Access.READ_ONLY

    # -- names -----------------------------------------------------------------------------------------------------

    def relative_name(self, name: str) -> str:
        """A container's name for this client; absolute when it is outside the client's namespace."""
        if name == limits.ROOT or not self.namespace:
            return name
        if name.startswith(self.namespace):
            return name[len(self.namespace) :]
        return limits.NAMESPACE + name

    def visible_name(self, name: str) -> str | None:
        """A container's name for this client; None when it can't be seen."""
        if name == limits.ROOT or not self.namespace:
            return name
        return name[len(self.namespace) :] if name.startswith(self.namespace) else None

    def resolve_name(self, relative: str) -> str:
        """:raises Fault: Permission: outside the client's namespace."""
        own = self.container.name
        if relative == limits.ROOT:
            name = limits.ROOT
        elif relative == limits.SELF:
            name = own
        elif relative == limits.DOT:
            name = names.parent_of(self.namespace)
        elif relative.startswith(limits.SELF + "/"):
            name = relative[len(limits.SELF) + 1 :]
            if not self.container.is_root:
                name = f"{own}/{name}"
        elif relative.startswith(limits.NAMESPACE):
            name = relative[len(limits.NAMESPACE) :]
        else:
            name = self.namespace + relative
        name = paths.normal(name)
        if name == ".":
            name = limits.ROOT
        if name == limits.ROOT or name.startswith((self.namespace, own + "/")) or (own + "/").startswith(name + "/"):
            return name
        raise permission(f"container name out of namespace: {relative}")

    def find(self, relative: str) -> Container:
        """:raises Fault: ContainerDoesNotExist, Permission."""
        return self.tree.find(self.resolve_name(relative))

    def find_for_write(self, relative: str, *, child: bool = False) -> Container:
        """A container this client may change, or (``child``) make children in.

        :raises Fault: ContainerDoesNotExist, Permission.
        """
        if not self.writes:
            raise permission("Write access denied")
        ct = self.find(relative)
        self.check_control(ct, child=child)
        return ct

    # -- rights ----------------------------------------------------------------------------------------------------

    def check_cred(self, other: Cred) -> None:
        """:raises Fault: Permission: this client can't act for ``other``."""
        if not self.writes:
            raise permission("Write access denied")
        if not (self.superuser or self.cred.uid == other.uid or other.unknown):
            raise permission(f"{self.cred} cannot control {other}")

    def check_control(self, ct: Container, *, child: bool = False) -> None:
        """:raises Fault: Permission."""
        if not self.writes:
            raise permission("Write access denied")
        if not child and ct.is_root:
            raise permission("Write access denied: root container is read-only")
        in_scope = (
            ct.name.startswith(self.write_namespace)
            or (child and ct.name == names.parent_of(self.write_namespace))
            or ct.child_of(self.container)
            or (ct is self.container and (child or ct.access == Access.SELF_ISOLATE))
        )
        if not in_scope:
            raise permission(f"Write access denied: container {ct.name} out of scope")
        if not (child and ct.is_root):
            try:
                self.check_cred(ct.owner)
            except Fault as fault:
                raise fault.within(f"Write access denied: container {ct.name}") from None
        own = self.container.name
        if own != limits.ROOT and ct.owner_containers:
            if any(allowed == own or allowed.startswith(own + "/") for allowed in ct.owner_containers):
                return
            raise permission(f"Write access denied: client {own} is not allowed by owner_containers property")

    @property
    def sets_ids(self) -> bool:
        """True when the client's container lets it change uid and gid."""
        caps = self.container.cap_bound if self.task_cred.uid == 0 else self.container.cap_ambient
        return caps & SET_UID_GID == SET_UID_GID

    # -- paths -----------------------------------------------------------------------------------------------------

    def compose_path(self, path: str) -> str:
        """A path of Porto's as this client sees it; empty when it can't."""
        return paths.inner(self.container.root_path, path)

    def resolve_path(self, path: str) -> str:
        return paths.join(self.container.root_path, path)


def system_client(tree: Tree) -> Client:
    """Porto itself."""
    return Client(tree, tree.root, pid=os.getpid(), comm="<system>")


def identify(tree: Tree, pid: int, uid: int, gid: int, container: Container) -> Client:
    """The client behind a connection, from the socket's peer credentials and the container its cgroup names.

    :raises Fault: Permission: Porto is disabled in that container, or the container doesn't run.
    """
    task_cred = Cred(uid, gid)
    start, comm = process_start(pid), _comm(pid)
    access = min([ct.access for ct in container.lineage()])
    if access == Access.NONE:
        raise permission(f"Porto disabled in container {container.name}")
    if container.state not in (states.RUNNING, states.STARTING, states.STOPPING, states.META):
        raise permission(f"Client from containers in state {container.state}")
    cred = (task_cred if container.is_root else container.owner).with_groups()
    if cred.uid == 0:
        access = Access.SUPERUSER if access == Access.NORMAL else access
    elif not _in_porto_group(cred):
        access = min(access, Access.READ_ONLY)
    return Client(
        tree,
        container,
        pid,
        start,
        cred,
        task_cred,
        access,
        comm,
        container.namespace(),
        container.namespace(write=True),
    )


def _in_porto_group(cred: Cred) -> bool:
    import grp

    try:
        return cred.member_of(grp.getgrnam(_PORTO_GROUP).gr_gid)
    except KeyError:
        return False


def process_start(pid: int) -> int:
    """When a process began, in clock ticks since boot.

    :raises Fault: no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        raise Fault(pb.Unknown, f"Can not get client process start time: pid {pid}") from None


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
