"""CURVE keys as files: a role's own pair and the public keys of the peers it trusts.

A key directory, mode 0700:

    own.key             this role's pair, mode 0600, made on first use
    trusted/NAME.key    one peer's public key, mode 0600

A key file is text: a first line that says what it is, then `public KEY` and, in own.key only,
`secret KEY`, both in the 40 characters of Z85 (ZeroMQ RFC 32). Files appear whole or not at all and
are on stable storage before they are used.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from checkpointd.errors import KeyFileError

if TYPE_CHECKING:
    from pathlib import Path

LOOPBACK: Final = "loopback"  # the name under which the two roles of one machine trust each other

_TITLE: Final = "checkpointd key file 1"
_FILE_MAX: Final = 4096  # octets; a pair has under 200
_Z85: Final = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class KeyPair:
    public: bytes  # 40 octets of Z85
    secret: bytes  # 40 octets of Z85

    def __repr__(self) -> str:  # a secret must not end up in a log or a traceback
        return f"KeyPair({self.public.decode('ascii')})"


def parse_public(text: str) -> bytes:
    """A public key as 40 octets of Z85; KeyFileError if it is none."""
    text = text.strip()
    if not _Z85.fullmatch(text):
        raise KeyFileError(
            "a public key has 40 characters of Z85; copy it from `checkpointd keys show` of the"
            " other side, and put it in single quotes"
        )
    try:
        z85.decode(text)
    except (ValueError, struct.error) as error:
        raise KeyFileError(f"{text!r} is no Z85 key: {error}") from None
    return text.encode("ascii")


def read_public(path: Path) -> bytes:
    """The public key in a file from the other side: a key file, or just the key as text."""
    try:
        with path.open("rb") as file:
            lines = file.read(_FILE_MAX).decode("ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read a public key from {path}: {error}") from error
    words = [line.removeprefix("public ") for line in lines if line.strip()]
    if any(line.startswith("secret ") for line in lines):
        raise KeyFileError(
            f"{path} has a secret key: that must never leave its host. Make a new pair there (remove"
            " the file), and bring what `checkpointd keys show` prints"
        )
    if words[:1] == [_TITLE]:
        del words[0]
    if len(words) != 1:
        raise KeyFileError(f"{path} is no public key: it has {len(words)} lines, not one")
    return parse_public(words[0])


def _new_pair() -> KeyPair:
    # A key that begins with "-" would read as an option on the command line, and one with "#" as a
    # comment.
    while True:
        public, secret = zmq.curve_keypair()
        if public[:1] not in b"-#":
            return KeyPair(public, secret)


class KeyStore:
    """One role's keys in `directory`. Every fault is a KeyFileError that names the file and what to
    do.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._own = directory / "own.key"
        self._trusted = directory / "trusted"

    def own(self) -> KeyPair:
        """The role's own pair; made, if there is none yet. Of two that make it at once, one wins
        for both.
        """
        if not self._own.exists():
            pair = _new_pair()
            _write_new(self._own, pair.public, pair.secret)
        public, secret = _read(self._own)
        if secret is None:
            raise KeyFileError(f"{self._own} has no secret key; restore it or remove it")
        try:
            matches = zmq.curve_public(secret) == public
        except zmq.ZMQError:
            matches = False
        if not matches:
            raise KeyFileError(f"{self._own}: the two keys are no pair; restore it or remove it")
        return KeyPair(public, secret)

    def trusted(self) -> dict[str, bytes]:
        """Public keys of the allowed peers, by name."""
        try:
            files = sorted(self._trusted.glob("*.key"))
        except OSError as error:
            raise KeyFileError(f"cannot list {self._trusted}: {error.strerror}") from error
        return {path.stem: _read(path)[0] for path in files if _NAME.fullmatch(path.stem)}

    def trust(self, name: str, public: bytes) -> None:
        """Allow this peer. The same name with another key is refused: remove the old one first."""
        path = self._path(name)
        public = parse_public(public.decode("ascii", "replace"))
        if not _write_new(path, public) and _read(path)[0] != public:
            raise KeyFileError(
                f"{name!r} is trusted with another key; `checkpointd keys remove {name}` first"
            )

    def remove(self, name: str) -> None:
        """Allow this peer no longer; it holds from the next handshake on."""
        path = self._path(name)
        try:
            path.unlink()
            _sync_directory(path.parent)
        except FileNotFoundError:
            known = ", ".join(self.trusted()) or "nobody"
            raise KeyFileError(f"no peer {name!r} is trusted; trusted: {known}") from None
        except OSError as error:
            raise KeyFileError(f"cannot remove {path}: {error.strerror}") from error

    def stamp(self) -> frozenset[tuple[str, int, int]]:
        """Differs after a peer was added, removed or changed; cheap enough to ask at each
        handshake.
        """
        try:
            with os.scandir(self._trusted) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise KeyFileError(f"cannot read {self._trusted}: {error.strerror}") from error
        return frozenset((name, status.st_ino, status.st_mtime_ns) for name, status in found)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise KeyFileError(
                f"{name!r} is no name for a peer: letters, digits, '.', '_' and '-', 64 at most"
            )
        return self._trusted / f"{name}.key"


def loopback_pair(directory: Path) -> tuple[KeyStore, KeyStore]:
    """The key stores of the primary and the secondary of one machine, which trust each other as
    "loopback".

    For two daemons of one user that talk over a loopback address; it may be called any number of
    times.
    """
    primary, secondary = KeyStore(directory / "primary"), KeyStore(directory / "secondary")
    for store, peer in ((primary, secondary), (secondary, primary)):
        public = peer.own().public
        if store.trusted().get(LOOPBACK, public) != public:
            store.remove(LOOPBACK)  # the peer's pair was made anew
        store.trust(LOOPBACK, public)
    return primary, secondary


def _write_new(path: Path, public: bytes, secret: bytes | None = None) -> bool:
    """Make a key file, whole and on stable storage. False: one was there already, and stays."""
    text = f"{_TITLE}\npublic {public.decode('ascii')}\n"
    if secret is not None:
        text += f"secret {secret.decode('ascii')}\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _make_private(path.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(text.encode("ascii"))
                file.flush()
                os.fsync(fd)
            os.link(temporary, path)  # unlike rename it never replaces what another has made
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        _sync_directory(path.parent)
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error
    return True


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = directory.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeyFileError(f"others may write to {directory}: `chmod 700 {directory}`")


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    """Public and, where there is one, secret key of a file that only its owner, who we are, can
    touch.
    """
    try:
        # O_NONBLOCK: a fifo put here by mistake would hold us up for ever
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise KeyFileError(f"{path} is no regular file; remove it")
            data = file.read(_FILE_MAX + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise KeyFileError(f"{path} belongs to user {status.st_uid}; run as that user or chown it")
    keys: dict[str, bytes] = {}
    with contextlib.suppress(UnicodeDecodeError):
        title, *lines = data.decode("ascii").splitlines() or [""]
        if title == _TITLE and len(data) <= _FILE_MAX:
            for line in lines:
                word, _, text = line.partition(" ")
                if word in ("public", "secret") and word not in keys and _Z85.fullmatch(text):
                    keys[word] = text.encode("ascii")
                else:
                    keys.clear()
                    break
    if "public" not in keys:
        raise KeyFileError(f"{path} is no key file of checkpointd; restore it or remove it")
    if "secret" in keys and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(
            f"others can read the secret key in {path}: make a new pair (remove the file), or, if"
            f" nobody has read it, `chmod 600 {path}`"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeyFileError(f"others may write to {path}: `chmod 600 {path}`")
    return keys["public"], keys.get("secret")
