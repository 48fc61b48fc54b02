"""
What the guard does. It is the process that the scheduler forked, and it forked the chaperone. If
the chaperone is killed, the kernel gives everything that it left to the guard, which kills it.

Knows: subreapers, signals, fds sent over a socket.  Must not know: the spool, specs, statuses.
It is imported behind the fork and imports nothing later: a guard may outlive the package.
"""

from __future__ import annotations

import fcntl
import select
import time

from ..cpython import os, prctl, signal, stat
from ..program import processes
from ..program.fds import NULL, owned, receive_fds
from ..program.guard import (
    ANSWERED,
    DONE,
    GROUP,
    HEAD_START_S,
    IGNORED,
    MESSAGE_BYTES,
    PIPES,
    RELEASE,
    RUN,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from ..cpython import socket

PR_SET_DUMPABLE = 4  # linux/prctl.h
CHUNK_BYTES = 65_536
# SIGKILL is sent again whenever a process died, and otherwise after 5 ms up to 1 s: a process may
# have forked just before it died, and a process in D state must not make the guard spin.
PAUSE_S = (0.005, 1.0)
# A process that takes longer to die (D state, gigabytes to free) writes nothing any more: readers
# need not wait.
PATIENCE_S = 10.0
FULL_MS = 2_000  # how long a full pipe or terminal of `chaperone exec` may hold up the rest
_HEARD = sorted(signal.valid_signals() - {*IGNORED, signal.SIGKILL, signal.SIGSTOP})
_OTHERS = [number for number in _HEARD if number != signal.SIGIO]


class Watch:
    """
    What the guard does until its chaperone ends, and after that.

    Args:
        chaperone (int): The pid of the chaperone, a child of this process.
        connection: To the chaperone.
        foreign (list): Children of this process that do not belong to the run.
        sees_orphans (bool): Whether the kernel makes us the parent of what a dead chaperone left.
    """

    def __init__(
        self, chaperone: int, connection: socket.socket, foreign: list[int], sees_orphans: bool
    ) -> None:
        self._chaperone, self._connection, self._foreign = chaperone, connection, foreign
        self._sees_orphans = sees_orphans
        self._run: list[int] = []
        self._pipes: list[int] = []
        self._max_bytes = -1
        self._group = -1
        self._is_done = False

    def keep(self) -> NoReturn:
        """
        Pass signals on until the chaperone ends, end what it left, and exit as it did.

        All signals stay blocked: one that is not waited for here, such as SIGHUP, does nothing.
        """
        code = os.EX_SOFTWARE
        try:
            # Up to the pipes, a message also raises a signal, so that it is enough to wait for one.
            # Later ones are only read when a signal came or the chaperone has ended.
            fd = self._connection.fileno()
            fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
            with owned(os.open(NULL, os.O_RDWR)) as null:  # the caller's pipes are not ours
                for number in range(3):
                    os.dup2(null, number)
            os.chdir("/")
            self._receive()
            while (ended := self._chaperones_end()) is None:
                self._answer(signal.sigwaitinfo(_HEARD).si_signo)
            self._receive()
            if not self._is_done:
                self._end_all()
            elif os.WIFSIGNALED(ended):
                self._leave_word(self._left())
            self._close()
            code = _end_like(ended)
        finally:
            os._exit(code)

    def _answer(self, number: int) -> None:
        if number == signal.SIGIO:
            other = signal.sigtimedwait(_OTHERS, HEAD_START_S)
            signal.sigtimedwait([signal.SIGIO], 0)  # of the pipes, which are read now as well
            self._receive()
            if other is not None:
                self._answer(other.si_signo)
        elif number in ANSWERED:
            self._receive()
            try:
                if self._is_done:  # it hears us no more, but may wait for a reader of its output
                    os.kill(self._chaperone, number)
                else:
                    self._connection.send(bytes([number]))
            except OSError:  # it has just ended; or it is suspended, and its socket is full
                pass
        elif number != signal.SIGCHLD:
            os.kill(self._chaperone, number)

    def _receive(self) -> None:
        """Take the messages and fds that the chaperone has sent."""
        while True:
            try:
                message, fds = receive_fds(self._connection, MESSAGE_BYTES)
            except OSError:  # there is no message; or it is gone and has not read all of ours
                return
            if not message:
                return
            word, _, number = message.partition(b" ")
            if word == RUN:
                self._run, self._max_bytes = fds, int(number)
            elif word == PIPES:
                self._pipes = fds
                # The rest is read when it is needed: two wakes less, 0.2 ms of CPU.
                fcntl.fcntl(self._connection.fileno(), fcntl.F_SETFL, os.O_NONBLOCK)
            elif word == GROUP:
                self._group = int(number)
            elif word == DONE:
                self._is_done = True
            elif word == RELEASE:
                os._exit(os.EX_OK)

    def _chaperones_end(self) -> int | None:
        """The chaperone's wait status once it has ended; other zombies are reaped."""
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self._chaperone:
                    return found[1]
        except ChildProcessError:
            pass
        return None

    # -- what a killed chaperone left

    def _end_all(self) -> None:
        """Kill what the chaperone left, and save what the pipes still hold."""
        # First its group, which is all of most runs: then /proc need not be read, 0.2 ms. The
        # SIGCHLD of the chaperone itself may still be there; a child of the group may have ended
        # before it.
        _child_ended(0)
        if self._strike_group() and (self._reap() or _child_ended(PAUSE_S[0])):
            self._reap()
        left: list[int] | None = []
        if not self._sees_orphans:
            left = self._kill_group()
        elif self._foreign or self._has_children():
            self._children_fd = processes.open_children()
            left = self._kill_all() if self._children_fd >= 0 else self._kill_group()
        self._drain()
        self._leave_word(left)

    def _kill_all(self) -> list[int]:
        """
        Kill all children until none lives; returns those that can't be killed.

        The limit is a time, not a number of tries: a killed process with 1.5 GB of memory keeps its
        children until the memory is freed.
        """
        begun, pause_s = time.monotonic(), PAUSE_S[0]
        while self._has_children():
            refused = self._strike()
            if _child_ended(pause_s):
                self._reap()
                continue
            waited_s = time.monotonic() - begun
            left = self._left()
            living = [
                pid
                for pid in left
                if pid not in refused
                and processes.is_living(pid)
                and not (waited_s > processes.HELD_S and processes.is_held(pid))
            ]
            if not living and not self._reap():
                self._log_left(left, refused)
                return left
            if waited_s > PATIENCE_S and self._run:
                still = f"have not ended {PATIENCE_S:g} s after SIGKILL: {living[:20]!r}"
                self._log(f"{len(living)} processes {still}")
                self._drain()
                self._leave_word(left)
                self._close()
            pause_s = min(2 * pause_s, PAUSE_S[1])
        return []

    def _reap(self) -> bool:
        """Reap children that have ended; returns whether there were any."""
        took = False
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                took = True
        except ChildProcessError:
            pass
        return took

    def _has_children(self) -> bool:
        """Whether we have children, living or not, that belong to the run."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return not self._foreign or self._children() != []

    def _strike(self) -> list[int]:
        """
        Send SIGKILL to our children. If one can't be signalled, send it to what is below it.
        Returns the pids that can't be signalled.
        """
        refused = processes.signal_each(self._children(), signal.SIGKILL)
        for pid in refused:
            below = processes.descendants(pid)
            refused = refused + processes.signal_each(below, signal.SIGKILL)
        return refused

    def _children(self) -> list[int]:
        listed = os.pread(self._children_fd, 1 << 20, 0).split()
        return [pid for pid in map(int, listed) if pid not in self._foreign]

    def _left(self) -> list[int]:
        """All processes below us that belong to the run."""
        return processes.descendants(os.getpid(), but=tuple(self._foreign))

    def _strike_group(self) -> bool:
        """
        Send SIGKILL to the whole group of the program, not to one generation after the other.
        Returns whether the group exists: a child in it, zombie or not, proves that its number was
        not reused.
        """
        try:
            if self._group > 1:
                os.waitid(os.P_PGID, self._group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                processes.signal_group(self._group, signal.SIGKILL)
                return True
        except ChildProcessError:
            pass
        return False

    def _kill_group(self) -> list[int] | None:
        """Kill the program's group; used if the kernel does not list our children."""
        begun, pause_s = time.monotonic(), PAUSE_S[0]
        while self._strike_group() and time.monotonic() - begun < PATIENCE_S:
            self._reap()
            _child_ended(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])
        self._reap()
        return [] if self._sees_orphans and not self._has_children() else None

    def _drain(self) -> None:
        """Move what the pipes hold now into the run's streams; do not wait for a writer."""
        for pipe, stream in zip(self._pipes, self._run, strict=False):
            try:
                while data := os.read(pipe, CHUNK_BYTES):
                    self._append(stream, data)
            except OSError:  # the pipe is empty now; or the disk is full
                pass
            os.close(pipe)
        self._pipes = []

    def _append(self, stream: int, data: bytes) -> None:
        found = os.fstat(stream)
        is_file = stat.S_ISREG(found.st_mode)
        if self._max_bytes >= 0 and is_file:
            data = data[: max(0, self._max_bytes - found.st_size)]
        view = memoryview(data)
        while view:
            if not is_file:
                poll = select.poll()
                poll.register(stream, select.POLLOUT)
                if not poll.poll(FULL_MS):
                    raise BlockingIOError
            view = view[os.write(stream, view if is_file else view[: select.PIPE_BUF]) :]

    def _leave_word(self, left: list[int] | None) -> None:
        """Write the pids of what still lives, for `reap`; nothing if they are not known."""
        if left is not None and len(self._run) > 3:
            # Not zombies, of which a parent that we may not kill takes no notice.
            living = [pid for pid in left if processes.is_living(pid)]
            try:
                os.write(self._run[3], b"left%b\n" % b"".join(b" %d" % pid for pid in living))
            except OSError:
                pass

    def _log_left(self, left: list[int], refused: list[int]) -> None:
        named = []
        for pid in left[:20]:
            held = "its tracer holds it" if processes.is_held(pid) else "a zombie"
            named.append(f"{pid} ({'another user' if pid in refused else held})")
        if named:
            count = "1 process" if len(left) == 1 else f"{len(left)} processes"
            self._log(f"{count} can't be killed: {', '.join(named)}")

    def _log(self, text: str) -> None:
        now_ns = time.time_ns()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 1_000_000_000))
        line = f"{moment}.{now_ns // 1000 % 1_000_000:06d}Z {text}\n"
        if len(self._run) > 2:
            try:
                os.write(self._run[2], line.encode())
            except OSError:
                pass

    def _close(self) -> None:
        for fd in self._run:
            os.close(fd)
        self._run = []


def _child_ended(patience_s: float) -> bool:
    """Wait until a child ends; False after `patience_s`."""
    return signal.sigtimedwait([signal.SIGCHLD], patience_s) is not None


def _end_like(wait_status: int) -> int:
    """Die of the same signal as the chaperone, or return its exit code."""
    if not os.WIFSIGNALED(wait_status):
        return os.WEXITSTATUS(wait_status)
    number = os.WTERMSIG(wait_status)
    prctl(PR_SET_DUMPABLE, 0)  # one core is enough
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + number  # PID 1 of a namespace: no signal of its own kills it
