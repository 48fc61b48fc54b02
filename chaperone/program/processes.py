"""
The descendants of this process: which exist, how one ended, and how to signal all of them.

Knows: /proc, process groups, subreapers.  Must not know: runs, specs, pipes.
"""

from __future__ import annotations

import errno

from ..cpython import os, prctl, signal
from .fds import contents

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# A tracer lets a killed process go within microseconds; a tracer that has not by then holds it.
HELD_S = 0.5


def become_subreaper() -> bool:
    """
    Have the kernel make us the parent of every orphan among our descendants, so that none leaves
    the tree.

    Returns:
        bool: False if the kernel refuses.
    Source: prctl(2).
    """
    return prctl(PR_SET_CHILD_SUBREAPER, 1) == 0


def is_proc_ours() -> bool:
    """
    Whether /proc shows our own pid namespace. In a /proc of another namespace, a pid means another
    process than it does here.

    Source: proc(5), NSpid: one number, and it is ours; Pid if the kernel has no NSpid.
    """
    try:
        text = contents("/proc/self/status")
    except OSError:
        return False
    for name in (b"\nNSpid:", b"\nPid:"):
        _, found, rest = text.partition(name)
        if found:
            return rest.partition(b"\n")[0].split() == [b"%d" % os.getpid()]
    return False


def open_children() -> int:
    """An fd that lists our children, read from offset 0; -1 if the kernel has no such list."""
    us = os.getpid()
    try:
        return os.open(f"/proc/self/task/{us}/children", os.O_RDONLY) if is_proc_ours() else -1
    except OSError:
        return -1


def lists_children() -> bool:
    """Whether /proc shows what our children are."""
    children_fd = open_children()
    if children_fd >= 0:
        os.close(children_fd)
    return children_fd >= 0


def children(pid: int) -> list[int]:
    """
    The children of a process, with zombies; [] if the process is gone.

    Raises:
        OSError: If they can't be listed; there may be some.
    Source: proc(5), /proc/PID/task/TID/children.
    """
    found: list[int] = []
    seen = False
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                found += map(int, contents(f"/proc/{pid}/task/{task}/children").split())
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
    All descendants of a process, parents before children.

    Args:
        but (tuple): Pids that are left out, with their descendants.
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
    Whether a process runs. A zombie does not, unless it has other threads that do. A /proc with
    hidepid shows nothing of another user's process, but the kernel says that it is there.

    Source: proc(5), /proc/PID/stat, fields 3 and 20; hidepid.
    """
    try:
        fields = contents(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return signal_each([pid], 0) != []
    return fields[0] not in (b"Z", b"X") or int(fields[17]) > 1


def is_held(pid: int) -> bool:
    """Whether a tracer keeps a process from dying, or its parent from reaping it."""
    try:
        text = contents(f"/proc/{pid}/status")
    except OSError:
        return False
    state = text.partition(b"\nState:")[2].split(None, 1)[:1]
    tracer = text.partition(b"\nTracerPid:")[2].split(None, 1)[:1]
    return state in ([b"t"], [b"Z"]) and tracer not in ([b"0"], [])


def reap_orphans(but: tuple[int, ...]) -> None:
    """Reap the zombies that were re-parented to us, so that they are not counted as alive."""
    for pid in children(os.getpid()):
        if pid not in but:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def has_ended(pid: int) -> bool:
    """Whether a child is a zombie that can be reaped: a tracer may keep it from its parent."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reaped(pid: int) -> tuple[int, dict[str, float | None]]:
    """
    Reap a child that has ended.

    Returns:
        tuple: Its wait status, as of wait(2), and its rusage: times in seconds, and maxrss in bytes
            (getrusage(2) has KiB).
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
    Signal a process group that we made; does nothing if it is gone.

    Raises:
        ValueError: For a group that can't be ours: 1 would mean every process.
    """
    if group <= 1:
        raise ValueError(f"unable to signal process group {group}: want one above 1")
    try:
        os.killpg(group, signum)
    # It is gone, or belongs to another user: a look at the tree shows what lives.
    except (ProcessLookupError, PermissionError):
        pass


def signal_each(pids: list[int], signum: int) -> list[int]:
    """
    Signal processes one by one.

    Args:
        pids (list): Our own descendants. Until we reap them, the kernel gives their pids to no
            other process.
    Returns:
        list: Those that can't be signalled because they run as another user.
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
    """The process group of a process; None if the process is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def reset_signals() -> None:
    """Set every signal to its default and block none, as a program expects at its start."""
    signal.set_wakeup_fd(-1)
    for number in range(1, signal.NSIG):
        # None: libc uses it. To look first saves 120 system calls.
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def outcome(wait_status: int) -> dict[str, object]:
    """
    A raw wait status as fields of a status.

    Args:
        wait_status (int): From wait4(2), of a process that ended.
    Returns:
        dict: `status`, `core_dump`, `return_code` (0..255) and `signal` (`SIGKILL`); exactly one of
            the last two is not None.
    Source: wait(2).
    """
    from ..model import spec as specs  # here, because the guard needs this module but no specs

    number = wait_status & 0x7F
    return {
        "status": wait_status,
        "return_code": None if number else wait_status >> 8 & 0xFF,
        "signal": specs.signal_name_of(number) if number else None,
        "core_dump": bool(number and wait_status & 0x80),
    }
