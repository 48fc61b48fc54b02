"""
How far a follower has come: the runs in its cursor.

Knows: what was delivered and what was collected.  Must not know: where events come from.
"""

from __future__ import annotations

from typing import Any

from ..model import cursor as cursors
from .followed import FollowedRun


class Progress:
    """
    The runs of which something was delivered, and those that were asked for.

    They are kept apart from all that a follower knows of: what is still to come costs a cursor
    nothing, however much it is.

    Args:
        others (dict): Entries of a cursor that belong to runs which are not followed.

    Attributes:
        collecting (set): Ids of runs whose entry is to be removed as soon as it is in .ended/.
    """

    def __init__(self, others: dict[str, cursors.Entry]) -> None:
        self._others = others
        self._runs: dict[str, FollowedRun] = {}
        self.collecting: set[str] = set()

    def add(self, run: FollowedRun) -> None:
        """An event of the run was delivered, or the run was asked for."""
        self._runs[run.run_id] = run

    def drop(self, run: FollowedRun) -> None:
        """The run was collected, or deleted."""
        self.collecting.discard(run.run_id)
        if self._runs.get(run.run_id) is run:
            del self._runs[run.run_id]

    def get(self, run_id: str) -> FollowedRun | None:
        """The run in the cursor; None if it is not in it."""
        run = self._runs.get(run_id)
        is_in = run is not None and (run.asked_for or not cursors.is_waited_for(run.entry))
        return run if is_in else None

    def cursor(self) -> dict[str, Any]:
        """The cursor, as a new dict."""
        entries = {run_id: run.entry for run_id in self._runs if (run := self.get(run_id))}
        return cursors.of({**self._others, **entries})

    def is_uncollected(self, run_id: str) -> bool:
        """Whether the run's ending was delivered, and the run is not collected."""
        run = self._runs.get(run_id)
        return run is not None and run.has_ended() and run_id not in self.collecting

    def uncollected(self) -> list[str]:
        """The ids of all uncollected runs."""
        return [run_id for run_id in self._runs if self.is_uncollected(run_id)]
