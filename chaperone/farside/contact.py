"""
Contact with a far side: up or down, when it was last heard, until when it may go on unheard, and
what is asked of it.

Knows: leases, heartbeats, clocks.  Must not know: what follows from a record.
"""

from __future__ import annotations

import os
import time

from ..model import status as statuses
from ..program.spawn import Stdin
from . import payload
from .lives import Event
from .records import LACKING, Recorded, Tail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..program.interface import Chaperone
    from ..program.loop import Loop
    from .connect.dialer import Dialer
    from .lives import Happen

SLACK_S = 4.0  # the far side repeats SIGKILL for 3 s, and takes one more look
# for the far side to do what takes it no time: then the connection is closed, which kills what is
# there
PATIENCE_S = 10.0
# for the far side to set out: until it has started the program, its supervisor seems to be gone
BEGIN_S = 60.0
# from "the program is gone" to a record that says how it ended, before we believe that none comes
DEAD_S = 5.0
# for what the far side writes on its way out, after all of the program's own output is here
CUT_OFF_S = 0.1
# heartbeats: then what passed them on is gone, though the connection is there; there are four to a
# lease, and another connection takes its time
UNANSWERED = 2
PAUSES_S = (0.2, 30.0)  # between attempts to come into contact again: the first, and the longest


class Contact:
    """
    What a status says about a connection, and the deadlines that follow from it.

    Args:
        spec (dict): Canonical.
        loop (Loop): For its clock.

    Attributes:
        survives (bool): Whether the program lives on without a connection.
        up (bool): None before the first connection.
        drops (int): How often it went down.
        queue (str): What an engine says while it makes the connection wait; None while none does.
    """

    def __init__(self, spec: dict[str, Any], loop: Loop) -> None:
        self._spec, self._loop = spec, loop
        self.survives = spec["on_disconnect"] == "survive"
        self.up: bool | None = None
        self.drops = 0
        self.queue: str | None = None
        self._since: str | None = None
        self._pause_s = 0.0
        self.heard()

    def heard(self) -> None:
        """The far side said something."""
        self._heard_s, self._heard_ns = self._loop.now(), time.time_ns()

    def went_up(self) -> None:
        """There is a connection."""
        self.queue = None
        self.up, self._since, self._pause_s = True, statuses.timestamp(time.time_ns()), 0.0

    def went_down(self) -> None:
        """There is none any more."""
        if self.up is not False:
            self._since = statuses.timestamp(time.time_ns())
        self.up = False

    def pause_s(self) -> float:
        """How long to wait before the next attempt: longer from one to the next."""
        self._pause_s = min(max(2 * self._pause_s, PAUSES_S[0]), PAUSES_S[1])
        return self._pause_s

    def facts(self, argv: list[str], pid: int | None) -> dict[str, object]:
        """
        The status's `connection`.

        Args:
            argv (list): Of the first hop.
            pid (int): Its process; None without a connection.
        """
        facts: dict[str, object] = {
            "argv": argv,
            "pid": pid if self.up or self.queue is not None else None,
            "drops": self.drops,
            "state": "up" if self.up else "down" if self.queue is None else "queued",
            "since": self._since,
        }
        if self.queue is not None:
            facts["message"] = self.queue
        if self.survives:
            facts["lease_until"] = None if self.up else self._after(self._spec["lease"])
        return facts

    def beat_s(self) -> float:
        """How long from one heartbeat to the next."""
        return float(min(payload.NO_HURRY_S, self._spec["lease"] / 4))

    def lease_is_over(self) -> bool:
        """Whether the far side has certainly ended by now what it did not hear about."""
        return self._loop.now() > self._heard_s + self._longest_s()

    def gone_by(self) -> str:
        """
        By then the far side has ended it, heard from last as we have: EOF is quicker, a silent cut
        takes the whole lease.
        """
        return self._after(self._longest_s())

    def _longest_s(self) -> float:
        lease_s = self._spec["lease"]
        return float(
            lease_s + payload.tick_s(lease_s) + self._spec["stop"]["grace_period"] + SLACK_S
        )

    def _after(self, seconds: float) -> str:
        return statuses.timestamp(self._heard_ns + int(seconds * 1e9))


