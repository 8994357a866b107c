"""Versions of the CNI specification: which are known, which is higher, and what each of them brought."""

from __future__ import annotations

KNOWN = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Every released version, the oldest first."""

UNSTATED = "0.1.0"
"""What a configuration or a plugin speaks that doesn't say (CNI: the version field came with 0.2.0)."""

CHAINING = "0.3.0"
"""The first version with plugin lists and results that can be passed on."""

CHECK = "0.4.0"
"""The first version with CHECK, and with ``prevResult`` on DEL."""

GC_AND_STATUS = "1.1.0"


def at_least(version: str, other: str) -> bool:
    """Whether ``version`` is ``other`` or a later one. Both are known versions."""
    return KNOWN.index(version) >= KNOWN.index(other)
