"""The stream keeper: owns the pipes and terminals of all containers of a node, and outlives the shim.

::

    shim ── KeeperClient ── keeper.sock ──> worker <─── pipes, terminals ─── containers
                                             │  ╲
                                    holder ──┘   ╲──> CRI logs, attached sessions

Two processes: the *worker* moves the output to the logs (:mod:`.pump`), fans it out to attached clients and feeds
stdin (:mod:`.attach`); the *holder* has duplicates of all descriptors and forks a new worker when one is killed, as the
worker forks a new holder. How far a batch has come is in memory files that both have (:mod:`.journal`), so no byte is
lost or written twice whenever one of them is killed; for an upgrade a successor takes it all over (:mod:`.handover`).

Differences from the design first thought of, which had a staging pipe for each stream:

- *One staging area, a memory file.* One batch is under way at a time, so one area serves all, and containers cost no
  further descriptors. Its file position does what the pipe's fill level did, with two system calls less a batch.
- *What is half written is completed, not truncated and redone:* the journal has the time of the batch, so its records
  come out the same again. A ``kubectl logs -f`` never sees a line twice.
- *The journal is no file on disk:* it is of use exactly as long as the pipes exist, and a full disk can't hurt it.
- *Terminals are staged, too:* ``splice`` from a terminal's master needs a pipe on the other side, so it goes through
  one. Linux 5.10 alone can't do it; there a kill at the wrong instruction loses at most 4 KiB of a terminal's output.

What it doesn't do: containers get SIGPIPE if worker and holder are killed within the same few milliseconds (both ask
the kernel's OOM killer to be taken last); and a log disk that hangs, rather than fails, holds up all containers once
their pipes are full.

The holder inherits the keeper's memory by fork, so the two cost little more than one. Everything that the keeper's
processes import counts: this package imports the client, and with it the shim's libraries, only when it is asked for.

Both stay in the cgroup of whoever started them: a systemd unit of the shim needs ``KillMode=process``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim_porto_runtime.keeper.client import (
        AttachEnd,
        ContainerStatus,
        ContainerStreams,
        KeeperClient,
        KeeperStats,
    )

__all__ = ["AttachEnd", "ContainerStatus", "ContainerStreams", "KeeperClient", "KeeperStats"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from shim_porto_runtime.keeper import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
