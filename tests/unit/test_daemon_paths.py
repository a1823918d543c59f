from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpointd.daemon import paths
from checkpointd.errors import StateError


@pytest.mark.parametrize(
    ("uid", "environ", "state", "run"),
    [
        (0, {}, "/var/lib/checkpointd", "/run/checkpointd"),
        (0, {"CHECKPOINTD_STATE_DIR": "/s", "CHECKPOINTD_RUN_DIR": "/r"}, "/s", "/r"),
        (
            1000,
            {"XDG_STATE_HOME": "/h/state", "XDG_RUNTIME_DIR": "/run/user/1000"},
            "/h/state/checkpointd",
            "/run/user/1000/checkpointd",
        ),
        (1000, {"HOME": "/h"}, "/h/.local/state/checkpointd", "/tmp/checkpointd-1000"),
    ],
)
def test_where_things_are(
    monkeypatch: pytest.MonkeyPatch, uid: int, environ: dict[str, str], state: str, run: str
) -> None:
    for name in ("CHECKPOINTD_STATE_DIR", "CHECKPOINTD_RUN_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert paths.state_dir() == Path(state)
    assert paths.run_dir() == Path(run)


def test_a_private_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    made = paths.private(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert paths.private(made) == made


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StateError, match="chmod 700"):
        paths.private(directory)


def test_a_directory_or_link_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StateError, match="by others than this user"):
        paths.private(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot make"):
        paths.private(tmp_path / "file")
