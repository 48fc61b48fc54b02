"""
What is known of a run: the fields of a status.

Knows: statuses as plain JSON values.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

import time

from . import checks
from . import spec as specs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from typing import Any

    from attrs import frozen

    from ..types import (
        StatusConnection,
        StatusDict,
        StatusException,
        StatusProgram,
        StatusRusage,
        StatusStop,
    )

else:

    def frozen(**options):
        """On the holding path a plain class; `events` makes it an attrs class for readers."""
        return lambda plain: plain


VERSION = 1
STATES = ("starting", "running", "stopping", "terminated", "unattended", "error", "lost")
LIVE = ("starting", "running", "stopping")
FINAL = ("terminated", "error", "lost")


# -- times

_ZEROS = {ord(digit): "0" for digit in "123456789"}


def timestamp(now_ns: int) -> str:
    """
    A time as a status has it: RFC 3339, UTC, with microseconds, `2026-11-23T20:14:26.123456Z`.

    Args:
        now_ns (int): Nanoseconds since the epoch.
    """
    seconds, rest = divmod(now_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}Z"


def moment_ns(text: object) -> int | None:
    """
    Parse a time of a status. It is the only parser of them, and avoids `datetime` and
    `time.strptime`, whose import a chaperone can't afford.

    Args:
        text (object): RFC 3339, with `Z` or another offset; or anything.
    Returns:
        int: Nanoseconds since the epoch; None if it is not a time.
    """
    if not isinstance(text, str):
        return None
    clock, zone = (text[:-1], "+00:00") if text.endswith("Z") else (text[:-6], text[-6:])
    clock, point, fraction = clock.partition(".")
    shape = f"{clock}{zone}".translate(_ZEROS)
    if shape[:19] != "0000-00-00T00:00:00" or shape[19:] not in ("+00:00", "-00:00"):
        return None
    if zone[1:3] > "23" or zone[4:] > "59":
        return None
    if point and not (fraction.isascii() and fraction.isdigit()):
        return None
    numbers = f"{clock[:10]}-{clock[11:].replace(':', '-')}".split("-")
    year, month, day, hour, minute, second = fields = tuple(map(int, numbers))
    # A year that begins in March: the leap day is its last, and five months have 153 days.
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    days = year * 365 + year // 4 - year // 100 + year // 400 + (month * 153 + 2) // 5 + day
    seconds = ((days - 719_469) * 24 + hour) * 3600 + minute * 60 + second  # from 1970-01-01 on
    if time.gmtime(seconds)[:6] != fields:  # a date or a time that does not exist: February 30
        return None
    offset_s = int(zone[1:3]) * 3600 + int(zone[4:]) * 60
    seconds += offset_s if zone[0] == "-" else -offset_s
    return seconds * 1_000_000_000 + int(f"{fraction:0<9.9}")


# -- the fields. `Status` describes each field once; everything else is made from that.

TEXT, WHOLE, BOOL, LIST, NUMBER = (str,), (int,), (bool,), (list,), (int, float)


class Field:
    """
    How a field of a status is stored.

    Args:
        kinds: The types of its JSON value, which may also be null; for an object a dict, name to
            types.
        starting: Its value in the first status of a run.
        unknown: Its value if it is missing or invalid (rule R5); `starting` if not given.
        view (str): What a reader gets in place of the JSON value: a "time" or "counts".
    """

    def __init__(
        self, kinds: Any, starting: Any = None, unknown: Any = ..., view: str = ""
    ) -> None:
        self.kinds, self.starting, self.view = kinds, starting, view
        self.is_scalar = isinstance(kinds, tuple)
        self.unknown = starting if unknown is ... else unknown


field: Any = Field  # for type checkers: a line of `Status` has the reader's type
_STREAM: Any = Field(
    {"bytes": WHOLE, "dropped": WHOLE},
    {"bytes": 0, "dropped": 0},
    {"bytes": 0, "dropped": None},
    "counts",
)


@frozen(kw_only=True, slots=False)
class Counts:
    """The size of a stream."""

    bytes: int | None
    """Bytes in the spool; None if they were not counted."""
    dropped: int | None
    """Bytes that the program wrote and that were not kept; None if they were not counted."""


@frozen(kw_only=True, slots=False)
class Status:
    """
    A status as a reader sees it; a field that is unknown or invalid is None.

    Each field has its type, how it is stored, and its sentence in docs/spool-format.rst.
    """

    version: int = field(WHOLE, VERSION)
    """1"""
    run_id: str = field(TEXT)
    """the name of the run directory"""
    state: str = field(TEXT, "starting", None)
    """see above"""
    program: StatusProgram = field(
        {"argv": LIST, "cwd": TEXT, "env": LIST}, unknown={"argv": None, "cwd": None, "env": []}
    )
    """``argv``, ``cwd``, and in ``env`` the names that the spec sets, never the values"""
    labels: dict[str, Any] = field({}, {})
    """the spec's labels"""
    chaperone_pid: int | None = field(WHOLE)
    """the process id of the chaperone, for people; to send a request use ``control``"""
    guard_pid: int | None = field(WHOLE)
    """the process that was forked to start the run: it guards the chaperone; null if there is
    none"""
    chaperone_host: str | None = field(TEXT)
    """the name of the host where the chaperone is"""
    boot_id: str | None = field(TEXT)
    """identifies the boot of that host, as in /proc/sys/kernel/random/boot_id"""
    pid: int | None = field(WHOLE)
    """the program's process id, where it runs"""
    connection: StatusConnection | None = field(
        {"argv": LIST, "pid": WHOLE, "drops": WHOLE, "state": TEXT, "since": TEXT}
    )
    """null for a local program; otherwise ``argv`` and ``pid`` of the connecting process,
    ``drops``, ``state`` (``up``, ``down``, ``queued``), ``since`` when, and as ``message`` the last
    words of an engine that makes it wait, or why the agent of a mirrored run is not heard"""
    exception: StatusException | None = field(
        {"stage": TEXT, "type": TEXT, "errno": WHOLE, "message": TEXT}
    )
    """null, or why the run is ``error`` or ``lost``: ``stage``, ``type`` and ``errno`` of a failed
    system call, ``message`` (one sentence)"""
    status: int | None = field(WHOLE)
    """the raw wait status, as of wait(2); null if it can't be known"""
    return_code: int | None = field(WHOLE)
    """the exit code, 0 to 255; null if a signal ended the program"""
    signal: str | None = field(TEXT)
    """the name of the signal that ended it: ``SIGKILL``, ``SIGRTMIN+3``"""
    core_dump: bool = field(BOOL, False)
    """whether it left a core dump"""
    oom: bool | None = field(BOOL)
    """true for a SIGKILL that was not requested while the kernel counted an OOM kill in the
    program's cgroup; false without such a signal or count; null if it can't be known"""
    rusage: StatusRusage | None = field({})
    """``utime`` and ``stime`` in seconds, ``maxrss`` in bytes, and counts as of getrusage(2); null,
    or null in parts, if it can't be known"""
    stop: StatusStop | None = field({"signal": TEXT, "reason": TEXT, "by": TEXT, "time": TEXT})
    """null, or ``signal``, ``reason`` (request, timeout, idle, lease, disconnect, output, guard),
    ``by`` (the word that the requester gave) and ``time``"""
    started: bool | None = field(BOOL)
    """whether the program was started: false only if it is proven that it was not, null if it can't
    be known"""
    complete: bool = field(BOOL, False)
    """false if the end of a stream may be missing"""
    ambiguous: bool = field(BOOL, False)
    """true if the far side could not distinguish a signal from an exit code above 128"""
    gone_by: datetime | None = field(TEXT, view="time")
    """for a lost run: the time by which it is certainly dead; null if that is not known"""
    leftovers: int | None = field(WHOLE, 0, None)
    """how many processes the program left running, null if that can't be known"""
    tracking: str | None = field(TEXT)
    """how the run's processes are found: ``kernel``, ``cookie`` or ``group``; null if not known"""
    stdout: Counts = _STREAM
    """``bytes`` in the file, ``dropped``: written by the program and not kept, null if it can't be
    counted"""
    stderr: Counts = _STREAM
    """the same"""
    create_time: datetime | None = field(TEXT, view="time")
    """when the run directory was made; all times are RFC 3339 with microseconds, UTC"""
    start_time: datetime | None = field(TEXT, view="time")
    """when the program was started"""
    end_time: datetime | None = field(TEXT, view="time")
    """when the program ended; for a lost run, when the loss was found"""
    elapsed: float | None = field(NUMBER)
    """seconds from start to end, on a monotonic clock"""

    raw: StatusDict
    """The whole status as it is on disk, with fields of newer writers."""

    def is_final(self) -> bool:
        """Whether the run has ended: terminated, error or lost."""
        return self.state in FINAL

    @property
    def exit_code(self) -> int:
        """The program's exit code, 128+n for signal n, 125 if it did not end or its end is lost."""
        return exit_code(self.raw)


