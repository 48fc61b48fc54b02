"""
How a process begins to hold a run, that is, becomes its chaperone: it creates the run directory,
and chooses the class of the program.

Knows: sessions, the classes of programs.  Must not know: how a program is held, or a file name.
"""

from __future__ import annotations

import gc
import time

from ..cpython import os
from ..errors import SpecError
from ..model import jsontext, transitions
from ..model import spec as specs
from ..model import status as statuses
from ..program import cgroup
from ..program.fds import NULL
from ..program.local import LocalProgram
from ..spool import look, run_directory
from . import guarding
from .chaperone import Chaperone
from .inherited import detach_from_caller, needs_guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..program.guard import Guard
    from ..program.interface import Program, RunStore
    from .chaperone import Begun
    from .inherited import Visible


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


def rehearse(text: bytes) -> None:
    """
    Call the functions that a start calls, as far as they change nothing outside this process.

    A process that the launcher forked shares its memory pages, and the kernel copies each page at
    the first write. A rehearsal causes these copies before the request for a run arrives.
    Measured with and without, in alternation: the time from a request to the exec is 10 to 15 %
    shorter, and a run takes 2 % more CPU time.

    Args:
        text (bytes): JSON of a canonical spec with an id.
    """
    spec: Any = jsontext.loads(text)
    status = _starting(spec, None)
    jsontext.dumps(transitions.running(status, os.getpid(), time.time_ns()))
    cgroup.oom_kills(cgroup.counter())


def _starting(spec: dict[str, Any], guard: Guard | None) -> dict[str, Any]:
    """The first status of a run that this process holds."""
    host, boot_id = os.uname().nodename, look.boot_id()
    return {
        **transitions.starting(spec, os.getpid(), host, boot_id, time.time_ns()),
        "guard_pid": None if guard is None else guard.pid,
    }


def hold_new_run(
    spec: dict[str, Any],
    spool_path: str,
    run_id: str | None,
    inherited: dict[str, Any],
    visible: Visible,
    key: str | None = None,
    guard: Guard | None = None,
    begun: Begun | None = None,
) -> int:
    """
    Create the run directory and hold the run in this process, which `shed_inherited_state` has
    prepared.

    Args:
        spec (dict): Canonical.
        spool_path (str): Absolute.
        run_id (str): Instead of the spec's, or None.
        inherited (dict): From `shed_inherited_state`.
        visible: Called with the run id when the run directory exists.
        key (str): Of the run, so that the process that starts it can recognize its own run. If it
            is None, a new key is made.
        guard (Guard): The guard that this process already has; it is released if the run needs
            none. If it is None and the run needs one, this process forks and becomes the guard, and
            only the child returns.
        begun: As for `Chaperone`.
    Returns:
        int: As `hold`.
    """
    chosen = run_id if run_id is not None else spec["id"] or new_id()
    if not specs.is_run_id(chosen):
        raise SpecError(f"unable to start run {chosen!r}: want an id {specs.ID_FORM}")
    spec = {**spec, "id": chosen}
    if not needs_guard(spec):
        if guard is not None:
            guard.release()
        guard = None
        if os.getsid(0) != os.getpid():
            os.setsid()
    elif guard is None:
        guard = guarding.fork()
    status = _starting(spec, guard)
    kept = spec if spec["keep_secrets"] else specs.without_secrets(spec)
    # Opened and imported now: once the run exists, a lack of fds must not end this process.
    null = os.open(NULL, os.O_RDWR)
    if spec["output"]["timeline"]:
        from ..spool import timeline  # noqa: F401
    max_bytes = spec["output"]["max_bytes"]
    directory = run_directory.create(
        spool_path,
        kept,
        spec,
        status,
        key or os.urandom(16).hex(),
        lambda run: None if guard is None else run.hand_to(guard, max_bytes),
    )
    visible(chosen)
    detach_from_caller(null)
    return hold(directory, spec, status, inherited, guard, begun=begun)


def hold(
    run: RunStore,
    spec: dict[str, Any],
    status: dict[str, Any],
    inherited: dict[str, Any],
    guard: Guard | None = None,
    adopted: bool = False,
    begun: Begun | None = None,
) -> int:
    """
    Stay with one program to its end.

    Args:
        run (RunStore): Visible and locked; closed at the end.
        spec (dict): Canonical, with its secrets.
        status (dict): `starting`, as in running.json.
        inherited (dict): `env` (dict of bytes) and `umask` (int) as the chaperone was started with.
        guard (Guard): The guard of this process; None if the run has none.
        adopted (bool): Whether the program was started by another chaperone, which has died; then
            `status` is the last one that it recorded.
        begun: As for `Chaperone`.
    Returns:
        int: os.EX_OK if the outcome is recorded, whatever it is; os.EX_IOERR if it could not be.
    """
    # The objects that imports made are never freed. Without freeze() each collection would visit
    # them, which takes 1 ms and copies the pages that are shared with the guard.
    gc.freeze()
    gc.enable()
    left = status if adopted else None
    begun = begun or (lambda failure: None)
    try:
        chaperone = Chaperone(
            run,
            spec,
            status,
            lambda chaperone: _program(spec, chaperone, inherited, run.key, guard, left),
            begun,
        )
    except OSError as error:  # such as a lack of fds; nothing was started
        if adopted:
            raise
        message = f"unable to start the program: {error.strerror}"
        try:
            run.publish(
                transitions.failed(
                    status, "spawn", message, time.time_ns(), errno=error.errno, started=False
                )
            )
            run.end(spec["durable"])
        finally:
            run.close()
        begun(message)
        return os.EX_OK
    if spec["callback"] is not None and not adopted:
        # The chaperone itself posts nothing: a run must not depend on a network.
        chaperone.log(
            "callback: posted only while `chaperone agent` or `chaperone serve` runs here"
        )
        if spec["callback"]["method"] == "GET":
            chaperone.log("callback.method: GET is treated as POST: a GET carries no output")
    # A spec of version 0.1 has no such field.
    if spec["output"].get("timeline") and isinstance(run, run_directory.RunDirectory):
        from ..spool import timeline

        run.timeline = timeline.kept(run.fd, chaperone.streams, chaperone.loop, chaperone.log)
    with chaperone:
        code = chaperone.hold()
        if any(stream.waiting for stream in chaperone.streams.values()):
            from .direct import see_off

            see_off(chaperone)
        return code


def _program(
    spec: dict[str, Any],
    chaperone: Chaperone,
    inherited: dict[str, Any],
    cookie: str,
    guard: Guard | None,
    left: dict[str, Any] | None,
) -> Program:
    """
    Make the program object that the spec requires. No other function chooses its class.

    The modules of `farside` are imported only if they are needed.
    """
    if needs_guard(spec):
        return LocalProgram(spec, chaperone, inherited, guard)
    if spec["remote"] is not None and not spec["remote"]["supervise"]:
        from ..farside.unsupervised import UnsupervisedProgram

        return UnsupervisedProgram(spec, chaperone)
    from ..farside.remote import RemoteProgram

    return RemoteProgram(spec, chaperone, inherited, cookie, left)
