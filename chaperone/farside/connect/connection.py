"""
One connection to a far side: the process of its hops, what is sent into it, what comes out of it.

Knows: pipes, processes, the ready word.  Must not know: runs, statuses, what a record means.
"""

from __future__ import annotations

import fcntl
import os
import select

from ...cpython import signal
from ...program.fds import PIPE_BYTES, widened
from ..records import Farewell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from ...model.hops.route import Route
    from ...program.loop import Loop

    class Dialogue(Protocol):
        """
        What is said over one connection, and how what comes back is read.

        Attributes:
            ready_word (bytes): A line on stderr, before which nothing is sent; b"" to send at once.
            payload (bytes): What is sent first.
            stdin (tuple): fd and size in bytes of what follows the payload, the fd stays its
                owner's; None for nothing.
            takes_lines (bool): Whether control lines may follow; if not, the input ends there.
        """

        ready_word: bytes
        payload: bytes
        stdin: tuple[int, int] | None
        takes_lines: bool

        def feed(self, stream: str, data: bytes) -> tuple[bytes, list[list[str]]]:
            """The bytes of the program in what was read, and the records."""

        def end(self, stream: str) -> bytes:
            """Bytes of the program that were kept back until the end of a stream."""

        def noise(self) -> bytes:
            """What was neither: the words of startup files and hops."""

    class ConnectionOwner(Protocol):
        """What made a connection, and learns how it goes; all in the loop's thread."""

        def waits(self, queue: str | None) -> None:
            """An engine makes it wait, and says this; None: it waits no longer."""

        def connected(self) -> None:
            """It is ready: the payload goes out now."""

        def closed(self, code: int, ready: bool, noise: bytes) -> None:
            """
            It is over: as from os.waitstatus_to_exitcode, whether it was ever ready, what came that
            was no word of the program.
            """

    class Receiver(Protocol):
        """What takes all that comes over a connection."""

        def output(self, stream: str, data: bytes) -> None:
            """Bytes of the program."""

        def is_full(self, stream: str, freed: Callable[[], None]) -> bool:
            """Whether no more can be taken now; then `freed` is called when it can."""

        def record(self, words: list[str]) -> None:
            """A record of the far side."""


BUSY_BYTES = 32_768  # what ssh writes at once
# for a chain whose pipes are closed to end by itself, and for pipes that outlive their chain
LINGER_S = 2.0
NOISE_BYTES = 65_536  # kept of what comes before the ready word; more would not help


class Inlet:
    """
    The pipe into a connection: the payload, standard input, then control lines.

    Args:
        fd (int): Closed here.
        dialogue (Dialogue): What is sent.
    """

    def __init__(self, loop: Loop, fd: int, dialogue: Dialogue) -> None:
        self._loop, self._fd, self._dialogue = loop, fd, dialogue
        self._out = bytearray(dialogue.payload)
        self._lines = bytearray()  # until all of the program's standard input is on its way
        self._stdin_left = dialogue.stdin[1] if dialogue.stdin else 0
        os.set_blocking(fd, False)

    def is_open(self) -> bool:
        """Whether something can still be sent."""
        return self._fd >= 0

    def begin(self) -> None:
        """Send the payload, and what follows it."""
        self._write()

    def send(self, line: str) -> None:
        """Send a control line behind all that."""
        if self.is_open() and self._dialogue.takes_lines:
            self._lines += line.encode() + b"\n"
            self._write()

    def close(self) -> None:
        """Nothing more is sent: to a far side that does not survive it, this means kill all."""
        if self.is_open():
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _write(self) -> None:
        """
        As much as the pipe takes; the program's standard input is read as it goes, however big it
        is.
        """
        while self.is_open() and self._next():
            try:
                count = os.write(self._fd, memoryview(self._out)[:PIPE_BYTES])
            except BlockingIOError:
                self._loop.watch(self._fd, select.POLLOUT, self._writable)
                return
            except BrokenPipeError:  # the exit of the process says what that was
                self.close()
                return
            del self._out[:count]
        if self.is_open():
            self._loop.unwatch(self._fd)
            if not self._dialogue.takes_lines:
                self.close()

    def _next(self) -> bool:
        """Have something to write, if there is anything."""
        if not self._out and self._stdin_left:
            self._read_stdin()
        if not self._out and not self._stdin_left:
            self._out, self._lines = self._lines, bytearray()
        return bool(self._out)

    def _read_stdin(self) -> None:
        assert self._dialogue.stdin is not None
        fd, size = self._dialogue.stdin
        data = os.pread(fd, min(self._stdin_left, PIPE_BYTES), size - self._stdin_left)
        if data:
            self._stdin_left -= len(data)
            self._out += data
        else:  # it shrank: the far side counts and will run nothing
            self.close()

    def _writable(self, fd: int, events: int) -> None:
        self._write()


