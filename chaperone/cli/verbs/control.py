"""
The verbs that wait for runs or send requests to them: wait, stop, kill, signal.

Knows: what their words mean.  Must not know: how a request reaches a chaperone.
"""

from __future__ import annotations

import os

from ...errors import AgentError, NoRunError, SpoolError
from ..common import age_s, user_name
from ..spools import opened
from ..verb import A_RUN, RUNS, SPOOL, Argument, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...api import Waited
    from ...interface import RunLike
    from ...model.status import Status
    from ..terminal import Terminal
    from ..verb import Given

TIMED_OUT = 124  # as timeout(1) exits
LIVES = Argument("runs", metavar="LIVE", nargs="+", help=RUNS)
NO_WAIT = Argument(
    "--no-wait", action="store_true", help="return at once, not when the runs have ended"
)
BY = Argument(
    "--by", metavar="WORD", help="the requester, for the status; default: the user's name"
)


@verb(
    "wait for runs to end; exit with their highest exit code",
    Argument("runs", metavar="RUN", nargs="+", help=RUNS),
    Argument("--timeout", metavar="AGE", help=f"exit with {TIMED_OUT} after it: 90s, 12h"),
    SPOOL,
)
def wait(given: Given, terminal: Terminal) -> int:
    timeout_s = age_s("--timeout", given.timeout)
    runs = _runs(given, given.runs, terminal)
    from ...api import wait_each

    worst, waited = os.EX_OK, len(runs)
    for run, final in wait_each(runs, timeout_s):
        waited -= 1
        if final.state != "terminated":
            fate = "lost" if final.state == "lost" else "in error"
            terminal.note(f"run {run.run_id!r} is {fate}: {_message(final)}")
        worst = max(worst, final.exit_code)
    return TIMED_OUT if waited else worst


@verb(
    "stop runs: a signal, a grace, then SIGKILL; wait for their end",
    LIVES,
    Argument(
        "--grace", metavar="SECONDS", type=float, help="seconds before SIGKILL; default: the spec's"
    ),
    NO_WAIT,
    BY,
    SPOOL,
)
def stop(given: Given, terminal: Terminal) -> int:
    by = _by(given)
    return _end(given, terminal, lambda run: run.stop(given.grace, wait=False, by=by))


@verb(
    "send SIGKILL to all processes of runs; wait for their end",
    LIVES,
    NO_WAIT,
    BY,
    SPOOL,
)
def kill(given: Given, terminal: Terminal) -> int:
    by = _by(given)
    return _end(given, terminal, lambda run: run.kill(wait=False, by=by))


@verb(
    "send a signal to a run's program",
    Argument("run", metavar="LIVE", help=A_RUN),
    Argument("signal", metavar="SIG", help="USR1, SIGUSR1 or 10"),
    BY,
    SPOOL,
)
def signal(given: Given, terminal: Terminal) -> int:
    (run,) = _runs(given, [given.run], terminal)
    run.signal(given.signal, _by(given))
    return os.EX_OK


def _runs(given: Given, texts: list[str], terminal: Terminal) -> list[Waited]:
    with opened(given, terminal) as spool:
        return spool.runs(spool.meant(texts))


def _by(given: Given) -> str:
    """The requester, for the status."""
    return user_name() if given.by is None else str(given.by)


def _end(given: Given, terminal: Terminal, ask: Callable[[RunLike], object]) -> int:
    """
    Send a request to all runs before waiting for the first: so their graces run at the same time,
    and a run that can't take the request does not hinder the others.
    """
    asked, code = [], os.EX_OK
    for run in _runs(given, given.runs, terminal):
        try:
            ask(run)
            asked.append(run)
        except NoRunError as error:
            code = code or os.EX_NOINPUT
            terminal.note(str(error))
        except AgentError:  # it will refuse the others, too
            raise
        except SpoolError as error:
            code = code or os.EX_IOERR
            terminal.note(f"unable to send a request to run {run.run_id!r}: {error}")
    from ...api import wait_each

    for run, final in wait_each([] if given.no_wait else asked):
        if final.state == "lost":
            terminal.note(f"run {run.run_id!r} is lost: {_message(final)}")
    return code


def _message(final: Status) -> str:
    return str(final.exception and final.exception["message"])
