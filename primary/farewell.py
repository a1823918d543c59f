"""The last word to the standby, RETIRE or END: said until it is answered, or its time is over. (Pure.)"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .events import SayEnd, SayRetire

if TYPE_CHECKING:
    from .policy import Policy


class Farewell:
    """Says how the process ends, too: by `code` and `text` if the word is answered, else as unconfirmed() has it."""

    def __init__(
        self, word: SayRetire | SayEnd, code: int, text: str, now: int, policy: Policy
    ) -> None:
        self.word = word
        self.code = code
        self.text = text
        self.deadline = now + policy.retire_timeout_ns
        self.answerable = (
            True  # the standby that is there can speak for the one that had the replica
        )
        self._again_every_ns = policy.ask_every_ns
        self._said_ns = now

    @property
    def guest_ended(self) -> bool:
        return isinstance(self.word, SayEnd)

    @property
    def unanswered(self) -> SayRetire | SayEnd | None:
        """What somebody else may go on saying when this process is over."""
        return self.word if self.answerable else None

    def due(self, now: int) -> bool:
        """It is time to say it once more."""
        return self.answerable and now - self._said_ns > self._again_every_ns

    def say(self, now: int) -> SayRetire | SayEnd:
        self._said_ns = now
        return self.word

    def unconfirmed(self) -> tuple[int, str]:
        """How the process ends without an answer."""
        text = f"{self.text}; the secondary did not confirm that it retired its replica"
        if not self.guest_ended:
            text += ", so the guest's output stays shut until a primary protects it again"
        return max(self.code, 1), text