class Outlet:
    """
    A pipe out of a connection.

    Args:
        fd (int): Closed here.
        take: Called with what was read, and with b"" when it has ended.

    Attributes:
        is_paused (bool): Whether nothing is read now.
    """

    def __init__(self, loop: Loop, fd: int, take: Callable[[bytes], None]) -> None:
        self._loop, self._fd, self._take = loop, fd, take
        self._capacity = PIPE_BYTES
        self.is_paused = False
        os.set_blocking(fd, False)
        self.resume()

    def is_open(self) -> bool:
        """Whether something may still come."""
        return self._fd >= 0

    def pause(self) -> None:
        """Read nothing until `resume`; what fills the pipe waits."""
        if self.is_open():
            self.is_paused = True
            self._loop.unwatch(self._fd)

    def resume(self) -> None:
        """Read whatever comes."""
        self.is_paused = False
        if self.is_open():
            self._loop.watch(self._fd, select.POLLIN, self._readable)

    def end(self) -> None:
        """Close it, as if it had ended now."""
        if self.is_open():
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._take(b"")

    def _readable(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, self._capacity)
        except BlockingIOError:
            return
        if not data:
            self.end()
            return
        if len(data) >= BUSY_BYTES and self._capacity == PIPE_BYTES:
            self._capacity = widened(fd)
        self._take(data)


