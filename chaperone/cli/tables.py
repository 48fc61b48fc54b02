"""
Runs as a table: one run a line, cut to the terminal's width.

Knows: statuses, columns of a terminal.  Must not know: files, the clock, who prints it.
"""

from __future__ import annotations

from ..model.hops import quoted
from ..model.status import moment_ns
from .terminal import amount, duration, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.status import StatusDict

COLUMNS = ("ID", "STATE", "AGE", "ELAPSED", "OUTCOME", "BYTES", "PROGRAM")
RED, GREEN, YELLOW, CYAN = 31, 32, 33, 36
COLOURS = {
    "starting": CYAN,
    "running": CYAN,
    "stopping": YELLOW,
    "unattended": YELLOW,
    "error": RED,
    "lost": RED,
}  # terminated: green if 0, otherwise red


def table(statuses: list[StatusDict], now: float, width: int | None, colour: bool) -> str:
    """
    The runs, one a line below a heading.

    Args:
        now (float): Seconds since the epoch.
        width (int): Of the terminal: a line is cut there; None for whole lines.
        colour (bool): Whether states may have one.
    Returns:
        str: Safe for a terminal, with a newline at its end; the heading alone where there are no
            runs.
    """
    rows = [COLUMNS, *(tuple(map(escaped, _row(status, now))) for status in statuses)]
    widths = [max(columns_of(row[number]) for row in rows) for number in range(len(COLUMNS) - 1)]
    lines = []
    for row, status in zip(rows, [None, *statuses], strict=True):
        cells = [
            cell + " " * (room - columns_of(cell)) for cell, room in zip(row, widths, strict=False)
        ]
        line = cut("  ".join([*cells, row[-1]]), width)
        if colour and status is not None:
            start = columns_of(cells[0]) + 2
            line = _coloured(line, start, start + len(row[1]), _colour(status))
        lines.append(line + "\n")
    return "".join(lines)


def _row(status: StatusDict, now: float) -> tuple[str, ...]:
    created, started = moment_ns(status["create_time"]), moment_ns(status["start_time"])
    elapsed = status["elapsed"]
    if not isinstance(elapsed, (int, float)):
        live = status["end_time"] is None and status["state"] not in ("lost", "error")
        elapsed = now - started / 1e9 if live and started is not None else None
    written = [status[stream].get("bytes") for stream in ("stdout", "stderr")]
    return (
        status["run_id"],
        status["state"],
        duration(None if created is None else now - created / 1e9),
        duration(elapsed),
        outcome(status),
        amount(sum(written) if all(isinstance(count, int) for count in written) else None),
        program(status),
    )


def outcome(status: StatusDict) -> str:
    """
    How it ended: `0`, `3`, `SIGSEGV (core)`, `SIGTERM (timeout)`, the stage of an error; what asked
    for the stop in brackets; `-` while it is not known.
    """
    known = None
    if status["state"] == "terminated":
        known = status["signal"] if status["return_code"] is None else status["return_code"]
    elif status["state"] in ("error", "lost"):
        known = (status["exception"] or {}).get("stage")
    marks = [str((status["stop"] or {}).get("reason"))] if status["stop"] else []
    marks += ["core"] if status["core_dump"] else []
    return ("-" if known is None else str(known)) + (f" ({', '.join(marks)})" if marks else "")


def program(status: StatusDict) -> str:
    """The argv as it would be typed into a shell; `-` where it is not known."""
    argv = status["program"].get("argv")
    if not isinstance(argv, list):
        return "-"
    return " ".join(quoted(word if isinstance(word, str) else repr(word)) for word in argv)


def _colour(status: StatusDict) -> int:
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
