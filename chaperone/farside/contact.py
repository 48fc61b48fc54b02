"""
Contact with a far side: up or down, when it was last heard, and until when it may go on unheard.

Knows: leases, clocks.  Must not know: what is said.
"""

from __future__ import annotations

import time

from ..model import status as statuses
from . import payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..program.loop import Loop

SLACK_S = 4.0  # the far side repeats SIGKILL for 3 s, and takes one more look
PAUSES_S = (0.2, 30.0)  # between attempts to come into contact again: the first, and the longest


class Contact:
    """
    What a status tells of a connection, and the deadlines that follow from it.

    Args:
        spec (dict): Canonical.
        loop (Loop): For its clock.

    Attributes:
        up (bool): None before the first connection.
        drops (int): How often it went down.
    """

    def __init__(self, spec: dict[str, Any], loop: Loop) -> None:
        self._spec, self._loop = spec, loop
        self.up: bool | None = None
        self.drops = 0
        self._since: str | None = None
        self._pause_s = 0.0
        self.heard()

    def heard(self) -> None:
        """The far side said something."""
        self._heard_s, self._heard_ns = self._loop.now(), time.time_ns()

    def went_up(self) -> None:
        """There is a connection."""
        self.up, self._since, self._pause_s = True, statuses.timestamp(time.time_ns()), 0.0

    def went_down(self) -> None:
        """There is none any more."""
        if self.up is not False:
            self._since = statuses.timestamp(time.time_ns())
        self.up = False

    def pause_s(self) -> float:
        """How long to wait before the next attempt: longer from one to the next."""
        self._pause_s = min(max(2 * self._pause_s, PAUSES_S[0]), PAUSES_S[1])
        return self._pause_s

    def facts(self, argv: list[str], pid: int | None) -> dict[str, object]:
        """
        The status's `connection`.

        Args:
            argv (list): Of the first hop.
            pid (int): Its process; None without a connection.
        """
        facts: dict[str, object] = {
            "argv": argv,
            "pid": pid if self.up else None,
            "drops": self.drops,
            "state": "up" if self.up else "down",
            "since": self._since,
        }
        if self._spec["on_disconnect"] == "survive":
            facts["lease_until"] = None if self.up else self._after(self._spec["lease"])
        return facts

    def lease_is_over(self) -> bool:
        """Whether the far side has certainly ended by now what it did not hear about."""
        return self._loop.now() > self._heard_s + self._longest_s()

    def gone_by(self) -> str:
        """
        By then the far side has ended it, heard from last as we have: EOF is quicker, a silent cut
        takes the whole lease.
        """
        return self._after(self._longest_s())

    def _longest_s(self) -> float:
        lease_s = self._spec["lease"]
        return float(
            lease_s + payload.tick_s(lease_s) + self._spec["stop"]["grace_period"] + SLACK_S
        )

    def _after(self, seconds: float) -> str:
        return statuses.timestamp(self._heard_ns + int(seconds * 1e9))
