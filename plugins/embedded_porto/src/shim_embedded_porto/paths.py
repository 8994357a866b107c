"""Paths as Porto calculates with them: by their text, never by what they lead to."""

from __future__ import annotations

import os

_SYSTEM = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/proc", "/root", "/sbin", "/sys", "/usr", "/var"),
)


def normal(path: str) -> str:
    """Without ``.``, ``..`` and double slashes, as far as the text tells."""
    result = os.path.normpath(path) if path else ""
    return "/" + result.lstrip("/") if result.startswith("//") else result


def is_normal(path: str) -> bool:
    return normal(path) == path


def join(base: str, path: str) -> str:
    """``path`` below ``base``, absolute or not."""
    if not path or path == "/":
        return base
    return base.rstrip("/") + "/" + path.lstrip("/")


def inside(path: str, base: str) -> bool:
    """True when ``path`` is ``base`` or below it."""
    return base == "/" or path == base or path.startswith(base.rstrip("/") + "/")


def inner(base: str, path: str) -> str:
    """``path`` as seen from the root ``base``; empty when it can't be seen."""
    if not path or not inside(path, base):
        return ""
    if base == "/":
        return path
    return path[len(base.rstrip("/")) :] or "/"


def is_system(path: str) -> bool:
    """True for places where Porto lets no volume or place be."""
    path = normal(path)
    if path in ("/", "/home"):
        return True
    if inside(path, "/var/lib"):
        return False
    return any(inside(path, system) for system in _SYSTEM)
