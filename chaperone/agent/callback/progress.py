"""
How much of a run a receiver has: which bytes to post next, and until when to try.

Knows: offsets, sizes, seconds.  Must not know: a socket, HTTP, a file, the clock.
"""

from __future__ import annotations

from typing import Any

from ...errors import AgentError
from ...model import spec as specs


def renewal_s(config: Any) -> float:
    """
    After how long without a renewal a run with a callback ends by itself: a receiver that answers
    renews it through its agent, and where the agent lives, it stops the run before that.

    Args:
        config: That of a spec; it may be invalid or None.
    """
    given = config.get("timeout") if isinstance(config, dict) else None
    timeout_s = given if isinstance(given, (int, float)) else specs.CONFIG["timeout"][1]
    return float(timeout_s) * 1.5  # type: ignore[arg-type]


class Progress:
    """
    One stream of a run, and how much of it the receiver has.

    Args:
        name (str): stdout or stderr, for messages.
        most (int): Bytes that are posted at once.
        latency_s (float): How long a byte may wait for more of them.
    Attributes:
        size (int): Bytes that the run has.
        taken (int): Bytes that the receiver has; 0 until it has said so.
    """

    def __init__(self, name: str, most: int, latency_s: float) -> None:
        self.name = name
        self.size = self.taken = 0
        self._most, self._latency_s = most, latency_s
        self._posted = 0  # where the piece ends that was posted last
        self._since: float | None = None  # when the first byte behind that was seen
        self._answered_by_a_gap = False

    def grew(self, size: int, now: float) -> None:
        """The run has so many bytes now; fewer than before if its program has truncated them."""
        self.size = size
        if size > max(self.taken, self._posted) and self._since is None:
            self._since = now

    def due_in(self, now: float, is_over: bool) -> float | None:
        """
        In how many seconds a piece is to be posted; 0 for at once, None if there is nothing.

        Args:
            is_over (bool): Whether no further byte can come.
        """
        left = self.size - self.taken
        if left <= 0:
            return None
        if is_over or left >= self._most or self._since is None:
            return 0.0
        return max(0.0, self._since + self._latency_s - now)

    def piece(self) -> tuple[int, int]:
        """Offset and size of the piece that is posted now."""
        size = max(0, min(self.size - self.taken, self._most))
        self._posted, self._since = self.taken + size, None
        return self.taken, size

    def acknowledged(self, size: int, now: float) -> None:
        """
        The receiver has taken a piece, and has `size` bytes now.

        Raises:
            AgentError: If that can't be true.
        """
        self._answered_by_a_gap = False
        self._go_on_at(size)
        if size < self._posted:
            raise AgentError(f"it has {size} bytes of {self.name} after it took {self._posted}")
        if self.size > size and self._since is None:
            self._since = now

    def missed(self, size: int) -> bool:
        """
        The receiver has only `size` bytes, or more than we thought: go on there.

        Returns:
            bool: Whether it said so to the piece before, too; then a pause is due.
        Raises:
            AgentError: If that can't be true.
        """
        again, self._answered_by_a_gap = self._answered_by_a_gap, True
        self._go_on_at(size)
        return again

    def _go_on_at(self, size: int) -> None:
        if size > self.size:
            raise AgentError(
                f"it has {size} bytes of {self.name}, but the run has only {self.size}: "
                "it may have another run's bytes, or the run's file was truncated"
            )
        self.taken = size


class Patience:
    """
    When to try again, and when to give up.

    Args:
        retry_s (float): From a failure to the next try, a quarter more or less.
        timeout_s (float): How long the receiver may acknowledge nothing.
        renew_s (float): How long the run lives without a renewal; None if it needs none.
        now (float): The clock's at the beginning.
    """

    def __init__(self, retry_s: float, timeout_s: float, renew_s: float | None, now: float) -> None:
        self.retry_s, self.timeout_s = retry_s, timeout_s
        self._renew_s = renew_s
        self._acknowledged_at = now
        self._renewed_at = float("-inf")

    def acknowledged(self, now: float) -> None:
        """The receiver has answered as agreed."""
        self._acknowledged_at = now

    def left_s(self, now: float) -> float:
        """Seconds until the time is over, 0 or less if it is."""
        return self._acknowledged_at + self.timeout_s - now

    def quiet_s(self, now: float) -> float:
        """
        Seconds until the receiver is to be asked for a sign of life: it must be able to answer
        some times before the time is over, or the run needs a renewal.
        """
        shortest_s = min(self.timeout_s, self._renew_s or self.timeout_s)
        return self._acknowledged_at + shortest_s / 4 - now

    def renews(self, now: float) -> bool:
        """Whether an acknowledgement at this moment is to renew the run; counted as done."""
        if self._renew_s is None or now < self._renewed_at + self._renew_s / 8:
            return False
        self._renewed_at = now
        return True

    def pause_s(self, random: float) -> float:
        """
        Seconds to the next try. With one random number each, many agents do not come back all at
        once.

        Args:
            random (float): From 0 to 1.
        """
        return self.retry_s * (0.75 + random / 2)
