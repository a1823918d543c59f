"""What deploy/ says about the daemons must be true of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpointd.cli.main import exit_codes
from checkpointd.daemon import config, settings
from checkpointd.daemon.metrics import PrimaryMetrics, SecondaryMetrics
from checkpointd.primary.protection import State as PrimaryState
from checkpointd.secondary.standby import State as SecondaryState

DEPLOY = Path(__file__).parents[2] / "deploy"
STATES = [str(state) for state in (*PrimaryState, *SecondaryState)]


def series() -> set[str]:
    secondary = SecondaryMetrics(STATES)
    secondary.domain("kv")
    registries = (PrimaryMetrics("kv", STATES).registry, secondary.registry)
    families = [family for registry in registries for family in registry.collect()]
    return {sample.name for family in families for sample in family.samples}


def test_alerts_are_on_series_that_exist() -> None:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    expressions = re.findall(r"expr: (.*?)\n        (?:for|labels):", text, re.DOTALL)
    named = set(re.findall(r"\bcheckpointd_\w+", " ".join(expressions)))
    assert len(expressions) == text.count("- alert: ") > 5
    assert named - series() - {"checkpointd_state"} == set()


def test_alerts_name_states_that_exist() -> None:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    named = "|".join(re.findall(r'checkpointd_state=~"(.*?)"', text)).split("|")
    assert len(named) > 2
    assert set(named) <= set(STATES)


@pytest.mark.parametrize(
    ("unit", "cls"),
    [
        ("checkpointd-primary@.service", config.PrimaryOptions),
        ("checkpointd-secondary.service", config.SecondaryOptions),
    ],
)
def test_units_use_options_and_exit_codes_that_exist(
    unit: str, cls: type[settings.Options]
) -> None:
    text = (DEPLOY / "systemd" / unit).read_text()
    (command,) = re.findall(r"^ExecStart=/usr/bin/checkpointd (.*)$", text, re.MULTILINE)
    role, *arguments = command.split()
    assert role == cls.role
    flags = [argument[2:].replace("-", "_") for argument in arguments if argument.startswith("--")]
    assert flags
    assert set(flags) <= set(settings.rows(cls))
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    assert {int(code) for code in codes.split()} <= set(exit_codes())
