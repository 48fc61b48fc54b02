"""
The spool of an agent, its runs and its events, as coroutines.

Knows: the tasks of an event loop, and the function in calls.py for each method.  Must not know: the
requests to an agent, or the meaning of an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import Any, overload

import httpx

from ...errors import ChaperoneError
from ...follow.descriptors import TURN_S, done, set_done
from ...follow.followed import CHUNK
from ...interface import Delivering, final_status, signal_request
from ...model.events import Ended, Event, Output, Status
from ...model.request import Request
from ...spool.format import STREAMS
from ...types import SpecDict
from . import calls
from .connection import AioConnection
from .following import Following, Read, Room
from .place import Place
from .question import Answer, Pause, Steps, Unanswered


class Spool:
    """`chaperone.aio.Spool` of an agent; the arguments are those of `chaperone.Spool`."""

    def __init__(
        self,
        url: str,
        *,
        token_file: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self._connection = AioConnection(Place(url, token_file, ca))
        self._name = self._connection.place.name
        self._perform = self._connection.perform

    def __repr__(self) -> str:
        return f"aio.Spool({self._connection.place.text!r})"

    async def start(
        self,
        spec: SpecDict | dict[str, Any],
        warm: bool = True,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> Run:
        """
        As `chaperone.Spool.start` of an agent. A start that is cancelled may still happen: give the
        spec an `id`, and try again.
        """
        return self[await self._perform(calls.start(self._name, spec, warm, env, cwd))]

    def follow(
        self,
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = STREAMS,
    ) -> Follower:
        """As `chaperone.Spool.follow` of an agent; call it while the event loop runs."""
        return Follower(self._connection, cursor, runs, streams)

    async def cursor(self) -> dict[str, Any]:
        """As `chaperone.Spool.cursor`."""
        return await self._perform(calls.cursor(self._name))

    def __getitem__(self, run_id: str) -> Run:
        """The run with that id. This sends no request: its first call fails if there is none."""
        return Run(self._connection, run_id)

    async def live(self) -> list[Run]:
        """As `chaperone.Spool.live`."""
        return await self._runs("live")

    async def ended(self) -> list[Run]:
        """As `chaperone.Spool.ended`."""
        return await self._runs("ended")

    async def all(self) -> list[Run]:
        """As `chaperone.Spool.all`."""
        return await self._runs("all")

    async def collect(self, run_id: str) -> None:
        """As `chaperone.Spool.collect`."""
        await self._perform(calls.collect(self._name, {run_id: None}))

    async def renew(self, runs: Iterable[str] | None = None) -> None:
        """As `chaperone.Spool.renew`."""
        await self._perform(calls.renew(self._name, runs))

    async def _runs(self, state: str) -> list[Run]:
        return [self[run_id] for run_id in await self._perform(calls.run_ids(self._name, state))]


class Run:
    """`chaperone.aio.Run` of an agent's spool: the same calls, arguments, values and errors."""

    def __init__(self, connection: AioConnection, run_id: str) -> None:
        self._connection = connection
        self._name = connection.place.name
        self._perform = connection.perform
        self.run_id = run_id

    def __repr__(self) -> str:
        return f"aio.Run({self._connection.place.text!r}, {self.run_id!r})"

    async def status(self) -> Status:
        """As `chaperone.Run.status`."""
        return await self._perform(calls.status(self._name, self.run_id))

    async def spec(self) -> dict[str, Any]:
        """As `chaperone.Run.spec`, without secrets."""
        return await self._perform(calls.spec(self._name, self.run_id))

    async def size(self, stream: str = "stdout") -> int:
        """As `chaperone.Run.size`."""
        return await self._perform(calls.size(self._name, self.run_id, stream))

    async def read(self, stream: str = "stdout", offset: int = 0, size: int = CHUNK) -> bytes:
        """As `chaperone.Run.read`."""
        return await self._perform(calls.read(self._name, self.run_id, stream, offset, size))

    async def cursor(self, stdout: int = 0, stderr: int = 0) -> dict[str, Any]:
        """As `chaperone.Run.cursor`."""
        return await self._perform(calls.cursor_of(self._name, self.run_id, stdout, stderr))

    @overload
    async def wait(self, timeout: None = None) -> Status: ...
    @overload
    async def wait(self, timeout: float | None) -> Status | None: ...
    async def wait(self, timeout: float | None = None) -> Status | None:
        """As `chaperone.Run.wait`; a wait that is cancelled leaves nothing."""
        return await self._perform(calls.wait(self._name, self.run_id, timeout))

    async def tail(self, stream: str = "stdout", offset: int = 0) -> AsyncIterator[bytes]:
        """As `chaperone.Run.tail`."""
        cursor = await self._perform(calls.tail_cursor(self._name, self.run_id, stream, offset))
        async with Follower(self._connection, cursor, [self.run_id], [stream]) as follower:
            async for event in follower:
                if isinstance(event, Output):
                    yield event.data
                elif isinstance(event, Ended):
                    final_status(event, "follow")

    async def stop(
        self, grace_s: float | None = None, wait: bool = True, by: str | None = None
    ) -> Status:
        """As `chaperone.Run.stop`; if it is cancelled, the stop goes on."""
        return await self._end(Request("stop", grace_s, by=by), wait)

    async def kill(self, wait: bool = True, by: str | None = None) -> Status:
        """As `chaperone.Run.kill`."""
        return await self._end(Request("kill", by=by), wait)

    async def signal(self, name: str | int, by: str | None = None) -> None:
        """As `chaperone.Run.signal` of an agent: it is never sent twice."""
        await self._perform(calls.signal(self._name, self.run_id, signal_request(name, by)))

    async def delete(self) -> None:
        """As `chaperone.Run.delete`."""
        await self._perform(calls.delete(self._name, self.run_id))

    async def _end(self, request: Request, wait: bool) -> Status:
        return await self._perform(calls.end(self._name, self.run_id, request, wait))


