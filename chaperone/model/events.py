"""
What a scheduler sees: the status of a run as a value, and the events that a follower delivers.

Knows: statuses as they are on disk.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import attrs

from . import checks
from . import status as statuses
from .status import Counts as Counts
from .status import Status as Status

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# `model/status.py` defines these classes, but a chaperone imports it and can't afford attrs.
attrs.frozen(kw_only=True, slots=False)(Counts)
_SHOWN = {name: attrs.field() for name in statuses.FIELDS}
attrs.frozen(kw_only=True, slots=False, these={**_SHOWN, "raw": attrs.field(repr=False, eq=False)})(
    Status
)


def status_view(status: dict[str, Any]) -> Status:
    """
    A status as a scheduler sees it.

    Args:
        status (dict): As from `chaperone.spool.look`, or any JSON object: a field that is missing
            or invalid is None, or has its value for "unknown" if it can't be None.
    """
    found = status.get
    seen: dict[str, Any] = {
        name: value if type(value := found(name)) in kinds else unknown
        for name, kinds, unknown in _PLAIN
    }
    for name, field in _NESTED:
        seen[name] = checks.shaped(found(name), field.unknown, field.kinds)
    for name in _TIMES:
        seen[name] = _moment(found(name))
    for name, kinds in _COUNTS:
        counts = checks.shaped(found(name), dict.fromkeys(kinds), kinds)
        seen[name] = Counts(bytes=counts["bytes"], dropped=counts["dropped"])
    seen["raw"] = status
    return Status(**seen)


def _moment(value: object) -> datetime | None:
    moment_ns = statuses.moment_ns(value)
    try:
        return None if moment_ns is None else EPOCH + timedelta(microseconds=moment_ns // 1000)
    except OverflowError:
        return None


# A scheduler has thousands of statuses made: each kind of field has its own loop.
_FIELDS = statuses.FIELDS.items()
_PLAIN = [(name, f.kinds, f.unknown) for name, f in _FIELDS if f.is_scalar and not f.view]
_NESTED = [(name, f) for name, f in _FIELDS if not f.is_scalar and not f.view]
_TIMES = [name for name, f in _FIELDS if f.view == "time"]
_COUNTS = [(name, f.kinds) for name, f in _FIELDS if f.view == "counts"]


# -- events; the events of one run come in order


@attrs.frozen(kw_only=True)
class Started:
    """The run exists; the first event of a run."""

    run_id: str
    key: str


@attrs.frozen(kw_only=True)
class Output:
    """
    New bytes of a stream.

    Attributes:
        stream (str): stdout or stderr.
        offset (int): Of the first byte, counted from the beginning of the stream.
        data (bytes): At most 1 MiB, as the program wrote them.
        time (datetime): When the chaperone read them, to the millisecond, UTC; None for a run
            without a timeline, and for bytes that its timeline has no line about.
    """

    run_id: str
    stream: str
    offset: int
    data: bytes = attrs.field(repr=False)
    time: datetime | None = None


@attrs.frozen(kw_only=True)
class Shrank:
    """
    A stream was truncated; it is read again from its first byte.

    Attributes:
        offset (int): How far it had been delivered.
        size (int): Its size when the follower noticed.
    """

    run_id: str
    stream: str
    offset: int
    size: int


@attrs.frozen(kw_only=True)
class Changed:
    """
    A status that is not final: the first one seen, then each one that differs from the last.
    """

    run_id: str
    status: Status


@attrs.frozen(kw_only=True)
class Ended:
    """
    The run has ended, and all its bytes were delivered; the last event of a run.

    Attributes:
        status (Status): Final; None if the run directory was deleted before it could be read.
    """

    run_id: str
    status: Status | None


@attrs.frozen(kw_only=True)
class Lost:
    """
    The outcome of the run can't be known, and all bytes that are left were delivered; the last
    event of a run.
    """

    run_id: str
    status: Status


Event = Started | Output | Shrank | Changed | Ended | Lost
