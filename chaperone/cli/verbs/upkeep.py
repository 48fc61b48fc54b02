"""
What the verbs of whoever looks after a spool do: each a generator of (fd, bytes) to be written,
that returns the exit code.

Knows: what the words of reap, gc and doctor ask for.  Must not know: who writes what it yields, or
a file name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any

from .. import terminal
from ..main import add_site_packages, spool_path, write
from ..parser import UsageError

Given = Any  # argparse.Namespace
Steps = Generator[tuple[int, bytes], None, int]

AGES = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
SIZES = {unit: 1 << shift for shift, unit in ((0, ""), (10, "K"), (20, "M"), (30, "G"), (40, "T"))}
PROGRESS_S = 0.1  # often enough to look alive, seldom enough to cost nothing
QUIET = ("alive", "ended")  # what reap need not tell of runs that nobody named


def _line(text: str) -> tuple[int, bytes]:
    return 1, f"{terminal.escaped(text)}\n".encode("utf-8", "backslashreplace")


def _note(sentence: str) -> tuple[int, bytes]:
    return 2, f"chaperone: {terminal.escaped(sentence)}\n".encode()


def _quantity(option: str, text: str | None, units: dict[str, int], want: str) -> float | None:
    """`7d` as seconds, `10G` as bytes; None for what was not given."""
    if text is None:
        return None
    number = text.rstrip("".join(units))
    unit = text[len(number) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"unable to understand '{option}': want {want}, got {text!r}")
    return value


# -- reap


def reap(given: Given) -> Steps:
    add_site_packages()
    from ...spool import reap
    from .look import run_ids

    named = run_ids(given, given.runs) if given.runs else None
    code = os.EX_OK
    for reaped in reap.reap(os.path.abspath(spool_path(given.spool)), named):
        if reaped.done == "failed":
            code = os.EX_IOERR
            yield _note(f"unable to reap run {reaped.run_id!r}: {reaped.says}")
            continue
        if reaped.done == "waiting":
            code = code or os.EX_TEMPFAIL
        if named or reaped.done not in QUIET:
            yield _line(f"{reaped.run_id}: {reaped.done}: {reaped.says}")
    return code


# -- gc


def gc(given: Given) -> Steps:
    older_s = _quantity("--older", given.older, AGES, "an age such as 7d, 12h or 90s")
    keep_failed_s = _quantity(
        "--keep-failed", given.keep_failed, AGES, "an age such as 30d, 12h or 90s"
    )
    max_bytes = _quantity("--max-bytes", given.max_bytes, SIZES, "a size such as 10G or 500M")
    if older_s is None and max_bytes is None:
        raise UsageError(
            "unable to understand 'chaperone gc': want --older or --max-bytes, or nothing would be deleted"
        )
    add_site_packages()
    from ...spool import gc

    progress = _Progress()
    summary = gc.gc(
        os.path.abspath(spool_path(given.spool)),
        older_s,
        keep_failed_s,
        None if max_bytes is None else int(max_bytes),
        given.dry_run,
        progress.tell,
    )
    progress.clear()
    if given.dry_run:
        for run_id in summary.removed:
            yield _line(run_id)
    for sentence in summary.failed:
        yield _note(sentence)
    size = (
        f" ({terminal.amount(summary.freed)} bytes)" if summary.freed or not given.dry_run else ""
    )  # unmeasured where nobody asked for sizes
    verb = "would remove" if given.dry_run else "removed"
    yield _line(
        f"{verb} {len(summary.removed)} runs{size}; left: {summary.kept} ended, {summary.live} live"
    )
    return os.EX_IOERR if summary.failed else os.EX_OK


class _Progress:
    """One line on a terminal's stderr, written over and over; nothing elsewhere."""

    def __init__(self) -> None:
        self._on = os.isatty(2)
        self._last = time.monotonic()  # what is done at once needs no line
        self._shown = False

    def tell(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self._on and now - self._last >= PROGRESS_S:
            self._last, self._shown = now, True
            write(2, f"\r{done} of {of} runs\x1b[K".encode())

    def clear(self) -> None:
        if self._shown:
            write(2, b"\r\x1b[K")


# -- doctor


def doctor(given: Given) -> Steps:
    add_site_packages()
    from . import doctor as physician

    code = os.EX_OK
    for finding in physician.examined(os.path.abspath(spool_path(given.spool)), given.host):
        mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.fits]
        if finding.fits is False:
            code = os.EX_CONFIG
        if terminal.may_colour(1) and finding.fits is not None:
            mark = f"\x1b[{32 if finding.fits else 31}m{mark}\x1b[0m"
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        yield (
            1,
            f"{mark}{terminal.escaped(f'{finding.name}: {finding.says}{remedy}')}\n".encode(
                "utf-8", "backslashreplace"
            ),
        )
    return code


def completion(given: Given) -> Steps:
    from .. import completion as scripts

    yield 1, scripts.script(given.shell).encode()
    return os.EX_OK
