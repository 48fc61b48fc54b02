"""
The verbs that read what programs wrote: tail, follow.

Knows: what their words mean, where lines begin.  Must not know: a file name, how to follow.
"""

from __future__ import annotations

import os
import sys
import time

from ...model import status as statuses
from ...spool import format
from ..common import add_site_packages
from ..spools import end_of, opened
from ..verb import RUNS, SPOOL, Argument, NoInputError, UsageError, is_agents, spool_named, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from ..spools import AnyRun, AnySpool
    from ..terminal import Terminal
    from ..verb import Given

BLOCK = 16_384  # bytes that `tail` reads at once backwards: ten lines are seldom longer
READ_BYTES = 1 << 20
LINE_PAUSE_S = 0.005  # the line of a timeline is written some 2 ms after its bytes
UNTIMED = "-"


class _Source:
    """
    A run that is read, and how far.

    Attributes:
        ends (dict): Of each stream, up to which byte it was read.
    """

    def __init__(self, run: AnyRun, streams: Sequence[str]) -> None:
        self.status = run.look()
        self.run_id, self.key = run.run_id, run.key()
        names = dict.fromkeys((*format.STREAMS, *streams))
        self.ends = {stream: end_of(run, self.status, stream) for stream in names}


class _Printer:
    """
    Where streams are printed: one that was named on stdout, of both each on its own; with the name
    of its run before it where there are several, as tail(1) has it for files.

    Args:
        has_times (bool): Whether each line has the time of its first byte before it.
    """

    def __init__(
        self, terminal: Terminal, is_named: bool, are_several: bool, has_times: bool
    ) -> None:
        self._terminal, self._is_named, self._are_several = terminal, is_named, are_several
        self._has_times = has_times
        self._last: dict[int, str] = {}
        self._begun: set[tuple[str, str]] = set()  # streams in the middle of a line

    def print(self, run_id: str, stream: str, data: bytes, when: str = UNTIMED) -> None:
        if self._has_times and data:
            data = self._stamped((run_id, stream), data, f"{when} ".encode())
        fd = 2 if stream == "stderr" and not self._is_named else 1
        last = self._last.get(fd)
        if self._are_several and data and last != run_id:
            blank = "" if last is None else "\n"
            self._terminal.data(f"{blank}==> {run_id} <==\n".encode(), fd)
        self._last[fd] = run_id
        self._terminal.data(data, fd)

    def _stamped(self, of: tuple[str, str], data: bytes, stamp: bytes) -> bytes:
        before = b"" if of in self._begun else stamp
        lines = data.replace(b"\n", b"\n" + stamp)
        if data.endswith(b"\n"):
            self._begun.discard(of)
            return before + lines[: -len(stamp)]
        self._begun.add(of)
        return before + lines

    def note(self, run_id: str, sentence: str) -> None:
        self._terminal.note(f"run {run_id!r}: {sentence}" if self._are_several else sentence)


@verb(
    "print the last lines of the output of runs",
    Argument("runs", metavar="RUN", nargs="+", help=RUNS),
    Argument(
        "stream",
        metavar="STREAM",
        nargs="?",
        help="stdout, stderr or log; default: both stdout and stderr",
    ),
    Argument("-f", "--follow", action="store_true", help="go on until the runs have ended"),
    Argument(
        "-n",
        "--lines",
        metavar="N",
        default="10",
        help="how many lines, or all [10]",
    ),
    Argument(
        "--timestamps",
        action="store_true",
        help="begin each line with its time; for runs with output.timeline",
    ),
    SPOOL,
)
def tail(given: Given, terminal: Terminal) -> int:
    words, streams = given.runs, format.STREAMS
    is_named = len(words) > 1 and words[-1] in (*format.STREAMS, format.LOG)
    if is_named:
        words, streams = words[:-1], words[-1:]
    if given.follow and streams[0] == format.LOG:
        raise UsageError("unable to follow stream 'log': want stdout or stderr")
    if given.timestamps and streams[0] == format.LOG:
        raise UsageError(
            "unable to print the times of 'log': each of its lines begins with its time"
        )
    lines = _line_count(given.lines)
    sources = []
    with opened(given, terminal) as spool:
        run_ids = spool.meant(words)
        printer = _Printer(terminal, is_named, len(run_ids) > 1, given.timestamps)
        for run_id in run_ids if given.timestamps else ():
            _require_timeline(spool, run_id)
        for run_id in run_ids:
            with spool.run(run_id) as run:
                source = _Source(run, streams)
                if given.timestamps:
                    _print_last_pieces(printer, source, run, streams, lines)
                else:
                    for stream in streams:
                        _print_last_lines(printer, source, run, stream, lines)
                sources.append(source)
            if not given.follow:
                _note_gaps(printer, source.status, streams, source.ends)
        if given.follow:
            _follow(spool, terminal, printer, sources, streams)
    return os.EX_OK


def _line_count(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"unable to understand '--lines': want a number or all, got {text!r}")
    return int(text)


def _print_last_lines(
    printer: _Printer, source: _Source, run: AnyRun, stream: str, lines: int | None
) -> None:
    end = source.ends[stream]
    offset = 0 if lines is None else _start_of_lines(run, stream, end, lines)
    while offset < end and (data := run.read(stream, min(READ_BYTES, end - offset), offset)):
        printer.print(source.run_id, stream, data)
        offset += len(data)


def _require_timeline(spool: AnySpool, run_id: str) -> None:
    with spool.run(run_id) as run:
        if not run.has_timeline():
            why = "it has no timeline; its spec would need output.timeline"
            raise NoInputError(f"unable to print the times of run {run_id!r}: {why}")


