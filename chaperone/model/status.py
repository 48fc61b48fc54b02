"""
What is known of a run, and which state may follow which.

Knows: the fields of a status, as plain JSON values.  Must not know: files, processes, the clock
(facts come in as arguments).
"""

from __future__ import annotations

import time

from ..errors import TransitionError
from . import jsontext
from . import spec as specs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Status = dict[str, Any]

VERSION = 1
STATES = ("starting", "running", "stopping", "terminated", "unattended", "error", "lost")
FINAL = ("terminated", "error", "lost")
TRANSITIONS = {
    "starting": ("running", "error", "lost", "unattended"),
    "running": ("running", "stopping", "terminated", "lost", "unattended"),
    "stopping": ("stopping", "terminated", "lost", "unattended"),
    "unattended": ("running", "stopping", "terminated", "lost"),
    "terminated": (),
    "error": (),
    "lost": (),
}
DIED = "the chaperone died before the program's end was recorded"
STOP_REASONS = ("request", "timeout", "idle", "lease", "disconnect", "output")
LIVE = ("starting", "running", "stopping")
MESSAGE_LENGTH = 2_000  # characters of a message
MESSAGE_ROOM = (
    8_000  # bytes of it as JSON, which may need twelve for one character: half the room of rule W5
)
WORD_LENGTH = 100  # characters of a word that somebody else chose, such as who asked for a stop


def timestamp(now_ns: int) -> str:
    """
    A moment as the status tells it.

    Args:
        now_ns (int): Nanoseconds since the epoch, as from time.time_ns().
    Returns:
        str: RFC 3339, UTC, with microseconds: `2026-11-23T20:14:26.123456Z`.
    """
    seconds, rest = divmod(now_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}Z"


def age_s(time_text: str, now_ns: int) -> float:
    """
    How long ago a moment was.

    Args:
        time_text (str): As from `timestamp`.
        now_ns (int): Nanoseconds since the epoch.
    Returns:
        float: Seconds, never below 0: the wall clock may have been set back.
    """
    year, month, day, hour, minute = (
        int(time_text[start:end]) for start, end in ((0, 4), (5, 7), (8, 10), (11, 13), (14, 16))
    )
    leap_years = (year - 1) // 4 - (year - 1) // 100 + (year - 1) // 400
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    months = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
    days = (
        365 * (year - 1)
        + leap_years
        + months[month - 1]
        + (month > 2 and is_leap)
        + day
        - 1
        - 719_162
    )  # to 1970-01-01
    return max(
        0.0, now_ns / 1e9 - (((days * 24 + hour) * 60 + minute) * 60 + float(time_text[17:-1]))
    )


def starting(
    spec: dict[str, Any], chaperone_pid: int, chaperone_host: str, boot_id: str | None, now_ns: int
) -> Status:
    """
    The first status of a run: its directory is there, its program is not yet.

    Args:
        spec (dict): Canonical, its `id` filled in.
        boot_id (str): As in /proc/sys/kernel/random/boot_id; None where there is none.
        now_ns (int): Nanoseconds since the epoch.
    Returns:
        dict: As in `running.json`; what is not known yet is None.
    """
    program = spec["program"]
    return {
        "version": VERSION,
        "run_id": spec["id"],
        "state": "starting",
        "program": {"argv": program["argv"], "cwd": program["cwd"], "env": sorted(program["env"])},
        "labels": spec["labels"],
        "chaperone_pid": chaperone_pid,
        "chaperone_host": chaperone_host,
        "boot_id": boot_id,
        "pid": None,
        "connection": None,
        "exception": None,
        "status": None,
        "return_code": None,
        "signal": None,
        "core_dump": False,
        "rusage": None,
        "stop": None,
        "started": None,
        "complete": False,
        "ambiguous": False,
        "gone_by": None,
        "leftovers": 0,
        "stdout": {"bytes": 0, "dropped": 0},
        "stderr": {"bytes": 0, "dropped": 0},
        "create_time": timestamp(now_ns),
        "start_time": None,
        "end_time": None,
        "elapsed": None,
    }


def _moved(status: Status, state: str, /, **facts: object) -> Status:
    if state not in TRANSITIONS[status["state"]]:
        raise TransitionError(
            f"unable to move run {status['run_id']!r} from {status['state']!r} to {state!r}: no such transition"
        )
    return {**_with(status, facts), "state": state}


def _with(status: Status, facts: dict[str, Any]) -> Status:
    if status["state"] in FINAL:
        raise TransitionError(f"unable to record more of run {status['run_id']!r}: it has ended")
    unknown = facts.keys() - status.keys()
    if unknown:
        raise TransitionError(f"unable to record {sorted(unknown)!r}: a status has no such fields")
    return {**status, **facts}


