"""
One poll for everything a chaperone waits for: fds and deadlines to callbacks.

Knows: poll(2), the monotonic clock.  Must not know: what is waited for.
"""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Ready = Callable[[int, int], None]
    Due = Callable[[], None]

LONGEST_S = (
    86_400.0  # poll(2) takes milliseconds in an int; a later deadline is looked at again once a day
)


class Loop:
    """Callbacks run one after the other in `run`; none is ever entered from inside another."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._ready: dict[int, Ready] = {}
        self._due: dict[int, tuple[float, Due]] = {}
        self._last = 0
        self._ended = False

    @staticmethod
    def now() -> float:
        """Seconds on the monotonic clock: wall-clock steps change no deadline."""
        return time.monotonic()

    def watch(self, fd: int, events: int, callback: Ready) -> None:
        """
        Call back whenever an fd is ready; to watch it again changes what for.

        Args:
            fd (int): Stays the caller's.
            events (int): As for poll(2): select.POLLIN ...
            callback: Called with the fd and the events that came; POLLHUP and POLLERR come unasked.
        """
        self._poll.register(fd, events)
        self._ready[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget an fd before it is closed; nothing to do when it is not watched."""
        if self._ready.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def at(self, when: float, callback: Due) -> int:
        """
        Call back once, at a time on the monotonic clock.

        Args:
            when (float): Seconds, as `now` tells them.
        Returns:
            int: A handle for `cancel`.
        """
        self._last += 1
        self._due[self._last] = (when, callback)
        return self._last

    def later(self, seconds: float, callback: Due) -> int:
        """Call back once, after some seconds: a handle for `cancel`."""
        return self.at(self.now() + seconds, callback)

    def cancel(self, handle: int | None) -> None:
        """Forget a deadline; nothing to do when it has passed or is None."""
        if handle is not None:
            self._due.pop(handle, None)

    def end(self) -> None:
        """Make `run` return after the callback that is running."""
        self._ended = True

    def has_ended(self) -> bool:
        """
        Whether `end` was called: a callback that goes through several things asks before each.
        """
        return self._ended

    def run(self) -> None:
        """Wait and call back, until `end` is called; not at all where it was called before."""
        while not self._ended:
            # Twice: a poll that a signal interrupted past its time (SIGCONT, say) says "nothing"
            # without having looked, and what has arrived must be heard before a deadline is called
            # missed.
            for fd, events in self._poll.poll(self._patience()) or self._poll.poll(0):
                callback = self._ready.get(
                    fd
                )  # an earlier callback of this round may have forgotten it
                if callback is not None and not self._ended:
                    callback(fd, events)
            self._pass_deadlines()

    def _patience(self) -> int | None:
        """
        Milliseconds until the next deadline, rounded up so that it has passed then; None for ever.
        """
        if not self._due:
            return None
        wait_s = min(when for when, _ in self._due.values()) - self.now()
        return max(0, int(min(wait_s, LONGEST_S) * 1000) + 1)

    def _pass_deadlines(self) -> None:
        if not self._due:
            return
        now = self.now()
        for handle, (when, callback) in sorted(self._due.items(), key=lambda item: item[1][0]):
            if when <= now and self._due.pop(handle, None) is not None and not self._ended:
                callback()
