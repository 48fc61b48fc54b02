"""
One stream of events for all runs of an agent's spool that the tasks of an event loop follow.

Knows: followers, whose event is whose.  Must not know: Apsis, what an event means.
The runs of a directory need none: their followers share one inotify instance.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any
from weakref import WeakValueDictionary

from .. import aio
from ..follow.descriptors import done, set_done
from ..model import cursor as cursors
from ..model.events import Changed, Event

GATHER_S = 0.02  # the stream begins again for runs that begin; for those of so long once


class SharedStream:
    """
    The stream of one spool.

    Args:
        spool (aio.Spool): Of an agent.
    """

    def __init__(self, spool: aio.Spool) -> None:
        self._spool = spool
        self.shares: dict[str, Share] = {}
        self.follower: aio.Follower | None = None  # the last one, which may be closed
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def add(self, share: Share) -> None:
        """Follow one run more."""
        self.shares[share.run_id] = share
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._read())
        elif self.follower is not None:
            await self.follower.close()

    async def remove(self, share: Share) -> None:
        """Follow one run less; without any run the stream ends."""
        if self.shares.get(share.run_id) is share:
            del self.shares[share.run_id]
        if not self.shares and self._task is not None:
            # No longer ours at once: a run that begins while it ends needs another one.
            task, self._task = self._task, None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _read(self) -> None:
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(GATHER_S)
                self._changed.clear()
                await self._read_once([*self.shares.values()])
        except Exception as error:  # noqa: BLE001  each run gets it, a bug of ours too
            for share in self.shares.values():
                share.end(error)

    async def _read_once(self, shares: list[Share]) -> None:
        """Give the runs their events, until one more begins or all have ended."""
        for share in shares:
            share.advance(self.follower)
        cursor = cursors.of({share.run_id: share.entry for share in shares})
        follower = self._spool.follow(cursor, [share.run_id for share in shares], ("stdout",))
        self.follower = follower
        async with follower:
            while (event := await follower.next()) is not None:
                if event.run_id in self.shares:
                    self.shares[event.run_id].put(event)
        if follower.is_over():
            for share in shares:
                share.end(None)


class Share:
    """
    One run of the stream, as a follower of its own; to be used in an `async with` statement.

    Args:
        stream (SharedStream): Of its spool.
        cursor (dict): Of the run, from where on it is followed.
    """

    def __init__(self, stream: SharedStream, run_id: str, cursor: dict[str, Any]) -> None:
        self.run_id = run_id
        self.entry: dict[str, Any] = cursor["runs"][run_id]  # up to what was put
        self._stream = stream
        self._is_read = False
        self._events: deque[Event] = deque()
        self._last: object = None
        self._is_over = False
        self._error: Exception | None = None
        self._news: asyncio.Future[bool] | None = None

    async def __aenter__(self) -> Share:
        await self._stream.add(self)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stream.remove(self)

    # -- of the stream

    def advance(self, follower: aio.Follower | None) -> None:
        """A new stream begins after the one that this follower had."""
        if self._is_read and follower is not None:
            self.entry = follower.entry(self.run_id) or self.entry
        self._is_read = True

    def put(self, event: Event) -> None:
        """An event of the run has come."""
        if isinstance(event, Changed):
            if event.status.raw == self._last:  # each stream begins with it
                return
            self._last = event.status.raw
        self._events.append(event)
        self._wake()

    def end(self, error: Exception | None) -> None:
        """No event comes any more."""
        self._is_over, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            set_done(self._news, True)

    # -- of the run

    async def next(self, timeout: float | None = None) -> Event | None:
        """As `chaperone.aio.Follower.next`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._events:
                return self._events.popleft()
            if self._error is not None:
                raise self._error
            left = None if deadline is None else deadline - time.monotonic()
            if self._is_over or (left is not None and left <= 0):
                return None
            self._news = asyncio.get_running_loop().create_future()
            await done(self._news, left)

    async def collect(self, run_id: str) -> None:
        """As `chaperone.aio.Follower.collect`."""
        if self._stream.follower is not None:
            await self._stream.follower.collect(run_id)

    def is_uncollected(self, run_id: str) -> bool:
        """As `chaperone.aio.Follower.is_uncollected`."""
        follower = self._stream.follower
        return follower is not None and follower.is_uncollected(run_id)


_streams: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], SharedStream]
_streams = WeakValueDictionary()


def stream_of(spool: aio.Spool, url: str) -> SharedStream:
    """
    The stream of a spool on the running event loop; it lasts as long as it is used.

    Args:
        url (str): The name of the spool, as it was given.
    """
    name = asyncio.get_running_loop(), url
    found = _streams.get(name)
    if found is None:
        found = _streams[name] = SharedStream(spool)
    return found
