"""
Events as JSON lines, in batches that a consumer in any language can take exactly once.

Knows: how events are written as text, the cursor file.  Must not know: where the lines go, or what
is done with them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import SpecError, SpoolError, UnreadableRunError
from ..model import checks, jsontext
from ..model import cursor as cursors
from ..model.events import Changed, Ended, Event, Lost, Output, Shrank, Started
from ..program.fds import owned
from ..spool.format import FILE, STREAMS, failure
from . import pieces
from .follower import Follower

if TYPE_CHECKING:
    from datetime import datetime

    import filelock

# A backlog fills each batch: the next one may be twice as big, because each costs two fsyncs.
BATCH_EVENTS, MOST_EVENTS = 256, 1024
BATCH_BYTES = 1024 * 1024  # of output: a batch is written to the cursor file too
PATIENCE_S = 1.0  # a process that was killed together with its consumer takes a moment to be gone
_quoted = json.encoder.encode_basestring_ascii
DIGITS = 19  # of a batch's number, at most 2**63 - 1


class Outbox:
    """
    A spool's events in batches of lines; the next batch is made when the one before it was
    acknowledged.

    A batch is stored in the cursor file, with its number, before it is returned. After a restart of
    either side, a batch that was not acknowledged comes again, identical. So a consumer that
    commits the number of a batch together with its own data takes each batch once.

    Args:
        spool_path (str): The spool's.
        path (str): The cursor file; made if it is missing, used by one outbox at a time (by a lock
            on `PATH.lock`). None: a batch counts as acknowledged when it is returned.
        begin (dict): The cursor to begin with if there is no such file yet.
        follow: Makes the follower of a cursor; None for one of a directory of this host.

    Attributes:
        number (int): Of the last batch that was returned; 0 before the first.
    Raises:
        SpecError: If the file is not a cursor file.
        SpoolError: If another outbox uses it, it can't be read, or the spool can't be followed.
    """

    def __init__(
        self,
        spool_path: str | os.PathLike[str],
        path: str | None = None,
        begin: object = None,
        follow: Callable[[object], Any] | None = None,
    ) -> None:
        self._path = path
        self._follow = follow or (lambda cursor: Follower(spool_path, cursor))
        with contextlib.ExitStack() as stack:
            if path is not None:
                stack.callback(_lock(path).release)
            self._begin(begin)
            stack.callback(self._follower.close)
            self._open = stack.pop_all()

    def _begin(self, begin: object) -> None:
        path = self._path
        kept = _kept(path) if path is not None else None
        self.number: int = kept["batch"] if kept else 0
        self._unacknowledged: list[str] = kept["lines"] if kept else []
        self._again = bool(self._unacknowledged)
        again = map(json.loads, self._unacknowledged)
        # Of the batch that is made or waits: what to collect when it is acknowledged.
        self._endings = [line["run_id"] for line in again if line["event"] in ("ended", "lost")]
        self._made: list[str] = []
        self._most_events = BATCH_EVENTS
        self._tails: dict[tuple[str, str], bytes] = {}
        self._follower = self._follow(kept["cursor"] if kept else begin)

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def fileno(self) -> int:
        """An fd that is readable whenever a batch may be ready."""
        return self._follower.fileno()

    def batch(self, timeout: float | None = None) -> list[str] | None:
        """
        The next batch.

        Args:
            timeout (float): Seconds to wait for an event; None waits as long as it takes.
        Returns:
            list: Lines of JSON without newlines, the last one `{"event": "batch", "batch":
                NUMBER}`; None when the time is over.
        Raises:
            SpecError: If the last one was not acknowledged.
            SpoolError: If the cursor file can't be written, or the spool can't be read: no batch is
                lost, and the next call goes on.
        """
        if self._again:
            self._again = False
            return self._unacknowledged
        if self._unacknowledged:
            raise SpecError(
                f"unable to make the next batch: batch {self.number} was not acknowledged"
            )
        if not self._made and not self._make(timeout):
            return None
        lines = [*self._made, f'{{"event": "batch", "batch": {self.number + 1}}}']
        self._keep(self.number + 1, lines)
        self._made = []
        self.number += 1
        self._unacknowledged = lines
        if self._path is None:
            self.acknowledge(self.number)
        return lines

    def _make(self, timeout: float | None) -> bool:
        """
        Take events until they fill a batch. The follower returns each event once, so `_made` keeps
        them until the batch is returned.
        """
        room = BATCH_BYTES
        most = self._most_events
        while not self._made:
            event = self._next(timeout)
            if event is None:
                return False
            while event is not None:
                self._made += self._written(event)
                room -= len(event.data) if isinstance(event, Output) else 0
                try:
                    event = self._next(0) if len(self._made) < most and room > 0 else None
                except SpoolError:
                    if not self._made:
                        raise
                    # Return what we have first: it may be the ending of a run whose spool is gone.
                    # The error comes again.
                    break
        is_full = len(self._made) >= most
        self._most_events = min(2 * most, MOST_EVENTS) if is_full else BATCH_EVENTS
        return True

    def _next(self, timeout: float | None) -> Event | None:
        """The next event; warn about a run that can't be read, and go on with the others."""
        while True:
            try:
                event: Event | None = self._follower.next(timeout)
                return event
            except UnreadableRunError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def acknowledge(self, number: int) -> None:
        """
        Accept the number of the batch that the consumer committed; collect its ended runs.

        Raises:
            SpecError: If it is not the number of the last batch.
        """
        if number != self.number or not self._unacknowledged:
            want = (
                f"want batch {self.number}"
                if self._unacknowledged
                else "no batch waits to be acknowledged"
            )
            raise SpecError(f"unable to acknowledge batch {number}: {want}")
        # The file keeps it until the next batch: printing a committed batch again does no harm.
        if self._path is not None:
            for run_id in self._endings:
                if self._follower.is_uncollected(run_id):
                    self._follower.collect(run_id)
        self._unacknowledged, self._endings = [], []

    def _written(self, event: Event) -> list[str]:
        """
        An event as lines. If output ends inside a character, its first bytes wait for the rest.
        """
        if isinstance(event, Output):
            tail = self._tails.pop((event.run_id, event.stream), b"")
            data = tail + event.data
            whole = len(data) - pieces.incomplete(data)
            if whole < len(data):
                self._tails[event.run_id, event.stream] = data[whole:]
            if not whole:
                return []
            offset = event.offset - len(tail)
            return [output_line(event.run_id, event.stream, offset, data[:whole], event.time)]
        if isinstance(event, (Ended, Lost)):
            self._endings.append(event.run_id)
        return [*self._left_of(event), event_line(event)]

    def _left_of(self, event: Event) -> Iterator[str]:
        """The first bytes of characters whose rest will not come after this event, as lines."""
        if not self._tails or isinstance(event, Changed):
            return
        entry = self._follower.entry(event.run_id) or {}
        for stream in (event.stream,) if isinstance(event, Shrank) else STREAMS:
            if tail := self._tails.pop((event.run_id, stream), b""):
                offset = event.offset if isinstance(event, Shrank) else entry.get(stream, 0)
                yield output_line(event.run_id, stream, offset - len(tail), tail)

    def _keep(self, number: int, lines: list[str]) -> None:
        """
        Replace the cursor file. It is on the disk before any consumer can acknowledge the batch.
        """
        if self._path is None:
            return
        cursor = self._follower.cursor
        for (run_id, stream), tail in self._tails.items():
            cursor["runs"][run_id][stream] -= len(tail)
        building = f"{self._path}.new"
        try:
            with open(building, "w", encoding="ascii", opener=_private) as file:
                kept = {"version": 1, "batch": number, "cursor": cursor, "lines": lines}
                file.write(jsontext.dumps(kept))
                file.flush()
                os.fsync(file.fileno())
            os.rename(building, self._path)
            _sync_directory(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(building)
            raise failure(f"write cursor file {self._path!r}", error) from error


def conversation(
    outbox: Outbox, answers: Iterable[str] | None = None, consumer: Iterable[int] = ()
) -> Iterator[str]:
    """
    What `chaperone follow` prints, and the answers that it reads.

    Args:
        answers (iterable): Lines that the consumer writes, each the number of a batch that it has
            committed; None if no answers are expected.
        consumer (iterable): fds of the pipes to and from the consumer; when one of them hangs up
            while there are no events, the generator ends.
    Yields:
        str: A batch, each line with its newline; to be written out before the next is asked for.
    Raises:
        SpecError: If an answer is not the number of the last batch.
    """
    heard = None if answers is None else iter(answers)
    poll = select.poll()
    poll.register(outbox, select.POLLIN)
    for fd in consumer:
        poll.register(fd, 0)  # poll(2) always reports a hangup: of a pipe, never of a file
    while True:
        while (lines := outbox.batch(0)) is None:
            if outbox.fileno() not in dict(poll.poll()):
                return
        yield "".join(f"{line}\n" for line in lines)
        if heard is not None:
            answer = next(heard, None)
            if answer is None:
                return
            outbox.acknowledge(_number(answer))


def _number(answer: str) -> int:
    text = answer.strip()
    # int() takes digits of any script, and no more than 4,300 of them.
    if not (text.isascii() and text.isdigit() and len(text) <= DIGITS):
        raise SpecError(
            f"unable to understand the answer {text[:80]!r}: want the number of a batch"
        )
    return int(text)


def _lock(path: str) -> filelock.BaseFileLock:
    """
    Lock a cursor file: of two users, one would replace the batch that the other's consumer has yet
    to acknowledge.

    The lock is a separate file, because each rename over the cursor file would drop a lock on it.
    """
    import filelock  # here, because it takes 50 ms and a follower without a cursor file needs none

    lock_path = f"{path}.lock"
    lock = filelock.FileLock(lock_path, timeout=PATIENCE_S, mode=0o600, thread_local=False)
    try:
        # Before filelock tries, because some of its releases empty the file that they try to lock.
        pid = _pid_in(lock_path)
        lock.acquire(poll_interval=0.01)
        _write_pid(lock_path)
    except filelock.Timeout as error:
        raise SpoolError(
            f"unable to use cursor file {path!r}: it is in use by pid {pid or 'unknown'}",
            errno.EAGAIN,
        ) from error
    except OSError as error:
        lock.release()
        raise failure(f"lock cursor file {path!r}", error) from error
    return lock


def _pid_in(lock_path: str) -> str:
    """
    The pid in a lock's file, which is made if it is not there.

    Opened here, although filelock would do it, because some of its releases follow a symlink, or
    make the directories that are missing.
    """
    with owned(os.open(lock_path, os.O_RDWR | os.O_CREAT | FILE, 0o600)) as fd:
        return os.pread(fd, 20, 0).decode("ascii", "replace").strip()


def _write_pid(lock_path: str) -> None:
    with owned(os.open(lock_path, os.O_WRONLY | os.O_TRUNC | FILE)) as fd:
        os.write(fd, b"%d\n" % os.getpid())


def _sync_directory(path: str) -> None:
    """
    Put a rename on the disk: without this, a power failure may bring back the previous file.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with owned(os.open(os.path.dirname(path) or ".", flags)) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a filesystem that syncs no directories
                raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _kept(path: str) -> dict[str, Any] | None:
    try:
        # O_NONBLOCK: the path may be a FIFO, and opening it must not wait for a writer.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            kept = json.loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise failure(f"read cursor file {path!r}", error) from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"unable to read cursor file {path!r}: it is not JSON: {error}") from error
    try:
        found: dict[str, Any] = _KEPT(kept, "")
    except SpecError as error:
        raise SpecError(f"unable to read cursor file {path!r}: {error}") from error
    return found


def _version(value: Any, path: str) -> int:
    return value if type(value) is int and value == 1 else checks.fail(path, "1", value)


def _cursor(value: Any, path: str) -> Any:
    cursors.checked(value)
    return value


def _line(value: Any, path: str) -> str:
    try:
        line = json.loads(value) if isinstance(value, str) and "\n" not in value else None
    except (ValueError, RecursionError):
        line = None
    names = (line.get("event"), line.get("run_id")) if isinstance(line, dict) else (None, None)
    # Only the last line of a batch is of no run.
    if not (names == ("batch", None) or all(isinstance(name, str) for name in names)):
        checks.fail_unseen(path, "an event as a line of JSON", value)
    return str(value)


_KEPT = checks.Fields(
    {
        "version": (_version, checks.REQUIRED),
        "batch": (checks.Number(0, whole=True, most=2**63 - 1), checks.REQUIRED),
        "cursor": (_cursor, None),
        "lines": (checks.ListOf(_line), checks.REQUIRED),
    },
    whole="file",
)


def output_line(
    run_id: str, stream: str, offset: int, data: bytes, time: datetime | None = None
) -> str:
    """Bytes of a stream as a line of JSON, as `Output` has them."""
    ((name, value),) = pieces.fields(data).items()
    when = "" if time is None else f', "time": "{pieces.timestamp(time)}"'
    # As `json.dumps` writes it, in a quarter of the time; a spool has 5,000 of them a second.
    return (
        f'{{"event": "output", "run_id": {_quoted(run_id)}, "stream": {_quoted(stream)},'
        f' "offset": {offset}{when}, "{name}": {_quoted(value)}}}'
    )


def event_line(event: Event) -> str:
    """Any other event as a line of JSON."""
    line: dict[str, Any] = {"event": type(event).__name__.lower(), "run_id": event.run_id}
    if isinstance(event, Started):
        line["key"] = event.key
    elif isinstance(event, Shrank):
        line |= {"stream": event.stream, "offset": event.offset, "size": event.size}
    elif isinstance(event, (Changed, Ended, Lost)):
        line["status"] = event.status.raw if event.status is not None else None
    return jsontext.dumps(line)
