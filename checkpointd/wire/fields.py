"""JSON payloads, read field by field: every type and bound is checked, and each fault names its
field.

Pure. Nothing but FrameError leaves this module, whatever the peer sent.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, NoReturn

from checkpointd.wire.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Mapping

I64_MIN = -(1 << 63)
I64_MAX = (1 << 63) - 1
SETTING_MAX = 32 << 10  # characters: a toolstack's own description of a domain has some KiB


def one_line(text: str, limit: int) -> str:
    """Free text made fit to travel: printable, on one line, at most `limit` characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:limit].strip()


def dumps(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def loads(payload: bytes, name: str) -> Fields:
    """The JSON object that `payload` is; `name` is its kind, for messages."""

    def no_float(text: str) -> NoReturn:
        raise FrameError(name, f"has the number {text[:32]}: only integers are allowed")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise FrameError(name, "has a field twice")
        return found

    try:
        document = json.loads(
            payload.decode("utf-8"),
            parse_float=no_float,
            parse_constant=no_float,
            object_pairs_hook=once,
        )
    except RecursionError:
        raise FrameError(name, "is nested too deep") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise FrameError(name, f"is not JSON: {error}") from None
    return Fields(document, name)


class Fields:
    """One JSON object. Each reader takes its field out; done() then finds what is left over."""

    def __init__(self, document: object, name: str) -> None:
        if not isinstance(document, dict):
            raise FrameError(name, "is not an object")
        self._left = document
        self._name = name

    def _take(self, field: str) -> object:
        try:
            return self._left.pop(field)
        except KeyError:
            raise FrameError(f"{self._name}.{field}", "is missing") from None

    def fail(self, field: str, problem: str) -> NoReturn:
        raise FrameError(f"{self._name}.{field}", problem)

    def done(self) -> None:
        if self._left:
            unknown = one_line(min(self._left), 64)
            self.fail(unknown, "is unknown")

    def integer(self, field: str, low: int = 0, high: int = I64_MAX) -> int:
        value = self._take(field)
        if type(value) is not int:  # bool is an int to isinstance
            self.fail(field, "is not an integer")
        if not low <= value <= high:
            self.fail(field, f"is not in {low}..{high}")
        return value

    def optional_integer(self, field: str, low: int = 0, high: int = I64_MAX) -> int | None:
        if field in self._left and self._left[field] is None:
            del self._left[field]
            return None
        return self.integer(field, low, high)

    def boolean(self, field: str) -> bool:
        value = self._take(field)
        if not isinstance(value, bool):
            self.fail(field, "is not true or false")
        return value

    def text(self, field: str, limit: int, low: int = 0) -> str:
        value = self._take(field)
        if not isinstance(value, str):
            self.fail(field, "is not text")
        return self._checked_text(field, value, limit, low)

    def _checked_text(self, field: str, value: str, limit: int, low: int) -> str:
        if not low <= len(value) <= limit:
            self.fail(field, f"has {len(value)} characters, not {low}..{limit}")
        # Control characters would forge log lines; lone surrogates could not be written anywhere.
        if not value.isprintable():
            self.fail(field, "has a character that cannot be printed")
        return value

    def octets(self, field: str, low: int, high: int) -> bytes:
        value = self._take(field)
        if not isinstance(value, str):
            self.fail(field, "is not base64 text")
        try:
            data = base64.b64decode(value.encode("ascii"), validate=True)
        except (UnicodeEncodeError, binascii.Error):
            self.fail(field, "is not base64 text")
        if not low <= len(data) <= high:
            self.fail(field, f"has {len(data)} octets, not {low}..{high}")
        return data

    def object(self, field: str) -> Fields:
        return Fields(self._take(field), f"{self._name}.{field}")

    def settings(self, field: str, entries: int) -> dict[str, str | int | bool]:
        """A mapping of names (1..64 characters) to text (<= 32768), 64-bit integers or booleans."""
        value = self._take(field)
        if not isinstance(value, dict) or len(value) > entries:
            self.fail(field, f"is not an object of at most {entries} entries")
        for name, setting in value.items():
            self._checked_text(field, name, 64, 1)
            inner = f"{field}.{name}"
            if isinstance(setting, str):
                self._checked_text(inner, setting, SETTING_MAX, 0)
            elif isinstance(setting, bool):
                continue
            elif not isinstance(setting, int) or not I64_MIN <= setting <= I64_MAX:
                self.fail(inner, "is neither text nor a boolean nor an integer of 64 bits")
        return value

    def ranges(self, field: str, entries: int, high: int) -> tuple[tuple[int, int], ...]:
        """Pairs [first, last] in 0..high, ascending and not touching; 1..entries of them."""
        value = self._take(field)
        if not isinstance(value, list) or not 1 <= len(value) <= entries:
            self.fail(field, f"is not a list of 1..{entries} pairs")
        ranges: list[tuple[int, int]] = []
        floor = 0
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or {type(n) for n in pair} != {int}:
                self.fail(field, "has an entry that is not a pair of integers")
            first, last = pair
            if not floor <= first <= last <= high:
                self.fail(field, "is not ascending, or touches, or is out of bounds")
            ranges.append((first, last))
            floor = last + 2
        return tuple(ranges)
