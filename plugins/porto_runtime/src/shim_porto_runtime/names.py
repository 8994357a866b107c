"""CRI ids and the Porto names made of them.

::

    <parent>/<sandbox id>                          meta container: the pod's namespaces
    <parent>/<sandbox id>/pause                    the pause image's process, if one is configured
    <parent>/<sandbox id>/<container id>           a container
    <parent>/<sandbox id>/<container id>/e-<hex>   a process of ExecSync or Exec
"""

from __future__ import annotations

import re
import secrets

from shim_core.errors import InvalidArgument, NotFound

PAUSE = "pause"
_ID = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(r"[0-9a-f]{1,64}")


def new_id() -> str:
    """64 random hex digits."""
    return secrets.token_hex(32)


def is_id(text: str) -> bool:
    """True for a whole CRI id."""
    return _ID.fullmatch(text) is not None


def check_id(text: str, field: str) -> str:
    """An id as a client sends it: whole, shortened, or none that was ever given out, which no record is found by.

    :raises InvalidArgument: it is empty.
    """
    if not text:
        raise InvalidArgument(f"{field}: must not be empty")
    return text


def may_be_id(text: str) -> bool:
    """True for a CRI id, whole or shortened.

    Nothing else may come near Porto, where ``*``, ``***``, ``self``, ``.`` and ``/`` have meanings.
    """
    return _ID_PREFIX.fullmatch(text) is not None


def no_such(kind: str, text: str) -> NotFound:
    """The error for an id that nothing has.

    :param kind: what it should be the id of: ``sandbox``, ``container``.
    """
    return NotFound(f"no such {kind}: {text[:64]!r}")


class Names:
    """Porto names below a parent container.

    :param parent: its name without slashes at the ends; empty for Porto's top level.
    """

    def __init__(self, parent: str = "") -> None:
        self.parent = parent
        self._prefix = f"{parent}/" if parent else ""

    def sandbox(self, sandbox_id: str) -> str:
        return self._prefix + sandbox_id

    def pause(self, sandbox_id: str) -> str:
        return f"{self._prefix}{sandbox_id}/{PAUSE}"

    def container(self, sandbox_id: str, container_id: str) -> str:
        return f"{self._prefix}{sandbox_id}/{container_id}"

    def exec(self, sandbox_id: str, container_id: str) -> str:
        return f"{self._prefix}{sandbox_id}/{container_id}/e-{secrets.token_hex(8)}"

    @property
    def masks(self) -> tuple[str, str]:
        """Porto masks that match all sandboxes, and all that is directly below them."""
        return f"{self._prefix}*", f"{self._prefix}*/*"

    @property
    def sandbox_masks(self) -> tuple[str, str]:
        """Porto masks that match all sandboxes, and their pause processes."""
        return f"{self._prefix}*", f"{self._prefix}*/{PAUSE}"

    def parse(self, name: str) -> tuple[str, str] | None:
        """Sandbox id, and the rest of the name below it (empty for the sandbox itself); None for what isn't ours."""
        if not name.startswith(self._prefix):
            return None
        sandbox_id, _, rest = name.removeprefix(self._prefix).partition("/")
        return (sandbox_id, rest) if is_id(sandbox_id) else None
