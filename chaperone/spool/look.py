"""
How a reader looks at a run: its lock, its lease, its status, its streams; and how it sends a
request to it.

Knows: rules R1 to R5, clocks, the boot id of this host.  Must not know: processes, signals, ssh.
"""

from __future__ import annotations

import errno
import time

from ..cpython import os
from ..errors import NoRunError, SpoolError
from ..model import status as statuses
from ..model import transitions
from ..model.spec import is_run_id
from ..program.fds import contents, owned
from . import format, locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..model.request import Request

PREAD = 1024 * 1024  # bytes
TICK_S = 0.05  # the kernel stamps files by a clock that ticks every 1 to 10 ms


def pulse(run_fd: int) -> bool | None:
    """
    Whether the chaperone lives. The probe disturbs neither the chaperone nor other probes (R4).

    Returns:
        bool: True if the lock is held, False if it is free; None if the lock file is gone.
    """
    try:
        fd = format.open_plain(run_fd, format.LOCK)
    except FileNotFoundError:
        return None
    with owned(fd):
        return not locks.try_share(fd)


def left_within(run_fd: int, patience_s: float) -> bool:
    """
    Wait some seconds until the chaperone has gone: it publishes the end of its run, and then it
    takes a moment to exit.

    Returns:
        bool: False if it still lives after `patience_s`.
    """
    try:
        fd = format.open_plain(run_fd, format.LOCK)
    except FileNotFoundError:
        return True
    with owned(fd):
        return locks.share_within(fd, patience_s)


def read_spec(run_fd: int) -> dict[str, Any]:
    """The spec with `version` and `key`; {} if it can't be read."""
    value = format.read_json(run_fd, format.SPEC)
    return value if isinstance(value, dict) else {}


def key_in(run_fd: int) -> str:
    """The key of a run, by an fd of its run directory; "" if it can't be read."""
    key = read_spec(run_fd).get("key")
    return key if isinstance(key, str) else ""


def edition(directory: os.stat_result) -> tuple[int, int, int] | None:
    """
    Which directory this is, and which names it has: another value if a name in it was made, renamed
    or removed. None right after that, because one more change within a clock tick may not show.
    """
    is_settled = time.time() - directory.st_ctime > TICK_S
    return (directory.st_dev, directory.st_ino, directory.st_ctime_ns) if is_settled else None


def key_of(spool_fd: int, run_id: str) -> str | None:
    """
    The key of a run, by its id; "" if it can't be read, None if there is no such run.
    """
    try:
        fd = format.open_run(spool_fd, run_id)
    except NoRunError:
        return None
    with owned(fd):
        return key_in(fd)


def key_at(path: str, run_id: str) -> str | None:
    """
    The key of a run, by the path of its spool; "" if it can't be read, None if there is no such
    run or no spool.
    """
    try:
        spool_fd = format.open_spool(path)
    except SpoolError:
        return None
    with owned(spool_fd):
        return key_of(spool_fd, run_id)


def is_fed(spec: dict[str, Any], by: str | None = None) -> bool:
    """
    Whether an agent has the run, and a sink feeds its run directory here.

    Args:
        spec (dict): From `read_spec`.
        by (str): `mirror` or `receiver`; None for any sink.
    """
    origin = spec.get("origin")
    return (
        isinstance(origin, dict)
        and isinstance(origin.get("url"), str)
        and isinstance(origin.get("by"), str)
        and by in (None, origin["by"])
    )


def feeder(spec: dict[str, Any]) -> str | None:
    """
    What feeds the run directory of a run that an agent has: `the mirror of URL`; None if its
    chaperone is here.
    """
    return f"the {spec['origin']['by']} of {spec['origin']['url']}" if is_fed(spec) else None


def read_final(run_fd: int, run_id: str) -> dict[str, Any] | None:
    """The published final status; None if there is none."""
    return statuses.final_known(format.read_json(run_fd, format.FINAL_STATUS), run_id)


def read_live(run_fd: int, run_id: str) -> dict[str, Any]:
    """The last status of a run that has not ended, as far as it can be read."""
    status = statuses.last_known(format.read_json(run_fd, format.LIVE_STATUS), run_id)
    return {
        **status,
        "state": status["state"] if status["state"] in statuses.LIVE else "running",
    }  # a final state only where it is published


def ended_at(run_fd: int) -> float | None:
    """When the final status was published, in seconds since the epoch; None if it was not."""
    final = format.found(run_fd, format.FINAL_STATUS)
    return None if final is None else final.st_mtime


