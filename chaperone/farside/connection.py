"""
One connection to a far side: the process of its hops, what is sent into it, what comes out of it.

Knows: pipes, processes, the ready word.  Must not know: runs, statuses, what a record means.
"""

from __future__ import annotations

import fcntl
import os
import select

from ..model.cpython import signal
from ..program.fds import PIPE_BYTES, widened
from . import payload
from .records import Records, farewell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from ..model.hops import Route
    from ..program.loop import Loop

    class Listener(Protocol):
        """Who is told what a connection brings; all in the loop's thread."""

        def connected(self) -> None:
            """The ready word came: the payload goes out now."""

        def output(self, stream: str, data: bytes) -> None:
            """Bytes of the program."""

        def record(self, words: list[str]) -> None:
            """A record of the far side."""

        def closed(self, code: int, ready: bool, noise: bytes) -> None:
            """
            It is over: as os.waitstatus_to_exitcode tells it, whether the ready word ever came,
            what came before the records.
            """


BUSY_BYTES = 32_768  # what ssh writes at once
# for a chain whose pipes are closed to end by itself, and for pipes that outlive their chain
LINGER_S = 2.0


class Connection:
    """
    A chain of hops, from its spawn to its end.

    Args:
        loop (Loop): Watches it.
        argv (list): Of the first hop.
        route (Route): What is known of the hops.
        nonce (str): Of the records.
        payload (bytes): Sent after the ready word, and nothing before.
        stdin (tuple): fd and size in bytes of what follows the payload, the fd stays the caller's;
            None for nothing.
        listener: Told what happens.
        bare (bool): There is no far side but the program itself: no ready word, no records.
    """

    def __init__(
        self,
        loop: Loop,
        argv: list[str],
        route: Route,
        nonce: str,
        payload: bytes,
        stdin: tuple[int, int] | None,
        listener: Listener,
        bare: bool = False,
    ) -> None:
        self._loop, self._listener, self._bare = loop, listener, bare
        self._route = route
        self._nonce = nonce
        self._out = bytearray()
        self._later = (
            bytearray()
        )  # control lines, until all of the program's standard input is on its way
        self._payload, self._stdin, self._stdin_left = payload, stdin, stdin[1] if stdin else 0
        self.ready = bare
        self._booted = b""
        self._records = {"stdout": Records(nonce), "stderr": Records(nonce)}
        self._held = b""  # the end of a stderr that may be the client's farewell
        self._capacity = {"stdout": PIPE_BYTES, "stderr": PIPE_BYTES}
        self._code: int | None = None
        self._over = False
        self._timer: int | None = None
        self._end_input = False
        self._fds: dict[str, int] = {}
        self.pid = self._spawn(argv)
        loop.watch(self._pidfd, select.POLLIN, self._exited)
        for stream in ("stdout", "stderr"):
            os.set_blocking(self._fds[stream], False)
            loop.watch(self._fds[stream], select.POLLIN, self._readable)
        os.set_blocking(self._fds["stdin"], False)
        if bare:
            self._send_payload()

    def _spawn(self, argv: list[str]) -> int:
        """
        Start the first hop: its pid.

        Raises:
            OSError: If that can't be; nothing of it stays open then, for a run that survives tries
                again and again.
        """
        theirs: list[int] = []
        try:
            for name in ("stdin", "stdout", "stderr"):
                reading, writing = os.pipe()
                self._fds[name], other = (
                    (writing, reading) if name == "stdin" else (reading, writing)
                )
                theirs.append(other)
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
            for fd in self._fds.values():
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._pidfd = os.pidfd_open(pid)  # now there is a descriptor for it
        self._names = {fd: name for name, fd in self._fds.items()}
        return pid

    # -- into it

    def send(self, line: str) -> None:
        """Send a control line; before the ready word it is not taken."""
        if self.ready and "stdin" in self._fds and not self._bare:
            self._later += line.encode() + b"\n"
            self._write()

    def go_bare(self) -> None:
        """
        What comes from now on is the program's alone, and input ends where it ends: there is no far
        side.
        """
        self._bare = True

    def close_input(self) -> None:
        """No more control lines: to a far side that does not survive it, this means kill all."""
        fd = self._fds.pop("stdin", -1)
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)

    def _send_payload(self) -> None:
        self._out = bytearray(self._payload)
        self._payload = b""
        self._end_input = self._bare
        self._write()

    def _write(self) -> None:
        """
        As much as the pipe takes; the program's standard input is read as it goes, however big it
        is.
        """
        fd = self._fds.get("stdin", -1)
        while fd >= 0:
            if not self._out and self._stdin_left and not self._read_stdin():
                return
            if not self._out:
                self._out, self._later = self._later, bytearray()
            if not self._out:
                break
            try:
                count = os.write(fd, memoryview(self._out)[:PIPE_BYTES])
            except BlockingIOError:
                self._loop.watch(fd, select.POLLOUT, self._writable)
                return
            except BrokenPipeError:  # its end is told by its exit
                self.close_input()
                return
            del self._out[:count]
        if fd >= 0:
            self._loop.unwatch(fd)
            if self._end_input:
                self.close_input()

    def _read_stdin(self) -> bool:
        assert self._stdin is not None
        data = os.pread(
            self._stdin[0], min(self._stdin_left, PIPE_BYTES), self._stdin[1] - self._stdin_left
        )
        if not data:  # it shrank: the far side counts and will run nothing
            self._stdin_left = 0
            self.close_input()
            return False
        self._stdin_left -= len(data)
        self._out += data
        return True

    def _writable(self, fd: int, events: int) -> None:
        self._write()

    # -- out of it

    def _readable(self, fd: int, events: int) -> None:
        stream = self._names[fd]
        try:
            data = os.read(fd, self._capacity[stream])
        except BlockingIOError:
            return
        if not data:
            self._end_stream(stream)
            return
        if len(data) >= BUSY_BYTES and self._capacity[stream] == PIPE_BYTES:
            self._capacity[stream] = widened(fd)
        if self._bare:
            self._pass_on(stream, data, [])
        elif not self.ready and stream == "stderr":
            self._boot(data)
        else:
            self._pass_on(stream, *self._records[stream].feed(data))

    def _boot(self, data: bytes) -> None:
        """Look for the ready word in what startup files and hops say."""
        self._booted = (self._booted + data)[-Records.NOISE_BYTES :]
        before, word, after = self._booted.partition(payload.READY)
        if (
            not word or "stdin" not in self._fds
        ):  # too late: what had eaten our silence until its end lets the command run now
            return
        self._records["stderr"].noise += before
        self.ready = True
        self._listener.connected()
        self._send_payload()
        if after:
            self._pass_on(
                "stderr", *((after, []) if self._bare else self._records["stderr"].feed(after))
            )

    def _pass_on(self, stream: str, clean: bytes, records: list[list[str]]) -> None:
        said = self._route.farewell
        if stream == "stderr" and said is not None and (clean or records):
            clean = self._held + clean
            kept = farewell(clean, said) if not records else 0
            clean, self._held = clean[: len(clean) - kept], clean[len(clean) - kept :]
        if clean:
            self._listener.output(stream, clean)
        for words in records:
            if words:
                self._listener.record(words)

    def _end_stream(self, stream: str) -> None:
        fd = self._fds.pop(stream, -1)
        if fd < 0:
            return
        self._loop.unwatch(fd)
        os.close(fd)
        rest = b"" if self._bare else self._records[stream].end()
        if rest:
            self._pass_on(stream, rest, [])
        self._look_closed()

    # -- its end

    def close(self) -> None:
        """
        End it: close its pipe, then, after a while, a signal; at once where the far side does not
        see the end of a pipe.
        """
        if not self._route.carries_eof:
            self.terminate()
            return
        self.close_input()
        self._loop.cancel(self._timer)
        if not self._over:
            self._timer = self._loop.later(LINGER_S, self.terminate)

    def terminate(self) -> None:
        """As `close`, now; for a chain that has nothing more to say."""
        self.close_input()
        self._loop.cancel(self._timer)
        if self._code is None and not self._over:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            self._timer = self._loop.later(LINGER_S, self._give_up)

    def _give_up(self) -> None:
        if self._code is None and self._route.may_be_killed:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        elif self._code is None:
            self.terminate()

    def _exited(self, fd: int, events: int) -> None:
        self._loop.unwatch(fd)
        os.close(fd)
        self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.close_input()
        self._loop.cancel(self._timer)
        # Something of the chain (a ProxyCommand) may hold the pipes a little longer, or for ever.
        self._timer = self._loop.later(LINGER_S, self._cut)
        self._look_closed()

    def _cut(self) -> None:
        for stream in ("stdout", "stderr"):
            self._end_stream(stream)

    def _look_closed(self) -> None:
        if self._over or self._code is None or "stdout" in self._fds or "stderr" in self._fds:
            return
        self._over = True
        self._loop.cancel(self._timer)
        said = self._route.farewell
        is_farewell = (
            said is not None
            and self._code in self._route.own_codes
            and self._held.endswith(said[1])
        )
        if self._held and not is_farewell:
            self._listener.output("stderr", self._held)
        noise = (
            bytes(self._records["stdout"].noise + self._records["stderr"].noise)
            if self.ready
            else self._booted.replace(payload.READY, b"")
        )
        self._listener.closed(self._code, self.ready, noise + self._held if is_farewell else noise)
