"""
How a chaperone, its program and the place where the run is kept know each other: only by these
Protocols.

Knows: the calls.  Must not know: the classes that have them.
Only type checkers import it: `typing` would make a start 5 ms slower.
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
        Start the program, or begin to; the chaperone gets `started`, or `failed`, later.

        Raises:
            StartError: If it could not be started; nothing is left running.
        """

    def children_changed(self) -> None:
        """SIGCHLD arrived: a child of this process may have ended."""

    def signal(self, signum: int) -> None:
        """Send a signal only to the program."""

    def stop(self, signum: int) -> None:
        """Send a signal to the program and to everything that it started."""

    def kill(self) -> None:
        """End the program and everything that it started, now."""

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left running, or leave it alone, then call `finished`.

        Args:
            grace_s (float): How many seconds the leftovers have before SIGKILL.
        """


class Caller(Protocol):
    """
    What wants a connection, as those know it that make one: a chaperone, or a command that needs
    no run.

    Attributes:
        loop (Loop): Watches the connection.
    """

    loop: Loop

    @property
    def log_path(self) -> str:
        """The log, for a client that must open it by name."""

    @property
    def spool_fd(self) -> int:
        """The spool's directory; -1 for a run without a spool."""

    def log(self, text: str) -> None:
        """Write a line into the log."""


class Chaperone(Caller, Protocol):
    """
    A chaperone, as its program knows it.

    Attributes:
        streams (dict): `stdout` and `stderr`, for the program's bytes.
    """

    streams: dict[str, Stream]

    def open_stream(self, stream: str) -> int:
        """One more fd of a stream, for the program itself; the caller closes it."""

    def started(self, pid: int | None, **facts: object) -> None:
        """The program was started; `facts` are more fields of the status."""

    def resumed(self, pid: int, **facts: object) -> None:
        """The program of an adopted run was found again."""

    def noted(self, **facts: object) -> None:
        """Facts changed, and the state did not."""

    def not_started(self, error: StartError) -> None:
        """The program could not be started, and that is proven."""

    def failed(
        self, stage: str, message: str, *, started: bool | None = False, stay: bool = False
    ) -> None:
        """
        The program could not be run; `started` is None if it may have been. `stay` as for
        `finished`.
        """

    def program_ended(self) -> None:
        """The program has ended; its leftovers may still run."""

    def ended(self, wait_status: int | None, **facts: object) -> None:
        """How it ended: as from wait4(2), or None if `facts` say it."""

    def finished(
        self, leftovers: int | None = 0, complete: bool = True, stay: bool = False
    ) -> None:
        """
        Everything has ended and the last bytes were received. With `stay` the chaperone stays until
        `leave`.
        """

    def lost(self, message: str, gone_by: str | None = None, *, stage: str = "connection") -> None:
        """The connection is lost for good, or the program can't be ended: no outcome is known."""

    def signalled(self, number: int, passed_on: bool = False) -> None:
        """A signal arrived at the chaperone, or at its guard, which passed it on."""

    def guard_died(self) -> None:
        """The guard, whose pid the scheduler knows, was killed: end the program now."""

    def leave(self) -> None:
        """
        Stop holding the run: its final status is published, and nothing is left to do.
        """

    def is_published(self) -> bool:
        """Whether the final status is published."""

    def is_running(self) -> bool:
        """Whether the program was started and no stop was requested."""

    def heard_from_far_side(self) -> None:
        """The far side answered: its lease begins again."""

    def stopped_by_far_side(self, reason: str) -> None:
        """The far side ends the program by itself: `disconnect` or `lease`."""


class RunStore(Protocol):
    """
    Where a run is kept, as its chaperone knows it: a run directory, or for `chaperone exec` this
    process's own streams.

    Attributes:
        run_id, key (str): The id and the key of the run.
        path, log_path (str): The paths of the run directory and of its log.
        streams (dict): `stdout` and `stderr` to fds.
        control_fd, spool_fd (int): The FIFO for requests, the spool's directory; -1 for none.
        started_at (float): For an adopted run: the start of its program on the monotonic clock;
            None if that is not known.
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
        """One more fd of a stream; the caller closes it."""

    def size_of(self, stream: str) -> int:
        """The length of a stream, in bytes."""

    def tell(self, line: bytes) -> bool:
        """Append a line to the log; False if the disk refused it for now."""

    def is_there(self) -> bool:
        """Whether a status can still be published there."""

    def is_in_place(self) -> bool:
        """Whether its path still leads to it."""

    def replace_running(self, status: dict[str, Any]) -> str | None:
        """Replace the live status; returns why that failed, or None."""

    def publish(self, status: dict[str, Any], durable: bool = False) -> None:
        """
        Publish the final status.

        Raises:
            OSError: If it can't be.
        """

    def end(self, durable: bool = False) -> None:
        """Remove what only a live run has."""

    def close(self) -> None:
        """Close every fd."""

    def mark_start(self, monotonic_s: float) -> None:
        """Record when the program was started, for a chaperone that adopts the run."""

    def touch(self) -> None:
        """Record that the far side was heard now."""
