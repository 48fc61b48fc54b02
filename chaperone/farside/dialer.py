"""
Getting through to a far side: attempts, and what their failures mean.

Knows: slots, when to try again.  Must not know: what is sent there.
"""

from __future__ import annotations

import os
import stat

from ..model import hops
from ..model.cpython import signal
from . import payload, slots
from .connection import Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from ..program.interface import Chaperone
    from .connection import Listener

    class Caller(Listener, Protocol):
        """Who wants to get through."""

        def unreachable(self, stage: str, message: str) -> None:
            """
            No attempt got through, in the time there was or for a reason that stays: nothing was
            started by this call.
            """


SLOT_AGAIN_S = 0.05  # all slots taken: a fresh connection takes 0.1-0.2 s, so one is free soon
RETRY_S = (
    0.2,
    5.0,
)  # from 0.2 to 5 s apart, jittered, so that a hundred refused at once don't come back at once
WORDS = 600  # characters of ssh's last words in a message


class Dialer:
    """
    Makes connections for one run, and passes on what they bring.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): For its loop, log and spool.
        inner (list): The argv at the end of the hops.
        nonce (str): Of the records.
        caller: Told what happens.
        bare (bool): As for `Connection`.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        chaperone: Chaperone,
        inner: list[str],
        nonce: str,
        caller: Caller,
        bare: bool = False,
    ) -> None:
        self._chaperone, self._caller, self._nonce = chaperone, caller, nonce
        route = hops.route(spec["remote"]["hops"] if spec["remote"] else [])
        # The only ready word that there is without a far side; else the hops are taken for ready.
        announcing = route.announcing(payload.READY.decode().strip()) if bare else None
        self._bare = bare and announcing is None
        self._after_ready_bare = announcing is not None
        self._route = announcing or route
        self.argv = self._route.argv(inner, chaperone.log_path)
        self._patience_s = spec["timeouts"]["connect"]
        self.connection: Connection | None = None
        self._slots: list[int] = []  # one, while we connect; all, while we wait for one
        self._deadline = 0.0
        self._pause_s = 0.0
        self._timer: int | None = None
        self._too_late: int | None = None
        self._log_size = 0
        self._refused = ""
        self._given_up = False
        self._payload = b""
        self._stdin: tuple[int, int] | None = None

    def dial(self, payload: bytes, stdin: tuple[int, int] | None = None) -> None:
        """Try until a connection is ready, then send; `caller` is told."""
        self._payload, self._stdin = payload, stdin
        self._deadline = self._chaperone.loop.now() + self._patience_s
        self._pause_s = 0.0
        self._refused = ""
        self._given_up = False
        self._attempt()

    def give_up(self) -> None:
        """
        Stop trying, and end the attempt there is; `closed` or `unreachable` may still be told.
        """
        self._given_up = True
        if self.connection is not None:
            self.connection.terminate()
        elif self._timer is not None:
            self._chaperone.loop.cancel(self._timer)
            self._timer = None
            self._chaperone.loop.at(
                self._chaperone.loop.now(),
                lambda: self._caller.unreachable(
                    "stopped", "stopped before the connection was there"
                ),
            )

    def _attempt(self) -> None:
        self._timer = None
        loop = self._chaperone.loop
        if not self._have_slot():
            if loop.now() >= self._deadline:
                self._caller.unreachable(
                    "connect",
                    f"unable to connect: all {slots.SLOTS} slots for this host stayed taken for {self._patience_s:g} s",
                )
            else:
                self._timer = loop.later(SLOT_AGAIN_S * (0.5 + _chance()), self._attempt)
            return
        self._log_size = self._size_of_log()
        try:
            self.connection = Connection(
                loop,
                self.argv,
                self._route,
                self._nonce,
                self._payload,
                self._stdin,
                self,
                self._bare,
            )
        except OSError as error:
            slots.leave(self._slots)
            self._caller.unreachable("spawn", f"unable to run {self.argv[0]!r}: {error.strerror}")
            return
        if not self.connection.ready:
            self._too_late = loop.at(self._deadline, self.connection.terminate)

    def _have_slot(self) -> bool:
        spool_fd = self._chaperone.spool_fd
        if self._route.slot_name is None or spool_fd < 0:
            return True
        try:
            # Kept open while we wait: a look at them takes 7 µs then, and 40 where they are opened
            # each time; a hundred may wait.
            self._slots = self._slots or slots.opened(spool_fd, self._route.slot_name)
            return slots.take(self._slots)
        except OSError as error:  # a limit that can't be kept is no reason not to run
            slots.leave(self._slots)
            self._chaperone.log(f"unable to take a slot for connecting: {error.strerror or error}")
            return True

    # -- what a connection brings

    def connected(self) -> None:
        """Through: from here on nothing is tried again."""
        self._chaperone.loop.cancel(self._too_late)
        slots.leave(self._slots)
        if self._after_ready_bare and self.connection is not None:
            self.connection.go_bare()
        self._caller.connected()

    def output(self, stream: str, data: bytes) -> None:
        """Passed on."""
        self._caller.output(stream, data)

    def record(self, words: list[str]) -> None:
        """Passed on."""
        self._caller.record(words)

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """An attempt is over: passed on if it got through, else tried again or given up."""
        self.connection = None
        self._chaperone.loop.cancel(self._too_late)
        slots.leave(self._slots)
        self._tell(noise)
        if ready:
            self._caller.closed(code, ready, noise)
            return
        now = self._chaperone.loop.now()
        words = self.words(noise)
        if (
            not words and now >= self._deadline
        ):  # this one was cut off: what the one before it met is the reason
            words = self._refused
        self._refused = words
        refused, passing = self._route.refusal(words)
        stage = (refused or "connect") if code else "far-side"
        self._pause_s = min(max(2 * self._pause_s, RETRY_S[0]), RETRY_S[1])
        pause_s = self._pause_s * (0.5 + _chance())
        if self._given_up:
            self._caller.unreachable("stopped", "stopped before the connection was there")
        elif (
            code in (*self._route.own_codes, -signal.SIGTERM)
            and passing
            and now + pause_s < self._deadline
        ):
            self._chaperone.log(
                f"unable to connect: {words or 'no reason given'}; the next attempt is in {pause_s:.1f} s"
            )
            self._timer = self._chaperone.loop.at(now + pause_s, self._attempt)
        else:
            self._caller.unreachable(*self._why(code, stage, words))

    def _why(self, code: int, stage: str, words: str) -> tuple[str, str]:
        if (
            stage in ("connect", "far-side")
            and self._chaperone.loop.now() >= self._deadline
            and not words
        ):
            return (
                "far-side",
                f"unable to reach a shell on the far side: no ready word within {self._patience_s:g} s",
            )
        if stage == "connect" and code not in self._route.own_codes and code >= 0:
            stage = "far-side"
        if stage == "far-side":
            said = f", said {words!r}" if words else ""
            return (
                stage,
                f"unable to reach a shell on the far side: the last hop's login ended with code {code}{said}",
            )
        return (
            stage,
            f"unable to connect: {words or f'{self.argv[0]} ended with code {code} and no word'}",
        )

    def _tell(self, noise: bytes) -> None:
        text = noise.decode("utf-8", "backslashreplace").strip()
        if text:
            self._chaperone.log(f"said before the program's own output: {text}")

    def words(self, noise: bytes = b"") -> str:
        """
        The last words of the hops: in the log what this connection's ssh wrote there, else what
        came on stderr; one line.
        """
        said = b""
        try:
            with open(self._chaperone.log_path, "rb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.seek(self._log_size)
                    said = file.read(65_536)
        except OSError:
            pass
        # Our own lines in the log begin with a time.
        lines = [
            line
            for line in said.decode("utf-8", "backslashreplace").splitlines()
            if not line[:2].isdigit()
        ]
        lines = lines or noise.decode("utf-8", "backslashreplace").splitlines()
        return " ".join(
            line.strip() for line in lines if line.strip() and set(line.strip()) != {"@"}
        )[-WORDS:]

    def _size_of_log(self) -> int:
        try:
            return os.stat(self._chaperone.log_path).st_size
        except OSError:
            return 0


def _chance() -> float:
    """0 to 1, from the kernel: 100 chaperones that start at once must not agree."""
    return int.from_bytes(os.urandom(2), "big") / 65_536
