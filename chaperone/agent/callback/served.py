"""
Posts every run of a spool that has a callback, as long as its agent serves the spool.

Knows: which runs there are.  Must not know: what is posted of a run.
"""

from __future__ import annotations

import asyncio
import contextlib

import httpx

from ...errors import ChaperoneError, NoRunError
from ...follow.follower import Follower
from ...model import checks
from ...model import spec as specs
from ...model.events import Started
from ...program.fds import owned
from ...spool import format, look
from .connection import Connection, client
from .poster import Poster, log


async def post_all(spool_path: str) -> None:
    """
    Post the runs of a spool that have a callback and were not collected, and those that begin,
    until it is cancelled.

    Args:
        spool_path (str): Absolute.
    Raises:
        SpoolError: If the spool can't be followed; each run can be posted later.
    """
    tasks: set[asyncio.Task[None]] = set()
    async with contextlib.AsyncExitStack() as stack:
        clients = _Clients(stack)
        follower = stack.enter_context(Follower(spool_path, streams=(), shared=True))
        try:
            while (event := await follower.anext()) is not None:
                if isinstance(event, Started):
                    task = asyncio.ensure_future(_post(spool_path, event.run_id, clients))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Clients:
    """A client for each file of authorities: runs with the same one share their connections."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self._clients: dict[str | None, httpx.AsyncClient] = {}

    async def of(self, ca_file: str | None) -> httpx.AsyncClient:
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
        if spec.get("callback") is None:
            return
        try:
            # 0.1 took any object.
            callback = checks.Fields(specs.CALLBACK)(spec["callback"], "callback")
            config = checks.Fields(specs.CONFIG)(spec.get("config"), "config")
            shared = await clients.of(callback["ca"])
            connection = Connection(shared, callback, look.key_in(run_fd))
            await Poster(spool_path, run_id, config, connection).post()
        except (ChaperoneError, OSError) as error:
            log(run_fd, f"unable to post the run any longer: {error}")
