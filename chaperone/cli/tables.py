"""
Runs as a table: one run a line, cut to the terminal's width.

Knows: statuses, columns of a terminal.  Must not know: files, the clock, who prints it.
"""

from __future__ import annotations

from ..model.hops.kinds import quoted
from ..model.status import FINAL, moment_ns
from .terminal import amount, duration, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

COLUMNS = ("ID", "STATE", "HOST", "AGE", "ELAPSED", "OUTCOME", "BYTES", "PROGRAM OR REASON")
LEAST = ("BYTES", "ELAPSED", "AGE")  # left out in this order where a terminal is too narrow
HERE = "here"
WIDE = 100  # columns of a terminal that is wide enough for whole ids and a program
GENERATED = len("20261123T201426")  # of a generated id: up to the second it is seldom ambiguous
RED, GREEN, YELLOW, CYAN = 31, 32, 33, 36
COLOURS = {
    "starting": CYAN,
    "running": CYAN,
    "stopping": YELLOW,
    "unattended": YELLOW,
    "error": RED,
    "lost": RED,
}  # terminated: green if 0, otherwise red


def table(
    runs: list[tuple[dict[str, Any], str]],
    now: float,
    width: int | None,
    colour: bool,
    others: Iterable[str] = (),
) -> str:
    """
    A table of runs, one a line below a heading.

    Args:
        runs (list): (status, host of the program); the host is `here` for this host. Hosts are
            shown if one of them is another.
        now (float): Seconds since the epoch.
        width (int): Columns of the terminal: lines are cut there, and on a narrow one generated ids
            are shortened and some columns left out; None for whole lines.
        colour (bool): Whether states are coloured.
        others (set): Ids that are not in the table, but that a user may mean by a prefix.
    Returns:
        str: Safe for a terminal, with a newline at its end; only the heading if there are no runs.
    """
    rows = [COLUMNS, *(tuple(map(escaped, _row(status, host, now))) for status, host in runs)]
    if width is not None and width < WIDE:
        rows = _with_short_ids(rows, others)
    if all(host == HERE for _, host in runs):
        rows = [(*row[:2], *row[3:]) for row in rows]
    if width is not None and width < WIDE:
        rows = _with_room_for_the_program(rows, width)
    widths = _widths(rows)
    lines = []
    for row, run in zip(rows, [None, *runs], strict=True):
        cells = [
            cell + " " * (room - columns_of(cell))
            for cell, room in zip(row[:-1], widths, strict=False)
        ]
        line = cut("  ".join([*cells, row[-1]]), width)
        if colour and run is not None:
            start = columns_of(cells[0]) + 2
            line = _coloured(line, start, start + len(row[1]), _colour(run[0]))
        lines.append(line + "\n")
    return "".join(lines)


def _with_short_ids(rows: list[tuple[str, ...]], others: Iterable[str]) -> list[tuple[str, ...]]:
    """The rows with shortened generated ids; each is still the prefix of no other id."""
    ids = sorted({*others, *(row[0] for row in rows)})
    shown = {}
    for number, run_id in enumerate(ids):
        length = GENERATED if len(run_id) == 31 and run_id[:8].isdigit() else len(run_id)
        # Of all ids, those beside it in their order have the longest beginning in common with it.
        for beside in (*ids[max(0, number - 1) : number], *ids[number + 1 : number + 2]):
            while beside.startswith(run_id[:length]) and length < len(run_id):
                length += 1
        shown[run_id] = run_id[:length]
    return [(shown[row[0]], *row[1:]) for row in rows]


def _with_room_for_the_program(rows: list[tuple[str, ...]], width: int) -> list[tuple[str, ...]]:
    """The rows, below a heading, without columns that leave no room for the program or reason."""
    longest = max((columns_of(row[-1]) for row in rows[1:]), default=0)
    for name in LEAST:
        room = width - sum(before + 2 for before in _widths(rows)[:-1])
        if room >= min(longest, len(COLUMNS[-1])):
            break
        at = rows[0].index(name)
        rows = [(*row[:at], *row[at + 1 :]) for row in rows]
    return rows


def _widths(rows: list[tuple[str, ...]]) -> list[int]:
    return [max(map(columns_of, column)) for column in zip(*rows, strict=True)]


def _row(status: dict[str, Any], host: str, now: float) -> tuple[str, ...]:
    created, started = moment_ns(status["create_time"]), moment_ns(status["start_time"])
    elapsed = status["elapsed"]
    if not isinstance(elapsed, (int, float)):
        live = status["end_time"] is None and status["state"] not in ("lost", "error")
        elapsed = now - started / 1e9 if live and started is not None else None
    written = [status[stream].get("bytes") for stream in ("stdout", "stderr")]
    reason = (status["exception"] or {}).get("message") or _silence(status)
    return (
        status["run_id"],
        status["state"],
        host,
        duration(None if created is None else now - created / 1e9),
        duration(elapsed),
        outcome(status),
        amount(sum(written) if all(isinstance(count, int) for count in written) else None),
        program(status) if reason is None else str(reason),
    )


def _silence(status: dict[str, Any]) -> str | None:
    """Since when nothing was heard of a live run, and why; None if its connection is there."""
    connection = status["connection"] or {}
    since, why = connection.get("since"), connection.get("message")
    is_silent = connection.get("state") == "down" and status["state"] not in FINAL
    if not is_silent or not isinstance(since, str):
        return None
    return f"not heard of since {since[:19]}Z" + (f": {why}" if isinstance(why, str) else "")


def outcome(status: dict[str, Any]) -> str:
    """
    How a run ended: `0`, `3`, `SIGSEGV (core)`, or the stage of an error; after a stop with its
    reason, `SIGTERM (timeout)`; `-` while it is not known.
    """
    known = None
    if status["state"] == "terminated":
        known = status["signal"] if status["return_code"] is None else status["return_code"]
    elif status["state"] in ("error", "lost"):
        known = (status["exception"] or {}).get("stage")
    marks = [str((status["stop"] or {}).get("reason"))] if status["stop"] else []
    marks += ["core"] if status["core_dump"] else []
    return ("-" if known is None else str(known)) + (f" ({', '.join(marks)})" if marks else "")


def program(status: dict[str, Any]) -> str:
    """The argv as one would type it in a shell, a `command` as it is; `-` if it is unknown."""
    argv = status["program"].get("argv")
    if not isinstance(argv, list):
        return "-"
    if argv[:2] == ["/bin/sh", "-c"] and len(argv) == 3:
        return str(argv[2])
    return " ".join(quoted(word if isinstance(word, str) else repr(word)) for word in argv)


def _colour(status: dict[str, Any]) -> int:
    if status["state"] == "terminated":
        return GREEN if status["return_code"] == 0 else RED
    return COLOURS[status["state"]]


def _coloured(line: str, start: int, end: int, colour: int) -> str:
    return f"{line[:start]}\x1b[{colour}m{line[start:end]}\x1b[0m{line[end:]}"


# -- columns


def columns_of(text: str) -> int:
    """
    How many columns of a terminal printable text takes: East Asian wide characters two, combining
    ones none.
    """
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    import unicodedata

    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, width: int | None) -> str:
    """Text that fits a width, with `…` where it was cut."""
    if width is None or columns_of(text) <= width:
        return text.rstrip(" ")
    kept, room = "", max(0, width - 1)
    for char in text:
        room -= _columns(char)
        if room < 0:
            break
        kept += char
    return kept + "…"
