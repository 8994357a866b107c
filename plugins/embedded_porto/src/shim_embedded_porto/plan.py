"""What the daemon tells the keeper to start: a container reduced to system calls. JSON on the wire.

Numbers under ``fd`` index the descriptors that travel with the plan.
"""

from __future__ import annotations

from typing import TypedDict


class StreamPlan(TypedDict, total=False):
    """A standard stream: a descriptor, or a path that the process itself opens in its root."""

    fd: int
    path: str


class Directory(TypedDict):
    """A directory to be made; the path is relative."""

    path: str
    mode: int
    uid: int
    gid: int


class BindPlan(TypedDict):
    """A bind mount: of ``source`` in the parent's root, at ``target`` in the container's."""

    source: str
    target: str
    flags: int
    uid: int
    gid: int
    """Who owns what has to be made for the target."""


class NodePlan(TypedDict):
    """A device node."""

    path: str
    mode: int
    """With the kind of node."""
    device: int
    uid: int
    gid: int


class SymlinkPlan(TypedDict):
    path: str
    target: str


class MountPlan(TypedDict):
    """A mount namespace of the container's own."""

    parent_root: str
    """The parent's root, in the mount namespace the container starts from."""
    root: str
    """The container's root in that of the parent."""
    proc: bool
    """Mount a new /proc: there is none yet that shows the container's PID namespace."""
    readonly: bool
    files: dict[str, str]
    """Contents by path: private files bound over those of the root."""
    binds: list[BindPlan]
    run: list[Directory]
    """What /run begins with."""
    run_bytes: int
    socket: str
    """The daemon's socket, to be bound at /run/portod.socket; empty: not."""
    work: str
    """An empty directory of the daemon's to work in."""
    unmount: list[str]
    """Mounts crun must not see."""
    unwanted: list[str]
    """What crun makes in /dev, and the container mustn't have, or not so."""
    nodes: list[NodePlan]
    """What is made in its place."""


class CommandPlan(TypedDict):
    """What is executed, and as whom."""

    argv: list[str]
    line: str
    """To be expanded to arguments when ``argv`` is empty."""
    env: dict[str, str]
    cwd: str
    umask: int
    uid: int
    gid: int
    groups: list[int]
    bounding: int
    ambient: int
    last_cap: int
    loginuid: int
    seccomp: dict[str, object] | None
    userns: int
    """Make a user namespace and others that belong to it, by clone flags; 0: none."""
    unshare_mounts: bool


class Plan(TypedDict):
    """One start."""

    key: str
    title: str
    cgroups: list[str]
    """Files to write 0 to, so as to get into the cgroups."""
    oom_score_adj: int
    nice: int
    policy: int
    io_priority: int
    rlimits: list[tuple[str, int, int, int]]
    """Name, number, soft and hard limit; -1 is unlimited."""
    join: dict[str, int]
    """Namespaces to enter first: kind (``pid``, ``mnt``, ...) and descriptor."""
    unshare: int
    """Namespaces to make, by clone flags; never the PID namespace."""
    isolate: bool
    """Make a PID namespace."""
    bare_init: bool
    """The command itself is the PID namespace's first process."""
    exact_status: bool
    """Exit codes above 128 are just that, where an init of portod's would have turned a signal into one."""
    hostname: str
    sysctls: dict[str, str]
    loopback: bool
    """Bring up ``lo`` in the new network namespace."""
    mounts: MountPlan | None
    crun: list[str]
    """The command that builds the root; empty when none has to be built."""
    bundle: str
    """The directory crun works in: removed afterwards."""
    symlinks: list[SymlinkPlan]
    streams: list[StreamPlan]
    command: CommandPlan | None
    """None: processes of other containers live in these namespaces, none of its own."""
    exit_fd: int
    """The file the exit status goes to as well, should the keeper not live to see it."""
