"""
An event loop: one poll(2) for all fds and deadlines that a chaperone waits for.

Knows: poll(2), the monotonic clock.  Must not know: what a callback does.
"""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Ready = Callable[[int, int], None]
    Due = Callable[[], None]

# poll(2) takes milliseconds in an int: for a later deadline the loop wakes up once a day.
LONGEST_S = 86_400.0

# How long nothing comes until it is quiet: the least that poll(2) waits.
QUIET_MS = 1


class Loop:
    """Calls callbacks, one after the other; it never calls one from inside another."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._ready: dict[int, Ready] = {}
        self._due: dict[int, tuple[float, Due]] = {}
        self._quiet: Due | None = None
        self._last = 0
        self._ended = False

    @staticmethod
    def now() -> float:
        """Seconds on the monotonic clock: a step of the wall clock moves no deadline."""
        return time.monotonic()

    def watch(self, fd: int, events: int, callback: Ready) -> None:
        """
        Call back whenever an fd is ready. A second call for the same fd replaces the first.

        Args:
            fd (int): The caller closes it.
            events (int): As for poll(2): select.POLLIN ...
            callback: Called with the fd and its events; poll(2) always reports POLLHUP and POLLERR.
        """
        self._poll.register(fd, events)
        self._ready[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Stop watching an fd, before it is closed; does nothing if it is not watched."""
        if self._ready.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def at(self, when: float, callback: Due) -> int:
        """
        Call back once, at a time on the monotonic clock.

        Args:
            when (float): Seconds, on the clock of `now`.
        Returns:
            int: A handle for `cancel`.
        """
        self._last += 1
        self._due[self._last] = (when, callback)
        return self._last

    def later(self, seconds: float, callback: Due) -> int:
        """Call back once, after some seconds; returns a handle for `cancel`."""
        return self.at(self.now() + seconds, callback)

    def cancel(self, handle: int | None) -> None:
        """Cancel a deadline; does nothing if it has passed or is None."""
        if handle is not None:
            self._due.pop(handle, None)

    def when_quiet(self, callback: Due) -> None:
        """
        Call back once, when nothing has come for a millisecond. Other than a deadline, it costs a
        busy loop no look at a clock.
        """
        self._quiet = callback

    def end(self) -> None:
        """Make `run` return after the current callback."""
        self._ended = True

    def has_ended(self) -> bool:
        """
        Whether `end` was called; a callback that does several things asks before each of them.
        """
        return self._ended

    def run(self) -> None:
        """Wait and call back until `end` is called; returns at once if it was called before."""
        while not self._ended:
            # Twice: if a signal (SIGCONT, say) interrupts a poll whose time is over, it returns
            # nothing and has not looked. What has arrived must be handled before a deadline is
            # called missed.
            came = self._poll.poll(self._patience())
            # Not after the callbacks: the process may have been stopped in one of them for long.
            now = self.now() if self._due else 0.0
            came = came or self._poll.poll(0)
            for fd, events in came:
                callback = self._ready.get(fd)
                # None if an earlier callback of this round has unwatched it.
                if callback is not None and not self._ended:
                    callback(fd, events)
            if not came and self._quiet is not None and not self._ended:
                quiet, self._quiet = self._quiet, None
                quiet()
            self._pass_deadlines(now)

    def _patience(self) -> int | None:
        """
        Milliseconds until the next deadline, rounded up so that it has passed by then; None if
        there is no deadline.
        """
        if self._quiet is not None:
            return QUIET_MS
        if not self._due:
            return None
        wait_s = min(when for when, _ in self._due.values()) - self.now()
        return max(0, int(min(wait_s, LONGEST_S) * 1000) + 1)

    def _pass_deadlines(self, now: float) -> None:
        for handle, (when, callback) in sorted(self._due.items(), key=lambda item: item[1][0]):
            if when <= now and self._due.pop(handle, None) is not None and not self._ended:
                callback()
