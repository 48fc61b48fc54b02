"""
Whose turn it is: runs with something new, one event a turn.

Knows: the order of turns.  Must not know: what an event is, or who takes it.
"""

from __future__ import annotations

from collections import deque

from ..model import cursor as cursors
from .followed import HINT_ENDED, FollowedRun

# Runs that had ended before their first event, and have turns at the same time. Without a limit the
# cursor would have the whole backlog in it at once, and each commit would cost as much as that.
MOST_ENDED = 64


class Turns:
    """The runs that wait for a turn; in a turn a run delivers one event, so none delays another."""

    def __init__(self) -> None:
        self._ready: deque[FollowedRun] = deque()
        self._backlog: deque[FollowedRun] = deque()
        self._ended: set[FollowedRun] = set()  # those of `_ready` that came from the backlog

    def __bool__(self) -> bool:
        # While there is a backlog some of it is in `_ready`.
        return bool(self._ready)

    def give(self, run: FollowedRun, hints: int = 0) -> None:
        """Give a run a turn, if it has more; `hints` say what of it may be new."""
        run.hints |= hints
        if run.queued or not run.has_more():
            return
        run.queued = True
        if hints & HINT_ENDED and cursors.is_waited_for(run.entry):
            self._backlog.append(run)
            self._admit()
        else:
            self._ready.append(run)

    def take(self) -> FollowedRun:
        """The next run; `back` is called when its turn is over."""
        run = self._ready.popleft()
        run.queued = False
        return run

    def back(self, run: FollowedRun) -> None:
        """A run has had its turn: give it another one, if it has more."""
        self.give(run)
        if not run.queued:
            self._ended.discard(run)
            self._admit()

    def _admit(self) -> None:
        while self._backlog and len(self._ended) < MOST_ENDED:
            run = self._backlog.popleft()
            self._ended.add(run)
            self._ready.append(run)
