"""Hand-over: a keeper gives all it has to a successor, and nobody notices.

The successor (a new process with the new code) connects like a client and asks. The older keeper stops reading and
sends what it has: socket and lock, each container with its descriptors and unfinished lines, each attached client. The
successor forks its worker, so that two processes have everything, and takes the offer. Until then the older keeper can
take it back (the successor died, or took too long) and goes on; afterwards it ends. Who owns the streams is settled by
:class:`~shim_porto_runtime.keeper.journal.Claim` whoever is killed in between.
"""

from __future__ import annotations

import os
import socket
from binascii import a2b_base64, b2a_base64

from shim_porto_runtime.keeper import process, protocol
from shim_porto_runtime.keeper.holder import Entries, Keep
from shim_porto_runtime.keeper.journal import Claim, Journal, make_staging, make_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim_porto_runtime.keeper.attach import Client
    from shim_porto_runtime.keeper.streams import Streams

FORMAT = 1
"""Of what is handed over; raised when an older successor couldn't go on with it."""
_TIMEOUT_S = 5.0
"""How long the containers may have to wait for a successor that hangs."""

Session = tuple["dict[str, Any]", "list[int]"]
"""An attached client: its description and descriptors."""


# -- the older keeper --------------------------------------------------------------------------------------------------


def give(keep: Keep, streams: Streams, successor: socket.socket, request: dict[str, Any]) -> bool:
    """Hand everything over; True if the successor has taken it, False if this keeper goes on."""
    if request.get("format", 0) < FORMAT:
        protocol.send(successor, {"ok": False, "code": "UNIMPLEMENTED", "message": "the successor is older"})
        return False
    claim = Claim(keep.state)
    number = claim.offer()
    try:
        successor.settimeout(_TIMEOUT_S)
        _send_all(keep, streams, successor, number)
        protocol.receive(successor)  # its word, its end, or nothing for too long: the claim says what it means
    except (OSError, protocol.ProtocolError) as err:
        process.log(f"hand-over: {err}")
    if claim.withdraw():
        process.log("hand-over: the successor hasn't taken it; going on")
        return False
    process.log("hand-over: done; this keeper ends")
    return True


def _send_all(keep: Keep, streams: Streams, successor: socket.socket, number: int) -> None:
    base = {"ok": True, "format": FORMAT, "offer": number, "idle_exit_s": keep.idle_exit_s}
    protocol.send(successor, base, [keep.listening, keep.lock, keep.state])
    for container in streams.containers.values():
        description, fds = container.entry()
        cells = {output.name: streams.cell(output) for output in container.outputs}
        carried = {name: [flags, dropped, _encode(rest)] for name, (flags, dropped, rest) in cells.items()}
        protocol.send(successor, {"container": description, "carried": carried}, fds)
    for client in streams.clients:
        _send_client(successor, client)
    protocol.send(successor, {"complete": True})


def _send_client(successor: socket.socket, client: Client) -> None:
    description, fds = client.entry()
    pending = client.pending()
    files = []
    try:
        for data in pending.values():
            file = os.memfd_create("keeper-pending", os.MFD_CLOEXEC)
            files.append(file)
            os.pwrite(file, data, 0)
        description["pending"] = list(pending)
        protocol.send(successor, {"client": description}, [*fds, *files])
    finally:
        protocol.close_all(files)


# -- the successor -----------------------------------------------------------------------------------------------------


class Takeover:
    """A hand-over from the successor's side, between having everything and owning it.

    :param sessions: the attached clients.
    """

    def __init__(self, older: socket.socket, state: int, number: int, sessions: list[Session]) -> None:
        self._older = older
        self._state = state
        self._number = number
        self.sessions = sessions

    def commit(self, worker: socket.socket) -> bool:
        """In the holder: become the owner, and set the worker going; False if the offer has been taken back."""
        if not Claim(self._state).take(self._number):
            process.log("hand-over: the older keeper has taken it back")
            return False
        for connection, message in ((worker, {"go": True}), (self._older, {"taken": True})):
            try:
                protocol.send(connection, message)
            except OSError:
                pass  # it finds out by itself
        return True

    def wait_for_commit(self, holder: socket.socket) -> bool:
        """In the worker: wait for the holder's word; without one, see whether it had become the owner."""
        try:
            packet = protocol.receive(holder)
        except OSError:
            packet = None
        return packet is not None or not Claim(self._state).withdraw()

    def close(self) -> None:
        """Let go of the older keeper; in the holder of the clients, too, which are the worker's."""
        self._older.close()
        os.close(self._state)
        for _, fds in self.sessions:
            protocol.close_all(fds)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._older.close()
        os.close(self._state)


def take(directory: str, build: str) -> tuple[Keep, Entries, Takeover]:
    """Ask the keeper of a directory for everything it has.

    :raises OSError: there is none, or it doesn't answer.
    :raises protocol.ProtocolError: it refuses, or speaks another language.
    """
    older = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    older.settimeout(_TIMEOUT_S)
    with protocol.Address(directory) as path:
        older.connect(path)
    protocol.send(older, {"v": protocol.VERSION, "op": "hand-over", "format": FORMAT})
    base, (listening, lock, old_state) = _expect(older, "offer", 3)
    entries: Entries = {}
    sessions: list[Session] = []
    state = make_state()
    journal = Journal(state)
    while True:
        message, fds = _expect(older, None, None)
        if "container" in message:
            description = message["container"]
            for name in description["cells"]:
                flags, dropped, rest = message["carried"][name]
                description["cells"][name] = cell = journal.allocate()
                journal.fill(cell, flags, dropped, a2b_base64(rest))
            entries[description["id"]] = (description, fds)
        elif "client" in message:
            sessions.append((message["client"], fds))
        elif "complete" in message:
            break
    journal.close()
    keep = Keep(
        directory,
        listening=listening,
        lock=lock,
        state=state,
        staging=make_staging(),
        transit=os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK),
        idle_exit_s=base["idle_exit_s"],
        build=build,
    )
    return keep, entries, Takeover(older, old_state, base["offer"], sessions)


def resume_sessions(streams: Streams, sessions: list[Session]) -> None:
    """Go on with the clients that were taken over."""
    for description, fds in sessions:
        names, pending_names = description["fds"], description["pending"]
        connection = socket.socket(fileno=fds[0])
        connection.setblocking(False)
        session = dict(zip(names, fds[1 : 1 + len(names)], strict=True))
        pending = {}
        for name, file in zip(pending_names, fds[1 + len(names) :], strict=True):
            pending[name] = os.pread(file, os.fstat(file).st_size, 0)
            os.close(file)
        container = streams.containers.get(description["id"])
        if container is None:  # removed while its client hadn't taken everything yet
            protocol.close_all(session.values())
            connection.close()
            continue
        try:
            client = streams.attach(container, connection, session)
        except protocol.Refusal as refusal:
            process.log(f"hand-over: a client can't go on: {refusal.message}")
            connection.close()
            continue
        client.resume(pending, a2b_base64(description.get("input", "")), description["ending"])
        client.start()


def _expect(older: socket.socket, key: str | None, count: int | None) -> tuple[dict[str, Any], list[int]]:
    packet = protocol.receive(older)
    if packet is None:
        raise protocol.ProtocolError("the older keeper has ended the hand-over")
    message, fds = packet
    if (key is not None and key not in message) or (count is not None and len(fds) != count):
        protocol.close_all(fds)
        raise protocol.ProtocolError(f"the older keeper refuses: {message.get('message', message)}")
    return message, fds


def _encode(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()