def _print_last_pieces(
    printer: _Printer, source: _Source, run: AnyRun, streams: Sequence[str], lines: int | None
) -> None:
    """As `_print_last_lines`, of all streams in the order in which they came."""
    from ...spool.timeline import Timed, timestamp

    offsets = {}
    for stream in streams:
        end = source.ends[stream]
        offsets[stream] = 0 if lines is None else _start_of_lines(run, stream, end, lines)
    timed, is_over = Timed(), source.status["state"] in statuses.FINAL
    timeline = run.timeline()
    # A line is about few bytes, and an agent is asked by each read.
    blocks = dict.fromkeys(streams, (0, b""))
    while any(offsets[stream] < source.ends[stream] for stream in offsets):
        piece = timed.piece(timeline, offsets, source.ends.__getitem__, is_over)
        if piece is None:
            time.sleep(LINE_PAUSE_S)
            continue
        stream, end, ms = piece
        offset = offsets[stream]
        start, block = blocks[stream]
        if offset >= start + len(block):
            size = min(READ_BYTES, source.ends[stream] - offset)
            blocks[stream] = start, block = offset, run.read(stream, size, offset)
        data = block[offset - start : end - start]
        when = UNTIMED if ms is None else timestamp(ms)
        printer.print(source.run_id, stream, data, when)
        offsets[stream] = offset + len(data) if data else source.ends[stream]


def _start_of_lines(run: AnyRun, stream: str, end: int, lines: int) -> int:
    """
    Where the last lines begin, read backwards: a stream of many GB costs no more than its end.
    """
    if not lines:
        return end
    start = end
    while start > 0:
        size = min(BLOCK, start)
        start -= size
        block = run.read(stream, size, start)
        newline = len(block) - (start + size == end)  # the last byte ends a line, it begins none
        while (newline := block.rfind(b"\n", 0, newline)) >= 0:
            lines -= 1
            if not lines:
                return start + newline + 1
    return 0


def _follow(
    spool: AnySpool,
    terminal: Terminal,
    printer: _Printer,
    sources: list[_Source],
    streams: Sequence[str],
) -> None:
    """Print what comes after the ends that were seen, until all runs have ended."""
    add_site_packages(terminal)
    from ...follow.pieces import timestamp
    from ...model import cursor, events

    live = {source.run_id: source for source in sources}
    begin = cursor.of(
        {
            run_id: cursor.entry(source.key, source.ends["stdout"], source.ends["stderr"])
            for run_id, source in live.items()
        }
    )
    with spool.follow(begin, list(live), streams) as follower:
        for event in follower:
            ends = live[event.run_id].ends
            if isinstance(event, events.Output) and event.stream in streams:
                when = UNTIMED if event.time is None else timestamp(event.time)
                printer.print(event.run_id, event.stream, event.data, when)
                ends[event.stream] = event.offset + len(event.data)
            elif isinstance(event, events.Shrank) and event.stream in streams:
                printer.note(
                    event.run_id,
                    f"{event.stream} was truncated from {event.offset} to {event.size} bytes:"
                    " it is printed from its first byte again",
                )
            elif isinstance(event, (events.Ended, events.Lost)):
                if event.status is None:
                    terminal.note(f"run {event.run_id!r} was deleted before its end was read")
                else:
                    _note_gaps(printer, event.status.raw, streams, ends)
                del live[event.run_id]
                if not live:
                    return


def _note_gaps(
    printer: _Printer, found: Mapping[str, Any], streams: Sequence[str], sizes: dict[str, int]
) -> None:
    for stream in streams:
        if stream in format.STREAMS:
            for sentence in gaps(found, stream, sizes[stream]):
                printer.note(found["run_id"], sentence)


def gaps(found: Mapping[str, Any], stream: str, size: int) -> list[str]:
    """
    What is missing of a stream, as sentences.

    Args:
        found (dict): The status, as of a look just before the stream's end was read.
        size (int): Of the stream's file, in bytes.
    """
    sentences = []
    recorded, dropped = found[stream].get("bytes"), found[stream].get("dropped")
    if isinstance(recorded, int) and size < recorded:
        sentences.append(
            f"{stream} is {recorded - size} bytes shorter than it was:"
            " it was truncated after it was written"
        )
    if isinstance(dropped, int) and dropped:
        sentences.append(
            f"{dropped} bytes of {stream} were dropped:"
            " the limit was reached or the disk was full; the run's log says when"
        )
    end = f"the end of {stream} may be missing"
    if found["state"] == "lost":
        sentences.append(f"{end}: {(found['exception'] or {}).get('message')}")
    elif found["state"] == "terminated" and not found["complete"]:
        sentences.append(f"{end}: not all of its last bytes were received")
    return sentences


def _lines_of_stdin() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("ascii", "backslashreplace")


@verb(
    "print all events as lines of JSON, for programs in any language",
    Argument(
        "--cursor",
        metavar="FILE",
        help="go on from this file; read the number of each committed batch from stdin, and "
        "collect its ended runs",
    ),
    SPOOL,
)
def follow(given: Given, terminal: Terminal) -> int:
    add_site_packages(terminal)
    from ...follow.batches import Outbox, conversation

    # By bytes: an answer that is no number is refused in a sentence, in whatever encoding it is.
    answers = _lines_of_stdin() if given.cursor else None
    if given.cursor and sys.stdin is None:
        raise UsageError(
            "unable to follow with --cursor: want the number of each batch on stdin,"
            " which is closed"
        )
    named, follower = spool_named(given), None
    if is_agents(named):
        follower = opened(given, terminal).follow
    else:
        named = os.path.abspath(named)
    with Outbox(named, given.cursor, follow=follower) as outbox:
        for text in conversation(outbox, answers, (0, 1) if given.cursor else (1,)):
            terminal.data(text.encode())
    return os.EX_OK
