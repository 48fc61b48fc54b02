"""
What each verb does, but `run`: a generator of (fd, bytes) to be written, that returns the exit
code.

Knows: what the verbs' words ask for.  Must not know: who writes what it yields, or a file name.
"""

from __future__ import annotations

import os
import pwd
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import NoRunError, SpoolError, TransitionError
from ...model import jsontext
from ...model import status as statuses
from ...spool import format, look
from .. import terminal
from ..main import add_site_packages, found_id, read_spec, spool_path
from ..parser import UsageError
from . import upkeep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...api import Run

Given = Any  # argparse.Namespace
Steps = Generator[tuple[int, bytes], None, int]
Status = dict[str, Any]

BLOCK = 16_384  # bytes that `tail` reads at once backwards: ten lines are seldom longer
READ_BYTES = 1 << 20


def _line(text: str) -> tuple[int, bytes]:
    return 1, f"{text}\n".encode("utf-8", "backslashreplace")


def _note(sentence: str) -> tuple[int, bytes]:
    return 2, f"chaperone: {terminal.escaped(sentence)}\n".encode()


# -- finding runs


@contextmanager
def _opened_spool(given: Given) -> Iterator[int]:
    fd = format.open_spool(spool_path(given.spool))
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened_run(spool_fd: int, run_id: str) -> Iterator[int]:
    fd = format.open_run(spool_fd, run_id)
    try:
        yield fd
    finally:
        os.close(fd)


def _look(spool_fd: int, run_id: str) -> Status:
    """A run's status, its streams as long as they are now where nobody has recorded their end."""
    with _opened_run(spool_fd, run_id) as run_fd:
        _, status = look.look(run_fd, run_id)
        if status["state"] not in statuses.FINAL or status["end_time"] is None:
            for stream in format.STREAMS:
                size = _size(run_fd, stream)
                if size is not None:
                    status[stream] = {**status[stream], "bytes": size}
    return status


def _size(run_fd: int, stream: str) -> int | None:
    try:
        fd = look.open_stream(run_fd, stream)
    except (OSError, SpoolError):
        return None
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


# -- looking


def ls(given: Given) -> Steps:
    with _opened_spool(given) as spool_fd:
        wanted = (
            format.all_ids(spool_fd)
            if given.all
            else sorted({*format.live_ids(spool_fd), *format.ended_ids(spool_fd)})
        )
        found, unread = [], []
        for run_id in wanted:
            try:
                found.append(_look(spool_fd, run_id))
            except NoRunError:  # about to appear, or gone since
                continue
            except SpoolError as error:  # that says nothing of the others
                unread.append(f"unable to look into run {run_id!r}: {error}")
    found.sort(key=lambda status: (str(status["create_time"]), status["run_id"]))
    if given.json:
        for status in found:
            yield _line(jsontext.dumps(status))
    else:
        yield (
            1,
            terminal.table(found, time.time(), terminal.width_of(1), terminal.may_colour(1)).encode(
                "utf-8", "backslashreplace"
            ),
        )
    for sentence in unread:
        yield _note(sentence)
    return os.EX_IOERR if unread else os.EX_OK


def status(given: Given) -> Steps:
    with _opened_spool(given) as spool_fd:
        found = _look(spool_fd, found_id(spool_fd, given.run))
    yield _line(terminal.status_json(found) if os.isatty(1) else jsontext.dumps(found))
    return os.EX_OK


# -- asking


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's uid without a name
        return str(os.geteuid())


def run_ids(given: Given, texts: list[str]) -> list[str]:
    """The runs that words mean, each once."""
    with _opened_spool(given) as spool_fd:
        return list(dict.fromkeys(found_id(spool_fd, text) for text in texts))


def _runs(given: Given, texts: list[str]) -> list[Run]:
    named = run_ids(given, texts)
    add_site_packages()
    from ...api import Run

    return [Run(os.path.abspath(spool_path(given.spool)), run_id) for run_id in named]


def _by(given: Given) -> str:
    """Who asks, as the status will tell."""
    return _user_name() if given.by is None else str(given.by)


def stop(given: Given) -> Steps:
    return (yield from _ended(given, lambda run: run.stop(given.grace, wait=False, by=_by(given))))


def kill(given: Given) -> Steps:
    return (yield from _ended(given, lambda run: run.kill(wait=False, by=_by(given))))


