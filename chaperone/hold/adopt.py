"""
Adopts a run that outlived its chaperone: takes its lock, and holds it to its end.

Knows: which runs can be adopted, and how their status goes on.  Must not know: how a program is
reached, or a file name.
"""

from __future__ import annotations

import os
import time

from ..errors import NoRunError, SpoolError
from ..model import status as statuses
from ..model import transitions
from ..spool import format, look, takeover
from . import begin
from .inherited import detach_from_caller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .inherited import Visible


def unattended(spool_path: str) -> list[str]:
    """
    The ids of all runs whose chaperone died and whose program may still run; without those that an
    agent has.
    """
    spool_fd = format.open_spool(spool_path)
    try:
        return [
            run_id
            for run_id in format.live_ids(spool_fd)
            if _state(spool_fd, run_id) == ("unattended", None)
        ]
    finally:
        os.close(spool_fd)


def _state(spool_fd: int, run_id: str) -> tuple[object, str | None]:
    """The state of a run, None if it can't be read; and what feeds it, as `look.feeder`."""
    try:
        run_fd = format.open_run(spool_fd, run_id)
    except NoRunError:
        return None, None
    try:
        return look.look(run_fd, run_id)[1]["state"], look.feeder(look.read_spec(run_fd))
    except (NoRunError, SpoolError):
        return None, None
    finally:
        os.close(run_fd)


def hold_left_run(spool_path: str, run_id: str, inherited: dict[str, Any], visible: Visible) -> int:
    """
    Take over a run and hold it in this process, which `shed_inherited_state` has prepared.

    Args:
        spool_path (str): Absolute.
        run_id (str): Of an unattended run.
        inherited (dict): From `shed_inherited_state`.
        visible: Called with the run id when this process has the lock.
    Returns:
        int: As `begin.hold`.
    Raises:
        SpoolError: If it is not unattended, or can't be taken over.
    """
    spool_fd = format.open_spool(spool_path)
    try:
        state, feeder = _state(spool_fd, run_id)
        if feeder is not None:
            why = f"an agent has it; start {feeder} again"
            raise SpoolError(f"unable to adopt run {run_id!r}: {why}")
        if state != "unattended":
            why = f"it is {state}, not unattended" if state else "there is no such run"
            raise SpoolError(f"unable to adopt run {run_id!r}: {why}")
        run = takeover.take_over(spool_fd, spool_path, run_id)
        if run is None:
            why = "another process has taken its lock"
            raise SpoolError(f"unable to adopt run {run_id!r}: {why}")
        # Between our look and our lock, another chaperone adopted it, published its end, and died.
        if run.is_ended():
            run.close()
            raise SpoolError(f"unable to adopt run {run_id!r}: it has ended")
    finally:
        os.close(spool_fd)
    spec, status = look.read_spec(run.fd), look.read_live(run.fd, run_id)
    spec = {name: field for name, field in spec.items() if name not in ("version", "key")}
    if os.getsid(0) != os.getpid():
        os.setsid()
    if status["boot_id"] == look.boot_id():
        run.read_start()
    # The last renewal, by the clock of this boot, for `Limits`.
    look.mark(run.control_fd, look.since_s(os.fstat(run.control_fd), status["boot_id"]))
    state = (
        status["state"] if status["state"] not in statuses.FINAL else "running"
    )  # a final state counts only if it is published
    status = {
        **status,
        "state": state,
        "chaperone_pid": os.getpid(),
        "guard_pid": None,
        "chaperone_host": os.uname().nodename,
        "boot_id": look.boot_id(),
    }
    status = transitions.with_facts(
        status,
        connection={
            **(status["connection"] or {}),
            "state": "down",
            "since": statuses.timestamp(time.time_ns()),
        },
    )
    visible(run_id)
    detach_from_caller()
    return begin.hold(run, spec, status, inherited, adopted=True)
