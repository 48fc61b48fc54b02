"""
How long a run may go on: since its start, without output, and without a renewal of its lease.

Knows: the limits of a spec, clocks.  Must not know: how a program is stopped, or a file name.
Only a run that has one of the limits imports this module.
"""

from __future__ import annotations

import time

from ..cpython import os
from ..spool import look

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from ..program.interface import RunStore
    from ..program.loop import Loop
    from ..program.streams import Stream

    class Chaperone(Protocol):
        """A chaperone, as its limits know it."""

        run: RunStore
        spec: dict[str, Any]
        status: dict[str, Any]
        loop: Loop
        streams: dict[str, Stream]

        def stop(self, reason: str, grace_s: float | None = None, by: str | None = None) -> None:
            """Stop the program."""

        def stops_later_than(self, seconds: float) -> bool:
            """Whether it would live longer than that."""


# The clock of deadlines stands still while the host is suspended, and the clock of leases does not;
# the kernel wakes no poll(2) for the difference. So a lease ends late by at most so long.
LOOK_S = 60.0


class Limits:
    """
    The limits of one run: `timeouts.run`, `timeouts.idle` and `renew`.

    Args:
        chaperone (Chaperone): It is stopped when a limit is reached.
    """

    def __init__(self, chaperone: Chaperone) -> None:
        self._chaperone, self._loop = chaperone, chaperone.loop
        self._run_s: float | None = chaperone.spec["timeouts"]["run"]
        self._idle_s: float | None = chaperone.spec["timeouts"]["idle"]
        # A spec of 0.1 has no `renew`. `chaperone exec` takes no requests, so no renewal.
        self._renew_s: float | None = chaperone.spec.get("renew")
        self._control_fd = chaperone.run.control_fd
        if self._control_fd < 0:
            self._renew_s = None
        self._started_at = self._renewed_at = 0.0
        self._run_timer: int | None = None

    def begin(self) -> None:
        """
        The run is held from now on. Its lease counts from its creation, or if it was adopted from
        its last renewal.
        """
        if self._renew_s is not None:
            times, boot = os.fstat(self._control_fd), self._chaperone.status["boot_id"]
            self._renewed_at = _boottime() - look.since_s(times, boot)
            self.keep_renewal()
            # In the loop: the program is not started yet, and a renewal may wait in `control`.
            self._loop.later(0, self._look_renewed)

    def program_started(self, started_at: float) -> None:
        """
        The program runs.

        Args:
            started_at (float): When it was started, on the monotonic clock.
        """
        self._started_at = started_at
        if self._run_s is not None:
            self._run_timer = self._loop.at(started_at + self._run_s, self._timed_out)
        if self._idle_s is not None:
            self._loop.at(started_at + self._idle_s, self._look_idle)

    def program_ended(self) -> None:
        """The program has ended: only what it left is limited now, by the grace."""
        self._loop.cancel(self._run_timer)

    def renew(self) -> None:
        """The lease begins again. After it has ended, this changes nothing."""
        self._renewed_at = _boottime()

    def keep_renewal(self) -> None:
        """
        Record when the run was last renewed, for a chaperone that adopts it: in the times of
        `control`, which each request changes.
        """
        if self._renew_s is not None:
            look.mark(self._control_fd, _boottime() - self._renewed_at)

    def _timed_out(self) -> None:
        self._chaperone.stop("timeout", by=f"timeouts.run {self._run_s:g}")

    def _look_idle(self) -> None:
        """Called when the limit may be reached. To set a timer at each byte would cost too much."""
        assert self._idle_s is not None
        heard_at = (stream.heard_at for stream in self._chaperone.streams.values())
        due = max(self._started_at, *heard_at) + self._idle_s
        if self._has_ended():
            return
        if due <= self._loop.now():
            self._chaperone.stop("idle", by=f"timeouts.idle {self._idle_s:g}")
        else:
            self._loop.at(due, self._look_idle)

    def _look_renewed(self) -> None:
        """Called when the lease may be over; a renewal sets no timer."""
        assert self._renew_s is not None
        left_s = self._renewed_at + self._renew_s - _boottime()
        if self._has_ended():
            return
        if left_s > 0:
            self._loop.later(min(left_s, LOOK_S), self._look_renewed)
        elif self._chaperone.stops_later_than(self._chaperone.spec["stop"]["grace_period"]):
            self._chaperone.stop("lease", by=f"renew {self._renew_s:g}")

    def _has_ended(self) -> bool:
        return self._chaperone.status["end_time"] is not None


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
