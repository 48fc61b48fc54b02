"""
One run in its follower: what was delivered, what may be new, and its next event.

Knows: rules R1 to R3 of `chaperone.spool`.  Must not know: other runs, or who takes the events.
"""

from __future__ import annotations

import errno
import os
import time
from datetime import timedelta
from typing import Any

from ..errors import NoRunError, SpoolError, UnreadableRunError
from ..model import cursor as cursors
from ..model import status as statuses
from ..model.events import EPOCH, Changed, Ended, Event, Lost, Output, Shrank, Started, status_view
from ..program.fds import owned
from ..spool import format, look
from ..spool.timeline import File, Timed
from .descriptors import CLOSE_WRITE, IGNORED, MODIFY, MOVED_TO
from .hub import FollowerServices

# Bytes of one Output at most: memory is flat however far behind the reader is.
CHUNK = 1024 * 1024
LINE = 4096  # bytes that are read without a look at the size: most of what programs write at once
# The kernel reports the close of the lock shortly before it releases the lock: 0.7 ms at the
# median, 2.5 ms at most, more on a loaded host.
FIRST_PROBE_S, LAST_PROBE_S = 0.001, 1.0
LEASE_SLACK_S = 0.01  # the lease is counted on another clock
DRAIN_S = 2.0  # how long a dead chaperone's guard may take to write what the pipes still held
SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # another time may do

# Hints: what of a run may be new.
HINT_LOOK = 1
HINT_OF_STREAM = {stream: 2 << number for number, stream in enumerate(format.STREAMS)}
HINT_STREAMS = sum(HINT_OF_STREAM.values())
HINT_ENDED = 8  # it is probably over, so look before taking a watch