class ControlLine:
    """
    What is asked of a far side: now, or as soon as it hears us.

    Args:
        dialer (Dialer): Has the connection.
        contact (Contact): Knows whether the far side hears us.
        timers (Timers): For the heartbeat.
    """

    def __init__(self, dialer: Dialer, contact: Contact, timers: Timers) -> None:
        self._dialer, self._contact, self._timers = dialer, contact, timers
        self._waiting: list[str] = []
        self._beats = self._answered = 0

    def ask(self, line: str) -> None:
        """Send a line, once; what was asked for and not sent yet is not asked for twice."""
        if self._contact.up and self._dialer.pid() is not None:
            self._dialer.send(line)
        elif line not in self._waiting:
            self._waiting.append(line)

    def begin(self) -> None:
        """The far side hears us: send what waits, and then heartbeats."""
        waiting, self._waiting = self._waiting, []
        self._answered = self._beats
        for line in waiting:
            self.ask(line)
        self._beat()

    def answered(self) -> None:
        """The far side has answered a heartbeat."""
        self._answered = self._beats

    def _beat(self) -> None:
        # Only if it survives: otherwise the far side ends everything when the lease is over.
        if self._contact.survives and self._beats - self._answered >= UNANSWERED:
            self._dialer.terminate()
            return
        self._beats += 1
        self._dialer.send(f"h {self._beats}")
        self._timers.set("beat", self._contact.beat_s(), self._beat)


class Timers:
    """Deadlines by name, each there once."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._handles: dict[str, int] = {}

    def set(self, name: str, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back after some seconds, in place of what this name was set to."""
        self.cancel(name)
        self._handles[name] = self._loop.later(delay_s, callback)

    def is_set(self, name: str) -> bool:
        """Whether it was set, and not cancelled since."""
        return name in self._handles

    def cancel(self, name: str) -> None:
        """Forget it; nothing to do when it is not set."""
        self._loop.cancel(self._handles.pop(name, None))

    def cancel_all(self) -> None:
        """Forget all of them."""
        for name in list(self._handles):
            self.cancel(name)


