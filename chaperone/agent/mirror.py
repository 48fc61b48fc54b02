"""
A mirror: copies the runs of an agent's spool into a local spool, and passes the requests for these
copies (stop, kill, signal) on to the agent.

Knows: the events of an agent, the sink, which writes the copies.  Must not know: HTTP, sockets, a
run's files.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

from ..errors import AgentError, ChaperoneError, NoRunError, RunExistsError, SpoolError
from ..model import cursor as cursors
from ..model import spec as specs
from ..model import status as statuses
from ..model.events import Changed, Ended, Event, Lost, Output, Shrank, Started, status_view
from ..program.fds import owned
from ..spool import format, locks
from . import sink as sinks
from .client import calls
from .client.aio import Follower
from .client.connection import AioConnection
from .client.following import Following
from .client.place import FILE, Place
from .client.question import Unanswered
from .fed_run import ConflictError, FedRun, GapError
from .forwarder import Forwarder
from .sink import MIRROR, Sink

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_PAUSE_S = 1.0  # until a write to a full disk is tried again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a run that can't be written is tried again
COLLECT_S = 0.02  # endings are gathered for so long, and collected by one request
LOOK_S = 2.0  # until the agent is asked again if it has recorded a loss
LOST_S = 150.0  # for the agent to record a loss: it does so once a minute, on a busy host later
# Bytes of a copy that is complete. If the agent would send more of them again, the events are
# asked for again, with a cursor behind them.
SKIPPED = 4 << 20
HEAR_S = 5.0  # until the mirror looks whether the agent is heard, if no event comes
AGAIN_S = 0.1  # before the events are asked for again
REFUSED_S = 5.0  # the same, if the agent refuses
# So many collected runs may stay in the cursor of a follower; then a new one is begun.
MOST_COLLECTED = 1_000
LEASE_S = specs.LEASE_S["survive"]


class AgainError(Exception):
    """The events must be asked for again, with a cursor made of the copies."""


class Mirror:
    """
    A mirror of an agent's spool.

    Args:
        url (str): As for `chaperone.Spool`; its token and authority are those of the environment.
        spool_path (str): Made if it is missing.
        log: Takes a sentence, for stderr.
    Raises:
        SpecError: If that is no place of an agent.
        SpoolError: If the spool can't be used, or another mirror copies the same into it.
    """

    def __init__(self, url: str, spool_path: str, log: Callable[[str], None]) -> None:
        place = Place(url)
        self._connection = AioConnection(place)
        self._name, self._url = place.name, _canonical(place.text)
        self._log = log
        self._sink = Sink(spool_path)
        self._lock_fd = -1
        self._forwarder = Forwarder(self._connection, self._name)
        self._ended: dict[str, FedRun] = {}  # complete here, not yet collected at the agent
        self._refused: dict[str, str] = {}  # id that another run has here: key of the agent's run
        self._again_at: dict[str, float] = {}  # of a run that could not be written; monotonic
        self._pauses: dict[str, float] = {}
        self._to_collect: dict[str, str | None] = {}
        self._collect_soon = asyncio.Event()
        self._renew_soon = asyncio.Event()
        self._lost: dict[str, asyncio.Task[None]] = {}
        self._is_away = False
        # Why the agent is not heard, as the runs say it; "" for what an earlier mirror wrote.
        self._silence: str | None = ""
        self._heard_ns: int | None = None
        self._is_full = False
        self._collected = 0  # since the events were asked for
        try:
            self._lock(spool_path)
        except BaseException:
            self._sink.close()
            raise

    def _lock(self, spool_path: str) -> None:
        """Take the lock of this URL in the spool, so that only one mirror copies it here."""
        format.make_directory(format.MIRROR, self._sink.spool_fd)
        name = hashlib.sha256(self._url.encode()).hexdigest()[:32]
        with owned(format.open_entries(self._sink.spool_fd, format.MIRROR)) as directory_fd:
            self._lock_fd = format.open_plain(directory_fd, name, os.O_RDWR | os.O_CREAT)
        if not locks.try_take(self._lock_fd):
            os.close(self._lock_fd)
            sentence = f"unable to mirror {self._url} into spool {spool_path!r}"
            raise SpoolError(f"{sentence}: another mirror is already running", errno.EAGAIN)

    async def run(self, end: asyncio.Event) -> None:
        """Mirror until `end` is set; the runs stay as they are, for the next mirror."""
        loop = asyncio.get_running_loop()
        self._take_over()
        loop.add_reader(self._sink.fileno(), self._take_requests)
        tasks = [
            loop.create_task(each())
            for each in (end.wait, self._follow, self._collect, self._renew)
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(self._sink.fileno())
            self._forwarder.close()
            for task in (*tasks, *self._lost.values()):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._sink.close()
            os.close(self._lock_fd)
        for task in done:
            task.result()  # raises what ended a task other than `end.wait`: a bug

    def _take_over(self) -> None:
        """Go on with the runs that an earlier mirror fed, before the agent is asked anything."""
        for run_id in self._sink.left(MIRROR, self._url):
            try:
                spec = self._sink.spec_of(run_id)
                run = self._sink.run(run_id, spec.get("key"), spec, spec["origin"])
            except ChaperoneError as error:
                self._put_off(run_id, error)
                continue
            self._begin(run)

    def _begin(self, run: FedRun) -> None:
        """Note a copy that was just opened: it is complete, or events will complete it."""
        if run.is_ended():
            self._ended[run.run_id] = run
            return
        self._renew_soon.set()
        self._show_silence(run)
        for request in run.pending:
            self._forwarder.add(run, request)

    # -- the events of the agent

    async def _follow(self) -> None:
        """Copy what the agent reports, and ask for it again after each error."""
        said = None
        while True:
            try:
                await self._follow_once()
            except AgainError:
                said = None
                await asyncio.sleep(AGAIN_S)
            except ChaperoneError as error:
                # The agent refuses, or its certificate is not trusted, until a person mends that.
                if str(error) != said:
                    said = str(error)
                    self._log(said)
                self._note_silence(error.reason if isinstance(error, Unanswered) else str(error))
                await asyncio.sleep(REFUSED_S)

    async def _follow_once(self) -> None:
        """
        Copy what the agent reports.

        Raises:
            AgainError: If the events must be asked for again.
            ChaperoneError: If the agent refuses.
        """
        async with Follower(self._connection, self._cursor(), None, format.STREAMS) as follower:
            while True:
                event = await follower.next(self._next_try_s())
                self._note_hearing(follower.following)
                if event is not None:
                    await self._take(event)
                if self._next_try_s() <= 0 or self._collected >= MOST_COLLECTED:
                    self._again_at.clear()
                    self._collected = 0
                    raise AgainError

    def _cursor(self) -> dict[str, Any]:
        """The cursor made of the copies: the sizes of their files say what has arrived."""
        self._sink.drop_removed()
        entries = {run_id: cursors.entry(key, ended=True) for run_id, key in self._refused.items()}
        for run in (*self._ended.values(), *self._sink.runs.values()):
            sizes = run.sizes["stdout"], run.sizes["stderr"]
            is_delivered = run.run_id in self._to_collect
            entries[run.run_id] = cursors.entry(run.key, *sizes, is_delivered)
        return cursors.of(entries)

    def _next_try_s(self) -> float:
        """Seconds until a run is to be tried again, at most HEAR_S."""
        first = min(self._again_at.values(), default=float("inf"))
        return max(0.0, min(first - time.monotonic(), HEAR_S))

    def _note_hearing(self, following: Following) -> None:
        """Log once that the agent is away, and once that it is back; each copy says so too."""
        self._heard_ns = following.heard_ns or self._heard_ns
        if following.silence is not None:
            if not self._is_away:
                self._log(str(following.polling))
            self._is_away = True
            self._note_silence(following.silence)
        elif following.heard_ns is not None:
            if self._is_away:
                self._log(f"following {self._url} again")
            self._is_away = False
            self._note_silence(None)

    def _note_silence(self, reason: str | None) -> None:
        if reason != self._silence:
            self._silence = reason
            for run in self._sink.runs.values():
                self._show_silence(run)

    def _show_silence(self, run: FedRun) -> None:
        if self._silence is None:
            run.heard()
        elif self._silence:
            run.silent(self._heard_ns, self._silence)

    async def _take(self, event: Event) -> None:
        """Write what an event says. The error of one run does not harm the others."""
        if event.run_id in self._again_at:
            return
        try:
            while True:
                try:
                    await self._write(event)
                    break
                except OSError as error:
                    if error.errno not in DISK_FULL:
                        raise
                    await self._wait_for_room(error)
        except GapError as error:
            raise AgainError from error
        except ConflictError as error:
            self._refuse(event.run_id, error)
        except (AgentError, NoRunError):
            raise AgainError from None
        except (ChaperoneError, OSError) as error:
            self._put_off(event.run_id, error)
        else:
            self._pauses.pop(event.run_id, None)

    async def _wait_for_room(self, error: OSError) -> None:
        """Pause because the disk is full. What is not read waits at the agent: nothing is lost."""
        if not self._is_full:
            self._is_full = True
            self._log(f"waiting for room in the spool: {error}")
        await asyncio.sleep(DISK_FULL_PAUSE_S)

    async def _write(self, event: Event) -> None:
        """Write what an event says into the copy of its run."""
        run_id = event.run_id
        if isinstance(event, Started):
            await self._start(run_id, event.key)
            return
        run = self._sink.runs.get(run_id) or self._ended.get(run_id)
        if run is None:
            return
        if isinstance(event, Output):
            if not run.is_ended():
                run.append(event.stream, event.offset, event.data)
                self._is_full = False
        elif isinstance(event, Changed):
            run.changed(dict(event.status.raw))
        elif isinstance(event, Shrank):
            run.cut(event.stream)
        elif isinstance(event, Lost) and event.status.end_time is None:
            self._await_loss(run, dict(event.status.raw))
        elif isinstance(event, (Ended, Lost)):
            self._end(run, None if event.status is None else dict(event.status.raw))

    async def _start(self, run_id: str, key: str) -> None:
        """Make the copy of a run, or find it."""
        spec = await self._connection.perform(calls.spec(self._name, run_id))
        if spec.get("key") != key:
            return  # the id has been given to another run, whose events follow
        try:
            run = self._sink.run(
                run_id,
                key,
                spec,
                sinks.origin(MIRROR, self._url),
                lease_s=_renew_s(spec) or LEASE_S,
            )
        except RunExistsError as error:
            self._refused[run_id] = key
            self._log(f"{error}; the agent keeps its own")
            return
        self._begin(run)
        if run.is_ended() and sum(run.sizes.values()) > SKIPPED:
            raise AgainError

    def _end(self, run: FedRun, status: dict[str, Any] | None) -> None:
        """Complete the copy of a run; then the run may be collected at the agent."""
        if status is None:
            run.lost("the agent has no such run any more, and its end was not mirrored")
        else:
            run.ended(status)
        self._ended[run.run_id] = run
        self._to_collect[run.run_id] = run.key
        self._collect_soon.set()

    def _refuse(self, run_id: str, error: ChaperoneError) -> None:
        """
        Leave a run alone whose complete copy differs from it: no more bytes can mend that. A copy
        that is not complete is tried again.
        """
        run = self._ended.pop(run_id, None)
        if run is None:
            self._put_off(run_id, error)
            return
        self._refused[run_id] = run.key
        self._log(f"{error}; it stays at the agent")

    def _put_off(self, run_id: str, error: Exception) -> None:
        """Try this run again later; its copy keeps what it has."""
        pause_s = self._pauses.get(run_id, FIRST_PAUSE_S)
        self._pauses[run_id] = min(2 * pause_s, LONGEST_PAUSE_S)
        self._again_at[run_id] = time.monotonic() + pause_s
        self._log(f"run {run_id!r} is tried again in {pause_s:.0f} s: {error}")

    # -- a run that is lost at its agent

    def _await_loss(self, run: FedRun, status: dict[str, Any]) -> None:
        """
        Wait until the agent has recorded the loss of a run, which it has only concluded: the status
        that it records says more.
        """
        if run.run_id not in self._lost:
            task = asyncio.get_running_loop().create_task(self._record_loss(run, status))
            self._lost[run.run_id] = task
            task.add_done_callback(lambda _: self._lost.pop(run.run_id, None))

    async def _record_loss(self, run: FedRun, status: dict[str, Any]) -> None:
        """Complete the copy with the recorded status, or after LOST_S with what is known."""
        status = statuses.last_known(status, run.run_id)
        deadline = time.monotonic() + LOST_S
        while status["end_time"] is None and time.monotonic() < deadline:
            try:
                found = await self._connection.perform(calls.raw_status(self._name, run.run_id))
                if found["state"] == "lost":
                    status = found
            except AgentError:  # it is away: the time begins again
                deadline = time.monotonic() + LOST_S
            except ChaperoneError:
                break
            if status["end_time"] is None:
                await asyncio.sleep(LOOK_S)
        if status["end_time"] is None:
            sizes = {name: {**status[name], "bytes": size} for name, size in run.sizes.items()}
            status = {**status, **sizes, "end_time": statuses.timestamp(time.time_ns())}
        try:
            await self._take(Lost(run_id=run.run_id, status=status_view(status)))
        except AgainError:
            self._collected = MOST_COLLECTED  # `_follow_once` asks for the events again

    # -- beside the events

    def _take_requests(self) -> None:
        """Pass on the requests that have come for the copies."""
        for run, request in self._sink.requests():
            self._forwarder.add(run, request)

    async def _collect(self) -> None:
        """Collect the complete runs at the agent, each until the agent has no entry of it."""
        while True:
            await self._collect_soon.wait()
            self._collect_soon.clear()
            await asyncio.sleep(COLLECT_S)
            keys = dict(self._to_collect)
            try:
                waiting = await self._connection.perform(calls.collect(self._name, keys))
            except ChaperoneError:
                waiting = set(keys)
            for run_id in keys.keys() - waiting:
                self._to_collect.pop(run_id, None)
                self._ended.pop(run_id, None)
                self._collected += 1
            if waiting:
                asyncio.get_running_loop().call_later(1.0, self._collect_soon.set)

    async def _renew(self) -> None:
        """
        Renew the leases of the runs at the agent, every quarter of the shortest. Without any lease
        the agent is asked for its name instead: each answer renews the copies' own leases.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._renew_soon.clear()
            lives = {run_id: _renew_s(run.spec) for run_id, run in self._sink.runs.items()}
            leases = {run_id: renew_s for run_id, renew_s in lives.items() if renew_s}
            pause_s = min([*leases.values(), LEASE_S]) / 4
            try:
                if leases:
                    await self._connection.perform(calls.renew(self._name, list(leases)))
                else:
                    await self._connection.perform(calls.about(self._name))
            except ChaperoneError:
                pause_s = min(pause_s, FIRST_PAUSE_S)
            else:
                for run_id in lives:
                    if (run := self._sink.runs.get(run_id)) is not None:
                        run.touch()
            timer = loop.call_later(pause_s, self._renew_soon.set)
            await self._renew_soon.wait()
            timer.cancel()


def _renew_s(spec: dict[str, Any]) -> float | None:
    """The lease of a run at its agent; None if it has none."""
    renew_s: Any = spec.get("renew")
    is_number = isinstance(renew_s, (int, float)) and not isinstance(renew_s, bool)
    return float(renew_s) if is_number and renew_s > 0 else None


def _canonical(text: str) -> str:
    """The one text for a place of an agent: in the spec of each copy, and for the lock."""
    if text.startswith(FILE):
        return FILE + os.path.abspath(text.removeprefix(FILE))
    return text.rstrip("/")
