"""
`chaperone run` and `chaperone adopt`: one process for each run, this one or a child.

Knows: processes, exit codes.  Must not know: how a program is held, or a file name.
"""

from __future__ import annotations

import os

from ..cpython import signal
from ..errors import SpecError
from ..hold.begin import canonical_spec, hold_new_run, new_id
from ..hold.inherited import leads_a_group, print_run_id, shed_inherited_state
from ..model import jsontext
from .process import KEY_MARK, exit_code, visible_or_ended

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..hold.chaperone import Begun
    from ..hold.inherited import Visible

    Call = Callable[[Visible], int]

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def run(
    texts: list[tuple[str, bytes]],
    spool_path: str,
    run_id: str | None,
    detach: bool,
    cwd: str,
    visible: Visible = print_run_id,
    warm: bool = False,
    begun: Begun | None = None,
) -> int:
    """
    Make this process the chaperone of a run, and stay until the run ends. For several runs, or if
    this process can't be a chaperone, make a child for each.

    It returns, or raises, in such a child too; the caller only exits with the result.

    Args:
        texts (list): Specs: (name for messages, JSON).
        spool_path (str): Made if it is missing; relative to `cwd`.
        run_id (str): Instead of the spec's id; None for the spec's id, or a new one.
        detach (bool): Return when the run directory is visible.
        cwd (str): Absolute; relative paths of a spec start there.
        visible: Called with the run id as soon as the run directory exists.
        warm (bool): Use the spool's launcher, if there is one, and return when the run directory
            exists.
        begun: Called once in the process that holds the run: with None when the program was
            started, with a sentence when it could not be.
    Returns:
        int: The exit code: of several the first that is not 0.
    Raises:
        SpecError: If a spec or the id is invalid; no run directory was made.
        RunExistsError, SpoolError: If the run directory can't be created.
    """
    if run_id is not None and len(texts) > 1:
        why = "each run needs an id of its own"
        raise SpecError(f"unable to start {len(texts)} runs with id {run_id!r}: {why}")
    inherited = shed_inherited_state()
    path = os.path.join(cwd, spool_path)

    def held_of(name: str, text: bytes) -> Call:
        if warm:
            return lambda tell: _asked(name, text, cwd, path, run_id, inherited, tell)
        text, mark, key = text.partition(KEY_MARK)
        if mark and not _is_key(key):
            raise SpecError(f"unable to read spec {name!r}: want JSON, got a NUL byte")
        given = key.decode() or None
        return lambda tell: hold_new_run(
            canonical_spec(name, text, cwd), path, run_id, inherited, tell, given, begun=begun
        )

    return _each([held_of(name, text) for name, text in texts], detach or warm, visible)


def _is_key(text: bytes) -> bool:
    return len(text) == 32 and not set(text) - set(b"0123456789abcdef")


def adopt(
    spool_path: str, run_ids: list[str], detach: bool, visible: Visible = print_run_id
) -> int:
    """
    Make this process the chaperone of a run that outlived its own, as `run` does for a new one; of
    several, children.

    Args:
        spool_path (str): Absolute.
        run_ids (list): Of runs that are unattended.
        detach (bool): Return when their locks are taken.
        visible: Called with the run id when its lock is taken.
    Raises:
        SpoolError: If a run can't be taken over.
    """
    from ..hold import adopt as adopting

    inherited = shed_inherited_state()

    def held_of(run_id: str) -> Call:
        return lambda tell: adopting.hold_left_run(spool_path, run_id, inherited, tell)

    return _each([held_of(run_id) for run_id in run_ids], detach, visible)


def _each(calls: list[Call], detach: bool, visible: Visible) -> int:
    """Hold one run in this process; several, or one that can't be held here, in children."""
    if not detach and len(calls) == 1 and not leads_a_group():
        return calls[0](visible)
    children: list[tuple[int, int]] = []
    for call in calls:
        reading, telling = os.pipe()
        pid = os.fork()
        if not pid:
            for _, fd in (*children, (0, reading)):
                os.close(fd)
            return call(_both(visible, telling))
        os.close(telling)
        children.append((pid, reading))
    codes = visible_or_ended(children) if detach else _ended(children)
    return next((code for code in codes if code), os.EX_OK)


def _asked(
    name: str,
    text: bytes,
    cwd: str,
    path: str,
    run_id: str | None,
    inherited: dict[str, Any],
    visible: Visible,
) -> int:
    """Let the launcher start the run; if it can't, hold it in this process."""
    from . import client

    spec = canonical_spec(name, text, cwd)
    spec["id"] = run_id if run_id is not None else spec["id"] or new_id()
    given = {"env": client.decoded(os.environb), "umask": inherited["umask"]}
    codes: list[int] = []
    request = jsontext.dumps(spec).encode()

    if client.start_warm(
        path,
        spec["id"],
        request,
        given,
        lambda: codes.append(hold_new_run(spec, path, None, inherited, visible)),
        on_demand=False,
    ):
        visible(spec["id"])
        return os.EX_OK
    return codes[0]


def _both(visible: Visible, telling: int) -> Visible:
    """Report the run directory to the caller, and to the process that forked this one."""

    def tell(run_id: str) -> None:
        visible(run_id)
        try:
            os.write(telling, b"\n")
        except OSError:  # it has gone; the run goes on
            pass
        os.close(telling)

    return tell


def _ended(children: list[tuple[int, int]]) -> list[int]:
    """The exit code of each child; signals to this process are passed on to them."""
    living = {pid for pid, _ in children}

    def forward(number: int, frame: object) -> None:
        for pid in living:
            os.kill(pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.signal(
        signal.SIGHUP, signal.SIG_IGN
    )  # as the chaperone itself: a terminal's death is not the run's
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    codes = []
    for pid, _ in children:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        living.discard(pid)  # before it is reaped: from then on the pid may be someone else's
        codes.append(exit_code(os.waitpid(pid, 0)[1]))
    return codes
