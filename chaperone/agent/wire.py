"""
What an agent and its clients send each other: errors and events as JSON, and the names of both.

Knows: JSON, HTTP's status codes.  Must not know: a socket, a file, a library for HTTP.
"""

from __future__ import annotations

import base64
import errno
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from .. import errors
from ..errors import AgentError, ChaperoneError
from ..follow.batches import event_line, output_line
from ..model.events import (
    Changed,
    Ended,
    Event,
    Lost,
    Output,
    Shrank,
    Started,
    Status,
    status_view,
)

API = "/api/v1"
EVENTS = "application/x-ndjson"  # a line of JSON for each event; an empty line is a sign of life
PING_S = 15.0  # between two signs of life of a stream without events
OFFSET = "Upload-Offset"  # of a callback's bytes; in an answer the size that the receiver has
PIECE = 65_536  # bytes that are sent at once: a reader that stalls costs the agent no more

# The HTTP status of each error; a subclass comes before its base class.
_STATUSES = (
    (errors.NoRunError, 404),
    (errors.RunExistsError, 409),
    (errors.BusyError, 503),
    (errors.SpecError, 422),
    (errors.AgentError, 502),
    (errors.SpoolError, 500),
    (errors.ChaperoneError, 500),
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_decoded = json.JSONDecoder().raw_decode


def error_status(error: ChaperoneError) -> int:
    """The HTTP status that goes with an error."""
    if getattr(error, "errno", None) in _FULL:
        return 507
    return next(code for kind, code in _STATUSES if isinstance(error, kind))


def error_object(error: ChaperoneError) -> dict[str, Any]:
    """
    An error as JSON: `{"error": {"kind": class, "message": sentence, "errno": number or null}}`.
    """
    kind = next(kind for kind, _ in _STATUSES if isinstance(error, kind))
    number = getattr(error, "errno", None)
    return {"error": {"kind": kind.__name__, "message": str(error), "errno": number}}


def error_from(value: object, status: int) -> ChaperoneError:
    """
    The error that an agent reported, of the class that the local call would raise.

    Args:
        value: The JSON of the answer; anything that is not an error object becomes an AgentError.
        status (int): The HTTP status of the answer.
    """
    found = value.get("error") if isinstance(value, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("message"), str):
        return AgentError(f"unable to ask the agent: it answered with HTTP status {status}")
    known = {kind.__name__: kind for kind, _ in _STATUSES}
    kind, message, number = known.get(str(found.get("kind"))), found["message"], found.get("errno")
    if kind is None:
        return AgentError(message)
    if issubclass(kind, errors.SpoolError):
        return kind(message, number if isinstance(number, int) else None)
    return kind(message)


# -- events


def event_text(event: Event) -> str:
    """An event as a line of JSON without its newline, as `chaperone follow` prints it."""
    if isinstance(event, Output):
        return output_line(event.run_id, event.stream, event.offset, event.data, event.time)
    return event_line(event)


def event_from(line: str | bytes) -> Event:
    """
    The event of a line.

    Raises:
        AgentError: If the line is not an event; a guess would lose bytes.
    """
    try:
        text = line if isinstance(line, str) else line.decode()
        value, end = _decoded(text)  # `json.loads` takes twice as long for a short line
        if text[end:].strip():
            raise ValueError
        event: Event = _READ[value["event"]](value)
        return event
    except (ValueError, LookupError, TypeError) as error:
        shown = repr(line[:80])
        raise AgentError(f"unable to follow: want an event, got {shown}") from error


def _output(value: dict[str, Any]) -> Output:
    if "text" in value:
        data = value["text"].encode()
    else:
        data = base64.b64decode(value["base64"], validate=True)
    when = value.get("time")
    return Output(
        run_id=_text(value["run_id"]),
        stream=_text(value["stream"]),
        offset=_number(value["offset"]),
        data=data,
        time=None if when is None else datetime.fromisoformat(when.replace("Z", "+00:00")),
    )


def _ended(value: dict[str, Any]) -> Ended:
    gone = value["status"] is None
    return Ended(run_id=_text(value["run_id"]), status=None if gone else _status(value))


def _status(value: dict[str, Any]) -> Status:
    status = value["status"]
    if not isinstance(status, dict):
        raise TypeError(status)
    return status_view(status)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(value)
    return value


_READ: dict[str, Callable[[dict[str, Any]], Event]] = {
    "started": lambda value: Started(run_id=_text(value["run_id"]), key=_text(value["key"])),
    "output": _output,
    "shrank": lambda value: Shrank(
        run_id=_text(value["run_id"]),
        stream=_text(value["stream"]),
        offset=_number(value["offset"]),
        size=_number(value["size"]),
    ),
    "changed": lambda value: Changed(run_id=_text(value["run_id"]), status=_status(value)),
    "ended": _ended,
    "lost": lambda value: Lost(run_id=_text(value["run_id"]), status=_status(value)),
}
