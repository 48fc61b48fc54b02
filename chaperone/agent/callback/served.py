"""
Posts the runs of served spools that have a callback.

Knows: which runs there are.  Must not know: what is posted of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING

from ...errors import ChaperoneError, NoRunError, SpoolError
from ...follow import hub
from ...follow.descriptors import IGNORED, MOVED_TO, OVERFLOW, OutOfWatchesError
from ...model import checks
from ...model import spec as specs
from ...program.fds import owned
from ...spool import format, look

if TYPE_CHECKING:
    import httpx

LOOK_S = 5.0  # until a new spool is seen; and a new run, where inotify is silent


async def post_each(paths: Callable[[], Iterable[str]], log: Callable[[str], None]) -> None:
    """
    Post the runs of several spools, until it is cancelled.

    Args:
        paths: Returns the paths of the spools that there are now, absolute.
        log: Takes a sentence for the log of the agent.
    """
    tasks: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            for path in paths():
                task = tasks.get(path)
                if task is not None and task.done() and (error := task.exception()) is not None:
                    log(f"unable to post the runs of spool {path!r}: {error}")
                if task is None or task.done():
                    tasks[path] = asyncio.ensure_future(post_all(path))
            await asyncio.sleep(LOOK_S)
    finally:
        await _end(tasks.values())


async def post_all(spool_path: str) -> None:
    """
    Post the runs of a spool that have a callback and were not collected, and those that begin,
    until it is cancelled.

    Args:
        spool_path (str): Absolute.
    Raises:
        SpoolError: If the spool can't be watched, or was removed.
    """
    tasks: dict[str, asyncio.Task[None]] = {}
    async with contextlib.AsyncExitStack() as stack:
        clients = _Clients(stack)
        try:
            async for run_id in _appeared(spool_path):
                before = tasks.get(run_id)
                if before is None or before.done():
                    tasks[run_id] = asyncio.ensure_future(_post(spool_path, run_id, clients))
                    tasks[run_id].add_done_callback(lambda task: _forget(tasks, task))
        finally:
            await _end([*tasks.values()])


def _forget(tasks: dict[str, asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    for run_id in [run_id for run_id, each in tasks.items() if each is task]:
        del tasks[run_id]


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _appeared(spool_path: str) -> AsyncIterator[str]:
    """
    The runs that have an entry, and then each run that appears; a run may come twice. A follower
    would look at every change of every run.
    """
    share = hub.share(format.open_spool(spool_path, create=True), reports=True)
    try:
        is_silent = share.silent is not None
        if not is_silent:
            try:
                share.watch(share.spool_fd, MOVED_TO)
            except OutOfWatchesError:
                is_silent = True
        looks = True
        while True:
            if looks:
                for run_id, _ in format.entered(share.spool_fd, None):
                    yield run_id
            await share.readable(LOOK_S if is_silent else None)
            looks = is_silent
            for _, mask, _, name in share.read():
                if mask & IGNORED:
                    raise SpoolError("it was removed")
                looks = looks or bool(mask & OVERFLOW)
                if mask & MOVED_TO and specs.is_run_id(name):
                    yield name
    finally:
        share.close()


class _Clients:
    """A client for each file of authorities: runs with the same one share their connections."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self._clients: dict[str | None, httpx.AsyncClient] = {}

    async def of(self, ca_file: str | None) -> httpx.AsyncClient:
        # Here: httpx takes 9 MiB, and most agents have nothing to post.
        from .connection import client

        if ca_file not in self._clients:
            made = client(ca_file)
            self._clients[ca_file] = made
            await self._stack.enter_async_context(made)
        return self._clients[ca_file]


async def _post(spool_path: str, run_id: str, clients: _Clients) -> None:
    """Post a run, if it has a callback; what fails is in its log, and harms no other run."""
    try:
        with owned(format.open_spool(spool_path)) as spool_fd:
            run_fd = format.open_run(spool_fd, run_id)
    except NoRunError:
        return
    with owned(run_fd):
        spec = look.read_spec(run_fd)
        # The agent where it really runs posts a run that is fed from elsewhere.
        if spec.get("callback") is None or look.feeder(spec) is not None:
            return
        from .connection import Connection
        from .poster import Poster, log

        try:
            # 0.1 took any object.
            callback = checks.Fields(specs.CALLBACK)(spec["callback"], "callback")
            config = checks.Fields(specs.CONFIG)(spec.get("config"), "config")
            shared = await clients.of(callback["ca"])
            connection = Connection(shared, callback, look.key_in(run_fd))
            await Poster(spool_path, run_id, config, connection).post()
        except (ChaperoneError, OSError) as error:
            log(run_fd, f"unable to post the run any longer: {error}")
