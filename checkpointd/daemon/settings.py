"""How an option is read, whatever it comes from: command line, environment, TOML file or default.

A role's options are a frozen dataclass whose fields setting() makes (checkpointd.daemon.config):
that one table gives the flags (``--ack-timeout``), the keys of the file (``ack-timeout`` in the
role's table), the environment (``CHECKPOINTD_ACK_TIMEOUT``), the help and the checks. The first of
flag, environment, file and default that gives a value wins; what the others give is checked too.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from checkpointd.daemon.units import (
    BadValueError,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Mapping

ENVIRONMENT_PREFIX = "CHECKPOINTD_"
TABLES = ("primary", "secondary")  # of a file: one for each role; a role reads its own
PORT_LIMIT = 65535


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value, and how it is read (BadValueError if it cannot be)."""

    metavar: str
    parse: Callable[[str], Any]
    toml: type = str  # how it is written in a file
    bounds: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: what setting() hangs on a field."""

    kind: Kind
    help: str
    default: str  # as a person writes it; empty: none


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A secondary's address: HOST[:CONTROLPORT:BULKPORT]."""

    host: str
    control_port: int
    bulk_port: int

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.control_port}:{self.bulk_port}"


@dataclass(frozen=True, slots=True)
class Listen:
    """HOST:PORT to listen on."""

    host: str
    port: int | None  # None: auto

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{'auto' if self.port is None else self.port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Options(Protocol):
    """What add_arguments() and load() need of a role's dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    role: ClassVar[str]  # name of its table in the file

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The options that do not go together, and why."""
        ...


OptionsT = TypeVar("OptionsT", bound=Options)
Number = TypeVar("Number", int, float)


def setting(kind: Kind, default: str | Callable[[], Any], text: str) -> Any:
    """A dataclass field; `default` as a person writes it (empty: None), or a function."""
    if callable(default):
        return dataclasses.field(
            default_factory=default, metadata={"setting": Setting(kind, text, str(default()))}
        )
    value = kind.parse(default) if default else None
    return dataclasses.field(default=value, metadata={"setting": Setting(kind, text, default)})


def _bounded(low: Number, high: Number, show: Callable[[Number], str], value: Number) -> Number:
    if not low <= value <= high:
        raise BadValueError(f"{show(value)} is not between {show(low)} and {show(high)}")
    return value


def duration(low: str, high: str) -> Kind:
    """Integer nanoseconds."""
    least, most = parse_duration(low), parse_duration(high)
    return Kind(
        "TIME",
        lambda text: _bounded(least, most, format_duration, parse_duration(text)),
        bounds=f"{low} to {high}",
    )


def duration_or_auto(low: str, high: str) -> Kind:
    """The same, or None for `auto`."""
    kind = duration(low, high)
    return Kind(
        "TIME|auto", lambda text: None if text == "auto" else kind.parse(text), bounds=kind.bounds
    )


def percentage(low: float, high: float) -> Kind:
    """A share, from 0 to 1."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%", text):
            raise BadValueError(f"{text!r} is not a percentage, such as 5% or 0.5%")
        return _bounded(low, high, "{:g}%".format, float(text[:-1])) / 100

    return Kind("PERCENT", parse, bounds=f"{low:g}% to {high:g}%")


def size(low: str, high: str) -> Kind:
    """Integer octets."""
    least, most = parse_size(low), parse_size(high)
    return Kind(
        "SIZE",
        lambda text: _bounded(least, most, format_size, parse_size(text)),
        bounds=f"{low} to {high}",
    )


def integer(low: int, high: int, metavar: str = "N") -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise BadValueError(f"{text!r} is not a whole number")
        return _bounded(low, high, str, int(text))

    return Kind(metavar, parse, toml=int, bounds=f"{low} to {high}")


def choice(*names: str) -> Kind:
    def parse(text: str) -> str:
        if text not in names:
            raise BadValueError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return Kind("|".join(names), parse)


def switch() -> Kind:
    """A bool: ``--option``, ``--option=no``, in a file true or false."""
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}

    def parse(text: str) -> bool:
        if text.lower() not in words:
            raise BadValueError(f"{text!r} is neither yes nor no")
        return words[text.lower()]

    return Kind("yes|no", parse, toml=bool)


def text_value(metavar: str, pattern: str, meaning: str) -> Kind:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise BadValueError(f"{text!r} is not {meaning}")
        return text

    return Kind(metavar, parse)


def command() -> Kind:
    """Words of a command line, split as a shell splits them; nothing else that a shell does."""

    def parse(text: str) -> tuple[str, ...]:
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise BadValueError(f"{text!r} is not a command line: {error}") from None
        if not words or "\0" in text:
            raise BadValueError(f"{text!r} is not a command line")
        return words

    return Kind("COMMAND", parse)


def uuid_value() -> Kind:
    pattern = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

    def parse(text: str) -> str:
        if not pattern.fullmatch(text.lower()):
            raise BadValueError(f"{text!r} is not a UUID (8-4-4-4-12 hexadecimal digits)")
        return text.lower()

    return Kind("UUID", parse)


def directory() -> Kind:
    def parse(text: str) -> Path:
        if not text or "\0" in text:
            raise BadValueError("is not a path")
        return Path(text).absolute()

    return Kind("PATH", parse)


def _split_address(text: str) -> tuple[str, list[str]]:
    """Host and what follows it, between colons; an IPv6 address is written in brackets."""
    pattern = r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]]+))(?P<rest>(?::[^:]*)*)"
    match = re.fullmatch(pattern, text)
    if match is None:
        raise BadValueError(f"{text!r} is not an address (an IPv6 host is written in brackets)")
    return match["six"] or match["host"], match["rest"].split(":")[1:]


def _port(text: str, low: int = 1) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not low <= int(text) <= PORT_LIMIT:
        raise BadValueError(f"{text!r} is not a port ({low} to {PORT_LIMIT})")
    return int(text)


def endpoint(control_port: int, bulk_port: int) -> Kind:
    def parse(text: str) -> Endpoint:
        host, ports = _split_address(text)
        if not ports:
            return Endpoint(host, control_port, bulk_port)
        if len(ports) != 2:
            raise BadValueError(f"{text!r} is neither HOST nor HOST:CONTROLPORT:BULKPORT")
        return Endpoint(host, _port(ports[0]), _port(ports[1]))

    return Kind("HOST[:CONTROLPORT:BULKPORT]", parse)


def address(*, auto: bool) -> Kind:
    """HOST:PORT; port 0 takes any free one; with `auto`, HOST:auto leaves it to the program."""

    def parse(text: str) -> Listen:
        host, ports = _split_address(text)
        if len(ports) != 1:
            raise BadValueError(f"{text!r} is not HOST:PORT")
        if auto and ports[0] == "auto":
            return Listen(host, None)
        return Listen(host, _port(ports[0], low=0))

    return Kind("HOST:PORT", parse)


def name_of(field_name: str) -> str:
    """``ack_timeout`` -> ``ack-timeout``."""
    return field_name.replace("_", "-")


def rows(cls: type[Options]) -> dict[str, Setting]:
    """The table of a role, by field name."""
    fields = cls.__dataclass_fields__
    return {name: field.metadata["setting"] for name, field in fields.items() if field.metadata}


def add_arguments(parser: argparse.ArgumentParser, cls: type[Options]) -> None:
    """Give `parser` the flags of a role; they stay text until load() names all faults at once."""
    own = parser.add_argument_group(f"options of the {cls.role}")
    common = parser.add_argument_group("options of every daemon")
    for name, row in rows(cls).items():
        group = own if name in cls.__annotations__ else common
        default = f"default {row.default}" if row.default not in ("", "no") else ""
        notes = "; ".join(filter(None, (row.kind.bounds, default)))
        text = (row.help + (f" ({notes})" if notes else "")).replace("%", "%%")  # argparse's sign
        flag = "--" + name_of(name)
        if row.kind.toml is bool:
            group.add_argument(
                flag, dest=name, metavar=row.kind.metavar, nargs="?", const="yes", help=text
            )
        else:
            group.add_argument(flag, dest=name, metavar=row.kind.metavar, help=text)
    # main() then leaves unknown flags to load(), which names them beside all other faults.
    parser.set_defaults(reports_unknown=True)


@dataclass(frozen=True, slots=True)
class Given:
    """One value somebody gave: where, for which field, and the text of it."""

    where: str
    field: str
    text: str


class Faults:
    """What is wrong, gathered, so that a person hears all of it at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fields: set[str] = set()

    def add(self, where: str, what: str, field: str = "") -> None:
        self.lines.append(f"{where}: {what}")
        self.fields.add(field)

    def raise_if_any(self) -> None:
        if self.lines:
            raise UsageError("\n  ".join(["wrong arguments or configuration:", *self.lines]))


def load(
    cls: type[OptionsT], args: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> OptionsT:
    """The options of a role; UsageError lists all faults, each by its option or file and line."""
    table, faults = rows(cls), Faults()
    for flag in getattr(args, "unknown", ()):
        faults.add(flag, "no such option" + _meant(flag, ("--" + name_of(name) for name in table)))
    flags = [
        Given("--" + name_of(name), name, text)
        for name in table
        if (text := getattr(args, name, None)) is not None
    ]
    variables = [
        Given(variable, name, text)
        for name in table
        if (text := environ.get(variable := ENVIRONMENT_PREFIX + name.upper()))  # empty is unset
    ]
    file = next((given.text for given in flags + variables if given.field == "config"), "")
    in_file = _read_file(Path(file), cls.role, table, faults) if file else []

    values: dict[str, Any] = {}
    for given in [*in_file, *variables, *flags]:  # the later wins
        try:
            values[given.field] = table[given.field].kind.parse(given.text)
        except BadValueError as error:
            faults.add(given.where, str(error), given.field)
    options = cls(**values)
    for fields, why in options.contradictions():
        if not faults.fields.intersection(fields):
            faults.add(" and ".join("--" + name_of(name) for name in fields), why)
    faults.raise_if_any()
    return options


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _read_file(path: Path, role: str, table: Mapping[str, Setting], faults: Faults) -> list[Given]:
    """The values of a role's table in a TOML file; what is wrong with the file goes to `faults`."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        faults.add(str(path), f"cannot be read: {error.strerror}")
        return []
    except UnicodeDecodeError:
        faults.add(str(path), "is not text in UTF-8")
        return []
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        faults.add(f"{path}:{line[1]}" if line else str(path), str(error))
        return []
    for name, value in document.items():
        if name not in TABLES or not isinstance(value, dict):
            tables = " and ".join(f"[{table}]" for table in TABLES)
            faults.add(_place(path, text, name, ""), f"{name!r} is not one of the tables {tables}")
    entries = document.get(role, {})
    given = []
    for key, value in entries.items() if isinstance(entries, dict) else ():
        where, field = _place(path, text, role, key), key.replace("-", "_")
        if field not in table or "_" in key or field == "config":
            faults.add(where, f"no such option: {key}" + _meant(key, map(name_of, table)))
            continue
        kind = table[field].kind
        if type(value) is not kind.toml:  # not isinstance: a bool is an int to Python
            faults.add(where, f"{key} must be {_TOML_NAMES[kind.toml]}, not {value!r}", field)
        else:
            given.append(Given(f"{where}: {key}", field, str(value)))
    return given


_TOML_NAMES = {str: "a string in quotes", int: "a whole number", bool: "true or false"}


def _place(path: Path, text: str, table: str, key: str) -> str:
    """FILE:LINE of a key, or of its table's head if `key` is empty (tomllib keeps no positions)."""
    head = re.compile(r"""\s*\[\s*["']?([\w-]+)["']?\s*\]""")
    wanted = re.compile(rf"""\s*["']?{re.escape(key or table)}["']?\s*=""")
    current = ""
    for number, line in enumerate(text.split("\n"), 1):
        if match := head.match(line):
            current = match[1]
            if not key and current == table:
                return f"{path}:{number}"
        elif current == (table if key else "") and wanted.match(line):
            return f"{path}:{number}"
    return str(path)
