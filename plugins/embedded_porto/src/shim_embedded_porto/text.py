"""How Porto reads and writes values: sizes, durations, CPU power, maps, escaped lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from shim_embedded_porto.errors import Fault, invalid_value
from shim_embedded_porto.limits import NS_PER_S

UINT64_MAX = (1 << 64) - 1
_INTEGER = re.compile(r"\s*[+-]?\d+")
_HEXADECIMAL = re.compile(r"\s*[+-]?0[xX]([0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)([pP][+-]?\d+)?")
_FLOAT = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SIZE_UNITS = "BKMGTPE"
_NSEC_UNITS = {
    "": 1.0,
    "s": 1e9,
    "sec": 1e9,
    "ms": 1e6,
    "msec": 1e6,
    "us": 1e3,
    "usec": 1e3,
    "ns": 1.0,
    "nsec": 1.0,
    "ps": 1e-3,
    "psec": 1e-3,
    "fs": 1e-6,
    "fsec": 1e-6,
}


def words(text: str) -> tuple[str, ...]:
    """The words of a list that reads better as prose."""
    return tuple(text.split())


def parse_int(text: str, low: int = -(1 << 63), high: int = (1 << 63) - 1, kind: str = "int64") -> int:
    """A decimal number; blanks around it are allowed.

    :raises Fault: InvalidValue.
    """
    match = _INTEGER.match(text)
    if match is None or text[match.end() :].strip() or not low <= int(match[0]) <= high:
        raise invalid_value(f"Bad {kind} value: {text}")
    return int(match[0])


def parse_uint(text: str) -> int:
    return parse_int(text, 0, UINT64_MAX, "uint64")


def parse_octal(text: str) -> int:
    match = re.fullmatch(r"\s*[+]?([0-7]+)\s*", text)
    if match is None or int(match[1], 8) > 0xFFFFFFFF:
        raise invalid_value(f"Bad base-8 value: {text}")
    return int(match[1], 8)


def format_octal(value: int) -> str:
    """As C's ``%#o``: 18 → ``022``, 0 → ``0``."""
    return f"0{value:o}" if value else "0"


def parse_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise Fault(1, f"Bad boolean value: {text}")
    return text == "true"


def format_bool(value: bool) -> str:
    return "true" if value else "false"


def parse_number(text: str) -> tuple[float, str]:
    """A floating point number, as strtod(3) takes it, and the unit behind it."""
    match = _HEXADECIMAL.match(text)
    if match is not None:
        return float.fromhex(match[0].strip()), text[match.end() :].strip()
    match = _FLOAT.match(text)
    if match is None:
        raise invalid_value(f"Bad value: {text}")
    return float(match[0]), text[match.end() :].strip()


def _size_multiplier(unit: str) -> int | None:
    if not unit:
        return 1
    power = _SIZE_UNITS.find(unit[0].upper())
    rest = unit[1:]
    if power < 0 or not (rest == "" or (power and rest in ("b", "B", "iB"))):
        return None
    return 1 << (10 * power)


def parse_size(text: str) -> int:
    """Bytes, or any count: ``64M``, ``1.5G``, ``10Kb``, ``4KiB``.

    :raises Fault: InvalidValue.
    """
    match = _INTEGER.match(text)
    if match is not None and abs(int(match[0])) <= UINT64_MAX:
        unit = _size_multiplier(text[match.end() :].strip())
        # strtoull takes a minus sign for what it means modulo 2^64
        value = int(match[0]) % (UINT64_MAX + 1)
        if unit is not None:
            if value * unit > UINT64_MAX:
                raise invalid_value(f"Too big: {text}")
            return value * unit
    number, name = parse_number(text)
    if number < 0:
        raise invalid_value(f"Negative: {text}")
    multiplier = _size_multiplier(name)
    if multiplier is None:
        raise invalid_value(f"Bad value unit: {name}")
    if match is not None and not name and text[match.end() :].lstrip()[:1] in ("e", "E"):
        multiplier = 1 << 60  # portod has taken the exponent for exabytes before
    if number * multiplier > UINT64_MAX:
        raise invalid_value(f"Too big: {text}")
    return int(number * multiplier)


def format_size(value: int) -> str:
    power = 0
    while power + 1 < len(_SIZE_UNITS) and value >= 1 << (10 * (power + 1)):
        power += 1
    divisor = 1 << (10 * power)
    unit = _SIZE_UNITS[power]
    return f"{value // divisor}{unit}" if value % divisor == 0 else f"{value / divisor:.1f}{unit}"


def parse_nsec(text: str) -> int:
    """Nanoseconds: a number with an optional unit from ``s`` to ``fs``."""
    number, unit = parse_number(text)
    if number < 0:
        raise invalid_value(f"Negative: {text}")
    if unit not in _NSEC_UNITS:
        raise invalid_value(f"Unknown unit: {unit}")
    if number * _NSEC_UNITS[unit] > UINT64_MAX:
        raise invalid_value(f"Too big: {text}")
    return int(number * _NSEC_UNITS[unit])


