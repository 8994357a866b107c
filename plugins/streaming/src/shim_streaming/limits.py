"""Every bound of the streaming server that is not the operator's to set, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds. The defaults are the ones in use; tests bring their own."""

    token_ttl_s: float = 60.0
    """How long a URL is good for."""
    tokens: int = 1000
    """URLs given out and not used yet."""
    command_bytes: int = 2 * 1024 * 1024
    """Length of a command with its arguments: what Linux takes, with the default stack limit."""
    head_timeout_s: float = 10.0
    """How long a client may take for the TLS handshake and its request."""
    head_bytes: int = 64 * 1024
    """Size of a request's head. Proxies before us pass on the headers of users, tokens and cookies included."""
    greetings: int = 512
    """Connections that haven't shown a token yet. One more, and the oldest has to go."""
    sessions: int = 4096
    """Connections that have."""
    creation_timeout_s: float = 30.0
    """How long a client may take to open all streams of its session."""
    linger_s: float = 10.0
    """How long a client may take to close its side once everything was said."""
    probe_interval_s: float = 5.0
    """How often to look whether a client that isn't read at present is still there."""
    disconnect_grace_s: float = 5.0
    """How long a command goes on when its client has gone: to finish the input it has got. Then it is killed."""
    drain_quiet_s: float = 1.0
    """A command has exited and something else still holds its output open: how long a silence ends the session."""
    drain_total_s: float = 10.0
    """The same, if it is never silent."""
    forwards: int = 1024
    """Connections forwarded at once for one client."""
    dials: int = 32
    """Connections to the pod being made at once for one client."""
    stop_linger_s: float = 2.0
    """As ``linger_s``, when the daemon stops."""
    stop_timeout_s: float = 10.0
    """How long sessions may take to end when the daemon stops."""