def running(status: Status, pid: int | None, now_ns: int, /, **facts: object) -> Status:
    """
    Record that the program was started, or is attended again.

    Args:
        status (dict): As in `running.json`; left as it is.
        pid (int): The program's, where it runs; None where nobody there tells it.
        facts: Further fields, such as `connection`.
    Returns:
        dict: A new status, `running`; its `start_time` stays if there was one.
    Raises:
        TransitionError: If the run has ended.
    """
    return _moved(
        status,
        "running",
        **{
            "pid": pid,
            "started": True,
            "start_time": status["start_time"] or timestamp(now_ns),
            **facts,
        },
    )


def noted(status: Status, /, **facts: object) -> Status:
    """Record facts that change no state, such as a connection that went down."""
    return _with(status, facts)


def stopping(status: Status, signal: str, reason: str, by: str | None, now_ns: int) -> Status:
    """
    Record that a stop was asked for. The first reason stays: a second stop changes only the signal.

    Args:
        signal (str): The one that was sent: `SIGTERM`.
        reason (str): One of `STOP_REASONS`.
        by (str): Who asked, in their own word, or None.
    Returns:
        dict: A new status, `stopping`; the same state when nothing is running yet.
    """
    if reason not in STOP_REASONS:
        raise TransitionError(f"unable to stop run {status['run_id']!r}: {reason!r} is no reason")
    word = None if by is None else by[:WORD_LENGTH]
    stop = status["stop"] or {
        "signal": signal,
        "reason": reason,
        "by": word,
        "time": timestamp(now_ns),
    }
    if status["state"] == "starting":
        return _with(status, {"stop": stop})
    return _moved(status, "stopping", stop={**stop, "signal": signal})


def ended(status: Status, /, **facts: object) -> Status:
    """
    Record that the program is gone, before its last bytes are in: still not final.

    Args:
        facts: From `outcome`, and `end_time`, `elapsed` (s, monotonic).
    """
    return _with(status, facts)


def outcome(wait_status: int) -> dict[str, object]:
    """
    What a raw wait status says.

    Args:
        wait_status (int): As from wait4(2), of a process that ended.
    Returns:
        dict: `status`, `core_dump`, and of `return_code` (0..255) and `signal` (`SIGKILL`) exactly
            one that is not None.
    Source: wait(2).
    """
    number = wait_status & 0x7F
    return {
        "status": wait_status,
        "return_code": None if number else wait_status >> 8 & 0xFF,
        "signal": specs.signal_name_of(number) if number else None,
        "core_dump": bool(number and wait_status & 0x80),
    }


def terminated(status: Status, complete: bool) -> Status:
    """
    The final status of a program that ran to its end.

    Args:
        status (dict): With the facts of `ended`.
        complete (bool): False where a stream may be cut short.
    Raises:
        TransitionError: Unless exactly one of `return_code` and `signal` is not None.
    """
    if (status["return_code"] is None) == (status["signal"] is None):
        raise TransitionError(
            f"unable to end run {status['run_id']!r}: want exactly one of return_code and signal"
        )
    return _moved(status, "terminated", complete=complete)


def failed(status: Status, stage: str, message: str, now_ns: int, /, **facts: object) -> Status:
    """
    The final status of a program that could not be run.

    Args:
        stage (str): Where it failed: spawn, connect, auth, far-side, spool, stopped ...
        facts: `errno` and `type` of the exception, or None; `started`, False where that is proven,
            else None.
    Returns:
        dict: A new status, `error`; where it may have been started, `complete` is false and what it
            left unknown.
    """
    exception = _exception(stage, message, facts.get("type"), facts.get("errno"))
    started = facts.get("started", False)
    proven = started is False
    return _moved(
        status,
        "error",
        exception=exception,
        started=started,
        complete=proven,
        leftovers=0 if proven else None,
        end_time=timestamp(now_ns),
    )


def lost(
    status: Status,
    message: str,
    gone_by: str | None = None,
    now_ns: int | None = None,
    stage: str = "chaperone",
) -> Status:
    """
    What is left to say of a run whose end nobody saw.

    Args:
        status (dict): The last one known.
        message (str): Why nobody can know.
        gone_by (str): The time by which the program is certainly dead; None where that is not
            known.
        now_ns (int): When this was found out; None when a reader only concludes it.
        stage (str): What went: `chaperone` or `connection`.
    Returns:
        dict: A new status, `lost`; no outcome, `complete` false.
    """
    unknown = {
        "status": None,
        "return_code": None,
        "signal": None,
        "core_dump": False,
        "rusage": None,
        "elapsed": None,
        "leftovers": None,
    }
    end_time = None if now_ns is None else timestamp(now_ns)
    started = True if status["pid"] is not None else status["started"]
    exception = _exception(stage, message, None, None)
    return _moved(
        status,
        "lost",
        **unknown,
        exception=exception,
        started=started,
        gone_by=gone_by,
        complete=False,
        end_time=end_time,
    )


def unattended(status: Status) -> Status:
    """
    What a reader concludes of a run that may outlive its chaperone, until it is adopted or its
    lease is over.
    """
    return _moved(status, "unattended")


