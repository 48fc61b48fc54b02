"""
A program behind hops, held by the far side's text: what it says and what is asked of it, by the
table of its life.

Knows: records, control lines, leases.  Must not know: how a connection is made, the spool,
statuses.
"""

from __future__ import annotations

from ..cpython import signal
from ..model.hops.route import Route
from . import lives, payload, records
from .connect.dialer import Dialer
from .contact import FarSide
from .lives import Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..program.interface import Chaperone
    from .lives import Happen

LEFTOVER_GRACE_S = 5.0  # as for a program here
CUT_PAYLOAD = 97  # the exit code of a far side whose payload came cut: none of it was run


class RemoteProgram:
    """
    The program of a run with `remote`, or one here that survives its chaperone.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): Learns what happens.
        inherited (dict): `umask` (int), for a program without hops.
        cookie (str): The run's random key: its first half marks the run's processes, the second one
            its records.
        resumed (dict): The last status of a run that is adopted; None for a new run.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        chaperone: Chaperone,
        inherited: dict[str, Any],
        cookie: str,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        self._chaperone, self._resumed = chaperone, resumed
        self._survives = spec["on_disconnect"] == "survive"
        self._life = lives.Life(lives.SURVIVE if self._survives else lives.KILL)
        self._state = "unsent"
        dialer = Dialer(
            chaperone,
            Route.of(spec["remote"]["hops"] if spec["remote"] else []),
            inner=list(payload.CONSTANT),
            patience_s=spec["timeouts"]["connect"],
            owner=self,
            share=bool(spec["remote"] and spec["remote"].get("share")),  # 0.1 had no such field
        )
        self._tail = records.Tail()
        self._far = FarSide(spec, chaperone, dialer, self._tail, self._happened)
        self._far.prepare(cookie, inherited["umask"])
        self._account = Account(spec, chaperone, self._far, self._tail, self._happened)

    def _happened(self, event: Event) -> None:
        """Do what the table says, and what that brings about."""
        actions, self._state = self._life.step(self._state, event.name)
        for action in actions:
            name = action.replace(" ", "_")
            of = self._far if hasattr(self._far, name) else self._account
            getattr(of, name)(event)

    # -- what the chaperone asks

    def start(self) -> None:
        """
        Set out for the far side; the chaperone learns what becomes of it.

        Raises:
            StartError: If nothing was tried.
        """
        if self._resumed is None:
            self._far.set_out()
            return
        connection = self._resumed["connection"] or {}
        self._account.is_killed = self._resumed["stop"] is not None
        self._far.contact.drops = int(connection.get("drops") or 0) + 1
        for name, stream in self._chaperone.streams.items():
            stream.dropped = max(stream.dropped, (self._resumed[name] or {}).get("dropped") or 0)
        self._state = "adopted" if self._resumed["pid"] is None else "resuming"
        self._far.attach()

    def children_changed(self) -> None:
        """SIGCHLD: the connection watches its own."""

    def signal(self, signum: int) -> None:
        """Signal the program alone."""
        self._account.is_killed |= signum == signal.SIGKILL
        self._happened(Event("signal", number=signum))

    def stop(self, signum: int) -> None:
        """Signal the program's group and whatever left it."""
        self._account.is_killed |= signum == signal.SIGKILL
        self._happened(Event("stop", number=signum))

    def kill(self) -> None:
        """
        SIGKILL to everything, until nothing is left; where no answer comes, by the end of the
        connection.
        """
        self._account.is_killed = True
        self._happened(Event("kill"))

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left there, or leave it alone, then call `finished`.
        """
        self._happened(Event("finish", seconds=min(grace_s, LEFTOVER_GRACE_S)))

    # -- what comes from the far side

    def waits(self, queue: str | None) -> None:
        """An engine makes it wait."""
        self._far.contact.queue = queue
        self._chaperone.noted(connection=self._far.facts())

    def connected(self) -> None:
        """The payload is on its way: from now on the program may start."""
        self._happened(Event("connected"))

    def output(self, stream: str, data: bytes) -> None:
        """Bytes of the program, into its streams."""
        self._chaperone.streams[stream].write(data)
        if self._tail.sizes is not None:
            self._account.look_complete()

    def is_full(self, stream: str, freed: Callable[[], None]) -> bool:
        """As `Stream.is_full`."""
        return self._chaperone.streams[stream].is_full(freed)

    def record(self, words: list[str]) -> None:
        """A record of the far side."""
        self._far.contact.heard()
        if self._survives:
            self._chaperone.heard_from_far_side()
        name = records.event_of(words)
        if name is None:
            self._account.call_it_odd(Event("odd", said=words))
        else:
            self._happened(Event(name, said=words))

    def unreachable(self, stage: str, message: str) -> None:
        """No connection: before the payload was sent that proves that nothing was started."""
        self._happened(Event("unreachable", stage=stage, text=message))

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """A connection that had got through is over."""
        self._far.timers.cancel_all()
        self._far.contact.went_down()
        text = self._far.words() or records.ending(code)
        name = "payload cut" if code == CUT_PAYLOAD else "closed"
        self._happened(Event(name, number=code, text=text))


class Account:
    """
    What is known of the run, and what of it the chaperone learns: the actions towards the near
    side.

    Args:
        spec (dict): Canonical.
        far (FarSide): Has the connection.
        tail (Tail): What was said of the end.
        happen: Called with an event that follows from others.

    Attributes:
        is_killed (bool): Whether a SIGKILL was asked for, or the far side may have sent one itself.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        chaperone: Chaperone,
        far: FarSide,
        tail: records.Tail,
        happen: Happen,
    ) -> None:
        self._spec, self._chaperone, self._far, self._tail = spec, chaperone, far, tail
        self._happen = happen
        self.is_killed = False
        self._kept: Event | None = None
        self._failure = ("", "")
        self._reason = ""  # why the outcome can't be known
        self._unkillable = ""  # what lives on there whatever is done

    # -- the start

    def report_unreachable(self, event: Event) -> None:
        """Nothing was sent, so nothing was started."""
        self._chaperone.failed(event.stage, event.text, started=False)

    def report_start(self, event: Event) -> None:
        """The program runs."""
        self._chaperone.started(int(event.said[1]), **self._start_facts(event))

    def report_resumed(self, event: Event) -> None:
        """The program of an adopted run was found."""
        self._chaperone.resumed(int(event.said[1]), **self._start_facts(event))

    def _start_facts(self, event: Event) -> dict[str, object]:
        facts: dict[str, object] = {"connection": self._far.facts()}
        if len(event.said) > 2:
            facts["tracking"] = event.said[2]
            self._tail.counts = event.said[2] != "group"
        return facts

    def report_never_started(self, event: Event) -> None:
        """No more will be heard, and it was not heard that it started."""
        message = f"unable to start the program: {self._reason}"
        self._chaperone.failed("far-side", message, started=False)

    def report_unknown_start(self, event: Event) -> None:
        """The payload was sent, and no record says what became of it."""
        ended = f"the connection ended: {event.text}"
        message = f"unable to find out whether the program was started: {ended}"
        started = False if event.number == CUT_PAYLOAD else None
        self._chaperone.failed("far-side", message, started=started)

    def report_stopped_start(self, event: Event) -> None:
        """As `report_unknown_start`, after a stop."""
        started = False if event.number == CUT_PAYLOAD else None
        message = "stopped before the program was known to run"
        self._chaperone.failed("stopped", message, started=started)

    def keep_failure(self, event: Event) -> None:
        """Why the far side could not start it, until the connection is over."""
        why = event.said[1] if len(event.said) > 1 else "setup"
        self._failure = records.failure(why, self._spec["program"])

    def report_failure(self, event: Event) -> None:
        """What `keep_failure` kept."""
        self._chaperone.failed(*self._failure, started=False)

    def publish_failure(self, event: Event) -> None:
        """The same, while the far side still has a directory to clear."""
        self.keep_failure(event)
        self._chaperone.failed(*self._failure, started=False, stay=True)

    # -- the end

    def keep_end(self, event: Event) -> None:
        """Of a quick program one part of the far side may say the end before another the start."""
        self._kept = event

    def take_kept_end(self, event: Event) -> None:
        """The start is recorded now: hear the end that came before it."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._happen(kept)

    def record_end(self, event: Event) -> None:
        """How it ended; the chaperone asks us to `finish` then."""
        words = list(event.said[1:])
        facts = records.outcome(words)
        if (counted := records.oom_counted(words)) is False:
            facts["oom"] = False
        elif counted and not self.is_killed and not facts["ambiguous"]:
            facts["oom"] = True
        self._chaperone.ended(facts.pop("wait_status"), **facts)
        self._chaperone.program_ended()

    def count_left(self, event: Event) -> None:
        """How many processes it left; the first count is the one that holds."""
        if self._tail.left is None:
            self._tail.left = int(event.said[1])
            if self._tail.left:
                self._chaperone.log(f"the program left {self._tail.left} processes running")
        self.look_complete()

    def note_unkillable(self, event: Event) -> None:
        """What is another user's lives on there, and nothing waits for it."""
        self._unkillable = records.unkillable(event.said)
        self._chaperone.log(self._unkillable)

    def note_drained(self, event: Event) -> None:
        """All that the program itself wrote to stdout is here."""
        self._tail.drained = True
        self.look_complete()

    def note_sizes(self, event: Event) -> None:
        """How long both streams are there."""
        if self._tail.sizes is None:
            self._tail.sizes = (int(event.said[1]), int(event.said[2]))
        self.look_complete()

    def look_complete(self) -> None:
        """Whether this was the last thing that was missing."""
        if self._tail.left is None:
            return
        if self._tail.drained and self._spec["leftovers"] == "leave":
            self._happen(Event("left alone"))
        elif self._tail.is_here(self._far.here()):
            self._happen(Event("all here"))

    def note_damage(self, event: Event) -> None:
        """A stream there is gone, or shorter than what is here already."""
        self._chaperone.log(
            f"the file {event.said[1]!r} of the far side's directory was damaged: that stream is"
            " cut short"
        )
        self._tail.damaged = True

    def compare_streams(self, event: Event) -> None:
        """Whether a stream there was shortened by somebody."""
        here = self._far.here()
        for name, size, size_there in zip(
            ("out", "err"), here, self._tail.sizes or here, strict=True
        ):
            # what was left alone goes on writing
            is_shorter = size > size_there and self._spec["leftovers"] != "leave"
            if size_there < 0 or is_shorter:
                self.note_damage(Event("short", said=("short", name)))

    def publish_end(self, event: Event) -> None:
        """All is here."""
        self._finished(complete=not self._tail.damaged, stay=True)

    def publish_partial_end(self, event: Event) -> None:
        """No more will come: what is here is all."""
        complete = self._tail.is_here(self._far.here()) and not self._tail.damaged
        self._finished(complete=complete, stay=True)

    def report_end(self, event: Event) -> None:
        """By the code of the far side itself: 0 if it has done all that was asked of it."""
        self._finished(complete=event.number == 0 and self._tail.left is not None)

    def report_whole_end(self, event: Event) -> None:
        """What it left may write on: that is not its own output."""
        self._finished(complete=True)

    def report_cut_end(self, event: Event) -> None:
        """The rest can not be had any more."""
        self._finished(complete=False)

    def _finished(self, complete: bool, stay: bool = False) -> None:
        left = self._tail.left if self._tail.counts else None
        self._chaperone.finished(leftovers=left, complete=complete, stay=stay)

    def leave(self, event: Event) -> None:
        """Published, and the far side is done."""
        self._chaperone.leave()

    # -- what can't be known

    def find_nothing(self, event: Event) -> None:
        """Why no outcome will come: there is no such run there."""
        self._reason = (
            "the far side knows nothing of it: its lease was over, or its directory was removed"
        )

    def find_no_outcome(self, event: Event) -> None:
        """Why none will come: the far side does not know it either."""
        self._reason = "the far side does not know how the program ended"

    def find_end_missing(self, event: Event) -> None:
        """Why none will come: what would have said it is gone."""
        self._reason = f"the {event.text}, which would report how the program ended, is gone"
        self._chaperone.log(self._reason)

    def warn_of_streams(self, event: Event) -> None:
        """Nobody can say how long they would have become."""
        if self._tail.left is not None and self._tail.sizes is None:
            self._chaperone.log("the far side's supervisor is gone: a stream may be cut short")

    def report_lost(self, event: Event) -> None:
        """The outcome will never be known."""
        reason = self._reason or f"the connection ended before the program did: {event.text}"
        self._lost(reason)

    def report_unkillable(self, event: Event) -> None:
        """The program itself can't be killed: how it ends is not waited for."""
        message = f"unable to stop the program: {self._unkillable}"
        self._chaperone.lost(message, stage="stop")

    def report_out_of_reach(self, event: Event) -> None:
        """The far side has ended it by now, unheard."""
        reason = f"the far side was not reached before its lease was over: {event.text}"
        self._lost(reason)

    def _lost(self, reason: str) -> None:
        if self._unkillable:
            self._chaperone.lost(f"{reason}; {self._unkillable}")
        else:
            self._chaperone.lost(reason, self._far.contact.gone_by())

    def log_loss(self, event: Event) -> None:
        """The far side does not hear us, and ends the program by itself."""
        self.is_killed = True
        why = event.said[1] if len(event.said) > 1 else "eof"
        causes = {
            "eof": "can't hear us any more",
            "reader": "can't hear us any more, as a part of it is gone",
        }
        cause = causes.get(why) or f"heard nothing for {why} s, its lease"
        self._chaperone.log(f"the far side {cause}: it ends the program")

    def record_far_stop(self, event: Event) -> None:
        """The same, as the reason of the stop."""
        why = event.said[1] if len(event.said) > 1 else "eof"
        self._chaperone.stopped_by_far_side("disconnect" if why in ("eof", "reader") else "lease")

    def call_it_odd(self, event: Event) -> None:
        """A record that a far side in order does not send now."""
        said = " ".join(event.said)[:200]
        self._chaperone.log(f"the far side sent {said!r}, which this chaperone does not know")
