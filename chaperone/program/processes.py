"""
The processes below this one: which there are, how one ended, and signals to all of them.

Knows: /proc, process groups, subreapers.  Must not know: runs, specs, pipes.
"""

from __future__ import annotations

import errno
import os

from ..cpython import prctl, signal
from .fds import owned

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> bool:
    """
    Make every orphan among our descendants our child, so that none can leave the tree.

    Returns:
        bool: False where the kernel does not do that.
    Source: prctl(2).
    """
    return prctl(PR_SET_CHILD_SUBREAPER, 1) == 0


def is_proc_ours() -> bool:
    """
    Whether /proc shows the processes of our own pid namespace: in another's, a number that it shows
    is some other process here.

    Source: proc(5), NSpid: one number, and it is ours; Pid where the kernel has no NSpid.
    """
    try:
        with owned(os.open("/proc/self/status", os.O_RDONLY)) as fd:
            text = os.read(fd, 16_384)
    except OSError:
        return False
    for name in (b"\nNSpid:", b"\nPid:"):
        _, found, rest = text.partition(name)
        if found:
            return rest.partition(b"\n")[0].split() == [b"%d" % os.getpid()]
    return False


def open_children() -> int:
    """An fd that lists our children, read from its start; -1 where there is no such list."""
    us = os.getpid()
    try:
        return os.open(f"/proc/self/task/{us}/children", os.O_RDONLY) if is_proc_ours() else -1
    except OSError:
        return -1


def children(pid: int) -> list[int]:
    """
    The children of a process, zombies too; [] when it is gone.

    Raises:
        OSError: If they can't be listed, which does not mean that there are none.
    Source: proc(5), /proc/PID/task/TID/children.
    """
    found: list[int] = []
    seen = False
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    found += map(int, file.read().split())
                seen = True
            except (ProcessLookupError, FileNotFoundError):  # this thread has ended
                continue
    except (ProcessLookupError, FileNotFoundError):
        pass
    if not seen and pid == os.getpid():
        raise FileNotFoundError(errno.ENOENT, "/proc does not list our children")
    return found


def descendants(pid: int, but: tuple[int, ...] = ()) -> list[int]:
    """
    All processes below one, parents before children.

    Args:
        but (tuple): Pids that are left out together with what is below them.
    """
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = [
            child for child in children(waiting.pop(0)) if child not in but and child not in found
        ]
        found += below
        waiting += below
    return found


def is_living(pid: int) -> bool:
    """
    Whether a process runs: not one that is gone, nor a zombie, unless threads of it live on.

    Source: proc(5), /proc/PID/stat: its 3rd field and its 20th.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in (b"Z", b"X") or int(fields[17]) > 1


def is_held(pid: int) -> bool:
    """Whether its tracer keeps a process from dying, or from being taken by its parent."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            text = file.read()
    except OSError:
        return False
    state = text.partition(b"\nState:")[2].split(None, 1)[:1]
    tracer = text.partition(b"\nTracerPid:")[2].split(None, 1)[:1]
    return state in ([b"t"], [b"Z"]) and tracer not in ([b"0"], [])


def reap_orphans(but: tuple[int, ...]) -> None:
    """Take the zombies that were re-parented to us, so that they are not counted as alive."""
    for pid in children(os.getpid()):
        if pid not in but:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def reaped(pid: int) -> tuple[int, dict[str, float | None]]:
    """
    Take a child that has ended: its wait status, undecoded, and its rusage.

    Returns:
        tuple: The rusage has times in seconds, and maxrss in bytes where getrusage(2) tells it in
            KiB.
    """
    _, wait_status, usage = os.wait4(pid, 0)
    return wait_status, {
        "utime": usage.ru_utime,
        "stime": usage.ru_stime,
        "maxrss": usage.ru_maxrss * 1024,
        "minflt": usage.ru_minflt,
        "majflt": usage.ru_majflt,
        "inblock": usage.ru_inblock,
        "oublock": usage.ru_oublock,
        "nvcsw": usage.ru_nvcsw,
        "nivcsw": usage.ru_nivcsw,
    }


def signal_group(group: int, signum: int) -> None:
    """
    Signal a process group that we made; nothing to do when it is gone.

    Raises:
        ValueError: For a group that can't be one of ours: 1 would be everybody.
    """
    if group <= 1:
        raise ValueError(f"unable to signal process group {group}: want one above 1")
    try:
        os.killpg(group, signum)
    except (
        ProcessLookupError,
        PermissionError,
    ):  # gone, or made of programs of another user: the tree tells
        pass


def signal_each(pids: list[int], signum: int) -> list[int]:
    """
    Signal processes one by one.

    Args:
        pids (list): Our own descendants: while we do not reap them, their numbers can't be someone
            else's.
    Returns:
        list: Those that refused because they run as another user.
    """
    refused = []
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
        except PermissionError:
            refused.append(pid)
    return refused


def group_of(pid: int) -> int | None:
    """The process group of a process, None when it is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def reset_signals() -> None:
    """Every signal to its default, none blocked: as a program expects to be started."""
    signal.set_wakeup_fd(-1)
    for number in range(1, signal.NSIG):
        if signal.getsignal(number) not in (
            signal.SIG_DFL,
            None,
        ):  # None: libc keeps it; to ask first saves 120 system calls
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def outcome(wait_status: int) -> dict[str, object]:
    """
    What a raw wait status says, as fields of a status.

    Args:
        wait_status (int): As from wait4(2), of a process that ended.
    Returns:
        dict: `status`, `core_dump`, and of `return_code` (0..255) and `signal` (`SIGKILL`) exactly
            one that is not None.
    Source: wait(2).
    """
    from ..model import spec as specs  # here: the guard has this module, and no specs

    number = wait_status & 0x7F
    return {
        "status": wait_status,
        "return_code": None if number else wait_status >> 8 & 0xFF,
        "signal": specs.signal_name_of(number) if number else None,
        "core_dump": bool(number and wait_status & 0x80),
    }