def _fixed_point(text: str, digits: int) -> int:
    whole, _, fraction = text.partition(".")
    fraction = (fraction[:digits] + "0" * digits)[:digits]
    try:
        scale: int = 10**digits
        return parse_uint(whole) * scale + parse_uint(fraction)
    except Fault:
        raise invalid_value(f"Bad value: {text}") from None


def parse_cpu_power(text: str, cores: int) -> int:
    """CPU power in nanoseconds per second: ``1.5c`` cores, ``5000000ns``, or a bare percentage of the machine."""
    number = text.rstrip("".join({c for c in text if not c.isdigit()}))
    unit = text[len(number) :]
    if not text:
        return 0
    if unit == "":
        return _fixed_point(text, 2) * (NS_PER_S // (100 * 100) * cores)
    if unit == "c":
        return _fixed_point(number, 9)
    if unit == "ns":
        return parse_uint(number)
    raise invalid_value(f"Invalid cpu power unit in '{text}'")


def format_cpu_power(power: int) -> str:
    whole, rest = divmod(power, NS_PER_S)
    return f"{whole}c" if rest == 0 else f"{whole}.{rest:09d}".rstrip("0") + "c"


def split_nested(text: str, inner: str, outer: str = "") -> list[list[str]]:
    """Words by ``inner`` in lines by ``outer``; a backslash keeps a separator or a backslash from its meaning."""
    lines: list[list[str]] = [[]]
    word: list[str] = []
    index = 0
    while True:
        char = text[index] if index < len(text) else ""
        if char == "" or char == inner or (outer and char == outer):
            stripped = "".join(word).strip(" \t\n\r\v\f")
            word = []
            if stripped:
                lines[-1].append(stripped)
            if char == "":
                break
            if outer and char == outer and lines[-1]:
                lines.append([])
        elif char == "\\" and text[index + 1 : index + 2] in {"\\", inner, outer} - {""}:
            index += 1
            word.append(text[index])
        else:
            word.append(char)
        index += 1
    return lines if lines[-1] else lines[:-1]


def split(text: str, separator: str) -> list[str]:
    """One line of :func:`split_nested`."""
    lines = split_nested(text, separator)
    return lines[0] if lines else []


def _escape(word: str, separators: str) -> str:
    word = word.replace("\\", "\\\\")
    for separator in separators:
        word = word.replace(separator, "\\" + separator)
    return word


def merge(words: Iterable[str], separator: str) -> str:
    return separator.join(_escape(word, separator) for word in words)


def merge_nested(lines: Iterable[Sequence[str]], inner: str, outer: str) -> str:
    return outer.join(inner.join(_escape(word, inner + outer) for word in line) for line in lines if line)


def parse_map(text: str) -> dict[str, str]:
    """``name: value; name: value``."""
    result = {}
    for line in split(text, ";"):
        pair = split(line, ":")
        if len(pair) != 2:
            raise invalid_value("Invalid format")
        result[pair[0]] = pair[1]
    return result


def parse_uint_map(text: str) -> dict[str, int]:
    """``name: 10K; name: 1.5G``."""
    result = {}
    for name, value in parse_map(text).items():
        try:
            result[name] = parse_size(value)
        except Fault:
            raise invalid_value(f"Invalid value {value}") from None
    return result


def format_map(values: Mapping[str, object]) -> str:
    return "; ".join(f"{name}: {values[name]}" for name in sorted(values))


_GLOB = re.compile(r"\\(.)|(\*+)|(\?)|\[([!^]?)(\]?[^\]]*)\]|(.)", re.DOTALL)


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """As fnmatch(3) with FNM_PATHNAME."""
    parts = []
    for escaped, stars, single, negation, characters, plain in _GLOB.findall(pattern):
        if stars:
            parts.append("[^/]*")
        elif single:
            parts.append("[^/]")
        elif characters:
            members = characters.replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
            parts.append(f"(?!/)[{'^' if negation else ''}{members}]")
        else:
            parts.append(re.escape(escaped or plain))
    return re.compile("".join(parts), re.DOTALL)


def matches(text: str, pattern: str, *, strict: bool = False) -> bool:
    """fnmatch with Porto's ``***``, which at either end stands for anything. Other wildcards match no slash."""
    if not strict:
        if pattern == "***":
            return True
        if pattern.endswith("***"):
            return text.startswith(pattern[: pattern.index("***")])
        if pattern.startswith("***"):
            return text.endswith(pattern[3:])
    return _glob(pattern).fullmatch(text) is not None


def is_mask(name: str) -> bool:
    return "*" in name or "?" in name


def parse_bitmap(text: str, error: str = "wrong bitmap format") -> frozenset[int]:
    """``0-3,7``."""
    numbers: set[int] = set()
    for part in split_nested(text, "-", ","):
        try:
            ends = [parse_int(end, 0, 65535, "int") for end in part]
        except Fault:
            raise invalid_value(error) from None
        if len(ends) > 2 or ends[-1] < ends[0]:
            raise invalid_value(error)
        numbers.update(range(ends[0], ends[-1] + 1))
    return frozenset(numbers)


def format_bitmap(numbers: Iterable[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
