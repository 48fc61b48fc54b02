"""
Getting through to a far side: attempts, and what their failures mean.

Knows: slots, when to try again.  Must not know: what is sent there, a kind of hop.
"""

from __future__ import annotations

import os
import stat

from ...cpython import signal
from .connection import Connection
from .masters import Masters
from .slots import SLOTS, Slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from ...model.hops.route import Route
    from ...program.interface import Caller
    from .connection import ConnectionOwner, Dialogue, Receiver

    class DialerOwner(ConnectionOwner, Receiver, Protocol):
        """What wants to get through; `closed` is called for a connection that was ready alone."""

        def unreachable(self, stage: str, message: str) -> None:
            """
            No attempt got through, in the time there was or for a reason that stays: nothing was
            started by this call.
            """


SLOT_AGAIN_S = 0.05  # all slots taken: a fresh connection takes 0.1-0.2 s, so one is free soon
# jittered, so that a hundred refused at once don't come back at once
RETRY_S = (0.2, 5.0)
SHARES = 3  # attempts to use a shared connection, then one of our own
SHARE_S = 10.0  # for a session on one: a master that was paused never answers
WORDS = 600  # characters of a client's last words in a message
LOG_BYTES = 65_536  # of the log that are read for these words
STOPPED = ("stopped", "stopped before the connection was there")