class Connection:
    """
    A chain of hops, from its spawn to its end.

    Args:
        loop (Loop): Watches it.
        argv (list): Of the first hop.
        route (Route): What is known of the hops.
        dialogue (Dialogue): What is said over it; of this connection alone.
        owner (ConnectionOwner): Learns how it goes.
        receiver (Receiver): Takes what comes.

    Attributes:
        pid (int): Of the first hop.
        ready (bool): Whether the payload was sent.

    Raises:
        OSError: If the first hop can't be started; nothing of it stays open then, since a run that
            survives tries again and again.
    """

    def __init__(
        self,
        loop: Loop,
        argv: list[str],
        route: Route,
        dialogue: Dialogue,
        owner: ConnectionOwner,
        receiver: Receiver,
    ) -> None:
        self._loop, self._route, self._dialogue = loop, route, dialogue
        self._owner, self._receiver = owner, receiver
        self.ready = False
        self._booted = b""  # what came on stderr before the ready word
        self._queue: str | None = None
        self._farewell = Farewell(route)
        self._code: int | None = None
        self._over = False
        self._timer: int | None = None
        self.pid, self._pidfd, (stdin, stdout, stderr) = _spawn(argv)
        loop.watch(self._pidfd, select.POLLIN, self._exited)
        self._inlet = Inlet(loop, stdin, dialogue)
        self._outlets = (
            Outlet(loop, stdout, lambda data: self._take("stdout", data)),
            Outlet(loop, stderr, lambda data: self._take("stderr", data)),
        )

    # -- into it

    def begin(self) -> None:
        """Send the payload at once, if there is no ready word to wait for."""
        if not self._dialogue.ready_word:
            self._get_ready()

    def send(self, line: str) -> None:
        """Send a control line; before the connection is ready it is dropped."""
        if self.ready:
            self._inlet.send(line)

    def _get_ready(self) -> None:
        self.ready = True
        self._owner.connected()
        self._inlet.begin()

    # -- out of it

    def _take(self, stream: str, data: bytes) -> None:
        if not data:
            rest = self._dialogue.end(stream)
            if rest:
                self._pass_on(stream, rest, [])
            self._look_closed()
        elif not self.ready and stream == "stderr":
            self._boot(data)
        else:
            self._pass_on(stream, *self._dialogue.feed(stream, data))

    def _boot(self, data: bytes) -> None:
        """Look for the ready word in what startup files and hops say."""
        self._booted = (self._booted + data)[-NOISE_BYTES:]
        before, word, after = self._booted.partition(self._dialogue.ready_word)
        # Without an inlet it is too late: a startup file took our silence until its end, and only
        # then our command ran.
        if word and self._inlet.is_open():
            self._booted = before
            self._get_ready()
            if after:
                self._take("stderr", after)
            return
        queue = self._route.queue(self._booted.decode("utf-8", "backslashreplace"))
        if queue != self._queue:
            self._queue = queue
            self._owner.waits(queue)

    def _pass_on(self, stream: str, clean: bytes, records: list[list[str]]) -> None:
        if stream == "stderr" and (clean or records):
            clean = self._farewell.feed(clean, bool(records))
        if clean:
            self._receiver.output(stream, clean)
            outlet = self._outlets[stream == "stderr"]
            # What is in the pipes of a client that has ended is all that there is.
            if self._code is None and self._receiver.is_full(stream, outlet.resume):
                outlet.pause()
        for words in records:
            if words:
                self._receiver.record(words)

    def is_held_up(self) -> bool:
        """Whether the receiver has no room now for something that came, or may come."""
        return any(outlet.is_paused for outlet in self._outlets)

    # -- its end

    def close(self) -> None:
        """End it: close its pipe, then, after a while, a signal."""
        self._inlet.close()
        self._loop.cancel(self._timer)
        if not self._over:
            self._timer = self._loop.later(LINGER_S, self.terminate)

    def terminate(self) -> None:
        """
        As `close`, now; for a chain that has nothing more to say.

        Without a hop it is our ends that go: the shell there is a run's subreaper, which must live.
        """
        self._inlet.close()
        self._loop.cancel(self._timer)
        if self._route.is_here or self._code is not None:
            self._cut()
        elif not self._over:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            self._timer = self._loop.later(LINGER_S, self._insist)

    def _insist(self) -> None:
        if self._code is None and self._route.may_be_killed:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        elif self._code is None:
            self.terminate()

    def _exited(self, fd: int, events: int) -> None:
        self._loop.unwatch(fd)
        os.close(fd)
        self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._inlet.close()
        self._loop.cancel(self._timer)
        # Something of the chain (a ProxyCommand) may hold the pipes a little longer, or for ever.
        self._timer = self._loop.later(LINGER_S, self._cut)
        for outlet in self._outlets:
            outlet.resume()
        self._look_closed()

    def _cut(self) -> None:
        for outlet in self._outlets:
            outlet.end()

    def _look_closed(self) -> None:
        if self._over or any(one.is_open() for one in self._outlets):
            return
        if self._code is None and not self._route.is_here:
            return
        self._over = True
        self._loop.cancel(self._timer)
        code = self._code or 0
        written, said = self._farewell.end(code)
        if written:
            self._receiver.output("stderr", written)
        noise = self._dialogue.noise()
        if self.ready:
            noise = self._booted + noise
        else:
            booted = self._booted.replace(self._dialogue.ready_word, b"")
            # A client that failed may say why on stdout; without such a code, a shell wrote that.
            failed = code in self._route.early_codes and code not in self._route.own_codes
            noise = booted or (noise if failed else b"")
        self._owner.closed(code, self.ready, noise + said)


def _spawn(argv: list[str]) -> tuple[int, int, list[int]]:
    """
    Start the first hop.

    Returns:
        tuple: Its pid, a pidfd of it, and our ends of its stdin, stdout and stderr.
    Raises:
        OSError: If it can't be started; nothing of it stays open then.
    """
    ours: list[int] = []
    theirs: list[int] = []
    try:
        for number in range(3):
            reading, writing = os.pipe()
            ours.append(reading if number else writing)
            theirs.append(writing if number else reading)
        for fd in theirs[:3]:
            theirs.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))
        pid = os.posix_spawnp(
            argv[0],
            [os.fsencode(word) for word in argv],
            os.environb,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(theirs[3:])
            ],
            setsid=True,  # what a terminal sends to us is no word to ssh
            setsigmask=(),
            setsigdef=range(1, signal.SIGSYS + 1),
        )
    except OSError:
        for fd in ours:
            os.close(fd)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    return pid, os.pidfd_open(pid), ours  # now there is a descriptor for it
