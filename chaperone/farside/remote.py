"""
A program behind hops, held by the far side's text: what it says becomes what the chaperone is told.

Knows: records, control lines, leases.  Must not know: how a connection is made, the spool,
statuses.
"""

from __future__ import annotations

import os

from ..model import hops
from ..program.spawn import Stdin
from . import payload, records
from .contact import SLACK_S, Contact
from .dialer import Dialer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..program.interface import Chaperone

LEFTOVER_GRACE_S = 5.0  # as for a program here
# for the far side to do what takes it no time: then the connection is closed, which kills what is
# there
PATIENCE_S = 10.0
# for the far side to set out: until it has started the program, its supervisor seems to be gone
BEGIN_S = 60.0
# from "the program is gone" to a record that says how it ended, before nobody is believed to write
# one
DEAD_S = 5.0


class RemoteProgram:
    """
    The program of a run with `remote`, or one here that survives its chaperone.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): Told what happens.
        inherited (dict): `umask` (int), for a program without hops.
        cookie (str): The run's random key: its first half marks the run's processes, the second one
            its records.
        resumed (dict): The last status of a run that is adopted, else None.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        chaperone: Chaperone,
        inherited: dict[str, Any],
        cookie: str,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        self._spec, self._chaperone, self._inherited = spec, chaperone, inherited
        self._survives = spec["on_disconnect"] == "survive"
        self._resumed = resumed
        self._cookie = cookie
        # In what survives the records are kept over there, so the nonce is the run's; a byte no
        # text begins with makes it quick to find.
        self._nonce = "\x1e" + (cookie[16:] if self._survives else os.urandom(12).hex())
        self._dialer = Dialer(
            chaperone,
            hops.route(spec["remote"]["hops"] if spec["remote"] else []),
            inner=list(payload.CONSTANT),
            patience_s=spec["timeouts"]["connect"],
            owner=self,
        )
        self._contact = Contact(spec, chaperone.loop)
        self._stdin = Stdin()
        self._sent = self._started = self._ended = self._finishing = self._stopped = False
        self._left: int | None = None
        self._early_end: list[str] | None = None
        self._stdout_ended = self._cleared = self._attaching = False
        self._sizes: tuple[int, int] | None = None
        self._failure: tuple[str, str] | None = None
        self._verdict: str | None = None
        self._short, self._blind, self._missing, self._beats = False, False, "", 0
        self._waiting: list[str] = []
        self._timers: dict[str, int] = {}

    # -- starting

    def start(self) -> None:
        """
        Set out for the far side; what becomes of it is told to the chaperone.

        Raises:
            StartError: If nothing was tried.
        """
        if self._resumed is not None:
            self._take_up(self._resumed)
            return
        self._stdin.open(self._spec["program"]["stdin"])
        self._dial("survive" if self._survives else "kill", self._stdin.source())

    def _take_up(self, status: dict[str, Any]) -> None:
        """Go on with a run whose chaperone died."""
        self._started = status["pid"] is not None
        self._sent = True
        connection = status["connection"] or {}
        self._contact.drops = int(connection.get("drops") or 0) + 1
        for name, stream in self._chaperone.streams.items():
            stream.dropped = max(stream.dropped, (status[name] or {}).get("dropped") or 0)
        self._attach()

    def _dial(self, life: str, stdin: tuple[int, int] | None = None) -> None:
        end, name = "@" + os.urandom(8).hex(), os.urandom(8).hex()
        sent = payload.sent(
            self._spec,
            life,
            payload.Words(self._nonce, self._cookie, end, name),
            umask=self._inherited["umask"],
            stdin_size=self._stdin.size,
            offsets=self._here(),
        )
        self._dialer.dial(lambda: records.Recorded(self._nonce, payload.READY, sent, stdin))

    def _facts(self) -> dict[str, object]:
        return self._contact.facts(self._dialer.argv, self._dialer.pid())

    # -- what the chaperone asks

    def children_changed(self) -> None:
        """SIGCHLD: the connection watches its own."""

    def signal(self, signum: int) -> None:
        """Signal the program alone."""
        self._ask(f"k {payload.signal_word(signum)}")

    def stop(self, signum: int) -> None:
        """Signal the program's group and whatever left it."""
        if not self._started and not self._sent:
            self._stopped = True
            self._dialer.give_up()
        elif not self._started:
            self._stopped = True
            self._close()
        else:
            self._ask(f"g {payload.signal_word(signum)}")

    def kill(self) -> None:
        """
        SIGKILL to everything, until nothing is left; where nobody answers, by the end of the
        connection.
        """
        if not self._started:
            self.stop(9)
            return
        self._ask("z")
        if not self._survives and not self._ended:
            self._at("patience", PATIENCE_S, self._close)

    def finish(self, grace_s: float) -> None:
        """
        The program has ended: end what it left over there, or leave it alone, then tell `finished`.
        """
        grace_s = min(grace_s, LEFTOVER_GRACE_S)
        self._finishing = True
        self._ask(
            "q leave" if self._spec["leftovers"] == "leave" else f"q {payload.fifths(grace_s)}"
        )
        if not self._survives:
            self._at("patience", grace_s + SLACK_S + PATIENCE_S, self._close)

    def _ask(self, line: str) -> None:
        """Now, or as soon as somebody is there to hear it."""
        if self._contact.up and self._dialer.pid() is not None:
            self._dialer.send(line)
        elif line not in self._waiting:
            self._waiting.append(line)

    def _close(self) -> None:
        self._dialer.close()

    # -- what the far side says

    def connected(self) -> None:
        """The payload is on its way: from now on the program may start."""
        self._sent = True

    def output(self, stream: str, data: bytes) -> None:
        """Bytes of the program, into its streams."""
        self._chaperone.streams[stream].write(data)
        if self._sizes is not None:
            self._look_complete()

    def record(self, words: list[str]) -> None:
        """A record: its first word is the name of the method that takes it."""
        self._contact.heard()
        if self._survives:
            self._chaperone.heard_from_far_side()
        take = getattr(self, f"_far_{words[0]}", None)
        if take is None or not records.is_sound(
            words, self._chaperone.is_running(), self._failure is not None
        ):
            self._chaperone.log(
                f"the far side said {' '.join(words)[:200]!r}, which nobody here understands"
            )
        else:
            take(words[1:])

    def _far_out(self, words: list[str]) -> None:
        """What came on stdout before this was noise."""

    def _far_hello(self, words: list[str]) -> None:
        for fact, lacking in payload.LACKING.items():
            if fact in words:
                self._chaperone.log(f"the far side has no {lacking}")
        self._blind = all(
            fact in words for fact in payload.LACKING
        )  # then nothing tells what an ended program left
        again = self._contact.up is False
        self._contact.went_up()
        if again:
            self._chaperone.noted(connection=self._facts())
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            self._ask(line)
        self._beat()

    def _far_start(self, words: list[str]) -> None:
        self._cancel("dead")
        if self._resumed is not None:
            self._chaperone.resumed(int(words[0]), connection=self._facts())
        elif not self._started:
            self._chaperone.started(int(words[0]), connection=self._facts())
        self._started, self._resumed = True, None
        if self._early_end is not None:
            self._far_end(self._early_end)

    def _far_fail(self, words: list[str]) -> None:
        why = words[0] if words else "setup"
        if why == "never":
            self._verdict = (
                "the far side knows nothing of it: its lease was over, or its directory was removed"
            )
            self._close()
            return
        self._failure = payload.failure(why, self._spec["program"])
        if self._survives and why not in (
            "stdin",
            "directory",
        ):  # there is a directory to be cleared; its end is a `bye`
            self._chaperone.failed(*self._failure, started=False, stay=True)
            if self._chaperone.is_published():
                self._clear()
        else:
            self._close()

    def _far_beat(self, words: list[str]) -> None:
        """It lives; `record` has noted when."""

    def _far_dead(self, words: list[str]) -> None:
        """
        The program is gone, or its supervisor, or a file between us; if nobody says how it ended,
        nobody ever will.
        """
        self._missing = f"file {words[0]!r} of the far side" if words else "part of the far side"
        if "dead" not in self._timers:
            self._at("dead", DEAD_S if self._started else BEGIN_S, self._nobody_tells)

    def _nobody_tells(self) -> None:
        if self._ended and self._left is not None and self._sizes is None:
            self._chaperone.log("the far side's supervisor is gone: a stream may be cut short")
        if not self._ended or self._survives:
            self._verdict = (
                f"the {self._missing} that would have told how the program ended is gone"
            )
            self._chaperone.log(self._verdict)
            if self._ended:
                self._finished(complete=self._is_here() and not self._short, stay=True)
                if not self._chaperone.is_published():
                    return
            self._clear()
            if not self._survives:
                self._close()

    def _far_lost(self, words: list[str]) -> None:
        why = words[0] if words else "eof"
        causes = {
            "eof": "can't hear us any more",
            "reader": "can't hear us any more, as a part of it is gone",
        }
        self._chaperone.log(
            f"the far side {causes.get(why) or f'heard nothing for {why} s, its lease'}: it ends the program"
        )
        if not self._ended:
            self._chaperone.stopped_by_far_side("disconnect" if why in causes else "lease")

    def _far_end(self, words: list[str]) -> None:
        if self._ended:  # told again after a cut
            return
        self._cancel("dead")
        # of a quick program the one part of the far side may tell the end before the other tells
        # the start
        if not self._started:
            self._early_end = words
            return
        facts = records.outcome(words)
        if not facts:
            self._verdict = "the far side could not tell how the program ended"
            self._close()
            return
        self._ended = True
        self._chaperone.ended(facts.pop("wait_status"), **facts)
        self._chaperone.program_ended()

    def _far_eof(self, words: list[str]) -> None:
        if len(words) == 2 and self._sizes is None:
            self._sizes = (int(words[0]), int(words[1]))
            self._look_complete()
        elif not words:
            self._stdout_ended = True
            self._look_left()

    def _far_short(self, words: list[str]) -> None:
        """
        A stream over there is gone, or shorter than what is here already: somebody damaged it.
        """
        self._chaperone.log(
            f"the file {words[0]!r} of the far side's directory was damaged: that stream is cut short"
        )
        self._short = True

    def _far_left(self, words: list[str]) -> None:
        self._cancel("dead")  # its supervisor has answered
        if self._left is None:
            self._left = int(words[0])
            if self._left:
                self._chaperone.log(f"the program left {self._left} processes running")
        self._look_left()
        self._look_complete()

    def _far_bye(self, words: list[str]) -> None:
        """The far side has cleared its directory; what was left alone may hold its last shell."""
        if self._spec["leftovers"] == "leave":
            self._dialer.terminate()
        else:
            self._close()

    def _look_left(self) -> None:
        """
        What was left alone holds the pipes, maybe for ever: all that the program itself wrote is
        here.
        """
        if (
            self._spec["leftovers"] == "leave"
            and not self._survives
            and self._left is not None
            and self._stdout_ended
        ):
            if self._left:
                self._chaperone.loop.later(0.1, self._dialer.terminate)

    def _look_complete(self) -> None:
        """Both streams are here to their ends: the far side may forget the run."""
        if (
            self._survives
            and self._ended
            and self._left is not None
            and not self._cleared
            and self._is_here()
        ):
            for name, here, there in zip(
                ("out", "err"), self._here(), self._sizes or self._here(), strict=True
            ):
                if there < 0 or (
                    here > there and self._spec["leftovers"] != "leave"
                ):  # what was left alone goes on writing
                    self._far_short([name])
            self._finished(complete=not self._short, stay=True)
            if self._chaperone.is_published():
                self._clear()

    def _finished(self, complete: bool, stay: bool = False) -> None:
        """What it left is told only where something over there could count it."""
        self._chaperone.finished(
            leftovers=None if self._blind else self._left, complete=complete, stay=stay
        )

    def _clear(self) -> None:
        """
        The far side may forget the run; what it alone knew is published by now, for we may be
        killed before it has answered.
        """
        self._cleared = True
        self._ask("c")
        self._at("patience", PATIENCE_S, self._close)

    # -- the end of a connection

    def unreachable(self, stage: str, message: str) -> None:
        """
        No connection: before the program was sent for, that is proven; after it, the far side goes
        on alone.
        """
        if self._survives and self._sent:
            self._again(message)
        else:
            self._chaperone.failed(stage, message, started=False)

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """A connection that had got through is over."""
        for name in list(self._timers):
            self._cancel(name)
        words = self._dialer.words()
        self._contact.went_down()
        if self._chaperone.is_published():
            self._chaperone.leave()
        elif self._failure is not None:
            self._chaperone.failed(*self._failure, started=False)
        elif self._survives:
            self._survived(code, words)
        elif self._ended:
            left_alone = (
                self._spec["leftovers"] == "leave" and self._left is not None and self._stdout_ended
            )
            self._finished(complete=left_alone or (code == 0 and self._left is not None))
        elif self._started:
            reason = (
                self._verdict
                or f"the connection ended before the program did: {words or records.ending(code)}"
            )
            self._chaperone.lost(reason, self._contact.gone_by())
        else:
            self._unknown_start(code, words)

    def _unknown_start(self, code: int, words: str) -> None:
        """
        The payload was sent and nobody said what became of it; 97 means that it came cut, and then
        none of it is run.
        """
        reason = words or records.ending(code)
        proven = False if code == 97 else None
        if self._stopped:
            self._chaperone.failed(
                "stopped", "stopped before the program was known to run", started=proven
            )
        else:
            self._chaperone.failed(
                "far-side",
                f"unable to know whether the program was started: {reason}",
                started=proven,
            )

    def _survived(self, code: int, words: str) -> None:
        if self._verdict is not None:
            if not self._started and self._resumed is None:
                self._chaperone.failed(
                    "far-side", f"unable to start the program: {self._verdict}", started=False
                )
            elif self._ended:
                self._finished(complete=False)
            else:
                self._chaperone.lost(self._verdict, self._contact.gone_by())
        elif code == 97 and not self._attaching:
            self._unknown_start(code, words)
        else:
            self._contact.drops += 1
            self._again(words or records.ending(code))

    def _here(self) -> tuple[int, int]:
        out, err = (stream.bytes + stream.dropped for stream in self._chaperone.streams.values())
        return out, err

    def _is_here(self) -> bool:
        return self._sizes is not None and all(
            here >= there for here, there in zip(self._here(), self._sizes, strict=True)
        )

    def _again(self, reason: str) -> None:
        """The program goes on over there: attach again, for as long as it may."""
        if self._contact.lease_is_over():
            self._chaperone.lost(
                f"the far side was not reached before its lease was over: {reason}",
                self._contact.gone_by(),
            )
            return
        self._contact.went_down()
        self._chaperone.log(f"the connection is down: {reason}")
        self._chaperone.noted(connection=self._facts())
        self._at("again", self._contact.pause_s(), self._attach)

    def _attach(self) -> None:
        if self._finishing and self._left is None:
            grace_s = min(self._spec["stop"]["grace_period"], LEFTOVER_GRACE_S)
            self._ask(
                "q leave" if self._spec["leftovers"] == "leave" else f"q {payload.fifths(grace_s)}"
            )
        self._cleared, self._attaching = False, True
        self._dial("attach")

    # -- heartbeats and facts

    def _beat(self) -> None:
        self._beats += 1
        self._dialer.send(f"h {self._beats}")
        self._at("beat", min(payload.NO_HURRY_S, self._spec["lease"] / 4), self._beat)

    def _at(self, name: str, delay_s: float, callback: Any) -> None:
        self._cancel(name)
        self._timers[name] = self._chaperone.loop.later(delay_s, callback)

    def _cancel(self, name: str) -> None:
        self._chaperone.loop.cancel(self._timers.pop(name, None))