class FollowedRun:
    """
    One run of a follower.

    Args:
        entry (dict): Its part of the cursor; {} if no event of it was delivered.
        asked_for (bool): Whether it is in the cursor before its first event was delivered.
        if_collected (bool): Whether to report it if it has no entry in .running/ or .ended/, and no
            event of it was delivered.

    Attributes:
        entry (dict): What was delivered; replaced at each step, never changed in place.
        hints (int): What may be new, of HINT_LOOK, HINT_ENDED and HINT_STREAMS; 0 when nothing is.
        watch (int): Its watch, -1 when there is none.
        edition: Of its run directory when its key was read, as `look.edition` has it.
    """

    __slots__ = (
        "_final",
        "_follower",
        "_identity",
        "_lease_ends",
        "_lost_since",
        "_probe_s",
        "_status",
        "_timed",
        "_turn",
        "asked_for",
        "edition",
        "entry",
        "hints",
        "if_collected",
        "queued",
        "run_id",
        "watch",
    )

    def __init__(
        self,
        follower: FollowerServices[FollowedRun],
        run_id: str,
        entry: cursors.Entry,
        asked_for: bool = False,
        if_collected: bool = False,
    ) -> None:
        self._follower = follower
        self.run_id = run_id
        self.entry = entry
        self.asked_for = asked_for
        self.if_collected = if_collected
        self.hints = 0
        self.queued = False
        self.watch = -1
        self.edition: tuple[int, int, int] | None = None
        self._turn = 0
        self._forget()

    def _forget(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._status: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None
        self._probe_s = 0.0
        self._lost_since: float | None = None
        self._timed: Timed | None = None
        self._lease_ends = 0.0

    def has_ended(self) -> bool:
        """Whether its ending was delivered."""
        return cursors.has_ended(self.entry)

    def has_more(self) -> bool:
        """Whether it should be given another turn."""
        return self.hints != 0 or self._final is not None

    def is_over(self) -> bool:
        """Whether its ending was delivered, and nothing hints at another run with its id."""
        return self.has_ended() and not self.hints

    def let_go(self) -> None:
        """Drop its watch and its fds; the next look begins from nothing."""
        self._follower.unwatch(self)
        self._follower.streams.drop(self.run_id)
        self._forget()

    def hint(self, mask: int, name: str) -> int:
        """
        Take an inotify event of its directory.

        Args:
            mask (int): What happened.
            name (str): To which file; "" for the directory itself.
        Returns:
            int: Which hints it adds; 0 for an event that means nothing new.
        """
        if mask & MODIFY:
            if name == format.TIMELINE:  # its lines say what there is of which stream
                return sum(HINT_OF_STREAM[stream] for stream in self._follower.wanted)
            return HINT_OF_STREAM.get(name, 0) if name in self._follower.wanted else 0
        if mask & MOVED_TO:
            return HINT_LOOK if name in (format.LIVE_STATUS, format.FINAL_STATUS) else 0
        if mask & CLOSE_WRITE:
            if name == format.LOCK:
                self._probe_s = FIRST_PROBE_S
                return HINT_LOOK
            return HINT_LOOK if self._lost_since is not None and name in HINT_OF_STREAM else 0
        if mask & IGNORED:
            self.watch = -1
            return HINT_LOOK
        return 0

    def next_event(self) -> Event | None:
        """
        The next event of this run, which counts as delivered from now on.

        Returns:
            Event: None if there is none; `hints` is 0 then, unless the run must be looked at again.
        Raises:
            UnreadableRunError: If it can't be read.
            SpoolError: If a later call may succeed, as when no fd is free; the hints stay.
        """
        try:
            if self.hints & (HINT_LOOK | HINT_ENDED):
                event = self._look()
                if event is not None:
                    return event
            if self.hints & HINT_STREAMS and not self.has_ended():
                event = self._read()
                if event is not None:
                    return event
        except OSError as error:
            reason = error if isinstance(error, SpoolError) else error.strerror
            sentence = f"unable to follow run {self.run_id!r}: {reason}"
            if error.errno in SHORT:
                raise SpoolError(sentence, error.errno) from error
            self.hints, self._final = 0, None
            raise UnreadableRunError(sentence, error.errno) from error
        return self._end() if self._final is not None and not self.hints else None

    # -- looking: lock, then status, then streams (rule R1)

    def _look(self) -> Event | None:
        try:
            fd = format.open_run(self._follower.spool_fd, self.run_id)
        except NoRunError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return self._gone()
            raise
        with owned(fd):
            found = os.fstat(fd)
            if self._identity not in (None, (found.st_dev, found.st_ino)):
                return self._replaced()
            if self._identity is None:
                event = self._meet(fd, found)
                if event is not None or not self.hints:
                    return event
            return self._look_into(fd)

    def _meet(self, fd: int, found: os.stat_result) -> Event | None:
        """See a run directory for the first time: is it the one of the cursor?"""
        key = look.key_in(fd)
        # A spec.json that can't be read proves nothing: starting from 0 would double every byte.
        if not cursors.is_waited_for(self.entry) and key and self.entry["key"] != key:
            if not self.has_ended():
                return self._replaced()
            self.entry = {}
        if self.has_ended():
            self.hints = 0
            return None
        if (
            cursors.is_waited_for(self.entry)
            and not self.if_collected
            and not format.is_entered(self._follower.spool_fd, self.run_id)
        ):
            # The kernel's event came late, and the run is already collected: reporting it now would
            # report it twice.
            self._follower.forget(self)
            return None
        self._identity = (found.st_dev, found.st_ino)
        self.edition = look.edition(found)
        self._timed = Timed() if format.found(fd, format.TIMELINE) else None
        if not cursors.is_waited_for(self.entry):
            return None
        if self.hints & HINT_ENDED:
            self._look_ahead(fd)
        self.entry = cursors.started(self.entry, key)
        return Started(run_id=self.run_id, key=key)

    def _look_ahead(self, fd: int) -> None:
        """
        Look at the end of a run together with its beginning: thousands may have ended meanwhile. If
        the run has not ended, or can't be read, its next turn looks again.
        """
        hints = self.hints
        try:
            self._look_into(fd)
        except OSError:
            self._final = None
        if self._final is None:
            self.hints, self._status = hints, None

    def _look_into(self, fd: int) -> Event | None:
        # An ended run needs no watch, and has no lock to be looked at.
        final = look.read_final(fd, self.run_id) if self.hints & HINT_ENDED else None
        if final is not None and final["state"] != "lost":
            alive, status = False, final
        else:
            if self.watch < 0:  # watch first, then look (rule R2)
                self._follower.watch(self, fd)
            alive, status = look.look(fd, self.run_id)
        self.hints &= ~(HINT_LOOK | HINT_ENDED)
        lost = status["state"] == "lost"
        is_final = self._is_proven_lost(fd) if lost else status["state"] in statuses.FINAL
        self._final = status if is_final else None
        if not lost:
            self._lost_since = None
        if status["state"] == "unattended":
            self._look_when_the_lease_ends(fd, status)
        self._hint_grown(fd)
        if alive and self._probe_s:
            self._probe_again()
        if is_final or lost or status == self._status:
            return None
        self._status = status
        return Changed(run_id=self.run_id, status=status_view(status))

    def _look_when_the_lease_ends(self, fd: int, status: dict[str, Any]) -> None:
        """Nothing that happens then would wake us."""
        now = time.monotonic()
        if now >= self._lease_ends:
            left_s = look.leased_s(fd, look.read_spec(fd), status["boot_id"])
            after_s = max(left_s, 0.0) + LEASE_SLACK_S
            self._lease_ends = now + after_s
            self._follower.look_again(self, after_s)

    def _hint_grown(self, fd: int) -> None:
        for stream in self._follower.wanted:
            try:
                size = os.stat(stream, dir_fd=fd, follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            if size != self.entry.get(stream, 0):
                self.hints |= HINT_OF_STREAM[stream]

    def _probe_again(self) -> None:
        """The kernel reported the close of the lock, but the lock is still held (rule R3)."""
        self._follower.look_again(self, self._probe_s)
        self._probe_s = (
            0.0 if self._probe_s >= LAST_PROBE_S else min(self._probe_s * 2, LAST_PROBE_S)
        )

    def _is_proven_lost(self, fd: int) -> bool:
        """
        Whether the run has ended: no chaperone lives, and no guard still drains the pipes.

        If not, add a hint to look again, at once or a little later.
        """
        if not format.is_path_of(self._follower.spool_fd, self.run_id, fd):
            self.hints |= HINT_LOOK
            return False
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since, self._probe_s = now, FIRST_PROBE_S
        if now - self._lost_since >= DRAIN_S or look.is_drained(fd):
            return True
        self._follower.look_again(self, self._probe_s)
        self._probe_s = min(self._probe_s * 2, 0.1)
        return False

    def _gone(self) -> Event | None:
        """There is no run directory of that name."""
        self.hints = 0
        if self._final is not None:
            return self._end() if self._has_all() else self._deleted()
        if cursors.is_waited_for(self.entry) or self.has_ended():
            self.let_go()
            if self.has_ended() or not self.asked_for:
                self._follower.forget(self)
            return None
        return self._deleted()

    def _has_all(self) -> bool:
        return all(
            self.entry.get(stream, 0) >= _length(self._final or {}, stream, 0)
            for stream in self._follower.wanted
        )

    def _replaced(self) -> Event | None:
        """The name belongs to another run by now; the next look meets that one."""
        event = self._gone()
        self.let_go()
        self.hints = HINT_LOOK
        return event

    def _deleted(self) -> Event:
        self.entry = cursors.ended(self.entry)
        self.let_go()
        return Ended(run_id=self.run_id, status=None)

    def _end(self) -> Event:
        final = self._final or {}
        self.entry = cursors.ended(self.entry)
        self.hints = 0
        self.let_go()
        kind = Lost if final.get("state") == "lost" else Ended
        return kind(run_id=self.run_id, status=status_view(final))

    # -- reading: bytes by offset

    def _read(self) -> Event | None:
        """The next bytes, of the streams in turn, or in the order in which they came."""
        if self._timed is not None:
            return self._read_timed(self._timed)
        for _ in format.STREAMS:
            stream = format.STREAMS[self._turn]
            self._turn = (self._turn + 1) % len(format.STREAMS)
            if self.hints & HINT_OF_STREAM[stream]:
                event = self._read_stream(stream)
                if event is not None:
                    return event
        return None

    def _read_timed(self, timed: Timed) -> Event | None:
        offsets = {stream: self.entry.get(stream, 0) for stream in self._follower.wanted}
        try:
            fd = self._open(format.TIMELINE)
        except OSError as error:
            if error.errno in SHORT:
                raise
            self._timed = None  # removed, or not ours: the bytes come without their times
            return self._read()
        piece = timed.piece(File(fd), offsets, self._readable, self._final is not None)
        if piece is not None:
            return self._read_stream(*piece)
        if timed.again_s:
            self._follower.look_again(self, timed.again_s)
        # Nothing of them is new; but one may be shorter than it was.
        events = (self._read_stream(stream, offset) for stream, offset in offsets.items())
        return next((event for event in events if event is not None), None)

    def _read_stream(
        self, stream: str, until: int | None = None, ms: int | None = None
    ) -> Event | None:
        """The next bytes of a stream, not beyond `until`; `ms` is when they came, if known."""
        offset = self.entry.get(stream, 0)
        try:
            fd = self._open(stream)
        except FileNotFoundError:
            self.hints = self.hints & ~HINT_OF_STREAM[stream] | HINT_LOOK
            return None
        # A line that was just written: its bytes end the file, so nothing need ask for its size.
        is_line = until is None and self._final is None and self._follower.chunk > LINE
        data = os.pread(fd, LINE, offset) if is_line else b""
        if 0 < len(data) < LINE:
            self.hints &= ~HINT_OF_STREAM[stream]
        else:
            size = os.fstat(fd).st_size
            end = self._end_of(stream, size)
            if size < offset and end == size:
                self.entry = cursors.advanced(self.entry, stream, 0)
                return Shrank(run_id=self.run_id, stream=stream, offset=offset, size=size)
            end = end if until is None else min(end, until)
            most = min(end - offset, self._follower.chunk)
            data = os.pread(fd, most, offset) if most > 0 else b""
            if until is None and offset + len(data) >= end or not data:
                self.hints &= ~HINT_OF_STREAM[stream]
        if not data:
            return None
        self.entry = cursors.advanced(self.entry, stream, offset + len(data))
        when = None if ms is None else EPOCH + timedelta(milliseconds=ms)
        return Output(run_id=self.run_id, stream=stream, offset=offset, data=data, time=when)

    def _readable(self, stream: str) -> int:
        """Up to which byte a stream may be delivered; 0 if somebody removed it."""
        try:
            return self._end_of(stream, os.fstat(self._open(stream)).st_size)
        except FileNotFoundError:
            return 0

    def _end_of(self, stream: str, size: int) -> int:
        return size if self._final is None else min(size, _length(self._final, stream, size))

    def _open(self, name: str) -> int:
        return self._follower.streams.get(self.run_id, name, lambda: self._opened(name))

    def _opened(self, stream: str) -> int:
        try:
            run_fd = format.open_run(self._follower.spool_fd, self.run_id)
        except NoRunError as error:
            raise error.__cause__ or error from None
        with owned(run_fd):
            found = os.fstat(run_fd)
            if self._identity != (found.st_dev, found.st_ino):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return format.open_plain(run_fd, stream)


def _length(status: dict[str, Any], stream: str, otherwise: int) -> int:
    """
    The length of a stream in its final status; `otherwise` if the run is lost, because its last
    bytes were not counted.
    """
    counts = status.get(stream)
    said = (
        counts.get("bytes") if isinstance(counts, dict) and status.get("state") != "lost" else None
    )
    return said if type(said) is int else otherwise
