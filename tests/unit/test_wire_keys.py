"""Keys as files, addresses, and the command line around them."""

from __future__ import annotations

import argparse
import os
import resource
import stat
import threading
from typing import TYPE_CHECKING

import pytest
import zmq

from checkpointd.cli import keys as command
from checkpointd.errors import KeyFileError
from checkpointd.wire import keys
from checkpointd.wire.keys import LOOPBACK, KeyStore, loopback_pair, parse_public, read_public
from checkpointd.wire.sockets import is_loopback, raise_file_limit

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys" / "primary")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def new_public() -> bytes:
    while (public := zmq.curve_keypair()[0])[:1] in b"-#":
        pass
    return public


def test_a_pair_is_made_once_and_only_its_owner_can_read_it(store: KeyStore) -> None:
    before = os.umask(0)
    try:
        pair = store.own()
    finally:
        os.umask(before)
    assert zmq.curve_public(pair.secret) == pair.public
    assert mode(store.directory / "own.key") == 0o600
    assert mode(store.directory) == 0o700
    assert KeyStore(store.directory).own() == pair
    assert [path.name for path in store.directory.iterdir()] == ["own.key"]
    assert pair.secret.decode() not in repr(pair)


def test_of_many_who_make_the_pair_at_once_all_get_the_same(store: KeyStore) -> None:
    gate = threading.Barrier(8)
    found = []

    def make() -> None:
        gate.wait(20)
        found.append(KeyStore(store.directory).own())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_pair_never_reads_as_an_option(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (new_public(), b"s" * 40)
    pairs = iter([(b"-" + b"0" * 39, b"s" * 40), (b"#" + b"0" * 39, b"s" * 40), good])
    monkeypatch.setattr(zmq, "curve_keypair", lambda: next(pairs))
    assert keys._new_pair().public == good[0]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o601])
def test_a_secret_that_others_can_touch_is_refused(store: KeyStore, bits: int) -> None:
    store.own()
    (store.directory / "own.key").chmod(bits)
    with pytest.raises(KeyFileError, match=r"own\.key"):
        store.own()


def test_a_directory_that_others_can_write_to_is_refused(store: KeyStore) -> None:
    store.directory.mkdir(parents=True)
    store.directory.chmod(0o770)
    with pytest.raises(KeyFileError, match="chmod 700"):
        store.own()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "checkpointd key file 1\n",
        "another title\npublic {public}\nsecret {secret}\n",
        "checkpointd key file 1\npublic {public}\n",
        "checkpointd key file 1\nsecret {secret}\n",
        "checkpointd key file 1\npublic {secret}\nsecret {public}\n",
        "checkpointd key file 1\npublic {public}\npublic {public}\nsecret {secret}\n",
        "checkpointd key file 1\npublic {public}\nsecret short\n",
        "checkpointd key file 1\npublic {public}\nsecret {secret}\nmore\n",
        "checkpointd key file 1\npublic {public}\nsecret {secret}\n" + 5000 * "\n",
        "\u00e9",
    ],
)
def test_a_damaged_pair_is_refused_by_name_and_not_replaced(store: KeyStore, content: str) -> None:
    pair = store.own()
    path = store.directory / "own.key"
    text = content.format(public=pair.public.decode(), secret=pair.secret.decode())
    path.write_text(text)
    with pytest.raises(KeyFileError, match=r"own\.key"):
        store.own()
    assert path.read_text() == text


def test_links_pipes_and_directories_are_no_keys(store: KeyStore, tmp_path: Path) -> None:
    store.own()
    path = store.directory / "own.key"
    moved = tmp_path / "elsewhere.key"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(KeyFileError, match=r"own\.key"):
        store.own()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(KeyFileError, match="no regular file"):
        store.own()
    path.unlink()
    path.mkdir()
    with pytest.raises(KeyFileError, match=r"own\.key"):
        store.own()


