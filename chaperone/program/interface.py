"""
What joins a chaperone, the program it holds and the place where the run is kept: each knows the
others by these Protocols alone.

Knows: what each is asked.  Must not know: who does it.  Imported by type checkers alone: `typing`
would cost a start 5 ms.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import StartError
from .loop import Loop
from .streams import Stream


class Program(Protocol):
    """A program, here or on a far side, as its chaperone knows it."""

    def start(self) -> None:
        """
        Start it, or set out to; what becomes of it is told to the chaperone.

        Raises:
            StartError: If it could not be started; nothing is left running.
        """

    def children_changed(self) -> None:
        """SIGCHLD came: a child of this process may have ended."""

    def signal(self, signum: int) -> None:
        """Send a signal to the program alone."""

    def stop(self, signum: int) -> None:
        """Send a signal to the program and to all that it started."""

    def kill(self) -> None:
        """End the program and all that it started, now."""

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left running, or leave it alone, then tell `finished`.

        Args:
            grace_s (float): How long what it left may take, in seconds.
        """


class Chaperone(Protocol):
    """
    A chaperone, as its program knows it.

    Attributes:
        loop (Loop): Watches the program's fds.
        streams (dict): `stdout` and `stderr`, for the program's bytes.
    """

    loop: Loop
    streams: dict[str, Stream]

    @property
    def log_path(self) -> str:
        """The run's log, for a client that must open it by name."""

    @property
    def spool_fd(self) -> int:
        """The spool's directory; -1 for a run without a spool."""

    def open_stream(self, stream: str) -> int:
        """A further fd of a stream, for the program itself; the caller closes it."""

    def log(self, text: str) -> None:
        """Write a line into the run's log."""

    def started(self, pid: int | None, **facts: object) -> None:
        """The program was started; `facts` are further fields of the status."""

    def resumed(self, pid: int, **facts: object) -> None:
        """The program of an adopted run was found again."""

    def noted(self, **facts: object) -> None:
        """Facts changed that are no change of state."""

    def not_started(self, error: StartError) -> None:
        """The program could not be started, and that is proven."""

    def failed(
        self, stage: str, message: str, *, started: bool | None = False, stay: bool = False
    ) -> None:
        """
        The program could not be run; `started` is None where it may have been. `stay` as for
        `finished`.
        """

    def program_ended(self) -> None:
        """The program has ended; its leftovers have not."""

    def ended(self, wait_status: int | None, **facts: object) -> None:
        """How it ended: as from wait4(2), or None where `facts` say it."""

    def finished(
        self, leftovers: int | None = 0, complete: bool = True, stay: bool = False
    ) -> None:
        """
        Everything is over, the last bytes are in. With `stay` the chaperone stays until `leave`.
        """

    def lost(self, message: str, gone_by: str | None = None, *, stage: str = "connection") -> None:
        """The connection went for good, or the program can't be ended: its outcome is unknown."""

    def signalled(self, number: int, passed_on: bool = False) -> None:
        """A signal came, to the chaperone or to its guard, which passed it on."""

    def guard_died(self) -> None:
        """The guard was killed, the pid that a scheduler knows: the program is to end now."""

    def leave(self) -> None:
        """
        Hold the run no longer: its final status is published, and nothing is to be done any more.
        """

    def is_published(self) -> bool:
        """Whether the final status is."""

    def is_running(self) -> bool:
        """Whether the program was started and its end was not asked for."""

    def heard_from_far_side(self) -> None:
        """The far side said something: it has a whole lease again."""

    def stopped_by_far_side(self, reason: str) -> None:
        """The far side ends the program by itself: `disconnect` or `lease`."""


class RunStore(Protocol):
    """
    Where a run is kept, as its chaperone knows it: a run directory, or for `chaperone exec` this
    process's own streams.

    Attributes:
        run_id, key (str): The run's.
        path, log_path (str): The run directory and its log by name.
        streams (dict): `stdout` and `stderr` to fds.
        control_fd, spool_fd (int): Where requests come from, the spool's directory; -1 for none.
        started_at (float): For an adopted run: its program's start on the monotonic clock; None
            where that is not known.
    """

    run_id: str
    key: str
    path: str
    streams: dict[str, int]
    control_fd: int
    spool_fd: int
    started_at: float | None

    @property
    def log_path(self) -> str: ...

    def open_stream(self, stream: str) -> int:
        """A further fd of a stream; the caller closes it."""

    def size_of(self, stream: str) -> int:
        """How long a stream is, in bytes."""

    def tell(self, line: bytes) -> bool:
        """Append a line to the log; False where the disk did not take it now."""

    def is_there(self) -> bool:
        """Whether something can still be published there."""

    def is_in_place(self) -> bool:
        """Whether its path still leads to it."""

    def replace_running(self, status: dict[str, Any]) -> str | None:
        """Replace the live status; why it failed, or None."""

    def publish(self, status: dict[str, Any], durable: bool = False) -> None:
        """
        Publish the final status.

        Raises:
            OSError: If it can't be.
        """

    def end(self, durable: bool = False) -> None:
        """Clear what only a live run has."""

    def close(self) -> None:
        """Close every fd."""

    def mark_start(self, monotonic_s: float) -> None:
        """Keep when the program was started, for an adopter."""

    def touch(self) -> None:
        """Keep that the far side was heard now."""
