"""
The processes below this one: which there are, how one ended, and signals to all of them.

Knows: /proc, process groups, subreapers.  Must not know: runs, specs, pipes.
"""

from __future__ import annotations

import os

from ..model import spec as specs
from ..model.cpython import prctl, signal

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> None:
    """
    Make every orphan among our descendants our child, so that none can leave the tree.

    Source: prctl(2).
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def children(pid: int) -> list[int]:
    """
    The children of a process, zombies too; [] when it is gone.

    Source: proc(5), /proc/PID/task/TID/children; /proc/PID/stat of all where the kernel has none.
    """
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    except ProcessLookupError:
        return []
    except FileNotFoundError:
        return _children_by_stat(pid) if os.path.exists(f"/proc/{pid}") else []
    return found


def _children_by_stat(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it ended while we looked
            if int(fields[1]) == parent:
                found.append(int(name))
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


def reap_orphans(but: tuple[int, ...]) -> None:
    """Take the zombies that were re-parented to us, so that they are not counted as alive."""
    for pid in children(os.getpid()):
        if pid not in but:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def reaped(pid: int) -> tuple[int, dict[str, float]]:
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


def signal_each(pids: list[int], signum: int) -> int:
    """
    Signal processes one by one.

    Args:
        pids (list): Our own descendants: while we do not reap them, their numbers can't be someone
            else's.
    Returns:
        int: How many refused because they run as another user.
    """
    refused = 0
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
        except PermissionError:
            refused += 1
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
    number = wait_status & 0x7F
    return {
        "status": wait_status,
        "return_code": None if number else wait_status >> 8 & 0xFF,
        "signal": specs.signal_name_of(number) if number else None,
        "core_dump": bool(number and wait_status & 0x80),
    }