def _ended(given: Given, ask: Callable[[Run], object]) -> Steps:
    """
    All are asked before the first is waited for: their graces run at the same time, and one that
    can't be asked keeps no other alive.
    """
    asked, code = [], os.EX_OK
    for run in _runs(given, given.runs):
        try:
            ask(run)
            asked.append(run)
        except NoRunError as error:
            code = code or os.EX_NOINPUT
            yield _note(str(error))
        except SpoolError as error:
            code = code or os.EX_IOERR
            yield _note(f"unable to ask run {run.run_id!r}: {error}")
    for run in [] if given.no_wait else asked:
        final = run.wait()
        if final is not None and final.state == "lost":
            yield _note(f"run {run.run_id!r} is lost: {_message(final.raw)}")
    return code


def signal(given: Given) -> Steps:
    (run,) = _runs(given, [given.run])
    run.signal(given.signal, _by(given))
    return os.EX_OK
    yield  # a generator like every verb, though there is nothing to tell


# -- waiting


def wait(given: Given) -> Steps:
    worst = os.EX_OK
    for run in _runs(given, given.runs):
        final = run.wait()
        assert final is not None, "without a timeout there is an end"
        if final.state != "terminated":
            yield _note(
                f"run {run.run_id!r} is {'lost' if final.state == 'lost' else 'in error'}: {_message(final.raw)}"
            )
        worst = max(worst, final.exit_code)
    return worst


def _message(status: Status) -> str:
    return str((status["exception"] or {}).get("message"))


# -- a program without a spool


def exec_(given: Given) -> Steps:
    from ...hold import begin, direct

    text = read_spec(given.spec)
    spec = begin.canonical_spec(given.spec, text, os.getcwd())
    inherited = begin.shed_inherited_state()
    run_id = spec["id"] or begin.new_id()
    spec = {**spec, "id": run_id}
    run = direct.DirectRun(run_id, os.urandom(16).hex())
    status = statuses.starting(spec, os.getpid(), os.uname().nodename, None, time.time_ns())
    begin.hold(run, spec, status, inherited)
    final = run.final
    if final is None:
        raise TransitionError("unable to tell how the program ended: nothing was recorded")
    if final["state"] != "terminated":
        yield _note(_message(final))
    return statuses.exit_code(final)


def check(given: Given) -> Steps:
    from ...farside import payload
    from ...hold import begin

    spec = begin.canonical_spec(given.spec, read_spec(given.spec), os.getcwd())
    remote = spec["remote"]
    if given.far_side:
        if remote is None and spec["on_disconnect"] == "kill":
            raise UsageError(
                "unable to show the far side's text: the program runs here, as a child of its chaperone"
            )
        if remote is not None and not remote["supervise"]:
            raise UsageError(
                "unable to show the far side's text: there is none where remote.supervise is false"
            )
        yield 1, _far_text(spec)
    else:
        far_argv = (
            list(payload.CONSTANT)
            if remote is None or remote["supervise"]
            else spec["program"]["argv"]
        )
        yield 1, terminal.plan(spec, _user_name(), far_argv).encode("utf-8", "backslashreplace")
    return os.EX_OK


def _far_text(spec: dict[str, Any]) -> bytes:
    """
    What is sent over the connection, but for what is random or secret; on a terminal nothing that
    could move its cursor.
    """
    from ...farside import payload

    umask = os.umask(0)
    os.umask(umask)
    text = payload.shown(spec, umask)
    if not os.isatty(1):
        return text
    return "\n".join(
        terminal.escaped(line.expandtabs())
        for line in text.decode("utf-8", "surrogateescape").split("\n")
    ).encode()


# -- reading


def tail(given: Given) -> Steps:
    streams = (given.stream,) if given.stream else format.STREAMS
    if streams[0] not in (*format.STREAMS, *([] if given.follow else [format.LOG])):
        raise UsageError(
            f"unable to understand {streams[0]!r}: want {'stdout or stderr' if given.follow else 'stdout, stderr or log'}"
        )
    if given.lines != "all" and not (given.lines.isascii() and given.lines.isdigit()):
        raise UsageError(
            f"unable to understand '--lines': want a number or all, got {given.lines!r}"
        )
    lines = None if given.lines == "all" else int(given.lines)
    with _opened_spool(given) as spool_fd:
        run_id = found_id(spool_fd, given.run)
        with _opened_run(spool_fd, run_id) as run_fd:
            _, status = look.look(run_fd, run_id)
            ends = {stream: _end(run_fd, status, stream) for stream in (*format.STREAMS, *streams)}
            for stream in streams:
                yield from _last_lines(run_fd, stream, ends[stream], lines, _target(given, stream))
            key = str(look.read_spec(run_fd).get("key"))
            if not given.follow:
                yield from _gaps(status, streams, ends)
    if given.follow:
        yield from _followed(given, run_id, key, ends, streams)
    return os.EX_OK


