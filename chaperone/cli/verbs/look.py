"""
The verbs that look at runs: ls, status.

Knows: what their words mean, which runs they choose.  Must not know: a file name.
"""

from __future__ import annotations

import os
import time

from ...errors import AgentError, NoRunError, SpoolError
from ...model import jsontext
from ...model import status as statuses
from ...spool import look
from .. import tables
from ..common import when_ns
from ..spools import opened
from ..terminal import indented
from ..verb import A_RUN, SPOOL, Argument, UsageError, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..terminal import Terminal
    from ..verb import Given

WHEN = "90s, 12h or 7d ago, yesterday, a date, or a time as in RFC 3339"


@verb(
    "list the live runs, and the ended runs that are not collected",
    Argument("prefixes", metavar="RUN", nargs="*", help="run ids, or prefixes of run ids"),
    Argument("--all", action="store_true", help="also list collected runs"),
    Argument("--state", metavar="STATE", help=f"only runs that are {', '.join(statuses.STATES)}"),
    Argument("--failed", action="store_true", help="only runs that did not end with exit code 0"),
    Argument("--label", metavar="NAME[=VALUE]", help="only runs with this label"),
    Argument("--host", metavar="HOST", help="only runs whose program is there"),
    Argument("--since", metavar="WHEN", help=f"only runs that ended later, or live: {WHEN}"),
    Argument("--until", metavar="WHEN", help="only runs that ended earlier"),
    Argument("--json", action="store_true", help="print each status as a line of JSON"),
    SPOOL,
)
def ls(given: Given, terminal: Terminal) -> int:
    import functools

    if given.state not in (None, *statuses.STATES):
        want = f"want one of {', '.join(statuses.STATES)}, got {given.state!r}"
        raise UsageError(f"unable to understand '--state': {want}")
    if given.label is not None and given.label[:1] in ("", "="):  # an unset shell variable
        want = f"want NAME[=VALUE], got {given.label!r}"
        raise UsageError(f"unable to understand '--label': {want}")
    now_ns = time.time_ns()
    since_ns = when_ns("--since", given.since, now_ns)
    until_ns = when_ns("--until", given.until, now_ns)
    found, unread = [], []
    with opened(given, terminal) as spool:
        known, collected = spool.ids(_prefixes(given), given.all, not given.json)
        wanted = sorted(run_id for run_id in known if run_id.startswith(_prefixes(given)))
        for run_id in wanted:
            try:
                status = spool.status(run_id)
                host = look.host(status, functools.partial(spool.spec, run_id))
            except AgentError:
                raise
            except NoRunError:  # about to appear, or gone since
                continue
            except SpoolError as error:  # the other runs may be readable
                unread.append(f"unable to read run {run_id!r}: {error}")
                continue
            end_ns = statuses.moment_ns(status["end_time"]) or now_ns
            if (since_ns or end_ns) <= end_ns <= (until_ns or end_ns) and _fits(status, given):
                if given.host in (None, host):
                    found.append((status, host))
    found.sort(key=lambda each: (str(each[0]["create_time"]), each[0]["run_id"]))
    if given.json:
        for status, _ in found:
            terminal.line(jsontext.dumps(status))
    else:
        now, colour = now_ns / 1e9, terminal.may_colour()
        table = tables.table(found, now, terminal.width(), colour, known)
        terminal.text(table + (f"{collected} collected: --all\n" if collected else ""))
    for sentence in unread:
        terminal.note(sentence)
    return os.EX_IOERR if unread else os.EX_OK


def _prefixes(given: Given) -> tuple[str, ...]:
    return tuple(given.prefixes) or ("",)


def _fits(status: dict[str, Any], given: Given) -> bool:
    name, equals, value = (given.label or "").partition("=")
    labels = status["labels"]
    if name and (name not in labels or (equals and labels[name] != value)):
        return False
    if given.failed and (status["state"] not in statuses.FINAL or status["return_code"] == 0):
        return False
    return given.state in (None, status["state"])


@verb("print the status of a run as JSON", Argument("run", metavar="RUN", help=A_RUN), SPOOL)
def status(given: Given, terminal: Terminal) -> int:
    with opened(given, terminal) as spool:
        (run_id,) = spool.meant([given.run])
        found = spool.status(run_id)
    show = indented if terminal.is_terminal() else jsontext.dumps
    terminal.text(f"{show(found)}\n")
    return os.EX_OK
