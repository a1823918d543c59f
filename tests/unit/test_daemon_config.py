from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.daemon import config, settings
from checkpointd.daemon.config import PrimaryOptions, SecondaryOptions
from checkpointd.daemon.settings import Endpoint, Listen
from checkpointd.daemon.units import BadValueError
from checkpointd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

MS = 1_000_000


def namespace(cls: type[settings.Options], *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, cls)
    args, unknown = parser.parse_known_args(argv)
    args.unknown = unknown
    return args


def primary(*argv: str, environ: Mapping[str, str] | None = None) -> PrimaryOptions:
    return settings.load(PrimaryOptions, namespace(PrimaryOptions, *argv), environ or {})


def secondary(*argv: str, environ: Mapping[str, str] | None = None) -> SecondaryOptions:
    return settings.load(SecondaryOptions, namespace(SecondaryOptions, *argv), environ or {})


def faults_of(*argv: str, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        primary(*argv, environ=environ)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_of_the_primary() -> None:
    options = primary("--domid", "4")
    assert options.domid == 4
    assert options.interval == 100 * MS
    assert options.secondary == Endpoint("127.0.0.1", 10946, 10947)
    assert options.metrics == Listen("127.0.0.1", None)
    assert options.arena == 32 << 20
    assert options.zero_pages is True
    assert options.unsafe == []
    assert options == PrimaryOptions(domid=4)  # the dataclass has the same defaults


def test_defaults_of_the_secondary() -> None:
    options = secondary()
    assert (options.control_port, options.bulk_port) == (10946, 10947)
    assert options.metrics == Listen("127.0.0.1", 10949)
    assert options.silence == 1000 * MS
    assert options.image_dir is None
    assert options == SecondaryOptions()


def test_flag_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[primary]\ndomid = 4\ninterval = "10ms"\nheartbeat = "11ms"\narenas = 3\n')
    environ = {"CHECKPOINTD_INTERVAL": "20ms", "CHECKPOINTD_HEARTBEAT": "21ms"}
    options = primary("--config", str(file), "--interval", "30ms", environ=environ)
    assert options.interval == 30 * MS
    assert options.heartbeat == 21 * MS
    assert options.arenas == 3
    assert options.standby_timeout == 1000 * MS


def test_an_interval_that_is_chosen() -> None:
    options = primary("--domid", "4", "--interval", "auto", "--pause-share", "2.5%")
    assert (options.interval, options.pause_share, options.added_latency) == (None, 0.025, None)
    options = primary("--domid", "4", "--interval", "auto", "--added-latency", "30ms")
    assert (options.interval, options.pause_share, options.added_latency) == (None, None, 30 * MS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--interval", "auto"], "auto needs to know what to keep: give one of the two others"),
        (
            ["--interval", "auto", "--pause-share", "1%", "--added-latency", "30ms"],
            "auto needs to know what to keep: give one of the two others",
        ),
        (["--pause-share", "1%"], "targets go with --interval auto only"),
    ],
)
def test_an_interval_that_is_chosen_needs_one_target(words: list[str], told: str) -> None:
    assert faults_of("--domid", "4", *words) == [
        f"--interval and --pause-share and --added-latency: {told}"
    ]


def test_a_recording_has_no_answers_that_wait() -> None:
    words = ("--domid", "4", "--to", "x", "--interval", "auto", "--added-latency", "30ms")
    assert faults_of(*words) == [
        "--to and --added-latency: a recording acks nothing, and holds nothing: give --pause-share"
    ]


@pytest.mark.parametrize("text", ["5", "0%", "51%", "five%", "1e1%", "5 %"])
def test_what_is_no_share_is_refused(text: str) -> None:
    (told,) = faults_of("--domid", "4", "--interval", "auto", "--pause-share", text)
    assert told.startswith("--pause-share: ")


def test_an_empty_variable_is_unset() -> None:
    assert primary("--domid", "1", environ={"CHECKPOINTD_INTERVAL": ""}).interval == 100 * MS


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[primary]\ndomid = 9\n")
    assert primary(environ={"CHECKPOINTD_CONFIG": str(file)}).domid == 9