def _target(given: Given, stream: str) -> int:
    """Where a stream goes: the one that was asked for to stdout, of both each to its own."""
    return 2 if stream == "stderr" and not given.stream else 1


def _end(run_fd: int, status: Status, stream: str) -> int:
    """
    How far a reader goes: to the length that a final status tells, for what was left running may
    still write.
    """
    size = _size(run_fd, stream) or 0
    recorded = status.get(stream, {}).get("bytes")
    final = status["state"] in statuses.FINAL and status["end_time"] is not None
    return min(size, recorded) if final and isinstance(recorded, int) else size


def _last_lines(
    run_fd: int, stream: str, end: int, lines: int | None, target: int
) -> Iterator[tuple[int, bytes]]:
    try:
        fd = look.open_stream(run_fd, stream)
    except FileNotFoundError:
        return
    try:
        offset = 0 if lines is None else _start_of_lines(fd, end, lines)
        while offset < end and (data := os.pread(fd, min(READ_BYTES, end - offset), offset)):
            yield target, data
            offset += len(data)
    finally:
        os.close(fd)


def _start_of_lines(fd: int, end: int, lines: int) -> int:
    """
    Where the last lines begin, read backwards: a stream of many GB costs no more than its end.
    """
    if not lines:
        return end
    start = end
    while start > 0:
        size = min(BLOCK, start)
        start -= size
        block = os.pread(fd, size, start)
        newline = len(block) - (start + size == end)  # the last byte ends a line, it begins none
        while (newline := block.rfind(b"\n", 0, newline)) >= 0:
            lines -= 1
            if not lines:
                return start + newline + 1
    return 0


def _gaps(
    status: Status, streams: tuple[str, ...], sizes: dict[str, int]
) -> Iterator[tuple[int, bytes]]:
    for stream in streams:
        if stream in format.STREAMS:
            for sentence in terminal.gaps(status, stream, sizes[stream]):
                yield _note(sentence)


def _followed(
    given: Given, run_id: str, key: str, ends: dict[str, int], streams: tuple[str, ...]
) -> Iterator[tuple[int, bytes]]:
    """What comes after the ends that were seen, until the run has ended."""
    add_site_packages()
    from ...follow.follower import Follower
    from ...model import cursor, events

    sizes = dict(ends)
    begin = cursor.of({run_id: cursor.entry(key, ends["stdout"], ends["stderr"])})
    with Follower(os.path.abspath(spool_path(given.spool)), begin, [run_id], streams) as follower:
        for event in follower:
            if isinstance(event, events.Output) and event.stream in streams:
                yield _target(given, event.stream), event.data
                sizes[event.stream] = event.offset + len(event.data)
            elif isinstance(event, events.Shrank) and event.stream in streams:
                yield _note(
                    f"{event.stream} was cut from {event.offset} to {event.size} bytes: what follows begins at its first byte again"
                )
            elif isinstance(event, (events.Ended, events.Lost)):
                if event.status is None:
                    yield _note(f"run {run_id!r} was deleted before its end was read")
                else:
                    yield from _gaps(event.status.raw, streams, sizes)
                return


def follow(given: Given) -> Steps:
    add_site_packages()
    from ...follow.batches import Outbox, conversation

    answers = sys.stdin if given.cursor else None
    if given.cursor and sys.stdin is None:
        raise UsageError(
            "unable to follow: stdin is closed, and with --cursor each batch is answered there"
        )
    with Outbox(os.path.abspath(spool_path(given.spool)), given.cursor) as outbox:
        for text in conversation(outbox, answers, (0, 1) if given.cursor else (1,)):
            yield 1, text.encode()
    return os.EX_OK


CALLS: dict[str, Callable[[Given], Steps]] = {
    "exec": exec_,
    "check": check,
    "ls": ls,
    "status": status,
    "tail": tail,
    "wait": wait,
    "stop": stop,
    "signal": signal,
    "kill": kill,
    "follow": follow,
    "reap": upkeep.reap,
    "gc": upkeep.gc,
    "doctor": upkeep.doctor,
    "completion": upkeep.completion,
}
