"""
What a spool and a run of an agent can do: each call as the questions that it takes.

Knows: the routes of an agent, the calls of `api`.  Must not know: how a question is sent, who
waits for its answer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable
from typing import Any

from ...errors import AgentError, NoRunError, SpecError, SpoolError
from ...hold.begin import new_id
from ...interface import check_followed, check_piece, has_ended
from ...model import cursor as cursors
from ...model import spec as specs
from ...model.events import Status, status_view
from ...model.request import Request
from ...spool.format import LOG, STREAMS, TIMELINE
from ..wire import PIECE
from .question import (
    Answer,
    Call,
    Pause,
    Question,
    Unanswered,
    answered,
    misunderstood,
    object_in,
    refusal,
    resource,
)

START_S = 60.0  # until a start is given up: asking again is harmless, because of its key
WAIT_S = 30.0  # of one question for an end; no proxy takes such a connection for a dead one
PROOF_S = 10.0  # a loss is proven in milliseconds, on a busy host in seconds
PAGE = 1_000  # statuses of an answer: the most that an agent gives
LATE_S = (0.02, 0.1)  # a run's entry is in .ended/ some milliseconds after its end
READ_BYTES = 16 * PIECE
PARTIAL, MISSING, RANGE_BEYOND = 206, 404, 416
_JSON = {"Content-Type": "application/json"}


def _asked(method: str, path: str, body: Any = None, **more: Any) -> Call[Answer]:
    data = None if body is None else json.dumps(body).encode()
    headers = {} if body is None else _JSON
    return answered(Question(method=method, path=path, headers=headers, body=data, **more))


# -- a spool


def about(name: str) -> Call[dict[str, Any]]:
    """What an agent says of itself; there must be a spool of that name."""
    found = object_in((yield from _asked("GET", resource(name).rpartition("/")[0])))
    if name not in found.get("spools", ()):
        raise AgentError(f"unable to find spool {name!r}: this agent has no spool of that name")
    return found


def start(
    name: str, spec: Any, warm: bool, env: dict[str, str] | None, cwd: str | None
) -> Call[str]:
    """Start a run; the id of the run."""
    given = spec.get("id") if isinstance(spec, dict) else None
    run_id = new_id() if given is None else given
    try:
        if not isinstance(spec, dict) or not specs.is_run_id(run_id):
            specs.checked(spec, "/")  # it says what is wrong
        body = {"spec": {**spec, "id": run_id}, "key": os.urandom(16).hex()}
        data = json.dumps({**body, "warm": warm, "env": env, "cwd": cwd}).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"unable to start a run: {error}") from error
    path = resource(name, "runs", run_id)
    try:
        yield from answered(Question(method="PUT", path=path, headers=_JSON, body=data), START_S)
    except Unanswered as error:
        if error.was_sent:
            sentence = f"unable to start run {run_id!r}: it may have been started: {error.reason}"
            raise Unanswered(sentence, error.reason) from error
        raise
    return str(run_id)


def collected_count(name: str, prefixes: Iterable[str]) -> Call[int]:
    """How many collected runs have an id that begins with one of the prefixes."""
    path = resource(name, "runs", limit=1, collected=",".join(prefixes))
    found = object_in((yield from _asked("GET", path))).get("collected")
    if not isinstance(found, int):
        raise misunderstood("a number of runs", found)
    return found


def statuses(
    name: str, state: str | None = None, after: str | None = None, limit: int | None = None
) -> Call[list[dict[str, Any]]]:
    """
    The statuses of runs, by id.

    Args:
        state (str): live, ended, all, or a state; None for live and ended ones.
        after (str): An id that comes before theirs.
        limit (int): How many at most; None for all of them.
    """
    found: list[dict[str, Any]] = []
    while True:
        path = resource(name, "runs", state=state, after=after, limit=limit or PAGE)
        page = object_in((yield from _asked("GET", path)))
        runs, following = page.get("runs"), page.get("next")
        if not isinstance(runs, list) or not all(map(_is_status, runs)):
            raise misunderstood("statuses", runs)
        found += runs
        if following is None or limit is not None:
            return found
        if not isinstance(following, str) or following <= (after or ""):
            raise misunderstood("a later run id", following)
        after = following


def _is_status(value: object) -> bool:
    return isinstance(value, dict) and specs.is_run_id(value.get("run_id"))


def run_ids(name: str, state: str) -> Call[list[str]]:
    """The ids of runs, as of `statuses`."""
    return [str(status["run_id"]) for status in (yield from statuses(name, state))]


def cursor(name: str) -> Call[dict[str, Any]]:
    """The cursor of this moment."""
    found = object_in((yield from _asked("GET", resource(name, "cursor"))))
    return cursors.of(cursors.checked(found))


def collect(
    name: str, keys: dict[str, str | None], late_s: tuple[float, ...] = LATE_S
) -> Call[set[str]]:
    """
    Collect ended runs.

    Args:
        keys (dict): Run id to the key of the run that is meant; None for whichever it is.
        late_s (tuple): The pauses, in seconds, before those that are not in .ended/ yet are asked
            for again.
    Returns:
        set: The ids of those whose entry is not in .ended/ yet.
    """
    waiting = keys
    for pause_s in (*late_s, None):
        found = object_in(
            (yield from _asked("POST", resource(name, "collect"), {"runs": waiting}))
        ).get("waiting")
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise misunderstood("run ids", found)
        waiting = {run_id: key for run_id, key in waiting.items() if run_id in found}
        if not waiting or pause_s is None:
            break
        yield Pause(pause_s)
    return set(waiting)


def renew(name: str, runs: Iterable[str] | None) -> Call[None]:
    """Renew the leases of runs; None for all live ones."""
    body = {"runs": None if runs is None else list(runs)}
    yield from _asked("POST", resource(name, "lease"), body)


# -- a run


def _of(name: str, run_id: str, *parts: str, **query: object) -> str:
    if not specs.is_run_id(run_id):
        raise NoRunError(f"unable to find run {run_id!r}: that is not a valid run id")
    return resource(name, "runs", run_id, *parts, **query)


def raw_status(name: str, run_id: str, wait_s: float = 0.0) -> Call[dict[str, Any]]:
    """The status of a run as JSON; after `wait_s` seconds, or at its end if that is earlier."""
    path = _of(name, run_id, wait=f"{wait_s:.3f}" if wait_s else None)
    return object_in((yield from _asked("GET", path, wait_s=wait_s)))


def status(name: str, run_id: str) -> Call[Status]:
    """The status of a run."""
    return status_view((yield from raw_status(name, run_id)))


def wait(name: str, run_id: str, timeout: float | None) -> Call[Status | None]:
    """The final status of a run; None if the time is over first."""
    deadline = None if timeout is None else time.monotonic() + timeout
    least_s = 0.0
    while True:
        now = time.monotonic()
        wait_s = WAIT_S if deadline is None else min(WAIT_S, max(least_s, deadline - now))
        found = status_view((yield from raw_status(name, run_id, wait_s)))
        # A loss is proven when the agent answers because of it. At the end of its time it answers
        # with whatever the status is.
        if has_ended(found) or (found.state == "lost" and time.monotonic() - now < wait_s):
            return found
        if found.state == "lost" and not least_s:
            least_s = PROOF_S
        elif deadline is not None and time.monotonic() >= deadline:
            return None


def spec(name: str, run_id: str) -> Call[dict[str, Any]]:
    """The spec of a run in canonical form, without secrets."""
    found = object_in((yield from _asked("GET", _of(name, run_id, "spec")))).get("spec")
    return found if isinstance(found, dict) else {}


def cursor_of(name: str, run_id: str, stdout: int, stderr: int) -> Call[dict[str, Any]]:
    """The cursor that means a run from these offsets on."""
    found = yield from spec(name, run_id)
    entry = cursors.entry(str(found.get("key", "")), stdout, stderr)
    return cursors.of(cursors.checked(cursors.of({run_id: entry})))


def tail_cursor(name: str, run_id: str, stream: str, offset: int) -> Call[dict[str, Any]]:
    """The cursor that means a stream of a run from an offset on."""
    check_followed(stream)
    return (yield from cursor_of(name, run_id, **{"stdout": 0, "stderr": 0, stream: offset}))


def size(name: str, run_id: str, stream: str) -> Call[int]:
    """The present size of a stream, in bytes."""
    return _size_in((yield from _first_byte((yield from _stream(name, run_id, stream)))))


def _first_byte(path: str, *accepted: int) -> Call[Answer]:
    # Not HEAD: the answer to it has no body, so it can't say what is wrong.
    question = Question(method="GET", path=path, headers={"Range": "bytes=0-0"}, limit=1)
    return (yield from answered(question, accepted=(RANGE_BEYOND, *accepted)))


def _size_in(answer: Answer) -> int:
    found = answer.headers.get("content-range", "").rpartition("/")[2]
    if not found.isdecimal():
        raise misunderstood("the size of a stream", found)
    return int(found)


def read(name: str, run_id: str, stream: str, offset: int, size: int) -> Call[bytes]:
    """Bytes of a stream that are there; fewer, or none, if there are no more."""
    check_piece(run_id, offset, size)
    path = yield from _stream(name, run_id, stream)
    if not size:
        yield from raw_status(name, run_id)  # there must be such a run
    return (yield from _read(path, offset, size))


def _read(path: str, offset: int, size: int) -> Call[bytes]:
    parts = []
    left = size
    while left:
        most = min(left, READ_BYTES)
        # No stream has a byte beyond the largest offset.
        last = min(offset + most - 1, cursors.LARGEST_OFFSET)
        part = {"Range": f"bytes={offset}-{last}"}
        question = Question(method="GET", path=path, headers=part, limit=most)
        answer = yield from answered(question, accepted=(RANGE_BEYOND,))
        if answer.status == RANGE_BEYOND:
            break
        if answer.status != PARTIAL:
            raise misunderstood("a part of a stream", answer.status)
        parts.append(answer.body)
        offset, left = offset + len(answer.body), left - len(answer.body)
        if len(answer.body) < most:
            break
    return b"".join(parts)


def timeline_size(name: str, run_id: str) -> Call[int | None]:
    """The present size of a run's timeline, in bytes; None if it has none."""
    answer = yield from _first_byte(_of(name, run_id, TIMELINE), MISSING)
    if answer.status != MISSING:
        return _size_in(answer)
    if isinstance(error := refusal(answer), NoRunError):
        raise error
    return None


