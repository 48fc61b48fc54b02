"""
Which state of a run may follow which. Each step makes a new status, or raises TransitionError.

Knows: statuses as plain JSON values.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

from ..errors import TransitionError
from . import jsontext
from . import status as statuses

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


TRANSITIONS = {
    "starting": ("running", "error", "lost", "unattended"),
    "running": ("running", "stopping", "terminated", "lost", "unattended"),
    "stopping": ("stopping", "terminated", "lost", "unattended"),
    "terminated": (),
    "unattended": ("running", "stopping", "terminated", "lost"),
    "error": (),
    "lost": (),
}
DIED = "the chaperone died before the program's end was recorded"
STOP_REASONS = ("request", "timeout", "idle", "lease", "disconnect", "output", "guard")
MESSAGE_LENGTH = 2_000  # characters of a message
MESSAGE_ROOM = 8_000  # bytes of it as JSON, at most 12 a character: half of the room of rule W5
WORD_LENGTH = 100  # characters of a word from outside, such as the requester of a stop


def starting(
    spec: dict[str, Any], chaperone_pid: int, chaperone_host: str, boot_id: str | None, now_ns: int
) -> dict[str, Any]:
    """
    The first status of a run: its directory exists, its program was not started yet.

    Args:
        spec (dict): Canonical, with its `id`.
        boot_id (str): As in /proc/sys/kernel/random/boot_id; None if there is none.
    """
    program = spec["program"]
    return {
        **{name: f.starting for name, f in statuses.FIELDS.items()},
        "run_id": spec["id"],
        "program": {"argv": program["argv"], "cwd": program["cwd"], "env": sorted(program["env"])},
        "labels": spec["labels"],
        "chaperone_pid": chaperone_pid,
        "chaperone_host": chaperone_host,
        "boot_id": boot_id,
        "create_time": statuses.timestamp(now_ns),
    }


def with_facts(status: dict[str, Any], /, **facts: object) -> dict[str, Any]:
    """The status with new facts that do not change its state, such as a lost connection."""
    if status["state"] in statuses.FINAL:
        raise TransitionError(f"unable to record more of run {status['run_id']!r}: it has ended")
    unknown = facts.keys() - status.keys()
    if unknown:
        raise TransitionError(f"unable to record {sorted(unknown)!r}: a status has no such fields")
    return {**status, **facts}


def _moved(status: dict[str, Any], state: str, /, **facts: object) -> dict[str, Any]:
    if state not in TRANSITIONS[status["state"]]:
        move = f"run {status['run_id']!r} from {status['state']!r} to {state!r}"
        raise TransitionError(f"unable to change the state of {move}: no such transition")
    return {**with_facts(status, **facts), "state": state}


def running(
    status: dict[str, Any], pid: int | None, now_ns: int, /, **facts: object
) -> dict[str, Any]:
    """
    The program was started, or was adopted: `running`. An earlier `start_time` stays.

    Args:
        pid (int): The program's, on the host where it runs; None if nothing there reports it.
        facts: More fields, such as `connection`.
    """
    start_time = status["start_time"] or statuses.timestamp(now_ns)
    facts = {"pid": pid, "started": True, "start_time": start_time, **facts}
    return _moved(status, "running", **facts)


def stopping(
    status: dict[str, Any], signal: str, reason: str, by: str | None, now_ns: int
) -> dict[str, Any]:
    """
    A stop was requested: `stopping`; a run that is `starting` stays so.

    Args:
        signal (str): The signal that is sent: `SIGTERM`.
        reason (str): One of `STOP_REASONS`. The first one stays: a second stop changes only the
            signal.
        by (str): The word that the requester gave, or None.
    """
    if reason not in STOP_REASONS:
        why = f"{reason!r} is not a known stop reason"
        raise TransitionError(f"unable to stop run {status['run_id']!r}: {why}")
    word = None if by is None else by[:WORD_LENGTH]
    first = {"signal": signal, "reason": reason, "by": word, "time": statuses.timestamp(now_ns)}
    stop = status["stop"] or first
    if status["state"] == "starting":
        return with_facts(status, stop=stop)
    return _moved(status, "stopping", stop={**stop, "signal": signal})


def terminated(status: dict[str, Any], complete: bool) -> dict[str, Any]:
    """The final status of a program that ran to its end: by a return code, or by a signal."""
    if (status["return_code"] is None) == (status["signal"] is None):
        raise TransitionError(
            f"unable to end run {status['run_id']!r}: want exactly one of return_code and signal"
        )
    return _moved(status, "terminated", complete=complete)


def failed(
    status: dict[str, Any], stage: str, message: str, now_ns: int, /, **facts: object
) -> dict[str, Any]:
    """
    The final status of a program that could not be run.

    Args:
        stage (str): What failed: spawn, connect, auth, far-side, spool, stopped ...
        facts: `errno` and `type` of the exception; `started`, False if it is proven that the
            program was not started.
    """
    started = facts.get("started", False)
    proven = started is False
    return _moved(
        status,
        "error",
        exception=_exception(stage, message, facts.get("type"), facts.get("errno")),
        started=started,
        complete=proven,
        leftovers=0 if proven else None,
        end_time=statuses.timestamp(now_ns),
    )


def lost(
    status: dict[str, Any],
    message: str,
    gone_by: str | None = None,
    now_ns: int | None = None,
    stage: str = "chaperone",
) -> dict[str, Any]:
    """
    The final status of a run whose outcome is unknown; its output may be incomplete.

    Args:
        status (dict): The last known one.
        message (str): Why the outcome is unknown.
        gone_by (str): When the program is certainly dead; None if that is not known.
        now_ns (int): When the loss was found; None if a reader concludes it and records nothing.
        stage (str): What failed: `chaperone`, `connection`, or `stop` if the program can't be
            killed.
    """
    outcome = "status return_code signal core_dump oom rusage elapsed leftovers".split()
    return _moved(
        status,
        "lost",
        **{name: statuses.FIELDS[name].unknown for name in outcome},
        exception=_exception(stage, message, None, None),
        started=True if status["pid"] is not None else status["started"],
        gone_by=gone_by,
        complete=False,
        end_time=None if now_ns is None else statuses.timestamp(now_ns),
    )


def unattended(status: dict[str, Any]) -> dict[str, Any]:
    """What a reader concludes: the chaperone died, and the program may run until its lease ends."""
    return _moved(status, "unattended")


def _exception(stage: str, message: str, kind: object, errno: object) -> dict[str, object]:
    cut = message[:MESSAGE_LENGTH]
    if len(jsontext.dumps(cut)) > MESSAGE_ROOM:
        cut = cut[: MESSAGE_ROOM // 12]
    word = None if kind is None else str(kind)[:WORD_LENGTH]
    return {"stage": stage, "type": word, "errno": errno, "message": cut}


def fitted(status: dict[str, Any], room: int) -> str:
    """
    A status as text that fits into the reserved room (rule W5).

    Args:
        room (int): In bytes.
    Returns:
        str: A line of JSON. If it would not fit, `connection.argv` is null: it is quoted again for
            each hop, so it can be larger than the spec that it comes from.
    """
    text = jsontext.dumps(status)
    if len(text) >= room and status["connection"] is not None:
        text = jsontext.dumps({**status, "connection": {**status["connection"], "argv": None}})
    return text + "\n"
