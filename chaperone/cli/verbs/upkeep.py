"""
The verbs that look after a spool and a shell: reap, gc, completion.

Knows: what their words mean.  Must not know: a file of a spool.
"""

from __future__ import annotations

import errno
import os

from ...errors import AgentError, BusyError, SpoolError
from ..common import add_site_packages, age_s, found_ids, quantity
from ..spools import opened
from ..terminal import amount
from ..verb import RUNS, SPOOL, Argument, UsageError, spool_path, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..terminal import Terminal
    from ..verb import Given

SIZES = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
QUIET = ("alive", "ended")  # reap prints these only for runs that were named


@verb(
    "record runs whose chaperone died as lost; clear failed starts",
    Argument("runs", metavar="RUN", nargs="*", help=f"{RUNS}; default: all runs that need it"),
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
    Argument("--older", metavar="AGE", help="delete runs that ended longer ago: 7d, 12h, 90s"),
    Argument(
        "--keep-failed",
        metavar="AGE",
        help="keep runs that did not exit with 0 for this long",
    ),
    Argument(
        "--max-bytes",
        metavar="SIZE",
        help="then delete the oldest until the others take no more: 10G, 500M",
    ),
    Argument(
        "--uncollected",
        action="store_true",
        help="also delete runs that no scheduler has collected",
    ),
    Argument("--dry-run", action="store_true", help="delete nothing; print the ids"),
    SPOOL,
)
def gc(given: Given, terminal: Terminal) -> int:
    older_s = age_s("--older", given.older)
    keep_failed_s = age_s("--keep-failed", given.keep_failed)
    max_bytes = None
    if given.max_bytes is not None:
        want = "a size such as 10G or 500M"
        max_bytes = int(quantity("--max-bytes", given.max_bytes, SIZES, want))
    if older_s is None and max_bytes is None:
        raise UsageError(
            "unable to understand 'chaperone gc': want --older or --max-bytes,"
            " to choose what is deleted"
        )
    add_site_packages(terminal)
    from ...spool import gc as collecting

    summary = collecting.gc(
        os.path.abspath(spool_path(given)),
        older_s,
        keep_failed_s,
        max_bytes,
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
        # On stderr, so that cron mails it: otherwise the spool would grow without a word.
        terminal.note(
            f"{_runs(summary.spared)} spared: no scheduler has collected them;"
            " --uncollected deletes them too"
        )
    return os.EX_IOERR if summary.failed else os.EX_OK


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"


@verb(
    "delete runs that have ended, collected or not",
    Argument("runs", metavar="RUN", nargs="+", help=RUNS),
    SPOOL,
)
def rm(given: Given, terminal: Terminal) -> int:
    code = os.EX_OK
    with opened(given, terminal) as spool:
        runs = spool.runs(spool.meant(given.runs))
    for run in runs:
        try:
            run.delete()
        except (AgentError, BusyError):  # no other could be deleted now
            raise
        except SpoolError as error:
            code = code or (os.EX_CANTCREAT if error.errno == errno.EBUSY else os.EX_IOERR)
            terminal.note(str(error))
    return code


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
