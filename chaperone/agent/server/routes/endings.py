"""
The routes of runs that have ended: collect, delete.

Knows: the calls of `api`.  Must not know: HTTP beyond a request and its answer.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any

from starlette.responses import Response

from ....errors import SpoolError
from ....model import checks
from ....model import spec as specs
from ....program.fds import owned
from ....spool import format, look
from ..application import Asked, Route
from ..exchange import LiveRunError, answer
from . import runs


def _keys(value: Any, path: str) -> dict[str, str | None]:
    if not isinstance(value, dict):
        checks.fail(path, "an object of keys", value)
    for run_id in value:  # each becomes a name in a directory
        if not specs.is_run_id(run_id):
            checks.fail(path, "run ids as its names", run_id)
    check = checks.OrNull(runs.key)
    return {run_id: check(key, checks.at(path, run_id)) for run_id, key in value.items()}


_COLLECT = checks.Fields({"runs": (_keys, checks.REQUIRED)}, "request")


async def collect(asked: Asked) -> Response:
    """Take ended runs out of .ended/: their endings are committed."""
    keys = _COLLECT(asked.json(), "")["runs"]
    collected, waiting = await asyncio.to_thread(_collect, asked.spool().path, keys)
    return answer({"collected": collected, "waiting": waiting})


def _collect(path: str, keys: dict[str, str | None]) -> tuple[list[str], list[str]]:
    collected: list[str] = []
    waiting: list[str] = []
    with owned(format.open_spool(path)) as spool_fd:
        for run_id, key in keys.items():
            is_same = key is None or look.key_of(spool_fd, run_id) in (key, None)
            if is_same:
                look.collect(spool_fd, run_id)
                # Once more: it may have moved there between the two looks.
                if format.where_entered(spool_fd, run_id) == format.ENDED:
                    look.collect(spool_fd, run_id)
            # A later run with this id is not theirs: what they ask for is done.
            is_there = is_same and format.where_entered(spool_fd, run_id) is not None
            (waiting if is_there else collected).append(run_id)
    return collected, waiting


async def delete(asked: Asked) -> Response:
    """Delete a run that has ended."""
    run = asked.run()
    runs.check_key(asked, run)
    try:
        async with asked.agent.alone(run.spool_path):
            await asyncio.to_thread(run.delete)
    except SpoolError as error:
        if error.errno == errno.EBUSY:
            raise LiveRunError(str(error), error.errno) from error
        raise
    return Response(status_code=204)


ROUTES = [
    Route(
        method="POST",
        path="/{spool}/collect",
        right="run",
        answer=collect,
        does="Take ended runs out of .ended/",
    ),
    Route(
        method="DELETE",
        path="/{spool}/runs/{run_id}",
        right="run",
        answer=delete,
        does="Delete a run that has ended",
    ),
]