def test_every_fault_of_every_source_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        '# a comment with interval = "1s" in it\n'
        "[secondary]\n"
        'interval = "not looked at"\n'
        "[primary]\n"
        "interval = 100\n"
        'hart-beat = "1s"\n'
        '"arenas" = 1\n'
        'no-metrics = "yes"\n'
        "[primry]\n"
    )
    told = faults_of(
        "--config", str(file), "--standby-loss", "pray", "--intreval=3",
        environ={"CHECKPOINTD_ARENA": "32"},
    )  # fmt: skip
    assert told == [
        "--intreval=3: no such option; did you mean --interval?",
        f"{file}:9: 'primry' is not one of the tables [primary] and [secondary]",
        f"{file}:5: interval must be a string in quotes, not 100",
        f"{file}:6: no such option: hart-beat; did you mean heartbeat?",
        f"{file}:8: no-metrics must be true or false, not 'yes'",
        f"{file}:7: arenas: 1 is not between 2 and 16",
        "CHECKPOINTD_ARENA: '32' is not a size with its unit, such as 64KiB, 256MiB or 1GB",
        "--standby-loss: 'pray' is not one of hold, run",
        "--domid: which guest? give its domid (or --uuid)",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[primary]\ninterval = \n", ":2: Invalid value"),
        (b"\xff", ": is not text in UTF-8"),
        (b"primary = 3\n", ":1: 'primary' is not one of the tables"),
        (b"[primary]\nconfig = 'x'\n", ":2: no such option: config"),
        (b"[primary]\nack_timeout = '1s'\n", ":2: no such option: ack_timeout; did you mean ack-t"),
        (b"[primary]\narenas = true\n", ":2: arenas must be a whole number, not True"),
    ],
)
def test_a_faulty_file(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    faults = faults_of("--domid", "1", "--config", str(file))
    assert len(faults) == 1
    assert faults[0].startswith(f"{file}{told}")


def test_a_missing_file() -> None:
    assert faults_of("--domid", "1", "--config", "/nonexistent/c.toml") == [
        "/nonexistent/c.toml: cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--domid", "1", "--uuid", "0" * 8 + "-0000-0000-0000-" + "0" * 12], "--domid and --uuid"),
        (["--domid", "1", "--standby-timeout", "149ms"], "--standby-timeout and --heartbeat: one"),
        (["--domid", "1", "--interval", "10s", "--ack-timeout", "9s"], "--ack-timeout and --inter"),
        (["--domid", "1", "--interval", "4ms"], "--interval: 4ms is not between 5ms and 10s"),
        (["--domid", "-1"], "--domid: -1 is not between 0 and 32751"),
        (["--domid", "1", "--uuid", "x"], "--uuid: 'x' is not a UUID"),
    ],
)
def test_what_contradicts_or_exceeds(argv: list[str], told: str) -> None:
    faults = faults_of(*argv)
    assert len(faults) == 1
    assert faults[0].startswith(told)


def test_a_faulty_option_contradicts_nothing() -> None:
    """Its default took its place, and would be blamed for what nobody wrote."""
    assert len(faults_of("--domid", "1", "--heartbeat", "x", "--standby-timeout", "100ms")) == 1


def test_without_an_image_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UsageError, match=r"vcpus at the failover alone \(docs/xen\.md\); take memory"
    ):
        secondary("--image", "none")


def test_contradictions_of_the_secondary() -> None:
    with pytest.raises(UsageError, match="--image and --image-dir"):
        secondary("--image", "disk")
    with pytest.raises(UsageError, match="the two ports must differ"):
        secondary("--control-port", "1", "--bulk-port", "1")
    assert secondary("--image", "disk", "--image-dir", "/x").image_dir == Path("/x")


def test_switches_may_be_turned_off_again() -> None:
    environ = {"CHECKPOINTD_UNSAFE_NO_FENCING": "yes"}
    assert secondary(environ=environ).unsafe == ["--unsafe-no-fencing"]
    assert secondary("--unsafe-no-fencing=no", environ=environ).unsafe == []
    assert secondary("--unsafe-no-fencing").unsafe_no_fencing is True


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("standby.lan", Endpoint("standby.lan", 10946, 10947)),
        ("h:1:2", Endpoint("h", 1, 2)),
        ("[fe80::1]", Endpoint("fe80::1", 10946, 10947)),
        ("[::1]:3:65535", Endpoint("::1", 3, 65535)),
    ],
)
def test_addresses_of_a_secondary(text: str, endpoint: Endpoint) -> None:
    read = primary("--domid", "1", "--secondary", text).secondary
    assert read == endpoint
    assert primary("--domid", "1", "--secondary", str(read)).secondary == endpoint


@pytest.mark.parametrize(
    "text",
    ["", ":", "h:1", "h:1:2:3", "h:0:1", "h:1:65536", "::1", "[::1", "h:1:x", "h h", "h:\u0661:2"],
)
def test_what_is_no_address_of_a_secondary(text: str) -> None:
    assert len(faults_of("--domid", "1", "--secondary", text)) == 1


def test_metrics_addresses() -> None:
    assert primary("--domid", "1", "--metrics", "[::]:0").metrics == Listen("::", 0)
    assert faults_of("--domid", "1", "--metrics", "h") == ["--metrics: 'h' is not HOST:PORT"]
    with pytest.raises(UsageError, match="'auto' is not a port"):
        secondary("--metrics", "h:auto")


def test_every_row_of_both_tables_reads_its_own_default() -> None:
    for cls in (PrimaryOptions, SecondaryOptions):
        for name, row in settings.rows(cls).items():
            assert row.help, name
            if row.default:
                row.kind.parse(row.default)


@given(st.text(max_size=40))
def test_no_text_gets_past_a_kind_but_as_a_value(text: str) -> None:
    for cls in (PrimaryOptions, SecondaryOptions):
        for row in settings.rows(cls).values():
            with suppress(BadValueError):
                row.kind.parse(text)


def test_ports_do_not_meet() -> None:
    fixed = {config.CONTROL_PORT, config.BULK_PORT, config.SECONDARY_METRICS_PORT}
    assert len(fixed) == 3
    assert max(fixed) < config.PRIMARY_METRICS_BASE
    assert config.PRIMARY_METRICS_BASE + config.LAST_DOMID <= settings.PORT_LIMIT
