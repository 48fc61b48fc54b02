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
from ...program.fds import owned
from ...spool import format, look
from .. import tables
from ..common import add_site_packages, age_s, found_id
from ..terminal import indented
from ..verb import A_RUN, SPOOL, Argument, UsageError, spool_path, verb
from .read import end_of, gaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

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

    def __init__(self, run_fd: int, asked: _Asked, is_proven: bool) -> None:
        _, self.status = look.look(run_fd, asked.run_id)
        final = self.status["state"] in statuses.FINAL
        # A dead chaperone's guard may still write what the pipes held, until the loss is proven.
        settled = final and (is_proven or self.status["end_time"] is not None)
        self.end = end_of(run_fd, self.status, asked.stream)
        self.data = _read(run_fd, asked, self.end, may_grow=not settled)
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
    path = os.path.abspath(spool_path(given))
    with owned(format.open_spool(path)) as spool_fd:
        asked.run_id = found_id(spool_fd, given.run)
        with owned(format.open_run(spool_fd, asked.run_id)) as run_fd:
            piece = _Piece(run_fd, asked, is_proven=False)
            is_lost = piece.status["state"] == "lost" and not piece.has_ended  # to be proven
            if is_lost or (wait_s and not piece.is_news()):
                add_site_packages(terminal)
                wait_s = 0.0 if piece.is_news() else wait_s
                piece = _waited(path, run_fd, asked, piece, time.monotonic() + (wait_s or 0.0))
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


def _waited(path: str, run_fd: int, asked: _Asked, piece: _Piece, deadline: float) -> _Piece:
    """The piece as soon as there is news, or as it is at the deadline (monotonic, seconds)."""
    from ...follow.follower import Follower
    from ...model import cursor, events

    # From what was read on, even beyond it: the follower reports each byte that comes after it.
    entry = {**cursor.entry(look.key_in(run_fd)), asked.stream: piece.end}
    streams = [stream for stream in format.STREAMS if stream == asked.stream]
    begin = cursor.of({asked.run_id: entry})
    with Follower(path, begin, [asked.run_id], streams) as follower:
        while True:
            event = follower.next(max(0.0, deadline - time.monotonic()))
            is_over = isinstance(event, (events.Ended, events.Lost))
            if isinstance(event, events.Ended) and event.status is None:
                raise NoRunError(f"unable to read run {asked.run_id!r}: it was deleted")
            piece = _Piece(run_fd, asked, is_proven=is_over)
            if event is None or piece.is_news():
                return piece


def _read(run_fd: int, asked: _Asked, end: int, may_grow: bool) -> bytes:
    """
    The bytes of the part that are there, up to the last whole character.

    A part smaller than a character has it all. The beginning of a character that may still be
    completed is left for later; at the end of a stream it comes by itself.
    """
    try:
        stream_fd = look.open_stream(run_fd, asked.stream)
    except FileNotFoundError:  # an empty log goes when the run ends
        return b""
    with owned(stream_fd) as fd:
        room = max(0, end - asked.offset)
        data = os.pread(fd, min(asked.size, room), asked.offset)
        while (begun := pieces.incomplete(data)) == len(data) < min(room, pieces.TAIL + 1):
            longer = os.pread(fd, len(data) + 1, asked.offset)
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
