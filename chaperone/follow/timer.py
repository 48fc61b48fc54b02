"""
A timer that poll(2) can wait for.

Knows: timerfd_create(2), which Python has from 3.13 on, and ctypes for the time before.  Must not
know: what it is set for.
"""

from __future__ import annotations

import functools
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ctypes

TFD_TIMER_ABSTIME = 1
_os: Any = os  # a type checker for 3.10 does not know these calls


class Timer:
    """
    A timer on the monotonic clock: its fd is readable from the time on that it is set for.

    Raises:
        OSError: If the kernel grants none.
    """

    def __init__(self) -> None:
        # TFD_NONBLOCK and TFD_CLOEXEC are these numbers by definition.
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        if hasattr(_os, "timerfd_create"):
            self._fd = int(_os.timerfd_create(time.CLOCK_MONOTONIC, flags=flags))
        else:
            self._fd = _called("timerfd_create", time.CLOCK_MONOTONIC, flags)

    def fileno(self) -> int:
        """The fd, readable when the time has come."""
        return self._fd

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def set(self, when_ns: int) -> None:
        """Set it to a time, in nanoseconds, no longer readable until then; 0 is never."""
        if hasattr(_os, "timerfd_settime_ns"):
            _os.timerfd_settime_ns(self._fd, flags=TFD_TIMER_ABSTIME, initial=when_ns)
            return
        import ctypes

        # struct itimerspec: the interval, then the time, each as seconds and nanoseconds.
        new = (ctypes.c_long * 4)(0, 0, *divmod(when_ns, 1_000_000_000))
        _called("timerfd_settime", self._fd, TFD_TIMER_ABSTIME, new, None)


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _called(name: str, *arguments: Any) -> int:
    import ctypes

    result = int(getattr(_libc(), name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
