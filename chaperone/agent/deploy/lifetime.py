"""
How long a deployed agent lives: until its runs were fetched and it is idle, or its lease is over.

Knows: the entries of a spool, clocks.  Must not know: HTTP, how an agent is ended.
"""

from __future__ import annotations

import contextlib
import os

from ...errors import NoRunError
from ...program.fds import owned
from ...spool import format, look

LONGEST_S = 5.0  # between two looks


class Lifetime:
    """
    When an agent may end.

    Args:
        spool_path (str): Of its only spool.
        tokens_path (str): Of its tokens; another `deploy` that finds the agent replaces the file.
        idle_s (float): For how long nothing was asked, if it has no run.
        lease_s (float): For how long nothing was asked, if it has runs that have ended and were not
            fetched.
        single (bool): Whether it is there for one run, and ends as soon as that was fetched.

    Attributes:
        pause_s (float): Between two looks.
    """

    def __init__(
        self, spool_path: str, tokens_path: str, idle_s: float, lease_s: float, single: bool
    ) -> None:
        self._spool_path, self._tokens_path = spool_path, tokens_path
        self._idle_s, self._lease_s, self._single = idle_s, lease_s, single
        self._entries: tuple[set[str], set[str]] = (set(), set())
        os.close(format.open_spool(spool_path, create=True))
        self._began = self._started_at()
        self._live_at = 0.0
        self._tokens = (0.0, 0)  # when they changed, and the time of the file
        self.pause_s = min(idle_s / 10, lease_s / 10, 1.0 if single else LONGEST_S)

    def is_over(self, now: float, asked_at: float, is_asked: bool) -> bool:
        """
        Look once.

        Args:
            now, asked_at (float): Of this look and of the last request, on the monotonic clock.
            is_asked (bool): Whether a request is under way.
        """
        live, ended = self._entries = self._looked()
        admitted_at = self._admitted_at(now)
        if live:
            self._live_at = now
        if live or is_asked:
            return False
        quiet_s = now - max(asked_at, admitted_at)
        if ended:  # one that came when its clients were silent already has as long
            left_s = min(quiet_s, now - self._live_at)
            return left_s >= self._lease_s and left_s >= self._posting_s(ended)
        return quiet_s >= self._idle_s or (self._single and self._started_at() != self._began)

    def has_changed(self) -> bool:
        """Whether a run was started since the last look."""
        return self._looked() != self._entries

    def _started_at(self) -> int:
        """What changes with the start of a run, also of one that was fetched between two looks."""
        return os.stat(f"{self._spool_path}/{format.RUNNING}").st_mtime_ns

    def _looked(self) -> tuple[set[str], set[str]]:
        """The ids of live runs, and of ended ones that were not fetched."""
        with owned(format.open_spool(self._spool_path)) as spool_fd:
            return set(format.live_ids(spool_fd)), set(format.ended_ids(spool_fd))

    def _posting_s(self, run_ids: set[str]) -> float:
        """For how long the agent may still post the end of one of these runs to its callback."""
        longest_s = 0.0
        with owned(format.open_spool(self._spool_path)) as spool_fd:
            for run_id in run_ids:
                with contextlib.suppress(NoRunError):
                    with owned(format.open_run(spool_fd, run_id)) as run_fd:
                        spec = look.read_spec(run_fd)
                    if spec.get("callback"):
                        longest_s = max(longest_s, spec["config"]["timeout"])
        return longest_s

    def _admitted_at(self, now: float) -> float:
        """When a `deploy` made this agent, or last found it."""
        changed = 0
        with contextlib.suppress(FileNotFoundError):
            changed = os.stat(self._tokens_path).st_mtime_ns
        if self._tokens[1] != changed:
            self._tokens = (now, changed)
        return self._tokens[0]
