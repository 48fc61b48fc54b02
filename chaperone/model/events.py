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
for _name in statuses.FIELDS:
    delattr(Status, _name)  # how it is stored, which the table keeps


def status_view(status: dict[str, Any]) -> Status:
    """
    A status as a scheduler sees it. Its fields are made when the first of them is asked for: what
    passes a status on as JSON asks for none, and they take a fifth of what an ending costs.

    Args:
        status (dict): As from `chaperone.spool.look`, or any JSON object: a field that is missing
            or invalid is None, or has its value for "unknown" if it can't be None. It belongs to
            the view from now on.
    """
    view = object.__new__(Status)
    vars(view)["raw"] = status
    return view


def _field(view: Status, name: str) -> object:
    """A field that the view does not have yet: all of them are made."""
    if name not in statuses.FIELDS:
        raise AttributeError(f"{type(view).__name__!r} object has no attribute {name!r}")
    found = view.raw.get
    seen: dict[str, Any] = {
        name: value if type(value := found(name)) in kinds else unknown
        for name, kinds, unknown in _PLAIN
    }
    for nested, field in _NESTED:
        seen[nested] = checks.shaped(found(nested), field.unknown, field.kinds)
    for moment in _TIMES:
        seen[moment] = _moment(found(moment))
    for stream, kinds in _COUNTS:
        counts = checks.shaped(found(stream), dict.fromkeys(kinds), kinds)
        seen[stream] = Counts(bytes=counts["bytes"], dropped=counts["dropped"])
    vars(view).update(seen)
    return seen[name]


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
type.__setattr__(Status, "__getattr__", _field)


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