class FarSide:
    """
    The connections to the far side and what is asked of it: the actions towards it.

    Args:
        spec (dict): Canonical.
        dialer (Dialer): Makes the connections.
        tail (Tail): What was said of the end.
        happen: Called with an event that follows from others.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        chaperone: Chaperone,
        dialer: Dialer,
        tail: Tail,
        happen: Happen,
    ) -> None:
        self._spec, self._chaperone, self._dialer, self._tail = spec, chaperone, dialer, tail
        self._happen = happen
        self.contact = Contact(spec, chaperone.loop)
        self.timers = Timers(chaperone.loop)
        self._line = ControlLine(dialer, self.contact, self.timers)
        self._stdin = Stdin()
        self._missing = ""  # what the far side seems to have lost
        self._rest = ""  # how we asked for what the program left
        self._is_killed = False

    def prepare(self, cookie: str, umask: int) -> None:
        """
        Make the words that all connections of the run share.

        Args:
            cookie (str): As for `RemoteProgram`.
            umask (int): For a program without hops.
        """
        # What survives keeps its records there, so the nonce is the run's. A byte that no text
        # begins with makes it quick to find.
        survives = self._spec["on_disconnect"] == "survive"
        self._nonce = "\x1e" + (cookie[16:] if survives else os.urandom(12).hex())
        self._cookie, self._umask = cookie, umask

    def facts(self) -> dict[str, object]:
        """The status's `connection`."""
        return self.contact.facts(self._dialer.argv, self._dialer.pid())

    def words(self) -> str:
        """The last words of the hops."""
        return self._dialer.words()

    def here(self) -> tuple[int, int]:
        """The sizes of stdout and stderr here, with what was dropped."""
        out, err = (stream.taken for stream in self._chaperone.streams.values())
        return out, err

    # -- connections

    def set_out(self) -> None:
        """
        Connect, and send the program.

        Raises:
            StartError: If its standard input can't be had.
        """
        self._stdin.open(self._spec["program"]["stdin"])
        self._dial("survive" if self._spec["on_disconnect"] == "survive" else "kill")

    def attach(self) -> None:
        """Connect to a program that was sent before."""
        if self._rest and self._tail.left is None:
            self._line.ask(self._rest)
        if self._is_killed:  # what was written as the connection broke was not heard
            self._line.ask("z")
        self._dial("attach")

    def _dial(self, life: str) -> None:
        end, name = "@" + os.urandom(8).hex(), os.urandom(8).hex()
        sent = payload.sent(
            self._spec,
            life,
            payload.Words(self._nonce, self._cookie, end, name),
            umask=self._umask,
            stdin_size=self._stdin.size,
            offsets=self.here(),
        )
        stdin = self._stdin.source() if life != "attach" else None
        self._dialer.dial(lambda: Recorded(self._nonce, payload.READY, sent, stdin))

    def greet(self, event: Event) -> None:
        """The far side is there, and says what it has."""
        lacks = [fact for fact in LACKING if fact in event.said]
        for fact in lacks:
            self._chaperone.log(f"the far side has no {LACKING[fact]}")
        self._tail.counts = "tracking=group" not in lacks
        again = self.contact.up is False
        self.contact.went_up()
        if again:
            self.note_connection(event)
        self._line.begin()

    def note_connection(self, event: Event) -> None:
        """Into the status."""
        self._chaperone.noted(connection=self.facts())

    def note_answer(self, event: Event) -> None:
        """Heartbeats get through."""
        self._line.answered()

    def count_drop(self, event: Event) -> None:
        """A connection was lost."""
        self.contact.drops += 1

    def come_back(self, event: Event) -> None:
        """The program goes on there: attach again, for as long as it may."""
        if self.contact.lease_is_over():
            self._happen(Event("too late", text=event.text))
            return
        self.contact.went_down()
        self._chaperone.log(f"the connection is down: {event.text}")
        self.note_connection(event)
        self.timers.set("again", self.contact.pause_s(), self.attach)

    def give_up(self, event: Event) -> None:
        """No connection is wanted any more."""
        self._dialer.give_up()

    def close(self, event: Event) -> None:
        """End the connection; in a `kill` life, all that is there."""
        self._dialer.close()

    def hang_up(self, event: Event) -> None:
        """The far side has cleared its directory; what was left alone may hold its last shell."""
        if self._spec["leftovers"] == "leave":
            self._dialer.terminate()
        else:
            self._dialer.close()

    def cut_off(self, event: Event) -> None:
        """What was left alone holds the pipes, maybe for ever."""
        if self._tail.left:
            self._chaperone.loop.later(CUT_OFF_S, self._dialer.terminate)

    # -- what is asked

    def ask_to_signal(self, event: Event) -> None:
        """The program alone."""
        self._line.ask(f"k {payload.signal_word(event.number)}")

    def ask_to_stop(self, event: Event) -> None:
        """A signal to the group of the program and to what left it."""
        self._line.ask(f"g {payload.signal_word(event.number)}")

    def ask_to_kill(self, event: Event) -> None:
        """SIGKILL to all of it, until nothing is left."""
        self._is_killed = True
        self._line.ask("z")

    def ask_for_the_rest(self, event: Event) -> None:
        """To end what the program left, or leave it alone, and count it."""
        leave = self._spec["leftovers"] == "leave"
        self._rest = "q leave" if leave else f"q {payload.fifths(event.seconds)}"
        self._line.ask(self._rest)

    def ask_to_forget(self, event: Event) -> None:
        """The far side may remove all that it keeps of the run."""
        self._line.ask("c")
        self.be_patient(event)

    def clear(self, event: Event) -> None:
        """
        As `ask_to_forget`, after the outcome was published: not where the disk refused that, since
        what the far side keeps is then all that there is.
        """
        if self._chaperone.is_published():
            self.ask_to_forget(event)

    # -- how long it may take

    def be_patient(self, event: Event) -> None:
        """For a short while: then the end of the connection ends what is there."""
        self._be_patient(PATIENCE_S)

    def be_patient_with_the_rest(self, event: Event) -> None:
        """For as long as the far side may need for what was left."""
        self._be_patient(event.seconds + SLACK_S + PATIENCE_S)

    def _be_patient(self, seconds: float) -> None:
        self.timers.set("patience", seconds, lambda: self._lose_patience(seconds))

    def _lose_patience(self, seconds: float) -> None:
        # A slow reader of our own output, of a direct run, is no fault of the far side.
        if self._dialer.is_held_up() and self._chaperone.is_running():
            self._be_patient(seconds)
        else:
            self._dialer.close()

    def wait_for_start(self, event: Event) -> None:
        """Of the program, before the far side is believed to be gone."""
        self._wait(event, BEGIN_S)

    def wait_for_end(self, event: Event) -> None:
        """Of the program, before no word of it is believed to come."""
        self._wait(event, DEAD_S)

    def _wait(self, event: Event, delay_s: float) -> None:
        """
        The program is gone, or its supervisor, or a file between us: if no record says how it
        ended, none ever will.
        """
        missing = event.said[1:]
        self._missing = f"file {missing[0]!r}" if missing else "part"
        if not self.timers.is_set("silence"):
            self.timers.set("silence", delay_s, self._fell_silent)

    def _fell_silent(self) -> None:
        self._happen(Event("silence", text=f"{self._missing} of the far side"))

    def stop_waiting(self, event: Event) -> None:
        """The far side has answered."""
        self.timers.cancel("silence")