def look(run_fd: int, run_id: str) -> tuple[bool, dict[str, Any]]:
    """
    The status of a run, as a reader concludes it (rules R1 and R3).

    Args:
        run_fd (int): From `open_run`.
    Returns:
        tuple: Whether its chaperone lives, and the status; its state is `lost` or `unattended` if
            the chaperone died.
    Raises:
        NoRunError: If the run directory is being deleted.
        SpoolError: If one of its files is a planted link or belongs to another user.
    """
    for again in (False, True):
        alive = pulse(run_fd)
        final = read_final(run_fd, run_id)
        if final is not None:
            return False, final
        status = read_live(run_fd, run_id)
        if not alive or status["create_time"] is not None or again:
            break  # otherwise it may have ended between our looks, and status.json exists now
    if alive:
        return True, status
    spec = read_spec(run_fd)
    # gc deletes the lock and the spec before status.json; ask again, as our first look may be old.
    if not spec and pulse(run_fd) is None:
        raise NoRunError(f"unable to read run {run_id!r}: it is being deleted", errno.ENOENT)
    if leased_s(run_fd, spec, status["boot_id"]) > 0:
        return False, transitions.unattended(status)
    return False, transitions.lost(status, transitions.DIED)


def present(spool_fd: int, run_id: str) -> dict[str, Any]:
    """As `look`, with the present sizes of the streams until their end is recorded."""
    with owned(format.open_run(spool_fd, run_id)) as run_fd:
        _, status = look(run_fd, run_id)
        if status["state"] not in statuses.FINAL or status["end_time"] is None:
            for stream in format.STREAMS:
                try:
                    size = stream_size(run_fd, stream)
                except SpoolError:  # not a file of ours
                    continue
                status[stream] = {**status[stream], "bytes": size}
    return status


def host(found: dict[str, Any], spec: Callable[[], dict[str, Any]]) -> str:
    """
    The host of a run's program: `here`, the host of its chaperone, or the one its hops lead to.

    Args:
        found (dict): Its status.
        spec: Returns its spec; called where the status does not say it.
    """
    is_local = found["connection"] is None and found["start_time"] is not None
    remote = None if is_local else spec().get("remote")
    try:
        if remote is not None:
            from ..model.hops.route import Route  # here, because each chaperone imports this file

            way = Route.of(remote["hops"]).place("")
            return way.partition(", as ")[0].removeprefix("on ")
    except (LookupError, TypeError, ValueError, AttributeError):  # no spec that we know
        return "-"
    name = found["chaperone_host"]
    return "here" if name in (None, os.uname().nodename) else str(name)


def leased_s(run_fd: int, spec: dict[str, Any], boot: str | None) -> float:
    """
    As `left_s`, with the times of the lock, which the chaperone sets whenever it hears the far
    side.
    """
    lock = format.found(run_fd, format.LOCK)
    return 0.0 if lock is None else left_s(lock, spec, boot)


def open_stream(run_fd: int, stream: str) -> int:
    """
    Open a stream for reading.

    Raises:
        FileNotFoundError: If it is missing.
        SpoolError: If it is not a file of this user.
    """
    if stream not in (*format.STREAMS, format.LOG):
        raise SpoolError(
            f"unable to open stream {stream!r}: want stdout, stderr or log", errno.EINVAL
        )
    return format.open_plain(run_fd, stream)


def read_stream(run_fd: int, stream: str, offset: int, size: int) -> bytes:
    """
    Bytes of a stream, without waiting: fewer than `size` or none if there are no more; none where
    it is not there, because an empty log is removed when the run ends.
    """
    try:
        fd = open_stream(run_fd, stream)
    except FileNotFoundError:
        return b""
    parts = [b""]
    left = size
    with owned(fd):
        # One pread may return less, and takes the memory for all that it may return.
        while left and (data := os.pread(fd, min(left, PREAD), offset + size - left)):
            parts.append(data)
            left -= len(data)
    return b"".join(parts)


def stream_size(run_fd: int, stream: str) -> int:
    """How many bytes a stream has; 0 if it is missing, as an empty log is after the run's end."""
    try:
        with owned(open_stream(run_fd, stream)) as fd:
            return os.fstat(fd).st_size
    except FileNotFoundError:
        return 0


def is_drained(run_fd: int) -> bool:
    """
    Whether both streams are unlocked: a dead chaperone's guard locks them until the pipes are
    empty.
    """
    return all(_is_unlocked(run_fd, stream) for stream in format.STREAMS)


def _is_unlocked(run_fd: int, stream: str) -> bool:
    try:
        fd = open_stream(run_fd, stream)
    except FileNotFoundError:
        return True
    with owned(fd):
        return locks.try_take(fd)


