"""
What a scheduler sees: a run's status as a value, and the events of following it.

Knows: statuses as they are on disk.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import attrs

from . import status as statuses


@attrs.frozen(kw_only=True)
class Counts:
    """
    How long a stream is.

    Attributes:
        bytes (int): In the spool; None where nobody counted.
        dropped (int): Written by the program, but not kept; None where nobody counted.
    """

    bytes: int | None
    dropped: int | None


@attrs.frozen(kw_only=True)
class Status:
    """
    A status, as far as it is known: a field that is unknown or that can't be understood is None.

    Attributes:
        state (str): starting, running, stopping, terminated, unattended, error or lost.
        program (dict): `argv`, `cwd` and the names in `env`.
        labels (dict): The user's own words.
        return_code (int): 0..255, if the program ended by itself.
        signal (str): `SIGKILL`, if a signal ended it.
        status (int): The raw wait status.
        rusage (dict): Times in seconds, `maxrss` in bytes.
        elapsed (float): Seconds.
        raw (dict): The whole of it as it is on disk, fields of newer writers too.
    """

    run_id: str
    state: str
    program: dict[str, Any]
    labels: dict[str, Any]
    chaperone_pid: int | None
    chaperone_host: str | None
    boot_id: str | None
    pid: int | None
    connection: dict[str, Any] | None
    exception: dict[str, Any] | None
    status: int | None
    return_code: int | None
    signal: str | None
    core_dump: bool
    rusage: dict[str, Any] | None
    stop: dict[str, Any] | None
    started: bool | None
    complete: bool
    ambiguous: bool
    gone_by: datetime | None
    leftovers: int | None
    stdout: Counts
    stderr: Counts
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    elapsed: float | None
    raw: dict[str, Any] = attrs.field(repr=False, eq=False)

    def is_final(self) -> bool:
        """Whether the run has ended: terminated, error or lost."""
        return self.state in statuses.FINAL

    @property
    def exit_code(self) -> int:
        """
        The program's code, 128+n for a signal, 125 for a run that is lost, in error or not over.
        """
        return statuses.exit_code(self.raw)


def status_view(status: dict[str, Any]) -> Status:
    """
    The view of a status.

    Args:
        status (dict): As from `chaperone.spool.look`: all fields are there, a newer writer's values
            may be anything.
    """
    return Status(raw=status, **{name: view(status.get(name)) for name, view in _VIEWS.items()})


def _is(*kinds: type) -> Any:
    return lambda value: (
        value
        if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        else None
    )


def _counts(value: object) -> Counts:
    found = value if isinstance(value, dict) else {}
    return Counts(bytes=_is(int)(found.get("bytes")), dropped=_is(int)(found.get("dropped")))


def moment(value: object) -> datetime | None:
    """
    A time as the status tells it.

    Args:
        value (object): RFC 3339, or anything.
    Returns:
        datetime: Aware, UTC; None if it is no time.
    """
    try:
        found = (
            datetime.fromisoformat(value.replace("Z", "+00:00")) if isinstance(value, str) else None
        )
        return found.astimezone(timezone.utc) if found and found.tzinfo else None
    except (ValueError, OverflowError):
        return None


_VIEWS: dict[str, Any] = {
    **dict.fromkeys(("run_id", "state", "chaperone_host", "boot_id", "signal"), _is(str)),
    **dict.fromkeys(("chaperone_pid", "pid", "status", "return_code", "leftovers"), _is(int)),
    **dict.fromkeys(("connection", "exception", "rusage", "stop"), _is(dict)),
    **dict.fromkeys(("program", "labels"), lambda value: value if isinstance(value, dict) else {}),
    **dict.fromkeys(("core_dump", "complete", "ambiguous"), lambda value: value is True),
    **dict.fromkeys(("gone_by", "create_time", "start_time", "end_time"), moment),
    **dict.fromkeys(("stdout", "stderr"), _counts),
    "started": _is(bool),
    "elapsed": _is(int, float),
}


# -- events: those of one run come in order


@attrs.frozen(kw_only=True)
class Started:
    """The run is there; it is the first event of it."""

    run_id: str
    key: str


@attrs.frozen(kw_only=True)
class Output:
    """
    New bytes.

    Attributes:
        stream (str): stdout or stderr.
        offset (int): Where they begin, in bytes from the stream's first one.
        data (bytes): 1 MiB of them at most, as the program wrote them.
    """

    run_id: str
    stream: str
    offset: int
    data: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Shrank:
    """
    Somebody cut a stream short; it is read again from its first byte.

    Attributes:
        offset (int): How far it had been handed out.
        size (int): How long it was found to be.
    """

    run_id: str
    stream: str
    offset: int
    size: int


@attrs.frozen(kw_only=True)
class Changed:
    """
    A status that is not final: the first one that is seen, and then each that differs from the
    last.
    """

    run_id: str
    status: Status


@attrs.frozen(kw_only=True)
class Ended:
    """
    The run has ended, and all its bytes were handed out; it is the last event of it.

    Attributes:
        status (Status): Final; None if the run directory was deleted before it could be read.
    """

    run_id: str
    status: Status | None


@attrs.frozen(kw_only=True)
class Lost:
    """
    Nobody can know how the run ended; all that is left of its bytes was handed out; it is the last
    event of it.
    """

    run_id: str
    status: Status


Event = Started | Output | Shrank | Changed | Ended | Lost
