"""
What a person sees: tables, statuses and amounts as text that no terminal takes for a command.

Knows: terminals, and how they read text.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from typing import Any

from ..model import hops as command

Status = dict[str, Any]

COLUMNS = ("ID", "STATE", "AGE", "ELAPSED", "OUTCOME", "BYTES", "PROGRAM")
COLOURS = {
    "starting": 36,
    "running": 36,
    "stopping": 33,
    "unattended": 33,
    "error": 31,
    "lost": 31,
}  # terminated: green if 0, else red
UNKNOWN = "-"


def escaped(text: str) -> str:
    """
    Text without control characters, unfinished bytes or marks that turn the writing round.

    Returns:
        str: What is not printable as `\\x1b` or `\\u202e`; a surrogate that stands for a byte as
            that byte, `\\xff`.
    """
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else _escape(char) for char in text)
    )


def _escape(char: str) -> str:
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00
    return (
        f"\\x{number:02x}"
        if number < 0x100
        else f"\\u{number:04x}"
        if number < 0x10000
        else f"\\U{number:08x}"
    )


def status_json(status: Status) -> str:
    """
    A status as indented JSON for a terminal: the same value, and nothing in it that moves a cursor.
    """
    text = json.dumps(status, indent=2, ensure_ascii=False)
    return "".join(
        char
        if char.isprintable() or char == "\n"
        else json.dumps(char)[1:-1]
        if char != "\x7f"
        else "\\u007f"
        for char in text
    )


def width_of(fd: int) -> int | None:
    """How many columns a terminal has; None for what is no terminal, or doesn't say."""
    try:
        return os.get_terminal_size(fd).columns or None
    except OSError:
        return None


