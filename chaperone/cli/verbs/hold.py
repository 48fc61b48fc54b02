"""
The verbs that hold programs, or fork chaperones: run, exec, adopt, launcher.

Knows: what their words mean.  Must not know: how a program is held, or a file name.
Their words are parsed without argparse: a chaperone keeps in memory what is imported here.
"""

from __future__ import annotations

import select

from ...cpython import os
from ...errors import TransitionError
from ..verb import (
    COMMAND,
    RUNS,
    SPECS,
    SPOOL,
    Argument,
    UsageError,
    is_agents,
    specs_given,
    spool_named,
    spool_path,
    verb,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..terminal import Terminal
    from ..verb import Given

PIPE_BUF = 4_096  # bytes that poll(2) promises room for, pipe(7)


@verb(
    "run a program and stay until it ends; print the run id first",
    SPECS,
    *COMMAND,
    SPOOL,
    Argument("--id", metavar="ID", help="the run id; default: the spec's, or a new one"),
    Argument("--detach", action="store_true", help="return as soon as the run directory exists"),
    Argument(
        "--warm",
        action="store_true",
        help="use the spool's launcher, if it runs; implies --detach",
    ),
    Argument("--exit-code", action="store_true", help="exit with the program's exit code"),
)
def run(given: Given, terminal: Terminal) -> int:
    texts = specs_given("run", given)
    leaves = given.detach or given.warm
    if given.exit_code and leaves:
        reason = "--exit-code waits for the end of the run, which --detach and --warm don't"
        raise UsageError(f"unable to understand 'chaperone run': {reason}")
    if is_agents(spool_named(given)):
        from .. import spools

        return spools.run(given, terminal, texts)
    path = _absolute(spool_path(given))
    from ...hold import inherited as shedding

    if leaves:
        from ...launch import run as runs

        return runs.run(texts, path, given.id, given.detach, os.getcwd(), warm=given.warm)
    caller = _Caller(shedding.print_run_id)
    cwd = os.getcwd()
    if len(texts) > 1 or shedding.leads_a_group():
        from ...launch import run as runs

        code = runs.run(texts, path, given.id, False, cwd, caller.visible, begun=caller.begun)
    else:  # without what several runs need
        from ...hold import begin

        ((name, text),) = texts
        shed = shedding.shed_inherited_state()
        spec = begin.canonical_spec(name, text, cwd)
        code = begin.hold_new_run(spec, path, given.id, shed, caller.visible, begun=caller.begun)
    if given.exit_code and code == os.EX_OK and caller.run_id is not None:
        return _exit_code(path, caller.run_id)
    return code


def _absolute(path: str) -> str:
    """As os.path.abspath: to import that takes 1.7 ms."""
    parts: list[str] = []
    for part in (path if path.startswith("/") else f"{os.getcwd()}/{path}").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


class _Caller:
    """
    Reports to the caller of `run` that the program could not be started: on its stderr, which a
    chaperone closes if it is a pipe. It is closed as soon as the program was started, because a
    reader may wait for its end.
    """

    def __init__(self, print_run_id: Callable[[str], None]) -> None:
        self.run_id: str | None = None  # of this process's run
        self._print_run_id = print_run_id
        self._stderr: int | None = None

    def visible(self, run_id: str) -> None:
        self._print_run_id(run_id)
        self.run_id = run_id
        try:
            self._stderr = os.dup(2)
        except OSError:  # the run goes on without
            self._stderr = None

    def begun(self, failure: str | None) -> None:
        stderr, self._stderr = self._stderr, None
        if stderr is None:
            return
        if failure is not None:
            _note(stderr, failure)
        os.close(stderr)


def _note(stderr: int, failure: str) -> None:
    """Print why a program could not be run; a reader that is stuck must not keep us."""
    from ...hold.inherited import PATIENCE_MS
    from ..terminal import escaped

    poll = select.poll()
    poll.register(stderr, select.POLLOUT)
    sentence = f"chaperone: {escaped(failure)}\n".encode()
    try:
        if poll.poll(PATIENCE_MS):
            os.write(stderr, sentence[:PIPE_BUF])
    except OSError:
        pass


def _exit_code(path: str, run_id: str) -> int:
    """The exit code of a published status; 125 if it can't be read."""
    from ...model import status as statuses
    from ...program.fds import owned
    from ...spool import format, look

    try:
        with owned(format.open_spool(path)) as spool_fd:
            with owned(format.open_run(spool_fd, run_id)) as run_fd:
                return statuses.exit_code(look.read_final(run_fd, run_id) or {"state": "lost"})
    except OSError:
        return 125


@verb(
    "run a program on this stdout and stderr, without a spool",
    SPECS,
    *COMMAND,
)
def exec_(given: Given, _: Terminal) -> int:
    import time

    from ...hold import begin, direct, guarding
    from ...hold import inherited as shedding
    from ...model import status as statuses
    from ...model import transitions

    ((name, text),) = specs_given("exec", given, at_most=1)
    spec = begin.canonical_spec(name, text, os.getcwd())
    inherited = shedding.shed_inherited_state()
    # It stays in the caller's session, so that Ctrl-C and the end of a terminal reach it.
    guard = guarding.fork(leave_session=False) if shedding.needs_guard(spec) else None
    run_id = spec["id"] or begin.new_id()
    spec = {**spec, "id": run_id}
    held = direct.DirectRun(run_id, os.urandom(16).hex())
    status = transitions.starting(spec, os.getpid(), os.uname().nodename, None, time.time_ns())
    if guard is not None:
        held.hand_to(guard, spec["output"]["max_bytes"])
    begin.hold(held, spec, status, inherited, guard)
    final = held.final
    if final is None:
        raise TransitionError("unable to report how the program ended: nothing was recorded")
    if final["state"] != "terminated":
        _note(2, str((final["exception"] or {}).get("message")))
    return statuses.exit_code(final)


@verb(
    "take over runs whose chaperone died; stay until they end",
    Argument("runs", metavar="RUN", nargs="*", help=f"{RUNS}; default: all that are unattended"),
    Argument("--detach", action="store_true", help="return as soon as they are taken over"),
    SPOOL,
)
def adopt(given: Given, _: Terminal) -> int:
    from ...hold import adopt as adopting
    from ...launch import run as runs
    from ..common import found_ids

    path = _absolute(spool_path(given))
    run_ids = found_ids(given, given.runs) if given.runs else adopting.unattended(path)
    return runs.adopt(path, run_ids, given.detach)


@verb(
    "fork chaperones quickly, for callers that use --warm",
    Argument("--idle", metavar="SECONDS", help="exit after so long without a request"),
    Argument("--detach", action="store_true", help="return as soon as it takes requests"),
    SPOOL,
)
def launcher(given: Given, _: Terminal) -> int:
    from ...launch import launcher as launchers

    idle_s = None if given.idle is None else _seconds("--idle", given.idle)
    return launchers.serve(_absolute(spool_path(given)), idle_s, given.detach)


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
