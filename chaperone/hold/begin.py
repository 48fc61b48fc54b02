"""
How a process becomes the chaperone of a run: what it sheds, the run directory it makes, and the
kind of program it is to hold.

Knows: inherited fds, signals, sessions, stdout; the kinds of programs.  Must not know: how a
program is held, or a file name.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time

from ..errors import SpecError
from ..model import jsontext
from ..model import spec as specs
from ..model import status as statuses
from ..model.cpython import environ, signal
from ..program.local import LocalProgram
from ..spool import look, run_directory
from .chaperone import Chaperone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..program.interface import Program, RunStore

    Visible = Callable[[str], None]

ALL_SIGNALS = sorted(signal.valid_signals())
KEPT_IGNORED = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
)  # a write that fails is told by errno, it must not kill a chaperone
PATIENCE_MS = (
    1_000  # for a full pipe on stdout to take the run id: then the program starts all the same
)


def shed_inherited_state() -> dict[str, Any]:
    """
    Shake off what a process inherits that could harm a run. Signals stay blocked until `hold` can
    answer them.

    Returns:
        dict: What belongs to the program: `env` (dict of bytes) and `umask` (int).
    Source: design of dumb-init and s6; signal(7), "an ignored SIGCHLD makes wait4(2) say ECHILD".
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ALL_SIGNALS)
    # Closed fds first: else the lock becomes fd 0, and the program inherits our pulse.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number in ALL_SIGNALS:
        wanted = signal.SIG_IGN if number in KEPT_IGNORED else signal.SIG_DFL
        if signal.getsignal(number) not in (
            wanted,
            None,
        ):  # None: libc keeps it; to ask first saves 120 system calls
            signal.signal(number, wanted)
    for fd in _open_fds():
        if fd > 2:
            try:
                os.close(fd)
            except OSError:  # it was the listing's own
                pass
    # what a run imports later is not to be kept with our umask, where no other user could read it
    sys.dont_write_bytecode = True
    return {"env": dict(environ), "umask": os.umask(0o077)}


def _open_fds() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except FileNotFoundError:
        return list(range(os.sysconf("SC_OPEN_MAX")))


def new_id() -> str:
    """A run id that sorts by time: `20261123T201426.123456-5f0c9a1e`, UTC, the rest random."""
    moment = statuses.timestamp(time.time_ns())
    return moment[:-1].replace("-", "").replace(":", "") + "-" + os.urandom(4).hex()


def canonical_spec(name: str, text: bytes, cwd: str) -> dict[str, Any]:
    """
    The canonical form of a spec's text.

    Raises:
        SpecError: `unable to read spec NAME: PATH: want WANT, got GOT`.
    """
    try:
        return specs.checked(jsontext.loads(text), cwd)
    except ValueError as error:
        raise SpecError(f"unable to read spec {name!r}: {error}") from error


def hold_new_run(
    spec: dict[str, Any],
    spool_path: str,
    run_id: str | None,
    inherited: dict[str, Any],
    visible: Visible,
    key: str | None = None,
) -> int:
    """
    Create the run directory and hold the run in this process, which `shed_inherited_state` has
    prepared.

    Args:
        spec (dict): Canonical.
        spool_path (str): Absolute.
        run_id (str): Instead of the spec's, or None.
        inherited (dict): From `shed_inherited_state`.
        visible: Called with the run id when the run directory is there.
        key (str): The run's, by which a starter tells its own run from another's; None for a new
            one.
    Returns:
        int: As `hold`.
    """
    chosen = run_id if run_id is not None else spec["id"] or new_id()
    if not specs.is_run_id(chosen):
        raise SpecError(
            f"unable to start run {chosen!r}: want an id of [A-Za-z0-9][A-Za-z0-9._-]* and at most 128 characters"
        )
    spec = {**spec, "id": chosen}
    if os.getsid(0) != os.getpid():
        os.setsid()
    status = statuses.starting(
        spec, os.getpid(), os.uname().nodename, look.boot_id(), time.time_ns()
    )
    kept = spec if spec["keep_secrets"] else specs.without_secrets(spec)
    null = os.open(
        os.devnull, os.O_RDWR
    )  # now: once the run is there, want of a descriptor must not end us
    directory = run_directory.create(spool_path, kept, spec, status, key or os.urandom(16).hex())
    visible(chosen)
    detach_from_caller(null)
    return hold(directory, spec, status, inherited)


def hold(
    run: RunStore,
    spec: dict[str, Any],
    status: dict[str, Any],
    inherited: dict[str, Any],
    adopted: bool = False,
) -> int:
    """
    Stay with one program to its end.

    Args:
        run (RunStore): Visible and locked; closed at the end.
        spec (dict): Canonical, with its secrets.
        status (dict): `starting`, as in running.json.
        inherited (dict): `env` (dict of bytes) and `umask` (int) as the chaperone was started with.
        adopted (bool): Its program was started by a chaperone that died; `status` is the last one
            it left.
    Returns:
        int: os.EX_OK when the outcome is recorded, whatever it was; os.EX_IOERR when it could not
            be.
    """
    left = status if adopted else None
    try:
        chaperone = Chaperone(
            run, spec, status, lambda chaperone: _program(spec, chaperone, inherited, run.key, left)
        )
    except OSError as error:  # no descriptor is left, say; nothing was started
        if adopted:
            raise
        message = f"unable to begin: {error.strerror}"
        try:
            run.publish(
                statuses.failed(
                    status, "spawn", message, time.time_ns(), errno=error.errno, started=False
                )
            )
            run.end(spec["durable"])
        finally:
            run.close()
        return os.EX_OK
    with chaperone:
        return chaperone.hold()


def _program(
    spec: dict[str, Any],
    chaperone: Chaperone,
    inherited: dict[str, Any],
    cookie: str,
    left: dict[str, Any] | None,
) -> Program:
    """
    The one place where the kind of a program is chosen; what is not needed for it is not imported.
    """
    if spec["remote"] is None and spec["on_disconnect"] == "kill":
        return LocalProgram(spec, chaperone, inherited, cookie)
    if spec["remote"] is not None and not spec["remote"]["supervise"]:
        from ..farside.unsupervised import UnsupervisedProgram

        return UnsupervisedProgram(spec, chaperone)
    from ..farside.remote import RemoteProgram

    return RemoteProgram(spec, chaperone, inherited, cookie, left)


def detach_from_caller(null: int | None = None) -> None:
    """
    Let go of the caller's pipes and directory: nothing that happens to them changes anything any
    more, and no mount is pinned.

    A stderr that is a file stays, beside a terminal: nobody waits for its end, and where the spool
    is gone it alone can tell so.

    Args:
        null (int): An fd of /dev/null, closed here; None to open one.
    """
    null = os.open(os.devnull, os.O_RDWR) if null is None else null
    for fd in range(3):
        if not os.isatty(fd) and not (fd == 2 and _is_named_file(fd)):
            os.dup2(null, fd)
    os.close(null)
    os.chdir("/")


def _is_named_file(fd: int) -> bool:
    found = os.fstat(fd)
    return (
        stat.S_ISREG(found.st_mode) and found.st_nlink > 0
    )  # a starter's file in memory has no name, and should go with the starter


def print_run_id(run_id: str) -> None:
    """Print a run id, now: on a stdout that nobody reads it is lost, and nothing else."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    try:
        if poll.poll(PATIENCE_MS):
            os.write(1, f"{run_id}\n".encode())
    except OSError:
        pass
