"""The decisions of one domain's standby: pure, without I/O or a clock.

machine: what each event leads to, made of sessions, failover and states; events: its words; detector: what silence
means.
"""

from __future__ import annotations

from .machine import Standby as Standby
from .states import RESUME_RETRY_NS as RESUME_RETRY_NS
from .states import RETRY_NS as RETRY_NS
from .states import Policy as Policy
from .states import State as State