FIELDS = {name: f for name, f in vars(Status).items() if isinstance(f, Field)}


def last_known(value: object, run_id: str) -> dict[str, Any]:
    """
    A usable status of what was read, which a newer or an older version, or a broken disk, may have
    written.

    Args:
        value (object): As read from JSON; anything; None if nothing could be read.
        run_id (str): The name of its run directory.
    Returns:
        dict: All fields of a status. Other fields stay; missing and invalid ones have their value
            for "unknown" (rule R5).
    """
    given = value if isinstance(value, dict) else {}
    # As `shaped` has it, without a call for each field: readers look at thousands of statuses.
    known = {
        name: (value if type(value := given.get(name)) in f.kinds else f.unknown)
        if f.is_scalar
        else checks.shaped(given.get(name), f.unknown, f.kinds)
        for name, f in FIELDS.items()
    }
    if known["state"] not in STATES:
        known["state"] = "starting" if known["pid"] is None else "running"
    return {**given, **known, "run_id": run_id}


def final_known(value: object, run_id: str) -> dict[str, Any] | None:
    """
    The final status of a run, as read from disk.

    Returns:
        dict: As from `last_known`; None if it is not a final status.
    """
    state = value.get("state") if isinstance(value, dict) else None
    if not isinstance(state, str) or state in (*LIVE, "unattended"):
        return None
    status = last_known(value, run_id)
    if state not in FINAL:  # a newer version's word: does it say how the program ended?
        known = status["return_code"] is not None or status["signal"] is not None
        status["state"] = "terminated" if known else "lost"
    return status


def exit_code(status: Mapping[str, Any]) -> int:
    """The exit code of `wait` and `exec`: the program's, 128+n for signal n, otherwise 125."""
    if status["state"] != "terminated":
        return 125
    if status["return_code"] is not None:
        return int(status["return_code"])
    number = specs.signal_number_of(status["signal"] or "")
    return 125 if number is None else 128 + number
