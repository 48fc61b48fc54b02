"""
What waits for a run in a triggerer of Airflow, and writes its output into the task's log.

Knows: how Airflow 3 runs a trigger, and where the logs of a task are.  Must not know: how a run is
started, or what its end means for the task.
The log itself is the commit: a trigger that starts again counts the lines that are in it, so each
line is there once, whichever process was killed.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from airflow.configuration import conf
from airflow.sdk import BaseHook
from airflow.triggers.base import BaseTrigger, TriggerEvent
from airflow.utils.helpers import log_filename_template_renderer

from .. import aio
from ..errors import NoRunError, SpecError, SpoolError
from ..model.events import Ended, Lost, Output

BY = "airflow"
RETRY_S = 5.0  # after a spool, or an agent, that could not be read
# A scheduler that learns of the end before it has handled the executor's report of the deferral
# finds the task running, and fails it. On a busy machine it handled a report after 6 s.
SETTLE_S = 10.0
LONGEST = 16_384  # bytes: a longer line becomes several
PAUSE = 10  # lines, after which the other triggers of the process get a turn
OUTPUT = logging.getLogger("chaperone.output")  # a name that marks a line of output in the log
MARK = f'"logger":"{OUTPUT.name}"'.encode()  # how Airflow writes it
STUCK_S = 30.0  # for how long a log may not grow while lines are on their way to it


class ChaperoneTrigger(BaseTrigger):  # type: ignore[misc]
    """
    Follow a run to its end.

    Args:
        run_id, key (str): Of the run.
        spool, chaperone_conn_id (str): As of `ChaperoneOperator`.
    """

    def __init__(
        self,
        run_id: str,
        key: str,
        spool: str | None = None,
        chaperone_conn_id: str | None = None,
    ) -> None:
        super().__init__()
        self.run_id = run_id
        self.key = key
        self.spool = spool
        self.chaperone_conn_id = chaperone_conn_id

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """What another triggerer needs."""
        names = ("run_id", "key", "spool", "chaperone_conn_id")
        return f"{__name__}.ChaperoneTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Write the output into the log; then yield the end, with the final status as it is."""
        settled = time.monotonic() + SETTLE_S
        skipped = await asyncio.to_thread(lines_in_log, self.task_instance)
        lines = Lines(skipped or 0)
        async with opened(self.spool, self.chaperone_conn_id) as spool:
            while True:
                try:
                    status = await self._follow(spool, lines)
                    break
                except NoRunError:
                    status = None
                    break
                except SpoolError as error:  # the run goes on, and so do we
                    self.log.warning("%s", error)
                    await asyncio.sleep(RETRY_S)
        await asyncio.sleep(max(0.0, settled - time.monotonic()))
        await self._logged(lines.count)
        yield TriggerEvent({"run_id": self.run_id, "status": status})

    async def _follow(self, spool: aio.Spool, lines: Lines) -> dict[str, Any] | None:
        """Deliver what is left of the run; its final status, None if it was deleted."""
        entry = {"key": self.key, "stdout": lines.offset, "stderr": 0}
        cursor = {"runs": {self.run_id: entry}}
        async with spool.follow(cursor, [self.run_id], ("stdout",)) as follower:
            while (event := await follower.next()) is not None:
                if isinstance(event, Output):
                    await _log(lines.taken(event.data))
                elif isinstance(event, (Ended, Lost)):
                    await _log(lines.rest())
                    return None if event.status is None else {**event.status.raw}
        why = "another process has collected it"
        raise NoRunError(f"unable to follow run {self.run_id!r}: {why}")

    async def _logged(self, count: int) -> None:
        """
        Wait until so many lines are in the log. They take their time through Airflow, and it closes
        the log when it learns of the end; what comes later goes into the triggerer's own log.
        """
        before, since = -1, time.monotonic()
        while (found := await asyncio.to_thread(lines_in_log, self.task_instance)) is not None:
            if found >= count or time.monotonic() - since > STUCK_S:
                return
            if found > before:
                before, since = found, time.monotonic()
            await asyncio.sleep(0.5)

    async def on_kill(self) -> None:
        """Stop the run, when a user ends or clears the task."""
        async with opened(self.spool, self.chaperone_conn_id) as spool:
            try:
                await spool[self.run_id].stop(wait=False, by=BY)
            except NoRunError as error:
                self.log.info("%s", error)


