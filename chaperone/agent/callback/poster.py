"""
Posts one run to its receiver: its bytes, its ending, and brings back the requests to it.

Knows: the order of what is posted, the clock.  Must not know: HTTP's library, which process it is
in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from typing import Any

from ...errors import AgentError, SpecError, SpoolError
from ...follow.follower import Follower
from ...model import cursor as cursors
from ...model import status as statuses
from ...model.events import Ended, Lost, Output, Shrank
from ...model.request import Request, parsed
from ...spool import format, look, reap
from .connection import Answer, Connection, within
from .note import Note
from .progress import Patience, Progress

ACKNOWLEDGED = "acknowledged"  # the receiver has all bytes and the final status
REFUSED = "refused"  # it has another run with this id, or has deleted it
TIMED_OUT = "timed out"  # it acknowledged nothing for `config.timeout`
DELETED = "deleted"  # the run directory is gone

BY = "callback"  # the requester of what names none
LOCKED_S = 1.0  # flock(2) can't wait in an event loop
MOST_COMPLAINTS = 100  # a receiver that comes and goes must not fill the log of a run
SHORT_S = 1.0  # an answer to `requests` that is empty and comes sooner was not held at all


class Over(Exception):
    """Nothing more can be posted; the argument is one of the words above."""


class Poster:
    """
    Posts one run, until the receiver has everything.

    Args:
        spool_path (str): Absolute.
        run_id (str): Of an existing run.
        config (dict): As in a spec.
        connection (Connection): To the receiver.
    """

    def __init__(
        self, spool_path: str, run_id: str, config: dict[str, Any], connection: Connection
    ) -> None:
        self.spool_path, self.run_id = spool_path, run_id
        self._connection = connection
        most, latency_s = config["output_buffer"], config["output_latency"]
        self._streams = {name: Progress(name, most, latency_s) for name in format.STREAMS}
        self._config = config
        self._final: dict[str, Any] | None = None
        self._ended = asyncio.Event()
        self._news = {name: asyncio.Event() for name in format.STREAMS}
        self._complaints: set[tuple[bool, str]] = set()
        self._complaints_left = MOST_COMPLAINTS

    async def post(self) -> str:
        """
        Post the run from where the receiver is, until it has everything.

        Returns:
            str: ACKNOWLEDGED, REFUSED, TIMED_OUT or DELETED.
        Raises:
            SpoolError: If the run directory can't be read, or the spool can't be followed.
        """
        with contextlib.ExitStack() as stack:
            self._spool_fd = format.open_spool(self.spool_path)
            stack.callback(os.close, self._spool_fd)
            self._run_fd = format.open_run(self._spool_fd, self.run_id)
            stack.callback(os.close, self._run_fd)
            self._key = look.key_in(self._run_fd)
            self._note = stack.enter_context(Note(self._run_fd))
            while not self._note.take():
                await asyncio.sleep(LOCKED_S)
            if self._note.is_done:
                return ACKNOWLEDGED
            retry_s, timeout_s = self._config["retry_frequency"], self._config["timeout"]
            renew_s = look.read_spec(self._run_fd).get("renew")
            self._patience = Patience(retry_s, timeout_s, renew_s, time.monotonic())
            outcome = await self._until_over()
            if outcome == ACKNOWLEDGED:
                # If the disk refuses that, the next agent asks the receiver again.
                with contextlib.suppress(SpoolError):
                    self._note.done()
                # The scheduler has it: no follower need deliver it again, and gc may delete it.
                if self._is_there():
                    look.collect(self._spool_fd, self.run_id)
            return outcome

    def _is_there(self) -> bool:
        return format.is_path_of(self._spool_fd, self.run_id, self._run_fd)

    async def _until_over(self) -> str:
        """Do all of it at once; the first that knows how it ends says so."""
        works = (self._follow(), self._take_requests(), self._watch_patience(), self._deliver())
        tasks = {asyncio.ensure_future(work) for work in works}
        try:
            while True:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    outcome = task.result()
                    if outcome is not None:
                        return outcome
        except Over as over:
            return str(over)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- what the run does

    async def _follow(self) -> str | None:
        """Hear what is new; the bytes are read again when they are posted."""
        sizes = {name: look.stream_size(self._run_fd, name) for name in format.STREAMS}
        for name, size in sizes.items():
            self._grew(name, size)
        entry = cursors.entry(self._key, sizes["stdout"], sizes["stderr"])
        cursor = cursors.of({self.run_id: entry})
        with Follower(self.spool_path, cursor, [self.run_id], shared=True) as follower:
            while (event := await follower.anext()) is not None:
                if isinstance(event, Output):
                    self._grew(event.stream, event.offset + len(event.data))
                elif isinstance(event, Shrank):
                    self._grew(event.stream, event.size)
                elif isinstance(event, Ended):
                    self._final = None if event.status is None else {**event.status.raw}
                    break
                elif isinstance(event, Lost):
                    self._final = await self._recorded_loss()
                    break
        if self._final is None:
            return DELETED
        self._ended.set()
        for news in self._news.values():
            news.set()
        return None

    async def _recorded_loss(self) -> dict[str, Any] | None:
        """
        The final status of a run whose chaperone died, once it is recorded with the sizes of its
        streams: what a reader concludes has older ones.
        """
        while True:
            with contextlib.suppress(SpoolError):
                await asyncio.to_thread(reap.reap, self.spool_path, [self.run_id])
            # An ending publishes the status, and then deletes the lock: look in the other order.
            is_gone = look.pulse(self._run_fd) is None
            final = look.read_final(self._run_fd, self.run_id)
            if final is not None:
                for name in format.STREAMS:
                    self._grew(name, look.stream_size(self._run_fd, name))
                return final
            if is_gone:
                return None
            await self._pause()  # its guard still works, or the disk refuses it

    def _grew(self, name: str, size: int) -> None:
        self._streams[name].grew(size, time.monotonic())
        self._news[name].set()

    # -- what the receiver gets

    async def _deliver(self) -> str:
        again = False
        while True:
            posts = [asyncio.ensure_future(self._post_stream(name)) for name in format.STREAMS]
            try:
                await asyncio.gather(*posts)
            finally:
                for post in posts:
                    post.cancel()
                await asyncio.gather(*posts, return_exceptions=True)
            try:
                status = {**(self._final or {}), "key": self._key}
                answer = await self._connection.completed(status)
                if self._is_taken(answer):
                    return ACKNOWLEDGED
                self._go_back(answer)
            except AgentError as error:
                await self._failed(error)
            else:
                await self._pause() if again else None
                again = True

    def _go_back(self, answer: Answer) -> None:
        """Bytes are missing there: post them from the sizes that it has."""
        sizes = answer.value.get("sizes") if isinstance(answer.value, dict) else None
        for name, stream in self._streams.items():
            size = sizes.get(name) if isinstance(sizes, dict) else None
            if type(size) is not int or size < 0:
                raise AgentError(f"{answer}: want the size of {name} in its answer, got none")
            stream.missed(size)

    async def _post_stream(self, name: str) -> None:
        """Post a stream, until the run has ended and the receiver has all of it."""
        stream, news = self._streams[name], self._news[name]
        while True:
            now, is_over = time.monotonic(), self._ended.is_set()
            due_s = stream.due_in(now, is_over)
            if due_s is None and is_over:
                return
            # Where nothing is said for long, an empty piece asks for a sign of life.
            quiet_s = self._patience.quiet_s(now) if name == format.STREAMS[0] else float("inf")
            wait_s = max(0.0, min(quiet_s, float("inf") if due_s is None else due_s))
            if wait_s:
                news.clear()
                await within(news.wait(), None if wait_s == float("inf") else wait_s)
                continue
            offset, size = stream.piece()
            try:
                data = look.read_stream(self._run_fd, name, offset, size)
                if len(data) < size and not self._is_there():
                    raise Over(DELETED)
                await self._posted(stream, offset, data)
            except SpoolError as error:  # also a lack of fds
                await self._failed(error)

    async def _posted(self, stream: Progress, offset: int, data: bytes) -> None:
        answer = await self._connection.output(stream.name, offset, data)
        if answer.code in (204, 409) and answer.offset is None:
            raise AgentError(f"{answer}: want the size of {stream.name} in its answer, got none")
        if self._is_taken(answer):
            stream.acknowledged(answer.offset or 0, time.monotonic())
            self._acknowledged()
        elif stream.missed(answer.offset or 0):
            await self._pause()

    def _is_taken(self, answer: Answer) -> bool:
        """
        Whether it is an acknowledgement; otherwise something is missing there.

        Raises:
            Over: If the receiver wants no more.
            AgentError: If it is neither.
        """
        if answer.code == 410:
            why = "it has another one, or another end"
            self._log(f"the receiver {self._connection.url} refuses the run: {why}")
            raise Over(REFUSED)
        if answer.code not in (204, 409):
            raise AgentError(str(answer))
        return answer.code == 204

    def _acknowledged(self) -> None:
        now = time.monotonic()
        self._patience.acknowledged(now)
        self._works(is_post=True)
        if self._patience.renews(now):
            # Its chaperone ends the run where neither the receiver nor this agent is left.
            with contextlib.suppress(SpoolError):
                look.renew(self._run_fd, self.run_id, Request("renew"))

    async def _failed(self, error: SpoolError, is_post: bool = True) -> None:
        """Log a failure once, however often it comes, and wait for the next try."""
        complaint = (is_post, str(error))
        if complaint not in self._complaints:
            what = "post to" if is_post else "ask"
            again = f"trying again every {self._patience.retry_s:g} s"
            self._complain(f"unable to {what} {self._connection.url}: {error}; {again}")
        self._complaints.add(complaint)
        await self._pause()

    def _complain(self, sentence: str) -> None:
        """Log what is wrong with the receiver, up to a number of times."""
        if self._complaints_left:
            self._complaints_left -= 1
            last = "" if self._complaints_left else "; nothing more of that kind is logged"
            self._log(f"{sentence}{last}")

    def _works(self, is_post: bool) -> None:
        """The receiver answered as agreed: a later failure is a new one."""
        self._complaints = {each for each in self._complaints if each[0] != is_post}

    async def _pause(self) -> None:
        await asyncio.sleep(self._patience.pause_s(random.random()))

    async def _watch_patience(self) -> str | None:
        """Stop the run where nothing was acknowledged for too long; give up when it has ended."""
        while True:
            left_s = self._patience.left_s(time.monotonic())
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            timeout_s = self._patience.timeout_s
            self._log(f"the receiver acknowledged nothing for {timeout_s:g} s: the run is stopped")
            # If it can't be asked, its chaperone ends it: it is not renewed either.
            with contextlib.suppress(SpoolError):
                look.request(self._run_fd, self.run_id, Request("stop", by=BY))
            await self._ended.wait()
            # Time for one more try: it may be back.
            await asyncio.sleep(self._patience.pause_s(1.0))
            if self._patience.left_s(time.monotonic()) <= 0:
                return TIMED_OUT

    # -- what the receiver asks

    async def _take_requests(self) -> None:
        """Ask for requests, until the run has been delivered."""
        while True:
            asked_at = time.monotonic()
            try:
                answer = await self._connection.requests(self._note.seq)
                if answer.code == 404:
                    return  # this receiver has none
                fresh = [each for each in _numbered(answer) if each[0] > self._note.seq]
                for seq, line in fresh:
                    await self._take(seq, line)
            except SpoolError as error:  # the note can't be written, or there was no answer
                await self._failed(error, is_post=False)
                continue
            self._works(is_post=False)
            if not fresh and time.monotonic() - asked_at < SHORT_S:
                await self._pause()

    async def _take(self, seq: int, line: str) -> None:
        request = parsed(line)
        if request is None:
            self._complain(f"unable to take the receiver's request {line[:200]!r}: it is invalid")
        elif request.verb == "signal":
            # Noted first: a signal that was delivered twice could not be taken back.
            self._note.took(seq)
            self._ask(request)
            return
        else:
            while not self._ask(request) and not self._ended.is_set():
                await self._pause()
        self._note.took(seq)

    def _ask(self, request: Request) -> bool:
        request.by = request.by or BY
        try:
            look.request(self._run_fd, self.run_id, request)
            return True
        except (SpoolError, SpecError) as error:
            self._complain(f"unable to pass on the receiver's {request.verb}: {error}")
            return isinstance(error, SpecError)

    def _log(self, sentence: str) -> None:
        log(self._run_fd, sentence)


def _numbered(answer: Answer) -> list[tuple[int, str]]:
    """
    The requests of an answer, in their order.

    Raises:
        AgentError: If it is no such answer.
    """
    found = answer.value.get("requests") if isinstance(answer.value, dict) else None
    if answer.code != 200 or not isinstance(found, list):
        raise AgentError(
            f"{answer}, without a list of requests" if answer.code == 200 else str(answer)
        )
    requests = []
    for item in found:
        seq = item.get("seq") if isinstance(item, dict) else None
        if type(seq) is not int or not isinstance(item.get("line"), str):
            raise AgentError(f"{answer}, with a request that lacks its number or its line")
        requests.append((seq, item["line"]))
    return sorted(requests)


def log(run_fd: int, sentence: str) -> None:
    """Write a line into the log of a run, as its chaperone does; a full disk loses it."""
    line = f"{statuses.timestamp(time.time_ns())} {sentence}\n".encode("utf-8", "backslashreplace")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with contextlib.suppress(OSError, SpoolError):
        fd = format.open_plain(run_fd, format.LOG, flags)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)
