"""
A run without a spool: the program's streams go to ours, its end stays in memory.

Knows: fds 1 and 2.  Must not know: files, processes.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..program.guard import Guard


class DirectRun:
    """
    What a `RunDirectory` is to a chaperone, for `chaperone exec`.

    Attributes:
        final (dict): The final status; None until the program has ended.
    """

    def __init__(self, run_id: str, key: str) -> None:
        self.run_id, self.key = run_id, key
        self.streams = {"stdout": 1, "stderr": 2}
        self.log_fd = 2
        self.control_fd = self.spool_fd = -1
        self.path, self.log_path = "", "/dev/stderr"
        self.final: dict[str, Any] | None = None
        self.started_at: float | None = None

    def hand_to(self, guard: Guard, max_bytes: int | None) -> None:
        """Hand over to the guard where a dead chaperone's output goes."""
        guard.take_run([*self.streams.values(), self.log_fd], max_bytes)

    def open_stream(self, stream: str) -> int:
        """A further fd of a stream; the caller closes it."""
        return os.dup(self.streams[stream])

    def size_of(self, stream: str) -> int:
        """Nobody keeps the bytes, so nobody can cut them short."""
        return sys.maxsize

    def tell(self, line: bytes) -> bool:
        """Its log is stderr."""
        try:
            os.write(self.log_fd, line)
        except OSError:
            pass
        return True

    def is_there(self) -> bool:
        """It has no place to vanish from."""
        return True

    is_in_place = is_there

    def replace_running(self, status: dict[str, Any]) -> str | None:
        """Nobody looks in."""
        return None

    def publish(self, status: dict[str, Any], durable: bool = False) -> None:
        """Keep the final status for the caller."""
        self.final = status

    def end(self, durable: bool = False) -> None:
        """Nothing is left behind."""

    def close(self) -> None:
        """Fds 1 and 2 stay the process's own."""

    def mark_start(self, monotonic_s: float) -> None:
        """Nobody adopts it."""

    def touch(self) -> None:
        """No far side is told about."""
