"""Names in a layer's archive: paths, targets of links, extended attributes. What may be, and what may not."""

from __future__ import annotations

from shim_porto_runtime.images.tarread import BadLayer

MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255


def split(name: bytes) -> list[bytes]:
    """The parts of a path, empty ones and ``.`` left out.

    :raises BadLayer: no file of a layer can be called so.
    """
    if len(name) > MAX_PATH_BYTES:
        raise BadLayer("its path is too long")
    parts = [part for part in name.split(b"/") if part and part != b"."]
    for part in parts:
        check_part(part)
    return parts


def check_part(part: bytes) -> None:
    """One part of a path.

    :raises BadLayer: it leads up, or is too long.
    """
    if part == b"..":
        raise BadLayer("its path holds '..'")
    if len(part) > MAX_NAME_BYTES:
        raise BadLayer("its name is too long")


def check_target(target: bytes) -> bytes:
    """A symlink's target. Where it leads to doesn't matter: it is resolved inside of containers.

    :raises BadLayer: it is empty or too long.
    """
    if not target or len(target) > MAX_PATH_BYTES:
        raise BadLayer("its target is empty or too long")
    return target


def is_harmless(name: bytes) -> bool:
    """True for the extended attributes that a layer may bring."""
    if name == b"security.capability":
        return True
    return (
        name.startswith(b"user.") and not name.startswith(b"user.overlay.") and b"\0" not in name and b"=" not in name
    )


def show(name: bytes) -> str:
    """A name for a message."""
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 120 else f"{text[:117]}...")