def may_colour(fd: int) -> bool:
    """
    Whether it is a terminal that takes colour, and nobody has said they want none (no-color.org).
    """
    return (
        os.isatty(fd)
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


# -- amounts


def amount(count: object) -> str:
    """Bytes as `812`, `9.8K`, `153M`: powers of 1,024."""
    if not isinstance(count, int):
        return UNKNOWN
    size: float = count
    for unit in ("", "K", "M", "G", "T", "P"):
        if size < 999.5 or unit == "P":
            break
        size /= 1024
    return f"{size:.1f}{unit}" if unit and size < 9.95 else f"{size:.0f}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds as `0.4s`, `59s`, `2m03s`, `1h05m`, `3d04h`."""
    if seconds is None:
        return UNKNOWN
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, low, size, low_size in (
        ("d", "h", 86_400, 3_600),
        ("h", "m", 3_600, 60),
        ("m", "s", 60, 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // low_size:02d}{low}"
    return f"{whole}s"


def moment(text: object) -> float | None:
    """A status's time as seconds since the epoch; None where it tells none."""
    try:
        return (
            datetime.fromisoformat(text[:-1] + "+00:00").timestamp()
            if isinstance(text, str)
            else None
        )
    except (ValueError, OverflowError):
        return None


# -- a run in a row


def outcome(status: Status) -> str:
    """
    How it ended: `0`, `3`, `SIGSEGV (core)`, `SIGTERM (timeout)`, the stage of an error; what asked
    for the stop in brackets.
    """
    if status["state"] == "terminated":
        known = status["signal"] if status["return_code"] is None else status["return_code"]
    elif status["state"] in ("error", "lost"):
        known = (status["exception"] or {}).get("stage")
    else:
        known = None
    marks = [str((status["stop"] or {}).get("reason"))] if status["stop"] else []
    marks += ["core"] if status["core_dump"] else []
    return (UNKNOWN if known is None else str(known)) + (f" ({', '.join(marks)})" if marks else "")


def program(status: Status) -> str:
    """The argv as it would be typed into a shell."""
    argv = status["program"].get("argv")
    if not isinstance(argv, list):
        return UNKNOWN
    return " ".join(command.quoted(word if isinstance(word, str) else repr(word)) for word in argv)


def _row(status: Status, now: float) -> tuple[str, ...]:
    created, started = moment(status["create_time"]), moment(status["start_time"])
    elapsed = status["elapsed"]
    if not isinstance(elapsed, (int, float)):
        live = status["end_time"] is None and status["state"] not in ("lost", "error")
        elapsed = now - started if live and started is not None else None
    written = [status[stream].get("bytes") for stream in ("stdout", "stderr")]
    bytes_ = sum(written) if all(isinstance(count, int) for count in written) else None
    age = None if created is None else now - created
    return (
        status["run_id"],
        status["state"],
        duration(age),
        duration(elapsed),
        outcome(status),
        amount(bytes_),
        program(status),
    )


def table(statuses: list[Status], now: float, width: int | None, colour: bool) -> str:
    """
    The runs, one a line below a heading.

    Args:
        now (float): Seconds since the epoch.
        width (int): Of the terminal: a line is cut there; None for whole lines.
        colour (bool): Whether states may have one.
    Returns:
        str: With a newline at its end; the heading alone where there are no runs.
    """
    rows = [COLUMNS, *(tuple(escaped(cell) for cell in _row(status, now)) for status in statuses)]
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


def _colour(status: Status) -> int:
    if status["state"] == "terminated":
        return 32 if status["return_code"] == 0 else 31
    return COLOURS[status["state"]]


def _coloured(line: str, start: int, end: int, colour: int) -> str:
    return f"{line[:start]}\x1b[{colour}m{line[start:end]}\x1b[0m{line[end:]}"


def columns_of(text: str) -> int:
    """
    How many columns of a terminal printable text takes: East Asian wide characters two, combining
    ones none.
    """
    if text.isascii():
        return len(text)
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    import unicodedata

    return (
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
    )


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


# -- what a view of a stream doesn't show


def gaps(status: Status, stream: str, size: int) -> list[str]:
    """
    What is missing of a stream, as sentences.

    Args:
        status (dict): As of a look just before the stream's end was read.
        size (int): Of the stream's file, in bytes.
    """
    found = []
    recorded, dropped = status[stream].get("bytes"), status[stream].get("dropped")
    if isinstance(recorded, int) and size < recorded:
        found.append(
            f"{stream} has {recorded - size} bytes less than it once had: it was cut short after it was written"
        )
    if isinstance(dropped, int) and dropped:
        found.append(
            f"{dropped} bytes of {stream} were dropped: the limit was reached or the disk was full; its log tells when"
        )
    if status["state"] == "lost":
        found.append(
            f"the end of {stream} may be missing: {(status['exception'] or {}).get('message')}"
        )
    elif status["state"] == "terminated" and not status["complete"]:
        found.append(f"the end of {stream} may be missing: its last bytes were not all received")
    return found


# -- what a spec would do


def plan(spec: dict[str, Any], user: str, far_argv: list[str]) -> str:
    """
    What would be run, a line a fact; names of the environment, never values, and nothing of a stdin
    text but its length.

    Args:
        spec (dict): Canonical.
        user (str): Who we are.
        far_argv (list): What the last hop of a remote run starts.
    """
    hops = spec["remote"]["hops"] if spec["remote"] else []
    facts = []
    for number in range(len(hops)):
        place, words = command.route(hops[:number]).place(user), command.route(hops[number:])
        facts.append((f"hop {number + 1}", f"{place}: {_words(words.argv(far_argv))}"))
    place = command.route(hops).place(user)
    program = spec["program"]
    facts = [
        ("run", spec["id"] or "an id that is made at the start"),
        *facts,
        ("program", f"{place}: {_words(program['argv'])}"),
        ("cwd", program["cwd"] or "the home directory"),
        ("env", _environment(program, bool(hops))),
        ("stdin", _stdin(program["stdin"])),
        ("process", _process(program)),
        ("output", _output(spec["output"], program["merge_stderr"])),
        (
            "timeouts",
            ", ".join(
                f"{name} {UNKNOWN if limit is None else f'{limit:g} s'}"
                for name, limit in spec["timeouts"].items()
            ),
        ),
        (
            "stop",
            f"{spec['stop']['signal']}, SIGKILL {spec['stop']['grace_period']:g} s later; leftovers: {spec['leftovers']}",
        ),
        ("life", _life(spec, bool(hops))),
        *(
            (name, "checked; nothing is posted yet")
            for name in ("callback", "config")
            if spec[name] is not None
        ),
        ("labels", ", ".join(f"{name}={value}" for name, value in spec["labels"].items())),
    ]
    return "".join(f"{name + ':':10}{escaped(fact)}\n" for name, fact in facts if fact)


def _words(argv: list[str]) -> str:
    return " ".join(map(command.quoted, argv))


def _environment(program: dict[str, Any], far: bool) -> str:
    inherit, names = program["inherit_env"], ", ".join(sorted(program["env"]))
    if isinstance(inherit, list):
        base = f"{', '.join(inherit) or 'nothing'} of {'the login environment' if far else 'ours'}"
    else:
        base = (
            ("the login environment there" if far else "all of ours")
            if inherit
            else "nothing inherited"
        )
    return base + (f"; set: {names}" if names else "")


def _stdin(stdin: Any) -> str:
    if stdin is None:
        return "empty"
    return (
        f"the file {stdin['file']!r}"
        if isinstance(stdin, dict)
        else f"a text of {len(stdin.encode('utf-8', 'surrogateescape'))} bytes"
    )


def _process(program: dict[str, Any]) -> str:
    limits = [
        f"{name} {':'.join('unlimited' if end is None else str(end) for end in ends)}"
        for name, ends in program["rlimits"].items()
    ]
    return ", ".join([*([f"umask {program['umask']}"] if program["umask"] else []), *limits])


def _output(output: dict[str, Any], merged: bool) -> str:
    limit = (
        "no limit"
        if output["max_bytes"] is None
        else f"at most {output['max_bytes']} bytes a stream"
    )
    full = {
        "drop": "what the disk refuses is dropped and counted",
        "stop": "a dropped byte stops the program",
    }[output["on_full"]]
    if output["through"] == "file":
        limit, full = "no limit", "the program itself sees a full disk"
    return f"through a {output['through']}, {limit}, {full}" + (
        "; stderr goes to stdout" if merged else ""
    )


def _life(spec: dict[str, Any], far: bool) -> str:
    with_us = "its connection" if far else "its chaperone"
    if spec["on_disconnect"] == "survive":
        return f"outlives {with_us} for {spec['lease']:g} s, so that it can be adopted"
    return f"ends with {with_us}" + (
        f", at the latest {spec['lease']:g} s after it was last heard" if far else ""
    )
