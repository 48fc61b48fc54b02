"""
The routes of streams: the bytes of a run, and the events of a spool as they come.

Knows: ranges, followers.  Must not know: how a stream is written.
A stream ends cleanly only where a local reader's would; anything that hinders it cuts it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from ....errors import SpecError
from ....follow.follower import Follower
from ....model import checks, events
from ....program.fds import owned
from ....spool import format
from ... import wire
from ..application import BIG_BODY, Asked, Route
from ..exchange import CutError, Exchange, RefusedError
from .runs import check_key

LOOK_S = 15.0  # between two looks at the token of a stream
# How long the lines of many programs are collected, so that they share a chunk: at 5,000 lines a
# second that halves the CPU of both ends. A line that comes alone is sent at once.
GATHER_S = 0.004
NAMES = (*format.STREAMS, format.LOG, format.TIMELINE)


class Stream(Response):
    """
    A response whose pieces are made when the client has taken the ones before.

    Args:
        pieces: Yields bytes; raises CutError where the answer must not look whole.
        follows (bool): Whether it waits for something, so that nothing is lost if it is cut.
    """

    def __init__(
        self, asked: Asked, pieces: AsyncIterator[bytes], follows: bool, **head: Any
    ) -> None:
        super().__init__(None, **head)
        if follows:  # no length
            self.raw_headers = [each for each in self.raw_headers if each[0] != b"content-length"]
        self._asked = asked
        self._pieces = pieces
        self._follows = follows

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange: Exchange = scope["chaperone"]
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(exchange.gone())
        connection = exchange.connection if self._follows else None
        self._asked.agent.streams += self._follows
        if connection is not None:
            connection.is_stream = True
        try:
            first = asyncio.FIRST_COMPLETED
            while not (await asyncio.wait([sending, leaving], timeout=LOOK_S, return_when=first))[
                0
            ]:
                exchange.authenticate()  # the token may have been revoked
            if not sending.done():
                raise CutError
            sending.result()
        finally:
            self._asked.agent.streams -= self._follows
            if connection is not None:
                connection.is_stream = False
            for task in (sending, leaving):
                task.cancel()
            await asyncio.wait([sending, leaving])
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Any) -> None:
        sent = -GATHER_S
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            before, sent = sent, time.monotonic()
            if self._follows and len(piece) < wire.PIECE and sent - before < 2 * GATHER_S:
                await asyncio.sleep(GATHER_S)


# -- the bytes of one run


async def stream(asked: Asked) -> Response:
    """The bytes of a stream, of a range of it, or as they come until the run has ended."""
    given = asked.query("follow")
    name = str(asked.request.path_params["stream"])
    run = asked.run()
    if name not in NAMES:
        want = "want stdout, stderr, log or timeline"
        raise RefusedError(404, f"unable to read stream {name!r}: {want}")
    follows = "follow" in given
    if follows and name not in format.STREAMS:
        raise SpecError(f"unable to follow stream {name!r}: want stdout or stderr")
    key = check_key(asked, run)
    size = _size(run, name)
    first, end, status = _range(asked.request.headers.get("range"), size, follows)
    headers = {"ETag": f'"{key}"', "Accept-Ranges": "bytes"}
    if status == 416:
        got = asked.request.headers["range"]
        want = f"want a range within its {size} bytes, got {got!r}"
        sentence = f"unable to read {name} of run {run.run_id!r}: {want}"
        error = RefusedError(416, sentence)
        error.headers["Content-Range"] = f"bytes */{size}"
        raise error
    if status == 206 and not follows:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    elif status == 206:
        headers["Content-Range"] = f"bytes {first}-{max(size - 1, first)}/*"
    if not follows:
        headers["Content-Length"] = str(end - first)
    pieces = _followed(run, name, first) if follows else _read(run, name, first, end)
    return Stream(
        asked,
        pieces,
        follows,
        status_code=status,
        headers=headers,
        media_type="application/octet-stream",
    )


def _size(run: Any, name: str) -> int:
    if name != format.TIMELINE:
        return int(run.size(name))
    with owned(format.open_spool(run.spool_path)) as spool_fd:
        with owned(format.open_run(spool_fd, run.run_id)) as run_fd:
            found = format.found(run_fd, name)
    if found is None:
        raise RefusedError(404, f"unable to read the timeline of run {run.run_id!r}: it has none")
    return found.st_size


def _range(text: str | None, size: int, follows: bool) -> tuple[int, int, int]:
    """
    The first byte, the one behind the last, and the status of a `Range`.

    Source: RFC 9110, 14.1.2: a range that can't be understood is ignored; of several, and of the
    last N bytes, none is understood here.
    """
    unit, _, numbers = (text or "").partition("=")
    first, dash, last = numbers.strip().partition("-")
    is_one = unit == "bytes" and dash and numbers.isascii() and len(numbers) <= 40
    is_one = is_one and first.isdigit() and (not last or last.isdigit())
    if not is_one or (last and int(last) < int(first)):
        return 0, size, 200
    begin = int(first)
    # Nothing is there yet behind the end of a stream that goes on.
    if begin > size or (begin == size and not follows):
        return 0, 0, 416
    return begin, min(int(last) + 1, size) if last else size, 206


async def _read(run: Any, name: str, first: int, end: int) -> AsyncIterator[bytes]:
    """The bytes between two offsets, from one open file: a later run's are never among them."""
    with owned(format.open_spool(run.spool_path)) as spool_fd:
        with owned(format.open_run(spool_fd, run.run_id)) as run_fd:
            if first == end:
                return
            fd = format.open_plain(run_fd, name)
    with owned(fd):
        while first < end:
            data = os.pread(fd, min(end - first, wire.PIECE), first)
            if not data:  # it was truncated
                raise CutError
            yield data
            first += len(data)


