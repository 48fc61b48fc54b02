"""
How an agent's spool is followed: what was delivered, what to ask for next, when to come again.

Knows: events, cursors, the route of events.  Must not know: a socket, a thread, an event loop.
A connection that is cut loses nothing: what arrived is taken first, and then the cursor says from
where on to ask again.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

from ...errors import AgentError, ChaperoneError, SpecError
from ...model import cursor as cursors
from ...model.events import Changed, Event, Output, Shrank, Started, Status
from ...spool.format import STREAMS
from .. import wire
from . import calls
from .place import Place
from .question import (
    PATIENCE_S,
    Answer,
    Call,
    Pause,
    Question,
    Unanswered,
    is_passing,
    misunderstood,
    pauses,
    refusal,
    resource,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
# What waits to be taken: the agent waits when its reader does not read, and has its own limit.
MOST_EVENTS, MOST_BYTES = 256, 1 << 20
AGAIN_S = 1.0  # between two tries to collect what is not in .ended/ yet
LONGEST_LINE = 64 << 20  # bytes; an output has at most 1 MiB, a status as much as its JSON


class Read:
    """A step: the next bytes of the stream; none at its clean end."""


class Room:
    """A step: wait until an event was taken."""


class Following:
    """
    The events of an agent's spool, whoever reads them from the agent.

    One reader performs `reading`; the owner takes the events.

    Attributes:
        polling (str): Why events are late, in one sentence; None while the agent is heard.
        silence (str): The reason in it.
        heard_ns (int): When bytes of the stream last came, since the epoch; None before the first.
        is_closed (bool): Whether no event can arrive any more.
    """

    def __init__(
        self, place: Place, cursor: object, runs: Iterable[str] | None, streams: Iterable[str]
    ) -> None:
        self._given = entries = cursors.checked(cursor)
        self._streams = wanted = tuple(streams)
        if not set(wanted) <= set(STREAMS):
            raise SpecError(f"unable to follow streams {wanted!r}: want stdout, stderr or both")
        self._place = place
        self._named = cursors.named(runs)
        self._entries = {**{run_id: {} for run_id in self._named or ()}, **entries}
        self._last: dict[str, Status] = {}  # of each live run: what was delivered
        self._collecting: set[str] = set()
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0  # of the lines of these events
        self._rest: list[bytes] = []  # of a line whose end has not arrived
        self._rest_bytes = 0
        self._is_torn = False
        self._again_at = 0.0
        self._was_heard = False
        self.silence: str | None = None
        self.polling: str | None = None
        self.heard_ns: int | None = None
        self.is_closed = False

    def _is_named(self, run_id: str) -> bool:
        return self._named is None or run_id in self._named

    # -- how far it has come

    @property
    def cursor(self) -> dict[str, Any]:
        """As of `chaperone.Follower`."""
        return cursors.of(dict(self._entries))  # a copy first: another thread may collect

    def entry(self, run_id: str) -> dict[str, Any] | None:
        """As of `chaperone.Follower`."""
        entry = self._entries.get(run_id)
        return None if entry is None else dict(entry)

    @property
    def uncollected(self) -> list[str]:
        """As of `chaperone.Follower`."""
        return [run_id for run_id in list(self._entries) if self.is_uncollected(run_id)]

    def is_uncollected(self, run_id: str) -> bool:
        """As of `chaperone.Follower`."""
        entry = self._entries.get(run_id)
        return entry is not None and self._is_named(run_id) and cursors.has_ended(entry)

    def is_over(self) -> bool:
        """As of `chaperone.Follower`."""
        return self.is_closed and not self._events

    def collect(self, run_id: str) -> Call[None]:
        """As `chaperone.Follower.collect`."""
        entry = self._entries.get(run_id) if self._is_named(run_id) else None
        if entry is None or not cursors.has_ended(entry):
            if entry is None:
                there = yield from calls.cursor(self._place.name)
                if run_id not in there["runs"]:
                    return
            raise SpecError(f"unable to collect run {run_id!r}: its end was not delivered yet")
        keys = self._keys({*self._collecting, run_id})
        # One that was asked for before is not waited for again.
        late_s = () if run_id in self._collecting else calls.LATE_S
        self._collected(keys, (yield from calls.collect(self._place.name, keys, late_s)))

    def _keys(self, run_ids: Iterable[str]) -> dict[str, str | None]:
        entries = [(run_id, self._entries.get(run_id)) for run_id in run_ids]
        return {run_id: entry["key"] for run_id, entry in entries if entry is not None}

    def _collected(self, keys: dict[str, str | None], waiting: set[str]) -> None:
        for run_id, key in keys.items():
            if run_id in waiting:
                self._collecting.add(run_id)
                continue
            self._collecting.discard(run_id)
            if self._entries.get(run_id, {}).get("key") == key:
                self._entries.pop(run_id, None)

    # -- taking

    def has_news(self) -> bool:
        """Whether `take` may return an event."""
        return bool(self._events)

    def take(self) -> Event | None:
        """The next event that has arrived, which counts as delivered from now on; None for none."""
        while self._events:
            event, size = self._events.popleft()
            self._bytes -= size
            delivered = self._delivered(event)
            if delivered is not None:
                return delivered
        return None

    def _delivered(self, event: Event) -> Event | None:
        """Advance the cursor by an event; None where it was delivered before."""
        before = self._entries.get(event.run_id, {})
        if isinstance(event, Started):
            if before.get("key") == event.key:
                return None
            # With a key it is the entry of an earlier run with this id.
            before = before if cursors.is_waited_for(before) else {}
            self._entries[event.run_id] = cursors.started(before, event.key)
            return event
        if cursors.is_waited_for(before) or cursors.has_ended(before):
            return None
        if isinstance(event, Changed):
            last = self._last.get(event.run_id)
            if last is not None and last.raw == event.status.raw:
                return None  # an agent repeats it on each connection
            self._last[event.run_id] = event.status
        elif isinstance(event, Shrank):
            self._entries[event.run_id] = cursors.advanced(before, event.stream, 0)
        elif isinstance(event, Output):
            return self._output(event, before)
        else:
            self._entries[event.run_id] = cursors.ended(before)
            self._last.pop(event.run_id, None)
        return event

    def _output(self, event: Output, before: cursors.Entry) -> Event | None:
        have = before.get(event.stream, 0)
        end = event.offset + len(event.data)
        if event.offset > have:  # never deliver a gap: ask again from where we are
            self._is_torn = True
            self._events.clear()
            self._bytes = 0
        if event.offset > have or end <= have:
            return None
        self._entries[event.run_id] = cursors.advanced(before, event.stream, end)
        if event.offset == have:
            return event
        data = event.data[have - event.offset :]
        return Output(
            run_id=event.run_id, stream=event.stream, offset=have, data=data, time=event.time
        )

    # -- reading

    def reading(self) -> Generator[Any, Any, None]:
        """
        Read the events, and come again whenever the agent does not answer or is cut off.

        Yields:
            Question, Read, Room, Pause: What the reader does next. It gets the answer, or the
                bytes, or `Unanswered`.
        Raises:
            ChaperoneError: If the agent refuses, or was never heard: a wrong address is no reason
                to wait forever.
        """
        waits = pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        give_up_at = time.monotonic() + PATIENCE_S  # unless it was heard before
        while True:
            self._rest, self._rest_bytes = [], 0
            self._is_torn = False
            try:
                reason = self._refused((yield self._question()))
                self._was_heard = self._was_heard or reason is None
                while reason is None:
                    data = yield Read
                    if not data:
                        if self._named is not None:
                            self.is_closed, self.polling, self.silence = True, None, None
                            return
                        reason = "the agent ended it"
                        break
                    self._feed(data)
                    self.polling, self.silence, self.heard_ns = None, None, time.time_ns()
                    waits = pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S)
                    yield from self._collect_again()
                    while self._is_full() and not self._is_torn:
                        yield Room
                    if self._is_torn:
                        reason = "the agent left out some bytes"
            except Unanswered as error:
                if error.is_settled or not self._was_heard and time.monotonic() > give_up_at:
                    raise
                reason = error.reason
            while self._events:
                yield Room
            pause_s = next(waits)
            again = f"following {self._place.text!r} again within {pause_s:.1f} s"
            self.polling, self.silence = f"{again}: {reason}", reason
            yield Pause(pause_s)

    def _question(self) -> Question:
        # What was only named is not in the cursor yet: an agent reports a run that was collected
        # long ago only to those that have it in their cursor.
        sent = {
            run_id: entry
            for run_id, entry in dict(self._entries).items()
            if run_id in self._given or not cursors.is_waited_for(entry)
        }
        names = None if self._named is None else [*self._named]
        body = {"cursor": cursors.of(sent), "runs": names, "streams": self._streams}
        return Question(
            method="POST",
            path=resource(self._place.name, "events"),
            headers={"Content-Type": "application/json", "Accept": wire.EVENTS},
            body=json.dumps(body).encode(),
            is_stream=True,
        )

    def _refused(self, answer: Answer) -> str | None:
        """Why there are no events for now; None if there are."""
        error = refusal(answer)
        if error is None:
            if answer.headers.get("transfer-encoding", "").lower() != "chunked":
                # Its end would look like a cut.
                raise misunderstood("a body in chunks", dict(answer.headers))
            return None
        if not is_passing(answer, error):
            raise error
        return str(error)

    def _feed(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            text = b"".join((*self._rest, line))
            self._rest, self._rest_bytes = [], 0
            if text:  # an empty line is a sign of life
                self._events.append((wire.event_from(text), len(text)))
                self._bytes += len(text)
        if rest:
            self._rest.append(rest)
            self._rest_bytes += len(rest)
        if self._rest_bytes > LONGEST_LINE:
            raise AgentError("unable to follow: want an event, got a line without an end")

    def _is_full(self) -> bool:
        return len(self._events) >= MOST_EVENTS or self._bytes >= MOST_BYTES

    def _collect_again(self) -> Generator[Any, Any, None]:
        """Collect the runs whose entry was not there yet; at the latest with a sign of life."""
        now = time.monotonic()
        if not self._collecting or now < self._again_at:
            return
        self._again_at = now + AGAIN_S
        keys = self._keys(list(self._collecting))
        try:
            waiting = yield from calls.collect(self._place.name, keys, late_s=())
        except ChaperoneError:  # the next sign of life brings the next try
            return
        self._collected(keys, waiting)
