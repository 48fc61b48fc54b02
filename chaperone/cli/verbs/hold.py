"""
The verbs that hold programs, or fork what does: run, exec, adopt, launcher.

Knows: what their words ask for.  Must not know: how a program is held, or a file name.
Read without argparse: what is imported here is in the memory of a chaperone as long as its run.
"""

from __future__ import annotations

import os

from ...errors import TransitionError
from ..verb import COMMAND, RUNS, SPECS, SPOOL, Argument, UsageError, specs_given, spool_path, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..terminal import Terminal
    from ..verb import Given


@verb(
    "run a program and hold it to its end; print the run id first",
    SPECS,
    *COMMAND,
    SPOOL,
    Argument("--id", metavar="ID", help="the run's id, instead of the spec's or a new one"),
    Argument("--detach", action="store_true", help="return when the run directory is visible"),
    Argument(
        "--warm",
        action="store_true",
        help="let the spool's launcher start it, if one is there; implies --detach",
    ),
)
def run(given: Given, _: Terminal) -> int:
    texts = specs_given("run", given)
    from ...launch import run as runs

    path = spool_path(given)
    return runs.run(texts, path, given.id, given.detach, os.getcwd(), warm=given.warm)


@verb(
    "run a program with its streams as ours, exit as it does; no spool",
    SPECS,
    *COMMAND,
)
def exec_(given: Given, terminal: Terminal) -> int:
    import time

    from ...hold import begin, direct
    from ...hold import inherited as shedding
    from ...model import status as statuses
    from ...program import guard as guards

    ((name, text),) = specs_given("exec", given, at_most=1)
    spec = begin.canonical_spec(name, text, os.getcwd())
    inherited = shedding.shed_inherited_state()
    # In the caller's session, where Ctrl-C and the end of a terminal find it.
    guard = guards.fork(leave_session=False) if shedding.needs_guard(spec) else None
    run_id = spec["id"] or begin.new_id()
    spec = {**spec, "id": run_id}
    held = direct.DirectRun(run_id, os.urandom(16).hex())
    status = statuses.starting(spec, os.getpid(), os.uname().nodename, None, time.time_ns())
    if guard is not None:
        held.hand_to(guard, spec["output"]["max_bytes"])
    begin.hold(held, spec, status, inherited, guard)
    final = held.final
    if final is None:
        raise TransitionError("unable to tell how the program ended: nothing was recorded")
    if final["state"] != "terminated":
        terminal.note(str((final["exception"] or {}).get("message")))
    return statuses.exit_code(final)


@verb(
    "take over runs that outlived their chaperone, hold them to the end",
    Argument("runs", metavar="RUN", nargs="*", help=f"{RUNS}; default: all that are unattended"),
    Argument("--detach", action="store_true", help="return when they are taken over"),
    SPOOL,
)
def adopt(given: Given, _: Terminal) -> int:
    from ...hold import adopt as adopting
    from ...launch import run as runs
    from ..common import found_ids

    path = os.path.abspath(spool_path(given))
    run_ids = found_ids(given, given.runs) if given.runs else adopting.unattended(path)
    return runs.adopt(path, run_ids, given.detach)


@verb(
    "start runs from a warm image, for callers that ask by --warm",
    Argument("--idle", metavar="SECONDS", help="end when it was not asked for so long"),
    Argument("--detach", action="store_true", help="return when it can be asked"),
    SPOOL,
)
def launcher(given: Given, _: Terminal) -> int:
    from ...launch import launcher as launchers

    idle_s = None if given.idle is None else _seconds("--idle", given.idle)
    return launchers.serve(os.path.abspath(spool_path(given)), idle_s, given.detach)


def _seconds(option: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e10:
        raise UsageError(
            f"unable to understand {option!r}: want seconds from 0 to 1e10, got {text!r}"
        )
    return seconds