async def _followed(run: Any, name: str, first: int) -> AsyncIterator[bytes]:
    cursor = run.cursor(**{name: first})
    with Follower(run.spool_path, cursor, [run.run_id], [name], shared=True) as follower:
        follower.chunk = wire.PIECE
        while (event := await follower.anext()) is not None:
            if isinstance(event, events.Output):
                yield event.data
            elif isinstance(event, events.Shrank) or (
                isinstance(event, events.Ended) and event.status is None
            ):
                raise CutError  # these bytes are not what follows those


# -- the events of a spool


def _strings(value: Any, path: str) -> list[object]:
    return checks.ListOf(checks.string)(value, path)


_EVENTS = checks.Fields(
    {
        "cursor": (lambda value, path: value, None),
        "runs": (checks.OrNull(_strings), None),
        "streams": (_strings, list(format.STREAMS)),
    },
    "request",
)


async def followed(asked: Asked) -> Response:
    """Each event as a line, from the cursor on."""
    given = _EVENTS(asked.json(), "")
    path = asked.spool().path
    follower = Follower(path, given["cursor"], given["runs"], given["streams"], shared=True)
    return Stream(asked, _lines(follower), True, media_type=wire.EVENTS)


async def _lines(follower: Follower) -> AsyncIterator[bytes]:
    follower.chunk = wire.PIECE
    with follower:
        while True:
            event = await follower.anext(wire.PING_S)
            if event is None and follower.is_over():
                return
            lines, size = [], 0
            while event is not None:
                lines.append(wire.event_text(event))
                size += len(lines[-1])
                event = None if size >= wire.PIECE else await follower.anext(0)
            yield "\n".join([*lines, ""]).encode("ascii") or b"\n"


ROUTES = [
    Route(
        method="GET",
        path="/{spool}/runs/{run_id}/{stream}",
        right="look",
        answer=stream,
        does="The bytes of stdout, stderr, log or timeline; with `follow` until the run has ended",
    ),
    Route(
        method="POST",
        path="/{spool}/events",
        right="look",
        answer=followed,
        does="The events of runs, as they come, a line each",
        most=BIG_BODY,
    ),
]
