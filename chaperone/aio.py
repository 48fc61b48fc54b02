"""
`chaperone.aio`: a spool and its runs as coroutines.

Knows: which calls wait for the kernel, and which for the disk.  Must not know: how a call does its
work.
What waits shares one inotify instance for each spool and event loop, and uses no thread. What may
take longer than a small file takes runs in the executor of the loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar, overload
from weakref import WeakValueDictionary

from . import api, interface
from .agent.client.place import client_room, is_place
from .follow import follower as followers
from .follow.followed import CHUNK
from .model.events import Ended, Event, Lost, Output, Status
from .model.request import Request
from .spool import format, gc
from .types import SpecDict

Value = TypeVar("Value")


class Spool:
    """
    `chaperone.Spool` as coroutines: the same calls, arguments, values and errors.

    Args:
        path (str): As of `chaperone.Spool`; the URL of an agent's spool, too.
        token_file, ca (str): As of `chaperone.Spool`.
    """

    def __new__(cls, path: Any = "", *rest: Any, **proofs: Any) -> Any:
        """A spool of the class that the path or the URL needs."""
        if is_place(path):
            return client_room(path, "aio").Spool(path, *rest, **proofs)
        return super().__new__(cls)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        token_file: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self._spool = api.Spool(path, token_file=token_file, ca=ca)

    def __repr__(self) -> str:
        return f"aio.{self._spool!r}"

    @property
    def path(self) -> str:
        """Its path, absolute."""
        return self._spool.path

    async def start(
        self,
        spec: SpecDict | dict[str, Any],
        warm: bool = False,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> Run:
        """
        As `chaperone.Spool.start`, in the executor of the loop.

        A start that is cancelled may still happen: give the spec an `id`, and try again.
        """
        return _run(await asyncio.to_thread(self._spool.start, spec, warm, env, cwd))

    def follow(
        self,
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = format.STREAMS,
        poll_s: float | None = None,
    ) -> Follower:
        """As `chaperone.Spool.follow`; called while the event loop runs."""
        return Follower(self.path, cursor, runs, streams, poll_s)

    async def cursor(self) -> dict[str, Any]:
        """As `chaperone.Spool.cursor`, in the executor of the loop."""
        return await asyncio.to_thread(self._spool.cursor)

    def __getitem__(self, run_id: str) -> Run:
        """As of `chaperone.Spool`: the run with that id, which must exist."""
        return _run(self._spool[run_id])

    async def live(self) -> list[Run]:
        """As `chaperone.Spool.live`, in the executor of the loop."""
        return [_run(run) for run in await asyncio.to_thread(self._spool.live)]

    async def ended(self) -> list[Run]:
        """As `chaperone.Spool.ended`, in the executor of the loop."""
        return [_run(run) for run in await asyncio.to_thread(self._spool.ended)]

    async def all(self) -> list[Run]:
        """As `chaperone.Spool.all`, in the executor of the loop."""
        return [_run(run) for run in await asyncio.to_thread(self._spool.all)]

    async def collect(self, run_id: str) -> None:
        """As `chaperone.Spool.collect`."""
        self._spool.collect(run_id)

    async def renew(self, runs: Iterable[str] | None = None) -> None:
        """As `chaperone.Spool.renew`, in the executor of the loop."""
        await asyncio.to_thread(self._spool.renew, runs)

    async def gc(
        self,
        older_s: float | None = None,
        keep_failed_s: float | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
        progress: Callable[[int, int], None] | None = None,
        uncollected: bool = False,
    ) -> gc.Summary:
        """As `chaperone.Spool.gc`, in the executor of the loop; `progress` is called there."""
        given = (older_s, keep_failed_s, max_bytes, dry_run, progress, uncollected)
        return await _alone(self.path, lambda: self._spool.gc(*given))


class Run:
    """
    `chaperone.Run` as coroutines: the same calls, arguments, values and errors.

    Args:
        spool_path (str): Absolute.
        run_id (str): Of an existing run.
    """

    def __init__(self, spool_path: str, run_id: str) -> None:
        self._run = api.Run(spool_path, run_id)

    def __repr__(self) -> str:
        return f"aio.{self._run!r}"

    @property
    def spool_path(self) -> str:
        """The path of its spool."""
        return self._run.spool_path

    @property
    def run_id(self) -> str:
        """Its id."""
        return self._run.run_id

    @property
    def path(self) -> str:
        """The path of the run directory."""
        return self._run.path

    async def status(self) -> Status:
        """As `chaperone.Run.status`."""
        return self._run.status()

    async def spec(self) -> dict[str, Any]:
        """As `chaperone.Run.spec`."""
        return self._run.spec()

    async def size(self, stream: str = "stdout") -> int:
        """As `chaperone.Run.size`."""
        return self._run.size(stream)

    async def read(self, stream: str = "stdout", offset: int = 0, size: int = CHUNK) -> bytes:
        """As `chaperone.Run.read`."""
        return self._run.read(stream, offset, size)

    async def cursor(self, stdout: int = 0, stderr: int = 0) -> dict[str, Any]:
        """As `chaperone.Run.cursor`."""
        return self._run.cursor(stdout, stderr)

    @overload
    async def wait(self, timeout: None = None) -> Status: ...
    @overload
    async def wait(self, timeout: float | None) -> Status | None: ...
    async def wait(self, timeout: float | None = None) -> Status | None:
        """As `chaperone.Run.wait`; a wait that is cancelled leaves nothing."""
        deadline = None if timeout is None else time.monotonic() + timeout
        status = self._run.status()
        if interface.has_ended(status):
            return status
        with self._followed(self._run.cursor(), ()) as follower:
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = await follower.anext(left)
                if event is None:
                    return None
                if isinstance(event, (Ended, Lost)):
                    return interface.final_status(event, "wait for")

    async def tail(self, stream: str = "stdout", offset: int = 0) -> AsyncIterator[bytes]:
        """As `chaperone.Run.tail`; nothing is read ahead of the task that asks."""
        interface.check_followed(stream)
        with self._followed(self._run.cursor(**{stream: offset}), (stream,)) as follower:
            while (event := await follower.anext()) is not None:
                if isinstance(event, Output):
                    yield event.data
                elif isinstance(event, Ended):
                    interface.final_status(event, "follow")

    def _followed(self, cursor: dict[str, Any], streams: Iterable[str]) -> followers.Follower:
        return followers.Follower(self.spool_path, cursor, [self.run_id], streams, shared=True)

    async def stop(
        self, grace_s: float | None = None, wait: bool = True, by: str | None = None
    ) -> Status:
        """As `chaperone.Run.stop`; if it is cancelled, the stop goes on."""
        return await self._end(Request("stop", grace_s, by=by), wait)

    async def kill(self, wait: bool = True, by: str | None = None) -> Status:
        """As `chaperone.Run.kill`."""
        return await self._end(Request("kill", by=by), wait)

    async def _end(self, request: Request, wait: bool) -> Status:
        ended = api.request_end(self._run, request, wait)
        return ended or (await self.wait() if wait else self._run.status())

    async def signal(self, name: str | int, by: str | None = None) -> None:
        """As `chaperone.Run.signal`."""
        self._run.signal(name, by)

    async def delete(self) -> None:
        """As `chaperone.Run.delete`, in the executor of the loop."""
        await _alone(self.spool_path, self._run.delete)


class Follower(interface.Delivering):
    """
    `chaperone.Follower` as coroutines: the same events, cursor and errors. It belongs to one task.

    Iterate with `async for`, at best inside of `async with`. Nothing is read ahead: an event is
    made when a task asks.
    """

    def __init__(
        self,
        path: str,
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = format.STREAMS,
        poll_s: float | None = None,
    ) -> None:
        self._follower = followers.Follower(path, cursor, runs, streams, poll_s, shared=True)
        super().__init__(self._follower)

    async def __aenter__(self) -> Follower:
        self._follower.__enter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._follower.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        """The events; at the end it closes the follower, unless an `async with` block does."""
        return self._follower.__aiter__()

    async def next(self, timeout: float | None = None) -> Event | None:
        """As `chaperone.Follower.next`."""
        return await self._follower.anext(timeout)

    async def collect(self, run_id: str) -> None:
        """As `chaperone.Follower.collect`."""
        self._follower.collect(run_id)

    async def close(self) -> None:
        """Close every watch and fd; the cursor can still be read."""
        self._follower.close()


_sweeps: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], asyncio.Lock]
_sweeps = WeakValueDictionary()


async def _alone(spool_path: str, call: Callable[[], Value]) -> Value:
    """Make a call in the executor; those of one loop that sweep a spool wait for each other."""
    name = (asyncio.get_running_loop(), spool_path)
    lock = _sweeps.setdefault(name, asyncio.Lock())
    async with lock:
        return await asyncio.to_thread(call)


def _run(run: api.Run) -> Run:
    return Run(run.spool_path, run.run_id)
