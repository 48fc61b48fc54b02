"""
How far a follower has come: the runs in its cursor.

Knows: what was delivered, what was collected, entries.  Must not know: where events come from.
"""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from ..model import cursor as cursors
from ..spool import format, look
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
        return run is not None and run.has_ended()

    def uncollected(self) -> list[str]:
        """The ids of all uncollected runs."""
        return [run_id for run_id in self._runs if self.is_uncollected(run_id)]

    def collected(self, spool_fd: int, run_id: str) -> FollowedRun | None:
        """
        Remove an ended run from .ended/.

        Returns:
            FollowedRun: The run if it is to be forgotten; None if it is not in the cursor, its
                entry is still to come, or the entry belongs to a later run.
        Raises:
            SpecError: If its ending was not delivered; not if another has collected it.
        """
        run = self.get(run_id)
        if run is None and format.where_entered(spool_fd, run_id) is None:
            return None
        if run is None and not format.found(spool_fd, run_id):  # deleted by hand, and forgotten
            format.remove_entry(spool_fd, format.ENDED, run_id)
            return None
        if run is None or not run.has_ended():
            raise SpecError(f"unable to collect run {run_id!r}: its end was not delivered yet")
        key = _key_of(spool_fd, run)
        if key is None:  # it was deleted, so no entry of it will move to .ended/
            format.remove_entry(spool_fd, format.ENDED, run_id)
            return run
        if key != run.entry["key"]:
            # The run was deleted; the entry belongs to a later run with this id, whose events are
            # still to be delivered.
            run.entry = {}
            run.asked_for = False
            return None
        if not look.collect(spool_fd, run_id):
            if format.where_entered(spool_fd, run_id) == format.RUNNING:
                self.collecting.add(run_id)
                return None
            look.collect(spool_fd, run_id)  # it may have moved between our two looks
        return run


def _key_of(spool_fd: int, run: FollowedRun) -> str | None:
    """As `look.key_of`; spec.json is not read again if nothing was made in its place since."""
    found = run.edition and format.found(spool_fd, run.run_id)
    if found and look.edition(found) == run.edition:
        return str(run.entry["key"])
    return look.key_of(spool_fd, run.run_id)