class Dialer:
    """
    Makes connections for one run, one at a time.

    Args:
        chaperone (Caller): For its loop, log and spool.
        route (Route): The hops.
        inner (list): The argv at their end.
        patience_s (float): For all attempts of one call together.
        share (bool): Whether it may share a connection with other runs.
        owner (DialerOwner): Learns how it goes.

    Attributes:
        argv (list): Of the first hop.
    """

    def __init__(
        self,
        chaperone: Caller,
        route: Route,
        inner: list[str],
        patience_s: float,
        owner: DialerOwner,
        share: bool = False,
    ) -> None:
        self._chaperone, self._inner, self._owner = chaperone, inner, owner
        self._take(route)
        self._patience_s = patience_s
        self._connection: Connection | None = None
        self._slots = Slots(chaperone, route.slot_name)
        can_share = share and route.share_key and chaperone.spool_fd >= 0
        self._masters = Masters(chaperone, route) if can_share else None
        self._attempts: Attempts | None = None
        self._timer: int | None = None
        self._too_late: int | None = None
        self._log_size = 0
        self._written: list[str] = []

    def _take(self, route: Route) -> None:
        self._route, self.argv = route, route.argv(self._inner, self._chaperone.log_path)

    def dial(self, make_dialogue: Callable[[], Dialogue]) -> None:
        """
        Try until a connection is ready; the owner learns what becomes of it.

        Args:
            make_dialogue: Called for each attempt.
        """
        self._attempts = Attempts(make_dialogue, self._chaperone.loop.now() + self._patience_s)
        self._attempt(self._attempts)

    def give_up(self) -> None:
        """Stop trying, and end the attempt there is; `closed` or `unreachable` may still come."""
        if self._attempts is not None:
            self._attempts.given_up = True
        if self._connection is not None:
            self._connection.terminate()
        elif self._timer is not None:
            self._chaperone.loop.cancel(self._timer)
            self._timer = self._chaperone.loop.later(0, lambda: self._owner.unreachable(*STOPPED))

    # -- to the connection that there is

    def pid(self) -> int | None:
        """Of the first hop; None without a connection."""
        return self._connection.pid if self._connection is not None else None

    def send(self, line: str) -> None:
        """Send a control line; without a ready connection it is dropped."""
        if self._connection is not None:
            self._connection.send(line)

    def is_held_up(self) -> bool:
        """As `Connection.is_held_up`; False without one."""
        return self._connection is not None and self._connection.is_held_up()

    def close(self) -> None:
        """End the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()

    def terminate(self) -> None:
        """As `close`, now."""
        if self._connection is not None:
            self._connection.terminate()

    # -- attempts

    def _attempt(self, attempts: Attempts) -> None:
        self._timer = None
        if self._masters is None or attempts.shares <= 0:
            self._connect(attempts)
            return
        try:
            path = self._masters.take()
            if path is not None:
                self._open(attempts, self._route.shared(path), SHARE_S)
            else:
                self._start_master(attempts, self._masters)
        except OSError as error:
            self._alone(attempts, str(error.strerror or error))

    def _start_master(self, attempts: Attempts, masters: Masters) -> None:
        if self._chaperone.loop.now() >= attempts.deadline - self._patience_s / 2:
            self._alone(attempts, "too little time is left to make one")
        elif "CHAPERONE_RUN_ID" in os.environ:  # it would end with the run that we are part of
            self._alone(attempts, "a chaperone inside another run makes none")
        elif attempts.started_master:
            self._alone(attempts, "the ssh master for it did not start")
        elif not self._slots.take():
            self._later(SLOT_AGAIN_S * (0.5 + _chance()), attempts)
        elif masters.start(lambda: self._started(attempts)):
            attempts.started_master = True
        else:
            self._slots.leave()
            self._later(SLOT_AGAIN_S * (0.5 + _chance()), attempts)

    def _started(self, attempts: Attempts) -> None:
        self._slots.leave()
        if attempts.given_up:
            self._owner.unreachable(*STOPPED)
        else:
            self._attempt(attempts)

    def _alone(self, attempts: Attempts, why: str) -> None:
        """Make a connection of our own, which also says what is wrong, if anything is."""
        assert self._masters is not None
        self._masters.leave()
        self._chaperone.log(f"unable to share a connection: {why}; this run makes its own")
        attempts.shares = 0
        self._attempt(attempts)

    def _connect(self, attempts: Attempts) -> None:
        loop = self._chaperone.loop
        if not self._slots.take():
            if loop.now() < attempts.deadline:
                self._later(SLOT_AGAIN_S * (0.5 + _chance()), attempts)
            else:
                slots = f"all {SLOTS} connection slots for this host"
                taken = f"{slots} were in use for {self._patience_s:g} s"
                self._owner.unreachable("connect", f"unable to connect: {taken}")
            return
        self._open(attempts, self._route, self._patience_s)

    def _open(self, attempts: Attempts, route: Route, patience_s: float) -> None:
        loop = self._chaperone.loop
        self.argv = route.argv(self._inner, self._chaperone.log_path)
        self._log_size = self._size_of_log()
        try:
            self._connection = Connection(
                loop,
                self.argv,
                route=route,
                dialogue=attempts.make_dialogue(),
                owner=self,
                receiver=self._owner,
            )
        except OSError as error:
            self._slots.leave()
            self._owner.unreachable("spawn", f"unable to run {self.argv[0]!r}: {error.strerror}")
            return
        too_late = min(attempts.deadline, loop.now() + patience_s)
        self._too_late = loop.at(too_late, self._connection.terminate)
        self._connection.begin()

    def _later(self, delay_s: float, attempts: Attempts) -> None:
        self._timer = self._chaperone.loop.later(delay_s, lambda: self._attempt(attempts))

    def waits(self, queue: str | None) -> None:
        """
        In the queue of an engine no patience is used up, and no slot: the hops before it are
        through.
        """
        loop = self._chaperone.loop
        self._slots.leave()
        loop.cancel(self._too_late)
        self._too_late = None
        assert self._attempts is not None and self._connection is not None
        self._attempts.deadline = loop.now() + self._patience_s
        if queue is None:
            self._too_late = loop.at(self._attempts.deadline, self._connection.terminate)
        self._owner.waits(queue)

    def connected(self) -> None:
        """Through: from here on nothing is tried again."""
        self._chaperone.loop.cancel(self._too_late)
        self._slots.leave()
        self._owner.connected()

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """A connection is over: the owner's if it was ready, else an attempt that failed."""
        self._connection = None
        self._chaperone.loop.cancel(self._too_late)
        self._slots.leave()
        # Before our own entry, whose further lines have no time.
        self._written = self._written_by_client()
        text = noise.decode("utf-8", "backslashreplace").strip()
        if text:
            self._chaperone.log(f"said before the program's own output: {text}")
        if ready:
            self._leave_master()
            self._owner.closed(code, ready, noise)
        elif self._attempts is not None and self._masters is not None and self._attempts.shares > 0:
            self._not_shared(self._attempts, self._masters, noise)
        elif self._attempts is not None:
            self._failed(self._attempts, code, noise)

    def _leave_master(self) -> None:
        if self._masters is not None:
            self._masters.leave()

    def _not_shared(self, attempts: Attempts, masters: Masters, noise: bytes) -> None:
        """A session on a master did not come about."""
        words = self.words(noise)
        if self._route.is_full(words):
            masters.refused()
            attempts.started_master = False
        elif self._route.is_too_new(words):
            self._take(self._route.older())
        else:
            attempts.shares -= 1
            masters.failed()
        if attempts.given_up:
            self._owner.unreachable(*STOPPED)
        elif attempts.shares <= 0:
            self._alone(attempts, words or "no reason given")
        else:
            self._attempt(attempts)

    def _failed(self, attempts: Attempts, code: int, noise: bytes) -> None:
        now = self._chaperone.loop.now()
        words = self.words(noise)
        # An attempt that was cut off says nothing: what the one before it met is the reason.
        if not words and now >= attempts.deadline:
            words = attempts.refused
        attempts.refused = words
        stage, passing = self._route.refusal(words)
        pause_s = attempts.next_pause_s() * (0.5 + _chance())
        by_a_hop = code in (*self._route.early_codes, -signal.SIGTERM)
        if attempts.given_up:
            self._owner.unreachable(*STOPPED)
        elif self._route.is_too_new(words):
            self._chaperone.log("connecting again, without what an old client does not know")
            self._take(self._route.older())
            self._later(0, attempts)
        elif by_a_hop and passing and now + pause_s < attempts.deadline:
            said = f"unable to connect: {words or 'no reason given'}"
            self._chaperone.log(f"{said}; the next attempt is in {pause_s:.1f} s")
            self._later(pause_s, attempts)
        elif code and stage is not None:
            self._owner.unreachable(stage, f"unable to connect: {words}")
        else:
            self._owner.unreachable(*self._reason(attempts, code, words))

    def _reason(self, attempts: Attempts, code: int, words: str) -> tuple[str, str]:
        """Why there is no connection, where no hop said that it was refused."""
        no_shell = "unable to reach a shell on the far side"
        if self._chaperone.loop.now() >= attempts.deadline and not words:
            return "far-side", f"{no_shell}: no answer within {self._patience_s:g} s"
        if code < 0 or code in self._route.early_codes:
            said = words or f"{self.argv[0]} ended with code {code} and no message"
            return "connect", f"unable to connect: {said}"
        said = f", said {words!r}" if words else ""
        return "far-side", f"{no_shell}: the last hop's login ended with code {code}{said}"

    # -- what the hops said

    def words(self, noise: bytes = b"") -> str:
        """
        The last message of the hops of the last connection, one line: what its client wrote into
        the log, or what came on stderr.
        """
        words = [line.strip() for line in self._written or _lines(noise)]
        return " ".join(line for line in words if line and set(line) != {"@"})[-WORDS:]

    def _written_by_client(self) -> list[str]:
        said = b""
        try:
            with open(self._chaperone.log_path, "rb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.seek(self._log_size)
                    said = file.read(LOG_BYTES)
        except OSError:
            pass
        # Our own lines in the log begin with a time.
        return [line for line in _lines(said) if not line[:2].isdigit()]

    def _size_of_log(self) -> int:
        try:
            return os.stat(self._chaperone.log_path).st_size
        except OSError:
            return 0


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", "backslashreplace").splitlines()


def _chance() -> float:
    """0 to 1, from the kernel: 100 chaperones that start at once must not agree."""
    return int.from_bytes(os.urandom(2), "big") / 65_536


class Attempts:
    """
    The attempts of one call.

    Args:
        make_dialogue: As for `Dialer.dial`.
        deadline (float): On the monotonic clock.

    Attributes:
        refused (str): What the hops said at the last one.
        given_up (bool): Whether no further one is wanted.
        shares (int): How many more are to use a shared connection, if the run may share one.
        started_master (bool): Whether it started the master that it needs.
    """

    def __init__(self, make_dialogue: Callable[[], Dialogue], deadline: float) -> None:
        self.make_dialogue, self.deadline = make_dialogue, deadline
        self.refused = ""
        self.given_up = False
        self.shares = SHARES
        self.started_master = False
        self._pause_s = 0.0

    def next_pause_s(self) -> float:
        """How long to wait before the next one: longer from one to the next."""
        self._pause_s = min(max(2 * self._pause_s, RETRY_S[0]), RETRY_S[1])
        return self._pause_s
