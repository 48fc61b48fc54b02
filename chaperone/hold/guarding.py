"""
How a process becomes the guard of a chaperone, which it forks.

Knows: subreapers, sessions.  Must not know: what a guard does from then on, the spool, specs.
"""

from __future__ import annotations

import select

from ..cpython import os, socket
from ..errors import StartError
from ..program import processes
from ..program.guard import Guard


def fork(leave_session: bool = True, kept: tuple[int, ...] = (), is_new: bool = False) -> Guard:
    """
    Make this process the guard of a chaperone, which is forked here: only the chaperone returns.

    When all is imported: what a fork imports dirties the pages that it shares (measured, cold:
    3.6 MB of both processes' own after the imports, 5.1 before). Signals are blocked on both sides.

    Args:
        leave_session (bool): Whether the guard begins a session of its own, as a run does; the
            chaperone always does, so that no SIGKILL of a group reaches both.
        kept (tuple): fds that the chaperone alone keeps.
        is_new (bool): Whether this process was forked just now, and has no children.
    Raises:
        StartError: If there can be no more processes or files.
    """
    ends: tuple[socket.socket, ...] = ()
    try:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC, 0)
        sees_orphans = processes.become_subreaper()
        foreign = [] if is_new else _children_of_before()
        if leave_session and os.getsid(0) != os.getpid():
            os.setsid()
        pid = os.getpid()
        chaperone = os.fork()
    except OSError as error:
        for end in ends:
            end.close()
        sentence = f"unable to start a chaperone: {error.strerror}"
        raise StartError("spawn", sentence, error.errno, type(error).__name__) from error
    ours, theirs = ends
    if not chaperone:
        ours.close()
        os.setsid()
        return Guard(pid, theirs)
    theirs.close()
    for fd in kept:
        if fd >= 0:
            os.close(fd)
    try:
        if not is_new:
            _wait_for_a_word(ours)
        from .watch import Watch

        Watch(chaperone, ours, foreign, sees_orphans).keep()
    finally:
        os._exit(os.EX_SOFTWARE)


def _wait_for_a_word(connection: socket.socket) -> None:
    """
    Let the chaperone go first, until it hands the run over, or dies. Until then there is nothing to
    guard; and two processes that go on behind a fork copy the same pages at the same time, which
    took a cold start 0.6 to 1 ms. Signals are blocked, and wait.
    """
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.poll()


def _children_of_before() -> list[int]:
    """Children that this process had before it was chaperone's: a shell's, which execs us."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the ordinary case
        return []
    try:
        return processes.children(os.getpid()) if processes.is_proc_ours() else []
    except OSError:
        return []
