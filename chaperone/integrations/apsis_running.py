"""
A run of Apsis that chaperone holds: started once, followed again after each restart of the server.

Knows: the updates that Apsis 2.4 takes.  Must not know: the fields of a job, or where a spool is.
All runs of a server share one inotify instance for each spool, by the hub of `chaperone.aio`, or
one stream of events of an agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from signal import Signals
from typing import Any

from apsis.lib.py import get_cfg
from apsis.program import base

from .. import aio
from ..agent.client.place import is_place
from ..agent.client.question import Unanswered
from ..errors import ChaperoneError, NoRunError, SpecError, SpoolError
from ..model.events import Changed, Ended, Lost, Output, Shrank, Status
from .apsis_stream import Share, stream_of

log = logging.getLogger(__name__)

# How often Apsis gets the output of a running program: it takes the whole of it each time.
OUTPUT_S = 1.0
RETRY_S = 5.0  # after a spool, or an agent, that could not be read
COLLECT_S = 10.0  # how long an entry of an ended run may take to appear on a busy host
EARLY_S = 0.01  # a follower that returns so long before it has to is at its end
BY = "apsis"


class RunningChaperoneProgram(base.RunningProgram):  # type: ignore[misc]
    """
    A run of a program.

    Args:
        run_id (str): Apsis's.
        program (BoundChaperoneProgram): What to run, and how to stop it.
        cfg (dict): The configuration of Apsis.
        run_state (dict): `spool` and `run_id` of a run that was started; None to start one.
    """

    def __init__(
        self,
        run_id: str,
        program: Any,
        cfg: dict[str, Any],
        run_state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(run_id)
        if program.timeout is None:
            program.timeout = base.get_global_runtime_timeout(cfg)
        self.program = program
        self.run_state = run_state
        self._cfg = cfg
        self._signalled: str | None = None  # by us, when the time was over

    @functools.cached_property
    async def updates(self) -> AsyncGenerator[Any, None]:
        """What Apsis is to know, until the run has ended; the run is collected behind the end."""
        try:
            if self.run_state is None:
                async for update in self._start():
                    yield update
            async for update in self._follow():
                yield update
        except ChaperoneError as error:
            yield base.ProgramError(f"chaperone: {error}")

    async def stop(self) -> None:
        """Have chaperone stop it; the grace and SIGKILL come without Apsis."""
        await self._run().stop(wait=False, by=BY)

    async def signal(self, signal: Signals) -> None:
        """Send a signal to the program."""
        await self._run().signal(Signals(signal).name, by=BY)

    # -- in the order in which it happens

    async def _start(self) -> AsyncIterator[Any]:
        name = self.program.spool or get_cfg(self._cfg, "chaperone.spool", None)
        if name is None:
            raise SpecError("unable to start: want `spool` in the job or in the config of Apsis")
        # Apsis uses its ids again with a new database; a spool never does.
        chaperone_run_id = f"{self.run_id}-{secrets.token_hex(4)}"
        self.run_state = {"spool": name, "run_id": chaperone_run_id, "start": time.time()}
        # First of all, for people: a server that dies now gives up what it was starting.
        yield base.ProgramUpdate(meta={"chaperone": self.run_state})
        spec = {**self.program.run_spec(self.run_id), "id": chaperone_run_id}
        meta: dict[str, Any] = {"chaperone": self.run_state}
        try:
            await self._spool.start(spec, warm=True)
        except Unanswered as error:
            if not error.was_sent:
                raise
            log.warning(f"{self.run_id}: {error}")  # to follow it finds out
        else:
            with contextlib.suppress(SpoolError):  # it is started, answer or not
                meta = self._meta(await self._run().status())
        yield base.ProgramRunning(self.run_state, meta=meta)

    @functools.cached_property
    def _spool(self) -> aio.Spool:
        assert self.run_state is not None, "Apsis asks nothing of a run that is starting"
        return aio.Spool(self.run_state["spool"])

    def _run(self) -> aio.Run:
        assert self.run_state is not None, "as above"
        return self._spool[self.run_state["run_id"]]

    async def _follow(self) -> AsyncIterator[Any]:
        """
        Follow the run to its end, and collect it when Apsis has recorded that. It begins with the
        first byte, because Apsis stores no output of a run that goes on.
        """
        assert self.run_state is not None
        run_id, is_over = self.run_state["run_id"], False
        while not is_over:
            try:
                cursor = await self._run().cursor()
                async with self._follower(run_id, cursor) as follower:
                    async for update in self._followed(follower):
                        is_over = isinstance(update, _OUTCOMES)
                        yield update
                    await _collect(follower, run_id)
            except NoRunError:
                if not is_over:
                    raise
            except SpoolError as error:
                log.warning(f"{self.run_id}: {error}")
                if not is_over:  # the run goes on, and so do we
                    await asyncio.sleep(RETRY_S)

    def _follower(self, run_id: str, cursor: dict[str, Any]) -> aio.Follower | Share:
        assert self.run_state is not None, "as above"
        if is_place(self.run_state["spool"]):
            return Share(stream_of(self._spool, self.run_state["spool"]), run_id, cursor)
        return self._spool.follow(cursor, [run_id], ("stdout",))

    async def _followed(self, follower: aio.Follower | Share) -> AsyncIterator[Any]:
        output = bytearray()
        output_due: float | None = None  # when Apsis gets the bytes that it lacks
        shown = -OUTPUT_S
        alarm = self._alarm()
        while True:
            due = min((each for each in (output_due, alarm) if each is not None), default=None)
            left = None if due is None else max(0.0, due - time.monotonic())
            event = await follower.next(left)
            if isinstance(event, (Ended, Lost)):
                yield self._outcome(event.status, bytes(output))
                return
            if isinstance(event, Changed):
                yield base.ProgramUpdate(meta=self._meta(event.status))
            elif isinstance(event, Output):
                output += event.data
                output_due = output_due or shown + OUTPUT_S
            elif isinstance(event, Shrank):
                output.clear()
            elif event is None and (due is None or time.monotonic() < due - EARLY_S):
                why = "another process has collected it"
                raise NoRunError(f"unable to follow run {self.run_id!r}: {why}")
            now = time.monotonic()
            if output_due is not None and now >= output_due:
                yield base.ProgramUpdate(outputs=base.program_outputs(bytes(output)))
                output_due, shown = None, time.monotonic()
            if alarm is not None and now >= alarm:
                alarm = None
                await self._time_out()

    # -- a timeout with a signal of its own, which a spec has not

    def _alarm(self) -> float | None:
        """When our own timeout is over, on the monotonic clock; None if chaperone has it."""
        timeout = self.program.timeout
        if timeout is None or self._signalled or timeout.signal == self.program.stop.signal.name:
            return None
        assert self.run_state is not None
        return float(time.monotonic() + self.run_state["start"] + timeout.duration - time.time())

    async def _time_out(self) -> None:
        name = self.program.timeout.signal
        try:
            await self.signal(Signals[name])
        except NoRunError:  # it has just ended
            return
        self._signalled = name

    # -- what Apsis shows

    def _outcome(self, status: Status | None, output: bytes) -> Any:
        outputs = base.program_outputs(output) if output else {}
        if status is None:
            return base.ProgramError("chaperone: the run was deleted", outputs=outputs)
        meta = self._meta(status)
        if status.state != "terminated":
            why = status.exception["message"] if status.exception else "its outcome can't be known"
            return base.ProgramError(f"{status.state}: {why}", meta=meta, outputs=outputs)
        timed_out = self._signalled or _stop(status).get("reason") in ("timeout", "idle")
        if status.return_code == 0 and not timed_out:
            return base.ProgramSuccess(meta=meta, outputs=outputs)
        killed = status.signal is not None
        message = f"killed by {status.signal}" if killed else f"exit code {status.return_code}"
        if status.oom:
            message += " (out of memory)"
        if timed_out:
            message += f" (timeout after {status.elapsed or 0:.0f} s)"
        return base.ProgramFailure(message, meta=meta, outputs=outputs)

    def _meta(self, status: Status) -> dict[str, Any]:
        """What Apsis keeps of a status, by the names that its other programs use."""
        raw, stop = status.raw, _stop(status)
        signals = [name for name in (self._signalled, stop.get("signal")) if name]
        if signals and status.signal == "SIGKILL" and not status.oom and "SIGKILL" not in signals:
            signals.append("SIGKILL")  # the grace was over
        return {
            "chaperone": {**(self.run_state or {}), "state": status.state},
            "errors": [status.exception["message"]] if status.exception else [],
            "status": {
                "status": status.status,
                "exit_code": status.return_code,
                "signal": status.signal,
                "core_dump": status.core_dump,
                "oom": status.oom,
            },
            "times": {
                "start": raw.get("start_time"),
                "stop": raw.get("end_time"),
                "elapsed": status.elapsed,
            },
            "rusage": status.rusage,
            "proc_stat": {"pid": status.pid},
            "stop": {"signals": signals, "reason": stop.get("reason"), "by": stop.get("by")},
        }


_OUTCOMES = (base.ProgramSuccess, base.ProgramFailure, base.ProgramError)


async def _collect(follower: aio.Follower | Share, run_id: str) -> None:
    """Collect an ended run. It gets its entry a moment behind its end, a lost one when reaped."""
    await follower.collect(run_id)
    given_up = time.monotonic() + COLLECT_S
    pause_s = 0.01
    while follower.is_uncollected(run_id) and time.monotonic() < given_up:
        await asyncio.sleep(pause_s)
        await follower.collect(run_id)
        pause_s = min(2 * pause_s, 1.0)


def _stop(status: Status) -> dict[str, Any]:
    """Who stopped the run, with what, and why; {} if it was not stopped."""
    return {**status.stop} if status.stop else {}
