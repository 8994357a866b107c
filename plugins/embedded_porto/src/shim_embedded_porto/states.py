"""Container states, as Porto names them."""

from __future__ import annotations

STOPPED = "stopped"
STARTING = "starting"
RUNNING = "running"
PAUSED = "paused"
STOPPING = "stopping"
DEAD = "dead"
META = "meta"
RESPAWNING = "respawning"
DESTROYED = "destroyed"

ALIVE = frozenset({RUNNING, META})
"""What a container must be in for its children to start."""
REPORTED = frozenset({STOPPED, DEAD, RESPAWNING})
"""What ends a Wait."""