def read_timeline(name: str, run_id: str, offset: int, size: int) -> Call[bytes]:
    """As `read`, of a run's timeline."""
    return (yield from _read(_of(name, run_id, TIMELINE), offset, size))


def _stream(name: str, run_id: str, stream: str) -> Call[str]:
    """The path of a stream."""
    path = _of(name, run_id, stream)
    if stream not in (*STREAMS, LOG):
        yield from raw_status(name, run_id)  # that there is no such run comes first
        raise SpoolError(
            f"unable to open stream {stream!r}: want stdout, stderr or log", errno.EINVAL
        )
    return path


def delete(name: str, run_id: str) -> Call[None]:
    """Delete a run that has ended."""
    question = Question(method="DELETE", path=_of(name, run_id), is_once=True)
    try:
        yield from answered(question)
    except Unanswered as error:
        if not error.was_sent:
            raise
        with contextlib.suppress(NoRunError):  # it was deleted, and only the answer was lost
            yield from answered(question)


# -- requests to a run


def _control(name: str, run_id: str, request: Request) -> Call[Answer]:
    path = _of(name, run_id, "control")
    try:
        line = request.line(run_id)
    except SpecError:
        yield from raw_status(name, run_id)  # that there is no such run comes first
        raise
    text = {"Content-Type": "text/plain; charset=utf-8"}
    is_once = request.verb == "signal"
    return (
        yield from answered(
            Question(method="POST", path=path, headers=text, body=line, is_once=is_once)
        )
    )


def end(name: str, run_id: str, request: Request, is_waited: bool) -> Call[Status]:
    """Stop or kill a run; its status at that moment, or the final one."""
    try:
        found = status_view(object_in((yield from _control(name, run_id, request))))
    except NoRunError:
        if not is_waited:
            raise
        # Its chaperone may have gone only because the run ends.
        found = yield from status(name, run_id)
        if found.state == "unattended":
            raise
    if is_waited and not found.is_final():
        found = (yield from wait(name, run_id, None)) or found
    return found


def signal(name: str, run_id: str, request: Request) -> Call[None]:
    """Send a signal to the program of a run, at most once."""
    try:
        yield from _control(name, run_id, request)
    except Unanswered as error:
        if error.was_sent:
            why = f"it may have been delivered: {error.reason}"
            raise AgentError(f"unable to signal run {run_id!r}: {why}") from error
        raise
