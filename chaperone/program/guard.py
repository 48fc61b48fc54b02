"""
The guard as its chaperone knows it: what is handed over to it, and the signals that it passes on.

Knows: fds sent over a socket.  Must not know: what a guard does, the spool, specs, statuses.
"""

from __future__ import annotations

from ..cpython import signal
from .fds import send_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cpython import socket

DONE, RUN, PIPES, GROUP, RELEASE = b"done", b"run", b"pipes", b"group", b"release"
# How long other processes leave the cores to a chaperone that begins a run: by then its program was
# executed. They would copy the same pages at the same time.
HEAD_START_S = 0.003
MESSAGE_BYTES = 64  # of one message, at most: a word and a number
# A terminal's death is not the run's; PIPE and XFSZ are reported by errno where they matter.
_IGNORED = "SIGHUP SIGPIPE SIGXFSZ SIGTTOU SIGTTIN SIGTSTP"
# Signals that a chaperone answers: the guard passes them on as a message, so that the chaperone can
# distinguish them from signals sent to itself. All others are sent on as signals.
_ANSWERED = "SIGTERM SIGINT SIGQUIT SIGUSR1 SIGUSR2 SIGCONT SIGALRM SIGVTALRM SIGPROF SIGWINCH"
IGNORED = tuple(int(getattr(signal, name)) for name in _IGNORED.split())
ANSWERED = tuple(int(getattr(signal, name)) for name in _ANSWERED.split())


class Guard:
    """
    The guard, as its chaperone knows it.

    Attributes:
        pid (int): The one that the scheduler forked.
        fd (int): Ready to be read when `heard` has something.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.fd = pid, connection.fileno()
        self._connection = connection
        connection.setblocking(False)

    def take_run(self, fds: list[int], max_bytes: int | None) -> None:
        """
        Hand over where a run's output goes, before anybody can see the run.

        Args:
            fds (list): Of stdout, stderr, the log, and of the file for the guard's word, if any.
            max_bytes (int): How much of a stream is kept; None for all.
        """
        self._tell(RUN, max_bytes if max_bytes is not None else -1, fds)

    def take_pipes(self, fds: list[int]) -> None:
        """
        Hand over the read ends of the program's pipes, before it is started.

        Args:
            fds (list): Not blocking; of stdout, and of stderr unless it is merged.
        """
        if fds:
            self._tell(PIPES, 0, fds)

    def take_group(self, pid: int) -> None:
        """Hand over the program's process group."""
        self._tell(GROUP, pid)

    def dismiss(self) -> None:
        """What is left is not to be killed any more."""
        self._tell(DONE)

    def release(self) -> None:
        """Have it end now: this process holds a run that has no guard."""
        self._tell(RELEASE)
        self.close()

    def _tell(self, word: bytes, number: int = 0, fds: list[int] | None = None) -> None:
        try:
            send_fds(self._connection, b"%b %d" % (word, number), fds or [])
        except (BrokenPipeError, ConnectionResetError):  # it is dead: `heard` says so
            pass

    def heard(self) -> list[int] | None:
        """The signals that it passes on; None when it is dead."""
        found: list[int] = []
        try:
            while word := self._connection.recv(MESSAGE_BYTES):
                found += word
        except BlockingIOError:
            return found
        except ConnectionResetError:
            pass
        return found or None

    def close(self) -> None:
        """Let go of the connection; the guard ends when this process does."""
        self._connection.close()