def test_peers_are_trusted_listed_and_removed(store: KeyStore) -> None:
    assert store.trusted() == {}
    first, second = new_public(), new_public()
    empty = store.stamp()
    store.trust("b-host", second)
    one = store.stamp()
    store.trust("a.host", first)
    assert store.trusted() == {"a.host": first, "b-host": second}
    assert len({empty, one, store.stamp()}) == 3
    store.trust("a.host", first)  # twice is once
    with pytest.raises(KeyFileError, match=r"keys remove a\.host"):
        store.trust("a.host", second)
    store.remove("b-host")
    assert store.trusted() == {"a.host": first}
    with pytest.raises(KeyFileError, match=r"trusted: a\.host"):
        store.remove("b-host")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "-x", "a b", 65 * "x", "a\n"])
def test_a_name_cannot_leave_its_directory(store: KeyStore, name: str) -> None:
    with pytest.raises(KeyFileError, match="no name for a peer"):
        store.trust(name, new_public())


@pytest.mark.parametrize("key", ["", "short", "x" * 41, "'" * 40, "é" * 40, "#" * 40])
def test_what_is_no_key_is_not_trusted(store: KeyStore, key: str) -> None:
    with pytest.raises(KeyFileError):
        store.trust("peer", key.encode())
    assert store.trusted() == {}


def test_loopback_makes_two_pairs_that_trust_each_other(tmp_path: Path) -> None:
    primary, secondary = loopback_pair(tmp_path)
    assert primary.trusted() == {LOOPBACK: secondary.own().public}
    assert secondary.trusted() == {LOOPBACK: primary.own().public}
    assert primary.own() != secondary.own()
    before = (primary.own(), secondary.own())
    loopback_pair(tmp_path)
    assert (primary.own(), secondary.own()) == before
    (primary.directory / "own.key").unlink()
    loopback_pair(tmp_path)
    assert secondary.trusted() == {LOOPBACK: primary.own().public}


def test_a_public_key_is_read_from_a_file_and_a_secret_is_not(
    store: KeyStore, tmp_path: Path
) -> None:
    public = new_public()
    path = tmp_path / "peer"
    for text in (f"{public.decode()}\n", f"checkpointd key file 1\npublic {public.decode()}\n"):
        path.write_text(text)
        assert read_public(path) == public
    store.own()
    with pytest.raises(KeyFileError, match="never leave its host"):
        read_public(store.directory / "own.key")
    path.write_text("one\ntwo\n")
    with pytest.raises(KeyFileError, match="2 lines"):
        read_public(path)
    with pytest.raises(KeyFileError, match="cannot read"):
        read_public(tmp_path / "absent")


def run(tmp_path: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["keys", *arguments, "--state-dir", str(tmp_path)]))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "show", "--role", "secondary", "--quiet") == 0
    shown = parse_public(capsys.readouterr().out)
    assert shown == KeyStore(tmp_path / "keys" / "secondary").own().public
    assert run(tmp_path, "show", "--role", "secondary") == 0
    out = capsys.readouterr().out
    assert shown.decode() in out
    assert "keys trust --role primary NAME" in out

    assert run(tmp_path, "trust", "standby", shown.decode()) == 0
    file = tmp_path / "peer.key"
    file.write_text(new_public().decode())
    assert run(tmp_path, "trust", "other", str(file)) == 0
    capsys.readouterr()
    assert run(tmp_path, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"other    {file.read_text()}", f"standby  {shown.decode()}"]
    assert run(tmp_path, "remove", "other") == 0
    assert KeyStore(tmp_path / "keys" / "primary").trusted() == {"standby": shown}
    with pytest.raises(KeyFileError, match="40 characters"):
        run(tmp_path, "trust", "third", str(tmp_path / "absent"))


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("10.0.0.1", "0.0.0.0", "::", "example.org", "127.evil")))


def test_the_limit_of_files_is_raised_to_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        assert raise_file_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
