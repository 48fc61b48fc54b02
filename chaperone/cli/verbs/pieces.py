"""
The verb that reads output in parts, for a caller that asks again and again: read.

Knows: what its words mean, when a stream has no more bytes.  Must not know: a file name, how to
follow.
"""

from __future__ import annotations

import os
import time

from ...errors import NoRunError
from ...follow import pieces
from ...model import jsontext
from ...model import status as statuses
from ...model.cursor import LARGEST_OFFSET
from ...spool import format
from .. import tables
from ..common import age_s
from ..spools import end_of, opened
from ..terminal import indented
from ..verb import A_RUN, SPOOL, Argument, UsageError, verb
from .read import gaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..spools import AnyRun, AnySpool
    from ..terminal import Terminal
    from ..verb import Given

USUAL_BYTES = 65_536  # some pages of output, and the size of a pipe
MOST_BYTES = 1 << 20  # as of an `Output` event: a caller reads again where there is more


class _Asked:
    """Which part of which stream the caller wants."""

    def __init__(self, given: Given) -> None:
        self.run_id, self.stream = "", given.stream
        if self.stream not in (*format.STREAMS, format.LOG):
            raise UsageError(f"unable to understand {self.stream!r}: want stdout, stderr or log")
        self.offset = _count("--offset", given.offset, 0)
        self.size = min(_count("--bytes", given.bytes, 1), MOST_BYTES)


class _Piece:
    """
    The bytes that exist of that part now.

    Attributes:
        status (dict): The status just before the stream was read.
        end (int): How many bytes the stream had.
        data (bytes): The bytes from the offset on.
        has_ended (bool): Whether no bytes can follow after `data`.
    """

    def __init__(self, run: AnyRun, asked: _Asked, is_proven: bool) -> None:
        self.status = run.look()
        final = self.status["state"] in statuses.FINAL
        # A dead chaperone's guard may still write what the pipes held, until the loss is proven.
        settled = final and (is_proven or self.status["end_time"] is not None)
        self.end = end_of(run, self.status, asked.stream)
        self.data = _read(run, asked, self.end, may_grow=not settled)
        self.has_ended = settled and asked.offset + len(self.data) >= self.end

    def is_news(self) -> bool:
        return bool(self.data) or self.has_ended


@verb(
    "print a part of a run's output and the next offset, as JSON",
    Argument("run", metavar="RUN", help=A_RUN),
    Argument(
        "stream",
        metavar="STREAM",
        nargs="?",
        default="stdout",
        help="stdout, stderr or log [stdout]",
    ),
    Argument("--offset", metavar="N", default="0", help="the offset of the first byte [0]"),
    Argument(
        "--bytes",
        metavar="N",
        default=str(USUAL_BYTES),
        help=f"how many bytes at most [{USUAL_BYTES}]; never more than {MOST_BYTES}",
    ),
    Argument(
        "--wait",
        metavar="AGE",
        help="wait up to this time for more bytes, or for the end of the run: 30s, 5m",
    ),
    SPOOL,
)
def read(given: Given, terminal: Terminal) -> int:
    asked = _Asked(given)
    wait_s = age_s("--wait", given.wait)
    if wait_s is not None and given.stream == format.LOG:
        raise UsageError("unable to understand 'log' with --wait: want stdout or stderr")
    with opened(given, terminal) as spool:
        (asked.run_id,) = spool.meant([given.run])
        with spool.run(asked.run_id) as run:
            piece = _Piece(run, asked, is_proven=False)
            is_lost = piece.status["state"] == "lost" and not piece.has_ended  # to be proven
            if is_lost or (wait_s and not piece.is_news()):
                wait_s = 0.0 if piece.is_news() else wait_s
                deadline = time.monotonic() + (wait_s or 0.0)
                piece = _waited(spool, run, asked, piece, deadline)
    shown = _as_json(asked, piece)
    terminal.text(f"{indented(shown) if terminal.is_terminal() else jsontext.dumps(shown)}\n")
    if piece.has_ended and asked.stream in format.STREAMS:
        for sentence in gaps(piece.status, asked.stream, piece.end):
            terminal.note(sentence)
    return os.EX_OK


def _count(option: str, text: str, least: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not least <= number <= LARGEST_OFFSET:
        want = f"a whole number of at least {least}"
        raise UsageError(f"unable to understand {option!r}: want {want}, got {text!r}")
    return number


def _waited(spool: AnySpool, run: AnyRun, asked: _Asked, piece: _Piece, deadline: float) -> _Piece:
    """The piece as soon as there is news, or as it is at the deadline (monotonic, seconds)."""
    from ...model import cursor

    # From what was read on, even beyond it: the follower reports each byte that comes after it.
    entry = {**cursor.entry(run.key()), asked.stream: piece.end}
    streams = [stream for stream in format.STREAMS if stream == asked.stream]
    begin = cursor.of({asked.run_id: entry})
    with spool.follow(begin, [asked.run_id], streams) as follower:
        from ...model import events

        while True:
            event = follower.next(max(0.0, deadline - time.monotonic()))
            is_over = isinstance(event, (events.Ended, events.Lost))
            if isinstance(event, events.Ended) and event.status is None:
                raise NoRunError(f"unable to read run {asked.run_id!r}: it was deleted")
            piece = _Piece(run, asked, is_proven=is_over)
            if event is None or piece.is_news():
                return piece


def _read(run: AnyRun, asked: _Asked, end: int, may_grow: bool) -> bytes:
    """
    The bytes of the part that are there, up to the last whole character.

    A part smaller than a character has it all. The beginning of a character that may still be
    completed is left for later; at the end of a stream it comes by itself.
    """
    room = max(0, end - asked.offset)
    data = run.read(asked.stream, min(asked.size, room), asked.offset)
    while (begun := pieces.incomplete(data)) == len(data) < min(room, pieces.TAIL + 1):
        longer = run.read(asked.stream, len(data) + 1, asked.offset)
        if not data or len(longer) == len(data):  # the file was cut meanwhile
            break
        data = longer
    if begun < len(data):
        return data[: len(data) - begun]
    return b"" if may_grow else data


def _as_json(asked: _Asked, piece: _Piece) -> dict[str, object]:
    status: dict[str, Any] = piece.status
    outcome = tables.outcome(status) if status["state"] in statuses.FINAL else "-"
    return {
        "run_id": asked.run_id,
        "stream": asked.stream,
        "offset": asked.offset,
        "next": asked.offset + len(piece.data),
        "state": status["state"],
        "outcome": None if outcome.startswith("-") else outcome,
        "ended": piece.has_ended,
        **pieces.fields(piece.data),
    }
