"""
The agent of one program: it starts the run, says so in one JSON object, and posts it to its end.

Knows: the fields of `program.json`, signals.  Must not know: HTTP, how a run is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx

from ...errors import NoRunError, RunExistsError, SpecError, SpoolError
from ...follow.follower import Follower
from ...hold.begin import canonical_spec, new_id
from ...launch import start
from ...model import cursor as cursors
from ...model import spec as specs
from ...model.events import Changed, Ended, Lost
from ...model.request import Request
from ...program.fds import owned
from ...spool import format, look
from .connection import Connection, client
from .poster import Poster
from .progress import renewal_s

BY = "agent"  # the requester of a stop that SIGTERM was
STOPS = (signal.SIGTERM, signal.SIGINT)
# What is printed of the status, in this order, behind `proc_id`, `state` and `program`.
FACTS = ("pid", "exception", "status", "return_code", "signal", "rusage", "start_time", "end_time")
ENDINGS = ("status", "return_code", "signal", "rusage", "end_time")


def spec_of(text: bytes, cwd: str) -> dict[str, Any]:
    """
    The spec of a `program.json`, with the id of its run: its own; otherwise the last segment of the
    URL, which names the program to the receiver, so that a second start is no second run; where
    that can't be an id, a new one.

    Args:
        text (bytes): JSON: `program`, `callback`, `config`, and any other field of a spec.
        cwd (str): Absolute.
    Raises:
        SpecError: If it is invalid, or has no callback.
    """
    spec = canonical_spec("program.json", text, cwd)
    if spec["callback"] is None:
        raise SpecError("unable to read spec 'program.json': callback: required field is missing")
    last = spec["callback"]["url"].rstrip("/").rpartition("/")[2]
    named = last if spec["callback"]["url"].count("/") > 2 and specs.is_run_id(last) else None
    renew = spec["renew"] or renewal_s(spec["config"])
    return {**spec, "id": spec["id"] or named or new_id(), "renew": renew}


def run(spool_path: str, spec: dict[str, Any], show: Callable[[str], None]) -> str:
    """
    Start the program, or find its run, and post the run until its receiver has everything.

    SIGTERM and SIGINT stop the run; this process goes on until its end was posted.

    Args:
        spool_path (str): Absolute.
        spec (dict): From `spec_of`.
        show: Called once with a JSON object, when the program runs or could not be run.
    Returns:
        str: As `Poster.post`.
    Raises:
        SpecError: If the authorities can't be read; nothing was started.
        RunExistsError: If the id is another run's.
        SpoolError: If the run can't be created or read.
    """
    # From here on they wait until they can stop the run.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    # The agent outlives the connection that it was started through.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    shared = client(spec["callback"]["ca"])
    is_new = True
    try:
        start.start(spool_path, spec)
    except RunExistsError as error:
        if not _is_same(spool_path, spec):
            why = "it exists, with another program or another callback.url"
            raise RunExistsError(f"unable to start run {spec['id']!r}: {why}") from error
        is_new = False
    return asyncio.run(_Agent(spool_path, spec, show).run(shared, is_new))


def _is_same(spool_path: str, spec: dict[str, Any]) -> bool:
    """Whether an agent that has died started the run from the same file, wherever it was then."""
    with owned(format.open_spool(spool_path)) as spool_fd:
        with owned(format.open_run(spool_fd, spec["id"])) as run_fd:
            kept = look.read_spec(run_fd)
    ours = spec if spec["keep_secrets"] else specs.without_secrets(spec)
    one, other = (
        ({**found["program"], "cwd": None}, found["remote"], found["callback"]["url"])
        for found in ({**ours, **kept, "callback": kept.get("callback") or {"url": None}}, ours)
    )
    return one == other


class _Agent:
    """Shows how the program began, passes stops on, and posts."""

    def __init__(self, spool_path: str, spec: dict[str, Any], show: Callable[[str], None]) -> None:
        self._spool_path, self._spec, self._show = spool_path, spec, show
        self._run_id = str(spec["id"])

    async def run(self, shared: httpx.AsyncClient, is_new: bool) -> str:
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        with self._opened() as run_fd:
            key = look.key_in(run_fd)
        async with shared:
            connection = Connection(shared, self._spec["callback"], key)
            poster = Poster(self._spool_path, self._run_id, self._spec["config"], connection)
            posting = asyncio.ensure_future(poster.post())
            status = await self._began(key)
            self._show(json.dumps(seeds_object(self._spec, status, is_new)))
            return await posting

    async def _began(self, key: str) -> dict[str, Any]:
        """The first status that is not `starting`."""
        cursor = cursors.of({self._run_id: cursors.entry(key)})
        with Follower(self._spool_path, cursor, [self._run_id], (), shared=True) as follower:
            while (event := await follower.anext()) is not None:
                if isinstance(event, (Changed, Ended, Lost)) and event.status is not None:
                    if event.status.state != "starting":
                        return {**event.status.raw}
        raise NoRunError(f"unable to start run {self._run_id!r}: it was deleted")

    def _stop(self) -> None:
        """Stop the run; one that has ended needs no stop."""
        with contextlib.suppress(SpoolError), self._opened() as run_fd:
            look.request(run_fd, self._run_id, Request("stop", by=BY))

    def _opened(self) -> owned:
        with owned(format.open_spool(self._spool_path)) as spool_fd:
            return owned(format.open_run(spool_fd, self._run_id))


def seeds_object(spec: dict[str, Any], status: dict[str, Any], is_new: bool) -> dict[str, Any]:
    """
    What the agent prints: the run as it began, without secrets.

    Args:
        spec (dict): Canonical, with its id.
        status (dict): The first one that was seen and is not `starting`.
        is_new (bool): Whether this agent has started the run. Its program runs then, even if it was
            so short that it has ended; its end is posted, and is not printed.
    """
    facts = {name: status[name] for name in FACTS}
    state = status["state"]
    if is_new and state in ("stopping", "terminated"):
        state = "running"
        facts.update(dict.fromkeys(ENDINGS))
    return {
        "proc_id": spec["id"],
        "state": state,
        "program": specs.without_secrets(spec)["program"],
        "agent_pid": os.getpid(),
        **facts,
    }
