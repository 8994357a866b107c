"""``WWW-Authenticate``: what a server asks for (RFC 9110, section 11.6.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_MAX_CHARACTERS = 16384
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PARAMETER = re.compile(r"""\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*""")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate."""

    scheme: str
    """In lower case: ``basic``, ``bearer``."""
    parameters: dict[str, str] = field(default_factory=dict)


def parse(header: str) -> list[Challenge]:
    """All challenges of a header, in its order. What can't be understood ends the list."""
    found: list[Challenge] = []
    text = header[:_MAX_CHARACTERS]
    position = 0
    while True:
        position = _skip(text, position, ", \t")
        scheme = _TOKEN.match(text, position)
        if scheme is None:
            return found
        challenge = Challenge(scheme[0].lower())
        found.append(challenge)
        position = _skip(text, scheme.end(), " \t")
        if (opaque := _TOKEN68.match(text, position)) is not None:
            position = opaque.end()  # a scheme's single credential, such as NTLM's
        while (parameter := _PARAMETER.match(text, position)) is not None:
            quoted, plain = parameter[2], parameter[3]
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            challenge.parameters.setdefault(parameter[1].lower(), value)
            position = parameter.end()
            following = _skip(text, position, ", \t")
            # After a comma comes another parameter, or another scheme.
            if text[position : position + 1] != "," or _PARAMETER.match(text, following) is None:
                break
            position = following
        position = _skip(text, position, " \t")
        if text[position : position + 1] != ",":
            return found


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
