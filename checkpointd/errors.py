"""Errors that are shown to a person, each with the exit code of the process that ends by it.

The docstring of a class says what it means; its message says what is wrong and what to do.
Codes: 0 all well, 1 ended degraded (see the message), 2 wrong usage, 3-99 one each as below,
128+n ended by signal n. `checkpointd --help` prints this table; a test keeps it unique.
"""

from __future__ import annotations

from typing import ClassVar


class CheckpointdError(Exception):
    """Something a person must know; str() is one sentence of what is wrong and what to do."""

    exit_code: ClassVar[int] = 1


class UsageError(CheckpointdError):
    """Wrong arguments or configuration; the message lists every fault at once."""

    exit_code = 2


class HypervisorError(CheckpointdError):
    """The hypervisor is missing, unsuitable, or a call to it failed."""

    exit_code = 3


class NoSuchDomainError(HypervisorError):
    """No domain with that domid or UUID lives here."""

    exit_code = 4


class DomainBusyError(HypervisorError):
    """Another engine protects this domain."""

    exit_code = 5


class HostLostError(HypervisorError):
    """The process or machine that runs the guest is gone."""

    exit_code = 6


class KeyFileError(CheckpointdError):
    """A key is missing, malformed, or readable by others than its owner."""

    exit_code = 7


class WireError(CheckpointdError):
    """The peer broke the protocol, or cannot be reached."""

    exit_code = 8


class RefusedError(CheckpointdError):
    """The secondary refused: another term runs this guest, or another engine protects it."""

    exit_code = 9


class StreamError(CheckpointdError):
    """A stream is malformed; the message says where."""

    exit_code = 10


class NativeError(CheckpointdError):
    """The compiled hot path is missing, stale, fails its self-test, or a kernel was demanded that this CPU lacks."""

    exit_code = 11


class StateError(CheckpointdError):
    """What was written to stable storage cannot be read back, or not be written."""

    exit_code = 12


class FenceError(CheckpointdError):
    """The other side could not be fenced, so nothing was activated."""

    exit_code = 13


class ProtectionLostError(CheckpointdError):
    """Protection was given up; the guest goes on running unprotected or held, as the message says."""

    exit_code = 14


class StuckError(CheckpointdError):
    """The engine was stuck and ended itself, so that its guest runs on; the guest's output stays held."""

    exit_code = 70  # EX_SOFTWARE of sysexits(3): the engine itself is at fault
