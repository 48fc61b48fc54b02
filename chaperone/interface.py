"""
What any spool, run and follower can do, wherever they are; each call is described in `api`.

Knows: the calls that a scheduler makes, endings, arguments that no call takes.  Must not know:
where a spool is, or how it is reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, overload, runtime_checkable

from .errors import NoRunError, SpecError
from .model import checks, cursor
from .model.events import Ended, Event, Lost, Status
from .model.request import Request
from .spool.format import STREAMS
from .types import SpecDict


class FollowerLike(Protocol):
    """What a follower of any spool can do, as `chaperone.Follower` does."""

    @property
    def cursor(self) -> dict[str, Any]: ...
    @property
    def uncollected(self) -> list[str]: ...
    def entry(self, run_id: str) -> dict[str, Any] | None: ...
    def collect(self, run_id: str) -> None: ...
    def next(self, timeout: float | None = None) -> Event | None: ...
    def __iter__(self) -> Iterator[Event]: ...
    def __enter__(self) -> FollowerLike: ...
    def __exit__(self, *exception: object) -> None: ...
    def close(self) -> None: ...


class Position(Protocol):
    """How far a follower has come; what `Delivering` passes on."""

    polling: str | None

    @property
    def cursor(self) -> dict[str, Any]: ...
    @property
    def uncollected(self) -> list[str]: ...
    def entry(self, run_id: str) -> dict[str, Any] | None: ...
    def is_uncollected(self, run_id: str) -> bool: ...
    def is_over(self) -> bool: ...


class Delivering:
    """
    The part of a follower that never waits: how far it has come.

    Args:
        position (Position): Knows that.
    """

    def __init__(self, position: Position) -> None:
        self._position = position

    @property
    def polling(self) -> str | None:
        """Why events are late, in one sentence; None while they are not."""
        return self._position.polling

    @property
    def cursor(self) -> dict[str, Any]:
        """As of `chaperone.Follower`."""
        return self._position.cursor

    @property
    def uncollected(self) -> list[str]:
        """As of `chaperone.Follower`."""
        return self._position.uncollected

    def entry(self, run_id: str) -> dict[str, Any] | None:
        """As `chaperone.Follower.entry`."""
        return self._position.entry(run_id)

    def is_uncollected(self, run_id: str) -> bool:
        """As `chaperone.Follower.is_uncollected`."""
        return self._position.is_uncollected(run_id)

    def is_over(self) -> bool:
        """As `chaperone.Follower.is_over`."""
        return self._position.is_over()


class RunLike(Protocol):
    """What a run of any spool can do, as `Run` does."""

    run_id: str

    def status(self) -> Status: ...
    def spec(self) -> dict[str, Any]: ...
    def size(self, stream: str = "stdout") -> int: ...
    def read(self, stream: str = "stdout", offset: int = 0, size: int = ...) -> bytes: ...
    def cursor(self, stdout: int = 0, stderr: int = 0) -> dict[str, Any]: ...
    @overload
    def wait(self, timeout: None = None) -> Status: ...
    @overload
    def wait(self, timeout: float | None) -> Status | None: ...
    def tail(self, stream: str = "stdout", offset: int = 0) -> Iterator[bytes]: ...
    def stop(
        self, grace_s: float | None = None, wait: bool = True, by: str | None = None
    ) -> Status: ...
    def kill(self, wait: bool = True, by: str | None = None) -> Status: ...
    def signal(self, name: str | int, by: str | None = None) -> None: ...
    def delete(self) -> None: ...


@runtime_checkable
class SpoolLike(Protocol):
    """What any spool can do, as `Spool` does; for code that takes any of them."""

    def start(
        self,
        spec: SpecDict | dict[str, Any],
        warm: bool = False,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> RunLike: ...
    def follow(
        self,
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = ("stdout", "stderr"),
    ) -> FollowerLike: ...
    def cursor(self) -> dict[str, Any]: ...
    def __getitem__(self, run_id: str) -> RunLike: ...
    def live(self) -> Sequence[RunLike]: ...
    def ended(self) -> Sequence[RunLike]: ...
    def all(self) -> Sequence[RunLike]: ...
    def collect(self, run_id: str) -> None: ...
    def renew(self, runs: Iterable[str] | None = None) -> None: ...


# -- endings


def has_ended(status: Status) -> bool:
    """Whether a status is proven to be final; a lost run may still be read until that is."""
    return status.state in ("terminated", "error")


def final_status(event: Ended | Lost, verb: str) -> Status:
    """
    The status of an ending.

    Args:
        verb (str): What the caller does with the run, for the error.
    Raises:
        NoRunError: If the run was deleted before its end.
    """
    if event.status is None:
        raise NoRunError(f"unable to {verb} run {event.run_id!r}: it was deleted")
    return event.status


# -- arguments

_OFFSET = checks.Number(0, whole=True, most=cursor.LARGEST_OFFSET), checks.REQUIRED
_PIECE = checks.Fields({"offset": _OFFSET, "size": _OFFSET})


def check_piece(run_id: str, offset: object, size: object) -> None:
    """
    Check which part of a stream is to be read.

    Raises:
        SpecError: If the offset or the size can't be one.
    """
    try:
        _PIECE({"offset": offset, "size": size}, "")
    except SpecError as error:
        raise SpecError(f"unable to read run {run_id!r}: {error}") from None


def check_followed(stream: object) -> None:
    """
    Check the name of a stream that is to be followed.

    Raises:
        SpecError: If there is no such stream.
    """
    if stream not in STREAMS:
        raise SpecError(f"unable to follow stream {stream!r}: want stdout or stderr")


def signal_request(name: str | int, by: str | None) -> Request:
    """The request that `Run.signal` makes."""
    return Request("signal", signal=str(int(name)) if isinstance(name, int) else name, by=by)