async def _log(lines: Iterator[str]) -> None:
    for number, line in enumerate(lines, 1):
        OUTPUT.info("%s", line)
        if number % PAUSE == 0:
            await asyncio.sleep(0)


class Lines:
    """
    The output of a run as lines for a log, the same whatever pieces it comes in.

    Args:
        skipped (int): How many lines are in the log already.

    Attributes:
        offset (int): How many bytes were taken.
        count (int): How many lines they made, with those in the log.
    """

    def __init__(self, skipped: int = 0) -> None:
        self.offset = 0
        self.count = 0
        self._skipped = skipped
        self._begun = b""

    def taken(self, data: bytes) -> Iterator[str]:
        """Take bytes; yield the lines that they end."""
        self.offset += len(data)
        *ended, self._begun = (self._begun + data).split(b"\n")
        for line in ended:
            yield from self._shown(line)
        while len(self._begun) > LONGEST:
            line, self._begun = self._begun[:LONGEST], self._begun[LONGEST:]
            yield from self._shown(line)

    def rest(self) -> Iterator[str]:
        """What is left behind the last newline, at the end."""
        line, self._begun = self._begun, b""
        if line:
            yield from self._shown(line)

    def _shown(self, line: bytes) -> Iterator[str]:
        for start in range(0, len(line) or 1, LONGEST):
            self.count += 1
            if self.count > self._skipped:
                yield line[start : start + LONGEST].decode(errors="backslashreplace")


def lines_in_log(ti: Any) -> int | None:
    """
    How many lines of output are in the log of a try of a task already.

    Args:
        ti: The task instance, as a trigger has it; None where a trigger runs without one.
    Returns:
        int: None if no log of a trigger is there.
    """
    if ti is None:
        return None
    name = log_filename_template_renderer()(ti=ti, try_number=ti.try_number)
    path = os.path.join(conf.get("logging", "base_log_folder"), name)
    found = glob.glob(f"{glob.escape(path)}.trigger.*.log")
    return sum(map(_lines_in, found)) if found else None


def _lines_in(path: str) -> int:
    # In a JSON string each quotation mark is escaped, so no output looks like this. A last line may
    # be cut short, by a SIGKILL.
    with open(path, "rb") as log:
        return sum(MARK in line and line.endswith(b"\n") for line in log)


@asynccontextmanager
async def opened(
    spool: str | None, chaperone_conn_id: str | None
) -> AsyncGenerator[aio.Spool, None]:
    """
    The spool of a task.

    Args:
        spool, chaperone_conn_id (str): As of `ChaperoneOperator`.
    Raises:
        SpecError: If the connection has neither a host nor a `spool` in its extra.
    """
    if chaperone_conn_id is None:
        yield aio.Spool(spool or "")
        return
    connection = await BaseHook.aget_connection(chaperone_conn_id)
    extra = connection.extra_dejson
    if not connection.host:
        if "spool" not in extra:
            what = f"connection {chaperone_conn_id!r}"
            raise SpecError(f"unable to use {what}: want a host, or `spool` in its extra")
        yield aio.Spool(extra["spool"], token_file=extra.get("token_file"), ca=extra.get("ca"))
        return
    host = connection.host.removeprefix("https://")
    port = f":{connection.port}" if connection.port else ""
    with tempfile.NamedTemporaryFile("w") as token:  # mode 0600
        token.write(f"{connection.password or ''}\n")
        token.flush()
        url = f"https://{host}{port}/{connection.schema}"
        yield aio.Spool(url, token_file=token.name, ca=extra.get("ca"))