def collect(spool_fd: int, run_id: str) -> bool:
    """
    Remove the entry of an ended run from .ended/; does nothing if it is not there.

    If the chaperone was killed before it could move the entry, it is removed from .running/.
    Otherwise the next follower would find the run again, and deliver its end a second time.

    Returns:
        bool: True if it was in .ended/ and there is none in .running/, as nearly always; then a
            caller need not look again.
    """
    if not is_run_id(run_id):
        return False
    if format.remove_entry(spool_fd, format.ENDED, run_id):
        return format.found(spool_fd, f"{format.RUNNING}/{run_id}") is None
    try:
        run_fd = format.open_run(spool_fd, run_id)
    except NoRunError:
        return False
    with owned(run_fd):
        ended = pulse(run_fd) is not True and read_final(run_fd, run_id) is not None
    if ended and not format.remove_entry(
        spool_fd, format.ENDED, run_id
    ):  # once more: between our two looks it may have been moved there
        format.remove_entry(spool_fd, format.RUNNING, run_id)
    return False


def request(run_fd: int, run_id: str, asked: Request) -> None:
    """
    Write a request into the control FIFO of a run.

    Raises:
        NoRunError: If its chaperone is not running.
        SpecError: If the request is invalid.
        SpoolError: If it can't be written.
    """
    data = asked.line(run_id)
    try:
        with owned(format.open_plain(run_fd, format.CONTROL, os.O_WRONLY)) as fd:
            os.write(fd, data)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            raise NoRunError(
                f"unable to send a request to run {run_id!r}: its chaperone is not running",
                error.errno,
            ) from error
        if isinstance(error, SpoolError):
            raise
        raise format.failure(f"send a request to run {run_id!r}", error) from error


def renew(run_fd: int, run_id: str, asked: Request) -> None:
    """
    Renew the lease of a run that has `renew` in its spec; does nothing for others, and for a run
    that has ended. If its chaperone died, the one that adopts it counts from now.

    Args:
        asked (Request): `renew`.
    Raises:
        SpoolError: If it can't be written.
    """
    if read_spec(run_fd).get("renew") is None:
        return
    try:
        request(run_fd, run_id, asked)
    except NoRunError:
        try:
            os.utime(format.CONTROL, stamp(), dir_fd=run_fd, follow_symlinks=False)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise format.failure(f"renew run {run_id!r}", error) from error


# -- leases: how long a run may live on without its chaperone, or without a renewal


def stamp() -> tuple[float, float]:
    """
    The current time, as the atime and the mtime that record when the far side was last heard.

    Returns:
        tuple: Seconds since the boot, which a step of the wall clock does not change; and seconds
            since the epoch, which are still valid after a boot.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def mark(fd: int, ago_s: float = 0.0) -> None:
    """
    Set the times of a file to `stamp`, or to a time before it. They need no room on a full disk; if
    the disk refuses, the earlier times stay, and the run goes on.

    Args:
        ago_s (float): Seconds.
    """
    since_boot, now = stamp()
    # Before the boot its clock has no number: then the mtime counts, as in `since_s`.
    atime = since_boot - ago_s if ago_s <= since_boot else now
    try:
        os.utime(fd, (atime, now - ago_s))
    except OSError:
        pass


def since_s(marked: os.stat_result, boot: str | None) -> float:
    """
    How many seconds have passed since the moment that the times of a file are.

    Args:
        marked (os.stat_result): With the times of `stamp`.
        boot (str): The `boot_id` of the status that was valid then.
    """
    since_boot, now = stamp()
    # A read may set the atime of a file to the time since the epoch, which is far more than the
    # time since any boot.
    same_boot = boot is not None and boot == boot_id() and marked.st_atime <= since_boot
    return since_boot - marked.st_atime if same_boot else now - marked.st_mtime


def left_s(heard: os.stat_result, spec: dict[str, Any], boot: str | None) -> float:
    """
    For how many seconds a run may still live without its chaperone.

    Args:
        heard (os.stat_result): With the times of `stamp`.
        spec (dict): From spec.json, not checked.
        boot (str): The `boot_id` of its last status.
    Returns:
        float: Seconds. 0 or less if its lease is over, or if the run ends with its chaperone.
    """
    lease_s = spec.get("lease")
    if spec.get("on_disconnect") != "survive" or not isinstance(lease_s, (int, float)):
        return 0.0
    return lease_s - since_s(heard, boot)


def boot_id() -> str | None:
    """A random id that this host has until its next boot; None if the kernel gives none."""
    try:
        return contents("/proc/sys/kernel/random/boot_id").decode("ascii").strip()
    except OSError:
        return None
