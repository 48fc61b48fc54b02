"""
The verbs that look after a spool and a shell: reap, gc, completion.

Knows: what their words ask for.  Must not know: a file of a spool.
"""

from __future__ import annotations

import os

from ..common import (
    RUNS,
    SPOOL,
    Argument,
    UsageError,
    add_site_packages,
    found_ids,
    spool_path,
    verb,
)
from ..terminal import amount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..common import Given
    from ..terminal import Terminal

AGES = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
SIZES = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
QUIET = ("alive", "ended")  # what reap does not say of runs that were not named


@verb(
    "publish the loss of runs whose chaperone died, sweep dead starts",
    Argument("runs", metavar="RUN", nargs="*", help=f"{RUNS}; default: all that need it"),
    SPOOL,
)
def reap(given: Given, terminal: Terminal) -> int:
    add_site_packages(terminal)
    from ...spool import reap as reaping

    named = found_ids(given, given.runs) if given.runs else None
    code = os.EX_OK
    for reaped in reaping.reap(os.path.abspath(spool_path(given)), named):
        if reaped.done == "failed":
            code = os.EX_IOERR
            terminal.note(f"unable to reap run {reaped.run_id!r}: {reaped.says}")
            continue
        if reaped.done == "waiting":
            code = code or os.EX_TEMPFAIL
        if named or reaped.done not in QUIET:
            terminal.line(f"{reaped.run_id}: {reaped.done}: {reaped.says}")
    return code


@verb(
    "delete ended runs",
    Argument("--older", metavar="AGE", help="those that ended longer ago: 7d, 12h, 90s"),
    Argument(
        "--keep-failed",
        metavar="AGE",
        help="but those that did not exit with 0 only if they ended longer ago than this",
    ),
    Argument(
        "--max-bytes",
        metavar="SIZE",
        help="then the oldest, until the rest takes no more: 10G, 500M",
    ),
    Argument(
        "--uncollected",
        action="store_true",
        help="the runs, too, that no scheduler has collected",
    ),
    Argument("--dry-run", action="store_true", help="delete nothing, print the ids"),
    SPOOL,
)
def gc(given: Given, terminal: Terminal) -> int:
    older_s = _quantity("--older", given.older, AGES, "an age such as 7d, 12h or 90s")
    keep_failed_s = _quantity(
        "--keep-failed", given.keep_failed, AGES, "an age such as 30d, 12h or 90s"
    )
    max_bytes = _quantity("--max-bytes", given.max_bytes, SIZES, "a size such as 10G or 500M")
    if older_s is None and max_bytes is None:
        raise UsageError(
            "unable to understand 'chaperone gc': want --older or --max-bytes,"
            " or nothing would be deleted"
        )
    add_site_packages(terminal)
    from ...spool import gc as collecting

    summary = collecting.gc(
        os.path.abspath(spool_path(given)),
        older_s,
        keep_failed_s,
        None if max_bytes is None else int(max_bytes),
        given.dry_run,
        terminal.progress,
        given.uncollected,
    )
    terminal.wipe_progress()
    if given.dry_run:
        for run_id in summary.removed:
            terminal.line(run_id)
    for sentence in summary.failed:
        terminal.note(sentence)
    # A dry run measures sizes only for --max-bytes.
    known = summary.freed or not given.dry_run
    size = f" ({amount(summary.freed)} bytes)" if known else ""
    done = "would remove" if given.dry_run else "removed"
    terminal.line(
        f"{done} {len(summary.removed)} runs{size}; left: {summary.kept} ended, {summary.live} live"
    )
    if summary.spared:
        # On stderr: cron sends it to the one whose spool would otherwise grow for ever.
        terminal.note(
            f"{_runs(summary.spared)} spared: no scheduler has collected them;"
            " --uncollected deletes them too"
        )
    return os.EX_IOERR if summary.failed else os.EX_OK


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"


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
        raise UsageError(f"unable to understand {option!r}: want {want}, got {text!r}")
    return value


@verb(
    "print the completion script of a shell",
    Argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish"),
)
def completion(given: Given, terminal: Terminal) -> int:
    with open(script_path(given.shell), "rb") as file:
        terminal.data(file.read())
    return os.EX_OK


def script_path(shell: str) -> str:
    """Where the script of a shell is shipped; `cli/completion.py` makes it."""
    cli = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.join(cli, "shells", f"chaperone.{shell}")