class Follower(Delivering):
    """
    `chaperone.aio.Follower` of an agent's spool: the same events, cursor and errors.

    Attributes:
        following (Following): It knows whether and when the agent was heard: `polling`, `heard_ns`.
    """

    def __init__(
        self,
        connection: AioConnection,
        cursor: object,
        runs: Iterable[str] | None,
        streams: Iterable[str],
    ) -> None:
        self._connection = connection
        self.following = Following(connection.place, cursor, runs, streams)
        super().__init__(self.following)
        self._reader = _Reader(connection, self.following)
        self._owned = False
        weakref.finalize(self, self._reader.drop).atexit = False

    async def __aenter__(self) -> Follower:
        self._owned = True
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events; at the end it closes the follower, unless an `async with` block does."""
        try:
            while (event := await self.next()) is not None:
                yield event
        finally:
            if not self._owned:
                await self.close()

    async def next(self, timeout: float | None = None) -> Event | None:
        """As `chaperone.Follower.next`."""
        return await self._reader.next(timeout)

    async def collect(self, run_id: str) -> None:
        """As `chaperone.Follower.collect`."""
        await self._connection.perform(self.following.collect(run_id))

    async def close(self) -> None:
        """Close the connection; the cursor can still be read."""
        await self._reader.close()


class _Reader:
    """
    The task that reads, and what it shares with the follower.

    It has no reference to the follower: otherwise a follower that is dropped would never be freed.
    """

    def __init__(self, connection: AioConnection, following: Following) -> None:
        self._connection, self._following = connection, following
        self._task: asyncio.Task[None] | None = None
        self._news: asyncio.Future[bool] | None = None  # the follower's caller waits for it
        self._room: asyncio.Future[bool] | None = None  # the task waits for it
        self._is_closed = False
        self._turn_ends = 0.0

    async def next(self, timeout: float | None) -> Event | None:
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        if now >= self._turn_ends:
            # In a backlog, yield to other tasks every TURN_S; a yield after each event costs 15 us.
            await asyncio.sleep(0)
            self._turn_ends = time.monotonic() + TURN_S
        while True:
            if self._is_closed:
                return None
            event = self._following.take()
            if event is not None:
                _wake(self._room)
                return event
            if self._following.is_over():
                return None
            if self._task is not None and self._task.done():
                task, self._task = self._task, None
                task.result()  # raises the error that ended the task
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._run())
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            _wake(self._room)  # take() may have dropped repeated events
            self._news = asyncio.get_running_loop().create_future()
            await done(self._news, left)
            self._turn_ends = time.monotonic() + TURN_S

    async def close(self) -> None:
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ChaperoneError):
                await self._task
        _wake(self._news)  # a task that is cancelled before it begins does not wake it

    def drop(self) -> None:
        """End the task of a follower that was not closed."""
        task = self._task
        if task is not None and not task.done() and not task.get_loop().is_closed():
            task.get_loop().call_soon_threadsafe(task.cancel)

    # -- in the task

    async def _run(self) -> None:
        try:
            async with self._connection.streaming() as client, contextlib.AsyncExitStack() as stack:
                await self._read(_Stream(self._connection, client, stack))
        finally:
            _wake(self._news)

    async def _read(self, stream: _Stream) -> None:
        """Perform the steps of `reading`."""
        steps = Steps(self._following.reading())
        while (step := steps.next()) is not None:
            _wake(self._news)
            try:
                steps.did(await self._result(step, stream))
            except Unanswered as error:
                steps.failed(error)

    async def _result(self, step: Any, stream: _Stream) -> Answer | bytes | None:
        if step is Room:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
            return None
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        return await stream.result(step)


def _wake(future: asyncio.Future[bool] | None) -> None:
    if future is not None:
        set_done(future, True)


class _Stream:
    """The connection of the task: a new one for each request for the stream of events."""

    def __init__(
        self,
        connection: AioConnection,
        client: httpx.AsyncClient,
        opened: contextlib.AsyncExitStack,
    ) -> None:
        self._connection, self._client, self._opened = connection, client, opened
        self._parts: AsyncIterator[bytes] | None = None

    async def result(self, step: Any) -> Answer | bytes | None:
        """As `_Stream.result` in follower.py."""
        if step is Read:
            return await self._read()
        if not step.is_stream:
            return await self._connection.kept_answer(step)
        await self._opened.aclose()
        response = await self._opened.enter_async_context(
            self._connection.stream(self._client, step)
        )
        if not response.is_success:
            return await self._connection.gathered(response, step)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._parts = aiter(response.stream)
        return Answer(status=response.status_code, headers=response.headers, body=b"")

    async def _read(self) -> bytes:
        try:
            return await anext(self._parts, b"") if self._parts is not None else b""
        except httpx.TransportError as error:
            raise self._connection.failure(error) from error
