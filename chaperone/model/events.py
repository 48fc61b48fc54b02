"""
What a scheduler sees: a run's status as a value, and the events of following it.

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

# Values in place: `status` stands on the holding path, which can't afford attrs.
attrs.frozen(kw_only=True, slots=False)(Counts)
_SHOWN = {name: attrs.field() for name in statuses.FIELDS}
attrs.frozen(kw_only=True, slots=False, these={**_SHOWN, "raw": attrs.field(repr=False, eq=False)})(
    Status
)


def status_view(status: dict[str, Any]) -> Status:
    """
    The view of a status.

    Args:
        status (dict): As from `chaperone.spool.look`, or any JSON object: what is missing or
            impossible is None, or what a field that is never None has then.
    """
    seen = {name: _VIEWS[f.view](status.get(name), f) for name, f in statuses.FIELDS.items()}
    return Status(raw=status, **seen)


def _counts(value: object, field: statuses.Field) -> Counts:
    found = checks.shaped(value, dict.fromkeys(field.kinds), field.kinds)
    return Counts(**{name: found[name] for name in field.kinds})


def _moment(value: object, field: statuses.Field) -> datetime | None:
    moment_ns = statuses.moment_ns(value)
    try:
        return None if moment_ns is None else EPOCH + timedelta(microseconds=moment_ns // 1000)
    except OverflowError:
        return None


def _as_it_is(value: object, field: statuses.Field) -> Any:
    return checks.shaped(value, field.unknown, field.kinds)


_VIEWS = {"": _as_it_is, "time": _moment, "counts": _counts}


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
