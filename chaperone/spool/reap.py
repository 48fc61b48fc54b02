"""
Repairs what dead chaperones and dead starters left: missing outcomes, incomplete endings, build
directories.

Knows: the order of the writes, and what a death between two of them leaves.  Must not know: how a
program is reached.  It sends no signal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import attrs

from ..errors import NoRunError, SpoolError
from ..model import status as statuses
from ..model import transitions
from ..program.fds import owned
from . import format, locks, look, takeover
from .run_directory import RunDirectory
from .sweep import Memory, sweep

# The far side's watchdog looks every 5 s, and its KILL may come 3 s after the grace (measured,
# docs/far-side.rst); rounded up.
FAR_SLACK_S = 10
SETTLED = ("lost", "finished", "ended", "swept")  # `Reaped.done` that leaves nothing more to do


@attrs.frozen(kw_only=True)
class Reaped:
    """
    What `reap` did for one run.

    Attributes:
        run_id (str): The run; for `swept` without a run, the name of what was removed.
        done (str): `lost` (its final status was published), `finished` (its ending was completed),
            `swept` (leftovers were removed), `failed`; or nothing was done: `alive`, `ended`,
            `unattended` (it can be adopted), `waiting` (its guard still works).
        says (str): The same as a sentence.
    """

    run_id: str
    done: str
    says: str


def reap(spool_path: str, run_ids: list[str] | None = None) -> list[Reaped]:
    """
    Publish `lost` for runs whose chaperone died, and finish what dead chaperones and starters left
    half done (rule R6).

    Args:
        spool_path (str): Of an existing spool.
        run_ids (list): Only these runs, each under its own lock, also while another sweep works.
            None for a sweep of all runs that may need it, and of what dead starters left.
    Returns:
        list: Of `Reaped`, in the order of the ids.
    Raises:
        BusyError: If another sweep works.
        SpoolError: If the spool can't be used.
        NoRunError: If one of `run_ids` does not exist.
    """
    with owned(format.open_spool(spool_path)) as spool_fd:
        for name in (format.RUNNING, format.ENDED):
            format.make_directory(name, spool_fd)
        if run_ids is not None:
            return [_reaped(spool_fd, spool_path, run_id) for run_id in run_ids]
        with sweep(spool_fd, spool_path) as memory:
            others = _not_live(spool_fd, memory)
            done = list(_reaped_all(spool_fd, spool_path, others))
            swept = _swept(spool_fd, memory)
            # The next sweep finds what is in .running/, and only a look at all finds the others.
            hidden = [one for one in done if one.run_id in others]
            if swept is not None and all(one.done in SETTLED for one in [*hidden, *swept]):
                memory.keep()
            return [*done, *(swept or [])]


def _reaped_all(spool_fd: int, path: str, others: list[str]) -> Iterator[Reaped]:
    for run_id in sorted({*format.live_ids(spool_fd), *others}):
        try:
            yield _reaped(spool_fd, path, run_id)
        # Its starter died before the run appeared, or gc deleted the run: `_swept` clears up.
        except NoRunError:
            pass


def _not_live(spool_fd: int, memory: Memory) -> list[str]:
    """
    Runs that have a lock and no entry in .running/: they have not ended to their last step, or a
    power cut has taken their entry. Only after a boot the lock of each old run is looked for.
    """
    if memory.nothing_changed:
        return []
    ids = format.ended_ids(spool_fd) if memory.is_of_this_boot else format.all_ids(spool_fd)
    live = frozenset(format.live_ids(spool_fd))
    return [run_id for run_id in ids if run_id not in live and format.has_lock(spool_fd, run_id)]


def _reaped(spool_fd: int, path: str, run_id: str) -> Reaped:
    with owned(format.open_run(spool_fd, run_id)) as run_fd:
        try:
            verdict = _needs_nothing(spool_fd, run_fd, run_id) or _taken_over(
                spool_fd, path, run_id
            )
        except NoRunError:
            raise
        except SpoolError as error:
            verdict = "failed", str(error)
    return Reaped(run_id=run_id, done=verdict[0], says=verdict[1])


def _needs_nothing(spool_fd: int, run_fd: int, run_id: str) -> tuple[str, str] | None:
    """Why a run is left as it is, as (done, says); None if its lock is to be taken."""
    pulse = look.pulse(run_fd)
    if pulse:
        return "alive", "its chaperone is running"
    ended = look.read_final(run_fd, run_id) is not None
    if pulse is None and ended:
        return "ended", "nothing is left to do"
    if pulse is None and not format.is_path_of(spool_fd, run_id, run_fd):
        raise NoRunError(f"unable to reap run {run_id!r}: it is being deleted")
    if pulse is None:
        return "failed", "its lock is gone, so nothing shows whether its chaperone is running"
    if not ended and (left_s := _adoptable_s(run_fd, run_id)) > 0:
        feeder = look.feeder(look.read_spec(run_fd))
        without = "its chaperone: adopt it" if feeder is None else f"{feeder}: start that again"
        return "unattended", f"it may run for {left_s:.0f} s more without {without}"
    return None


def _taken_over(spool_fd: int, path: str, run_id: str) -> tuple[str, str]:
    run = takeover.take_over(spool_fd, path, run_id)
    if run is None:
        return "alive", "another process has taken its lock"
    try:
        return _recovered(run)
    except OSError as error:
        return "failed", str(format.failure(f"publish the status of run {run_id!r}", error))
    finally:
        run.close()


def _adoptable_s(run_fd: int, run_id: str) -> float:
    return look.leased_s(run_fd, look.read_spec(run_fd), look.read_live(run_fd, run_id)["boot_id"])


def _recovered(run: RunDirectory) -> tuple[str, str]:
    """Repair a run whose lock we hold; returns (done, says)."""
    spec = look.read_spec(run.fd)
    durable = spec.get("durable") is True
    final = look.read_final(run.fd, run.run_id)
    if final is not None:
        # A run without an entry was collected; but if this host was booted since, a power failure
        # may have lost the entry.
        if final["boot_id"] != look.boot_id() and not run.has_entry():
            run.enter()
        run.end(durable)
        return "finished", f"its ending is complete now; it is {final['state']}"
    status = look.read_live(run.fd, run.run_id)
    left_s = look.leased_s(run.fd, spec, status["boot_id"])
    if left_s > 0:
        return "unattended", "it was adopted meanwhile, and may run on without its chaperone"
    if not takeover.wait_for_guard(run):
        return "waiting", "its guard is still ending its program: try again"
    final = _lost(run, spec, status, left_s)
    run.enter()
    run.publish(final, durable)
    run.end(durable)
    return "lost", final["exception"]["message"]


def _lost(
    run: RunDirectory, spec: dict[str, Any], status: dict[str, Any], left_s: float
) -> dict[str, Any]:
    """The final status, with everything that is still known."""
    now_ns = time.time_ns()
    message = transitions.DIED
    gone_by = None
    remote = spec.get("remote")
    if (feeder := look.feeder(spec)) is not None:
        message = f"{feeder} died before the program's end was recorded, and its lease is over"
        if spec.get("renew") is not None:  # nothing else ends a program that an agent has
            wait_s = _far_end_s({**spec, "remote": None}, left_s)
            gone_by = None if wait_s is None else statuses.timestamp(now_ns + int(wait_s * 1e9))
    elif spec.get("on_disconnect") == "survive" or isinstance(remote, dict):
        survives = spec.get("on_disconnect") == "survive"
        wait_s = _far_end_s(spec, left_s if survives else spec.get("lease"))
        gone_by = None if wait_s is None else statuses.timestamp(now_ns + int(wait_s * 1e9))
        message += ", and its lease is over" if survives else ""
    elif status["chaperone_host"] == os.uname().nodename and run.key:
        left = run.guards_word() if status["boot_id"] == look.boot_id() else []
        gone_by = statuses.timestamp(now_ns) if left == [] else None
        message += f"; still running: {', '.join(map(str, left))}" if left else ""
    sizes = {name: {**status[name], "bytes": run.size_of(name)} for name in run.streams}
    return {**transitions.lost(status, message, gone_by, now_ns), **sizes}


def _far_end_s(spec: dict[str, Any], lease_s: object) -> float | None:
    """
    After how many seconds the far side has certainly ended the program by itself; None if nothing
    there does.
    """
    stop, remote = spec.get("stop"), spec.get("remote")
    grace_s = stop.get("grace_period") if isinstance(stop, dict) else None
    if isinstance(remote, dict) and not remote.get("supervise"):
        return None
    if not isinstance(lease_s, (int, float)) or not isinstance(grace_s, (int, float)):
        return None
    return lease_s + grace_s + FAR_SLACK_S


def _swept(spool_fd: int, memory: Memory) -> list[Reaped] | None:
    """
    Remove what dead starters left (rule W1).

    Returns:
        list: What was done; None if a starter is at work.
    """
    found = []
    with owned(format.open_entries(spool_fd, format.RUNNING)) as running_fd:
        if not locks.try_take(running_fd):
            return None
        # The listing of a big spool takes as long as all the rest.
        built = [] if memory.nothing_changed else format.hidden_directories(spool_fd, format.NEW)
        for name in built:
            format.remove_tree(spool_fd, name)
            found.append(_swept_directory(name, format.found(spool_fd, name) is None))
        for run_id in format.live_ids(spool_fd):
            if format.sweep_entry(spool_fd, running_fd, run_id):
                says = "its entry was removed: there is no such live run"
                found.append(Reaped(run_id=run_id, done="swept", says=says))
    return found


def _swept_directory(name: str, is_gone: bool) -> Reaped:
    if is_gone:
        says = "it was removed: its chaperone died before the run appeared"
        return Reaped(run_id=name, done="swept", says=says)
    # It was planted: a starter makes only directories that contain files.
    says = "it contains something that is not a file, so it was not removed"
    return Reaped(run_id=name, done="failed", says=says)
