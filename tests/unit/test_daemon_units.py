from __future__ import annotations

import argparse
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.daemon import units
from checkpointd.daemon.units import (
    BadValueError,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@given(st.integers(0, 10**18))
def test_a_duration_is_read_back_as_it_was(nanoseconds: int) -> None:
    assert parse_duration(format_duration(nanoseconds)) == nanoseconds


@given(st.integers(0, 2**60))
def test_a_size_is_read_back_as_it_was(octets: int) -> None:
    assert parse_size(format_size(octets)) == octets


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("100ms", 100_000_000),
        ("1m30s", 90 * units.SECOND),
        ("500us", 500_000),
        ("500µs", 500_000),
        ("500μs", 500_000),
        ("1.5h", 5_400 * units.SECOND),
        ("0.000000001s", 1),
        ("0s", 0),
        ("1h0.25s", 3600 * units.SECOND + 250_000_000),
    ],
)
def test_durations_people_write(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_500, "1.5us"),
        (1_500_000, "1.5ms"),
        (100_000_000, "100ms"),
        (90 * units.SECOND, "1m30s"),
        (3600 * units.SECOND + 1, "1h0.000000001s"),
    ],
)
def test_durations_are_shown_short_and_exact(nanoseconds: int, text: str) -> None:
    assert format_duration(nanoseconds) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "100", "ms", "1 s", " 1s", "1s ", "-1s", "+1s", "1.s", ".5s", "1e3s", "1d", "1S"),
        *("1_0s", "\u0661s", "1s\n", "0.1ns", "1." + "1" * 12 + "s", "9" * 70 + "s", "1ss", "1s,"),
    ],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(BadValueError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "octets"),
    [("256MiB", 256 << 20), ("64kB", 64_000), ("1.5GiB", 3 << 29), ("1GB", 10**9), ("7B", 7)],
)
def test_sizes_people_write(text: str, octets: int) -> None:
    assert parse_size(text) == octets


@pytest.mark.parametrize(
    "text", ["", "256", "MiB", "1KB", "1mib", "-1B", "1 MiB", "1MiB1KiB", "0.3B", "1e3B", "1M"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadValueError):
        parse_size(text)


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_duration, parse_size):
        with suppress(BadValueError):
            assert parse(text) >= 0


def test_argparse_names_the_option_and_keeps_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", type=parse_size)
    with pytest.raises(SystemExit):
        parser.parse_args(["--memory", "64"])
    assert "argument --memory: '64' is not a size with its unit" in capsys.readouterr().err


def test_negative_values_are_a_bug_of_the_caller() -> None:
    for show in (format_duration, format_size):
        with pytest.raises(ValueError, match="not negative"):
            show(-1)
