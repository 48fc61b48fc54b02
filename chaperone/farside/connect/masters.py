"""
Shared connections: masters of OpenSSH, each with a socket in the spool and sessions of many runs.

Knows: sockets, locks, when a master has to be started.  Must not know: what is sent, what a client
says.
"""

from __future__ import annotations

import os
import select
import stat

from ... import cpython
from ...program.fds import owned
from ...spool import format, locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...model.hops.route import Route
    from ...program.interface import Caller

MASTERS = 16  # for one way
SESSIONS = 10  # of one master: sshd's default MaxSessions; a lower limit is found out
# ssh binds a socket under its name and 17 more characters, and a socket's path has at most 107.
PATH_ROOM = 107 - 17


class Masters:
    """
    The masters that a run may share, and its session on one of them.

    The first run that needs a master starts it, in a session of its own and outside the process
    tree of every run; it ends by itself when it was idle for a while. Each session is a lock of its
    chaperone's process, so the session of a dead chaperone is free at once.

    Args:
        chaperone (Caller): For its loop and its spool.
        route (Route): One whose `share_key` is not empty.
    """

    def __init__(self, chaperone: Caller, route: Route) -> None:
        self._chaperone, self._route = chaperone, route
        self._name = f"m-{cpython.digest(route.share_key.encode())}"
        self._directory_fd = -1
        self._fd = -1  # the lock file of one master
        self._number, self._session = 0, 0

    def take(self) -> str | None:
        """
        Take a session of a master that is there, until `leave`.

        Returns:
            str: The path of the master's socket. None where all sessions are taken: then `start`
                may start one more.
        Raises:
            OSError: If nothing can be shared in this spool.
        """
        self.leave()
        if self._directory_fd < 0:
            format.make_directory(format.CONNECT, self._chaperone.spool_fd)
            self._directory_fd = format.open_entries(self._chaperone.spool_fd, format.CONNECT)
        for self._number in range(MASTERS):
            flags = os.O_RDWR | os.O_CREAT
            self._fd = format.open_plain(self._directory_fd, f"{self._socket}.lock", flags)
            if not self._is_there():
                return None
            if not (limit := self._limit()):
                raise OSError("the server refuses sessions on a shared connection")
            if self._take_session() and (limit == SESSIONS or self._taken() < limit):
                return self._path()
            self.leave()
        raise OSError(f"all sessions of {MASTERS} connections are in use")

    def leave(self) -> None:
        """Free the session."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._session = -1, 0

    def start(self, done: Callable[[], None]) -> bool:
        """
        Start the master that `take` missed.

        Args:
            done: Called when it is there or could not be started; `take` says which.
        Returns:
            bool: Whether `done` will be called. False where another process starts it right now.
        Raises:
            OSError: If it can't be started.
        """
        if not locks.try_take_for_process(self._fd, 0):
            return False
        if self._is_there():  # another process has just started it
            self._chaperone.loop.later(0, done)
            return True
        if self._number == 0:  # the server may have been changed meanwhile
            format.unlink(f"{self._name}.sessions", self._directory_fd)
        argv = self._route.master(self._path(), f"{self._path()}.log")
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]
        pid = os.posix_spawnp(
            argv[0],
            [os.fsencode(word) for word in argv],
            os.environb,
            file_actions=null,
            setsid=True,  # a signal to this run's group must not end the runs of others
            setsigmask=(),
            setsigdef=range(1, cpython.signal.SIGSYS + 1),
        )
        pidfd = os.pidfd_open(pid)

        def ended(fd: int, events: int) -> None:
            self._chaperone.loop.unwatch(pidfd)
            os.close(pidfd)
            os.waitpid(pid, 0)
            done()

        self._chaperone.loop.watch(pidfd, select.POLLIN, ended)
        return True

    def refused(self) -> None:
        """The server takes no more sessions on this connection: remember how many it takes."""
        # Of several that ask at once the server may refuse any: what the others have is its limit.
        taken, flags = self._taken(), os.O_WRONLY | os.O_CREAT
        with owned(format.open_plain(self._directory_fd, f"{self._name}.sessions", flags)) as fd:
            os.pwrite(fd, b"%d\n" % min(taken, self._limit()), 0)
        self.leave()

    def failed(self) -> None:
        """No session came about: remove the socket if no master listens behind it."""
        if self._fd >= 0 and locks.try_take_for_process(self._fd, 0):
            if not _listens(self._path()):
                format.unlink(self._socket, self._directory_fd)
        self.leave()

    def _take_session(self) -> bool:
        for session in range(1, SESSIONS + 1):
            if locks.try_take_for_process(self._fd, session):
                self._session = session
                return True
        return False

    def _taken(self) -> int:
        """How many sessions of this master others have."""
        others = [number for number in range(1, SESSIONS + 1) if number != self._session]
        return sum(not locks.is_free_for_process(self._fd, number) for number in others)

    def _limit(self) -> int:
        try:
            with owned(format.open_plain(self._directory_fd, f"{self._name}.sessions")) as fd:
                found = os.read(fd, 16).strip()
        except FileNotFoundError:
            return SESSIONS
        return min(int(found), SESSIONS) if found.isdigit() else SESSIONS

    @property
    def _socket(self) -> str:
        return f"{self._name}.{self._number}"

    def _is_there(self) -> bool:
        found = format.found(self._directory_fd, self._socket)
        return found is not None and stat.S_ISSOCK(found.st_mode)

    def _path(self) -> str:
        """Of the socket; where that would be too long, by way of our own descriptor."""
        directory = os.readlink(f"/proc/self/fd/{self._directory_fd}")
        if len(os.fsencode(f"{directory}/{self._socket}")) > PATH_ROOM:
            directory = f"/proc/{os.getpid()}/fd/{self._directory_fd}"
        return f"{directory}/{self._socket}"


def listening(spool_fd: int) -> dict[str, bool]:
    """The sockets of a spool's masters by name, and whether a process listens behind each."""
    try:
        directory_fd = format.open_entries(spool_fd, format.CONNECT)
    except FileNotFoundError:
        return {}
    with owned(directory_fd):
        names = [name for name in os.listdir(directory_fd) if name.startswith("m-")]
        at = f"/proc/{os.getpid()}/fd/{directory_fd}"
        return {
            name: _listens(f"{at}/{name}")
            for name in sorted(names)
            if name.rpartition(".")[2].isdigit()
        }


def _listens(path: str) -> bool:
    """Whether a process listens behind a socket."""
    connection = cpython.socket.socket(cpython.socket.AF_UNIX, cpython.socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(path)
    except BlockingIOError:  # its backlog is full, so a process listens
        return True
    except OSError:
        return False
    finally:
        connection.close()
    return True
