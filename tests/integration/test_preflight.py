"""`checkpointd check` against real embedded guests and a real secondary over real sockets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pair import Guest, Pair, Standby, pair_in

from checkpointd.cli import main as cli
from checkpointd.daemon.config import PrimaryOptions
from checkpointd.daemon.settings import Endpoint
from checkpointd.demo.rig import free_port
from checkpointd.errors import DomainBusyError, HypervisorError, NoSuchDomainError, WireError
from checkpointd.hypervisor.embedded import toolstack
from checkpointd.hypervisor.embedded.hypervisor import EmbeddedHypervisor
from checkpointd.preflight.ask import TIMEOUT
from checkpointd.preflight.gather import gather
from checkpointd.preflight.items import Item, Verdict
from checkpointd.preflight.judge import exit_code, judge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_in(tmp_path) as made:
        yield made


@pytest.fixture
def guest(pair: Pair) -> Guest:
    return pair.guest()


@pytest.fixture
def standby(pair: Pair) -> Standby:
    return pair.standby()


def check(
    pair: Pair, ports: tuple[int, int], timeout: float = TIMEOUT, **options: Any
) -> list[Item]:
    chosen = {
        "state_dir": pair.directory / "state",
        "domid": 4,
        "hypervisor": "embedded",
        **options,
    }
    return judge(
        gather(
            PrimaryOptions(
                run_dir=pair.directory / "run", secondary=Endpoint("127.0.0.1", *ports), **chosen
            ),
            timeout,
        )
    )


def refused(items: list[Item]) -> dict[str, Item]:
    return {item.name: item for item in items if item.verdict is Verdict.REFUSED}


def test_all_is_well_and_nothing_is_left_behind(pair: Pair, guest: Guest, standby: Standby) -> None:
    items = check(pair, standby.ports)
    assert not refused(items), items
    assert exit_code(items) == 0
    assert {"domain", "ports", "releases", "memory there", "clock"} <= {item.name for item in items}
    assert standby.service.status()["domains"] == []  # no session, no domain
    view = toolstack.look(guest.info)
    assert not view.engine
    assert not view.shut


def test_protection_begins_and_goes_on_beside_a_check(
    pair: Pair, guest: Guest, standby: Standby
) -> None:
    engine = pair.engine(guest, standby)
    engine.wait("protected")
    items = check(pair, standby.ports)
    assert exit_code(items) == DomainBusyError.exit_code
    assert set(refused(items)) == {"engine"}
    engine.acked_beyond(2)
    assert standby.state(guest) == "standby"


def test_a_guest_that_is_not_there_or_does_not_run(
    pair: Pair, guest: Guest, standby: Standby
) -> None:
    items = check(pair, standby.ports, domid=5)
    assert exit_code(items) == NoSuchDomainError.exit_code
    assert set(refused(items)) == {"domain"}
    toolstack.pause(guest.info)
    assert set(refused(check(pair, standby.ports))) == {"state"}


def test_a_guest_that_runs_on_the_other_side_already(
    pair: Pair, guest: Guest, standby: Standby
) -> None:
    engine = pair.engine(guest, standby)
    engine.wait("protected")
    engine.committed()
    guest.kill()
    standby.wait(guest, "active")
    engine.thread.join()
    hypervisor = EmbeddedHypervisor("secondary", pair.directory / "run")
    assert hypervisor.find(uuid=guest.info.uuid)
    # There is no guest on this side any more; by its UUID the other side would know it.
    items = check(pair, standby.ports, namespace="secondary")
    assert set(refused(items)) == {"guest there"}


def test_ports_that_do_not_answer(pair: Pair, guest: Guest, standby: Standby) -> None:
    control, bulk = standby.ports
    for ports in ((free_port(), bulk), (control, free_port())):
        items = check(pair, ports, timeout=1.0)
        assert set(refused(items)) == {"ports"}
        assert exit_code(items) == WireError.exit_code
        assert "is `checkpointd secondary` running there?" in refused(items)["ports"].text


def test_a_secondary_with_another_key_is_told_apart(
    pair: Pair, guest: Guest, standby: Standby, tmp_path: Path
) -> None:
    items = check(pair, standby.ports, timeout=1.0, state_dir=tmp_path / "elsewhere")
    assert "key" in refused(items)["ports"].text
    assert set(refused(items)) == {"ports"}


def test_arenas_and_mappings_are_no_larger_than_the_guest(
    pair: Pair, guest: Guest, standby: Standby
) -> None:
    items = check(pair, standby.ports, arena=1 << 40, arenas=16, mapping_budget=1 << 40)
    assert not refused(items)


def test_no_xen_is_refused_as_primary_would(pair: Pair, standby: Standby) -> None:
    items = check(pair, standby.ports, hypervisor="xen")
    assert exit_code(items) == HypervisorError.exit_code
    assert "hypervisor" in refused(items)


def test_the_command_takes_the_options_of_primary_and_speaks_json(
    pair: Pair, guest: Guest, standby: Standby, capsys: pytest.CaptureFixture[str]
) -> None:
    control, bulk = standby.ports
    arguments = [
        *("check", "--uuid", guest.info.uuid, "--secondary", f"127.0.0.1:{control}:{bulk}"),
        *("--run-dir", str(pair.directory / "run"), "--state-dir", str(pair.directory / "state")),
    ]
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["exit_code"]) == (1, 0)
    assert {item["verdict"] for item in document["items"]} == {"ok"}
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok ") and guest.info.uuid in line for line in lines)
    assert cli.main([*arguments, "--interval", "soon"]) == 2


def test_a_domain_that_xl_keeps_for_the_guest_is_not_the_guest(
    pair: Pair, guest: Guest, standby: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(guest.info, domid=7, name=f"{guest.info.name}--incoming")
    monkeypatch.setattr(standby.service._hypervisor, "domains", lambda: [kept])
    assert not refused(check(pair, standby.ports))
    monkeypatch.setattr(standby.service._hypervisor, "domains", lambda: [replace(kept, name="web")])
    assert set(refused(check(pair, standby.ports))) == {"guest there"}