def _exception(stage: str, message: str, kind: object, errno: object) -> dict[str, object]:
    cut = message[:MESSAGE_LENGTH]
    if len(jsontext.dumps(cut)) > MESSAGE_ROOM:
        cut = cut[: MESSAGE_ROOM // 12]
    return {
        "stage": stage,
        "type": None if kind is None else str(kind)[:WORD_LENGTH],
        "errno": errno,
        "message": cut,
    }


def fitted(status: Status, room: int) -> str:
    """
    The text of a status, for a place that can't grow (rule W5).

    Args:
        room (int): Bytes.
    Returns:
        str: A line of JSON; if it would not fit, without `connection.argv`: quoted hop by hop, it
            alone can outgrow its spec.
    """
    text = jsontext.dumps(status) + "\n"
    if len(text) > room and status["connection"] is not None:
        text = (
            jsontext.dumps({**status, "connection": {**status["connection"], "argv": None}}) + "\n"
        )
    return text


def exit_code(status: Status) -> int:
    """
    What `wait` and `exec` exit with.

    Returns:
        int: The program's code, 128+n for a signal, 125 for an error or a lost run.
    """
    if status["state"] != "terminated":
        return 125
    if status["return_code"] is not None:
        return int(status["return_code"])
    number = specs.signal_number_of(status["signal"] or "")
    return 125 if number is None else 128 + number


# -- what was read from disk, as a newer or an older writer, or a broken disk, may have left it

_TEXT, _WHOLE, _BOOL, _LIST, _NUMBER = (str,), (int,), (bool,), (list,), (int, float)
_FIELDS: dict[str, Any] = {
    "version": _WHOLE,
    "program": {"argv": _LIST, "cwd": _TEXT, "env": _LIST},
    "labels": {},
    "chaperone_pid": _WHOLE,
    "chaperone_host": _TEXT,
    "boot_id": _TEXT,
    "pid": _WHOLE,
    "connection": {"argv": _LIST, "pid": _WHOLE, "drops": _WHOLE, "state": _TEXT, "since": _TEXT},
    "exception": {"stage": _TEXT, "type": _TEXT, "errno": _WHOLE, "message": _TEXT},
    "status": _WHOLE,
    "return_code": _WHOLE,
    "signal": _TEXT,
    "core_dump": _BOOL,
    "rusage": {},
    "stop": {"signal": _TEXT, "reason": _TEXT, "by": _TEXT, "time": _TEXT},
    "started": _BOOL,
    "complete": _BOOL,
    "ambiguous": _BOOL,
    "gone_by": _TEXT,
    "leftovers": _WHOLE,
    "stdout": {"bytes": _WHOLE, "dropped": _WHOLE},
    "stderr": {"bytes": _WHOLE, "dropped": _WHOLE},
    "create_time": _TEXT,
    "start_time": _TEXT,
    "end_time": _TEXT,
    "elapsed": _NUMBER,
}


def last_known(value: object, run_id: str) -> Status:
    """
    A status as read from disk.

    Args:
        value (object): As read from JSON; anything, None where nothing could be read.
        run_id (str): The name of its run directory.
    Returns:
        dict: All the fields of a status: unknown ones kept, missing or impossible ones as of an
            unknown run (rule R5); what nobody counted is None.
    """
    blank = starting(
        {"id": run_id, "program": {"argv": None, "cwd": None, "env": []}, "labels": {}},
        0,
        "",
        None,
        0,
    )
    uncounted = {"bytes": 0, "dropped": None}
    blank.update(
        chaperone_pid=None,
        chaperone_host=None,
        create_time=None,
        leftovers=None,
        stdout=uncounted,
        stderr=uncounted,
    )
    given = value if isinstance(value, dict) else {}
    known = {name: _shaped(given.get(name), blank[name], kinds) for name, kinds in _FIELDS.items()}
    state = given.get("state")
    if not isinstance(state, str) or state not in STATES:
        state = "starting" if known["pid"] is None else "running"
    return {**given, **known, "run_id": run_id, "state": state}


def _shaped(found: Any, blank: Any, kinds: Any) -> Any:
    """What was found, where it is what the field holds; else what a blank status has there."""
    if isinstance(kinds, tuple):
        return found if type(found) in kinds else blank
    if not isinstance(found, dict):
        return blank
    inner = blank or dict.fromkeys(kinds)
    return {
        **found,
        **{name: _shaped(found.get(name), inner[name], kind) for name, kind in kinds.items()},
    }


def final_known(value: object, run_id: str) -> Status | None:
    """
    The final status of a run, as read from disk.

    Returns:
        dict: As from `last_known`; None where it is no final status.
    """
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("state"), str)
        or value["state"] in (*LIVE, "unattended")
    ):
        return None
    status = last_known(value, run_id)
    if (
        status["state"] not in FINAL
    ):  # a newer writer's word: what counts is whether the end is known
        status["state"] = (
            "lost" if status["return_code"] is status["signal"] is None else "terminated"
        )
    return status
