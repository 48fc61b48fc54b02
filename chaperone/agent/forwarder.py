"""
A forwarder: passes what is asked for in the run directories of a mirror on to the agent.

Knows: requests, which of them may be repeated.  Must not know: HTTP, who asked.
"""

from __future__ import annotations

import asyncio
from collections import deque

from ..errors import AgentError, ChaperoneError
from ..model.request import Request
from .client import calls
from .client.connection import AioConnection
from .fed_run import REPEATABLE, FedRun

AGAIN_S = 1.0  # before an agent that did not answer is asked again


class Forwarder:
    """
    Forwards the requests for each run in their order; one run does not wait for another.

    Args:
        connection (AioConnection): To the agent.
        name (str): Of the agent's spool.
    """

    def __init__(self, connection: AioConnection, name: str) -> None:
        self._connection, self._name = connection, name
        self._waiting: dict[str, deque[Request]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, run: FedRun, request: Request) -> None:
        """Forward a request, after the earlier ones for its run."""
        if request.verb == "renew":  # the mirror itself renews
            return
        self._waiting.setdefault(run.run_id, deque()).append(request)
        if run.run_id not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._forward(run))
            self._tasks[run.run_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(run.run_id, None))

    def close(self) -> None:
        """Stop forwarding; the stops that are left are kept in the runs."""
        for task in self._tasks.values():
            task.cancel()

    async def _forward(self, run: FedRun) -> None:
        waiting = self._waiting[run.run_id]
        while waiting and not run.is_ended():
            request = waiting.popleft()
            if request.verb in REPEATABLE:
                await self._end(run, request)
            else:
                await self._signal(run, request)
        del self._waiting[run.run_id]

    async def _signal(self, run: FedRun, request: Request) -> None:
        """Once: a signal whose answer was lost may have been delivered."""
        try:
            await self._connection.perform(calls.signal(self._name, run.run_id, request))
        except ChaperoneError as error:
            run.log(str(error))

    async def _end(self, run: FedRun, request: Request) -> None:
        """Until the agent has heard it: a stop may be repeated."""
        said = False
        while not run.is_ended():
            try:
                await self._connection.perform(calls.end(self._name, run.run_id, request, False))
                break
            except AgentError as error:
                if not said:
                    said = True
                    run.log(f"{error}; the agent is asked again")
                await asyncio.sleep(AGAIN_S)
            except ChaperoneError as error:
                run.log(str(error))
                break
        run.passed_on(request)
