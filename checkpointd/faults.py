"""Fault injection for the tests: named points in the code at which a process can be made to die, stop or fail.

Armed only by the environment variable CHECKPOINTD_FAULTS; unarmed, a point costs one test of a module global.
Syntax: rules separated by commas, each ``POINT[@N]=ACTION[+ACTION...]``: the N-th passage (from 1, default 1)
of POINT performs the actions in order.

    kill        SIGKILL this process
    kill-NAME   SIGKILL the process registered under NAME (``register_target``), e.g. kill-host
    stop        SIGSTOP this process
    fail        raise InjectedFault (in C: return -EIO)
    again       do not count: the rule acts at every passage from the N-th on

Points of the hypervisor table are named ``hv.<function>`` (hv.suspend, hv.harvest, ...) and are served by the
embedded adapter; all others are calls of point() in Python.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field

from checkpointd.errors import CheckpointdError, UsageError

ENVIRONMENT = "CHECKPOINTD_FAULTS"


class InjectedFault(CheckpointdError):  # noqa: N818 - it is a fault, injected
    """A test asked for this failure through CHECKPOINTD_FAULTS."""


@dataclass(slots=True)
class Rule:
    point: str
    at: int  # acts at this passage, counted from 1
    actions: tuple[str, ...]
    passed: int = field(default=0)

    def due(self) -> bool:
        self.passed += 1
        return self.passed == self.at or (self.passed > self.at and "again" in self.actions)


_lock = threading.Lock()
_rules: list[Rule] = []
_targets: dict[str, int] = {}


def parse(spec: str) -> list[Rule]:
    rules = []
    for text in filter(None, (part.strip() for part in spec.split(","))):
        point_text, equals, actions = text.partition("=")
        name, _, count = point_text.partition("@")
        if not (name and equals and actions and (not count or count.isdecimal())):
            raise UsageError(f"{ENVIRONMENT}: {text!r} is not POINT[@N]=ACTION[+ACTION...]")
        for action in actions.split("+"):
            if action not in ("kill", "stop", "fail", "again") and not action.startswith("kill-"):
                raise UsageError(f"{ENVIRONMENT}: unknown action {action!r} in {text!r}")
        rules.append(Rule(name, int(count or 1), tuple(actions.split("+"))))
    return rules


def arm(spec: str) -> None:
    """Replace all rules by those of `spec`; the empty string disarms."""
    global _rules
    _rules = parse(spec)


def armed() -> list[Rule]:
    """The rules in force; status shows them, since an armed process is not safe."""
    return list(_rules)


def register_target(name: str, pid: int) -> None:
    """Let the action kill-NAME strike process `pid`."""
    _targets[name] = pid


def point(name: str) -> None:
    """A named place in the code; raises InjectedFault if a rule says `fail`."""
    if not _rules:
        return
    with _lock:
        due = [rule for rule in _rules if rule.point == name and rule.due()]
    for rule in due:
        for action in rule.actions:
            perform(action, name)


def perform(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        # To this thread: sent to the process, another thread would take it, and this one be past the point by then.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif action == "fail":
        raise InjectedFault(f"injected at {name}")
    elif action.startswith("kill-"):
        pid = _targets.get(action.removeprefix("kill-"))
        if pid is None:
            raise UsageError(f"{ENVIRONMENT}: nothing is registered for {action!r} at {name}")
        os.kill(pid, signal.SIGKILL)


arm(os.environ.get(ENVIRONMENT, ""))
