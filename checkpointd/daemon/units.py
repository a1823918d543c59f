"""Durations and sizes as people write them: Go's duration syntax, and octets with a unit.

The unit is mandatory: a bare ``100`` is a guess at somebody else's unit. Values are exact integers
(nanoseconds, octets); what cannot be exact is refused.
"""

from __future__ import annotations

import argparse
import re

from checkpointd.errors import UsageError

NANOSECOND = 1
MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

DURATION_UNITS = {
    "ns": NANOSECOND,
    "us": MICROSECOND,
    "µs": MICROSECOND,  # U+00B5, the micro sign
    "μs": MICROSECOND,  # U+03BC, the Greek letter: keyboards give either
    "ms": MILLISECOND,
    "s": SECOND,
    "m": MINUTE,
    "h": HOUR,
}
SIZE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

_TERM = re.compile(r"(?P<whole>\d+)(?:\.(?P<part>\d+))?(?P<unit>[^\d.\s]+)", re.ASCII)
_LONGEST = 64  # characters; nothing a person writes is longer, and int() of a huge text is slow


class BadValueError(UsageError, argparse.ArgumentTypeError):
    """A value cannot be read.

    As an ArgumentTypeError it may leave an argparse ``type=`` function: argparse names the option
    and keeps the message. checkpointd.daemon.settings names the option itself.
    """


def parse_duration(text: str) -> int:
    """``1m30s``, ``100ms``, ``1.5h`` in nanoseconds; BadValueError says what is wrong.

    Go's syntax (time.ParseDuration) without signs: terms of number and unit, in any order.
    """
    example = "a duration with its unit, such as 100ms, 500us or 1m30s"
    return sum(_terms(text, DURATION_UNITS, example, "nanosecond"))


def parse_size(text: str) -> int:
    """``256MiB``, ``64kB``, ``1.5GiB`` in octets; BadValueError says what is wrong."""
    example = "a size with its unit, such as 64KiB, 256MiB or 1GB"
    terms = _terms(text, SIZE_UNITS, example, "octet")
    if len(terms) > 1:
        raise BadValueError(f"{text!r} is not {example}")
    return terms[0]


def _terms(text: str, units: dict[str, int], example: str, smallest: str) -> list[int]:
    terms = []
    position = 0
    while position < len(text) <= _LONGEST:
        term = _TERM.match(text, position)
        if term is None or term["unit"] not in units:
            break
        unit, part = units[term["unit"]], term["part"] or ""
        fraction, rest = divmod(int(part or 0) * unit, 10 ** len(part))
        if rest:
            raise BadValueError(f"{text!r} is not a whole number of {smallest}s")
        terms.append(int(term["whole"]) * unit + fraction)
        position = term.end()
    if not terms or position < len(text):
        raise BadValueError(f"{text[:_LONGEST]!r} is not {example}")
    return terms


def format_duration(nanoseconds: int) -> str:
    """Exact, and much as Go prints it: ``1.5ms``, ``100ms``, ``1m30s``; parse_duration reads it."""
    if nanoseconds < 0:
        raise ValueError(f"a duration is not negative: {nanoseconds}")
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < SECOND:
        unit = next(unit for unit in ("ms", "us", "ns") if nanoseconds >= DURATION_UNITS[unit])
        return _decimal(nanoseconds, DURATION_UNITS[unit]) + unit
    hours, rest = divmod(nanoseconds, HOUR)
    minutes, rest = divmod(rest, MINUTE)
    return (
        (f"{hours}h" if hours else "")
        + (f"{minutes}m" if minutes else "")
        + (_decimal(rest, SECOND) + "s" if rest else "")
    )


def _decimal(value: int, unit: int) -> str:
    whole, part = divmod(value, unit)
    digits = f"{part:0{len(str(unit)) - 1}d}".rstrip("0") if part else ""
    return f"{whole}.{digits}" if digits else str(whole)


def format_size(octets: int) -> str:
    """The largest binary unit that is exact: ``256MiB``, ``1000B``; parse_size reads it back."""
    if octets < 0:
        raise ValueError(f"a size is not negative: {octets}")
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if octets and octets % SIZE_UNITS[unit] == 0:
            return f"{octets // SIZE_UNITS[unit]}{unit}"
    return f"{octets}B"
