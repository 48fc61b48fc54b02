"""
Follower: the events of an agent's spool, for callers that block.

Knows: a thread that reads, a lock, the caller's patience.  Must not know: what an event means.
The thread reads ahead of the caller by 1 MiB at most. Without it, a caller that does not wait would
have to: no library reads the half of a TLS record.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from ...follow.descriptors import close_when_dropped
from ...interface import Delivering
from ...model.events import Event
from .connection import Connection
from .following import Following, Read, Room
from .question import Answer, Pause, Question, Steps, Unanswered

LEAVING_S = 0.5  # the thread ends at once, unless it is about to connect


class Follower(Delivering):
    """
    `chaperone.Follower` of an agent's spool: the same events, cursor and errors.

    It connects when the first event is asked for. A connection that is cut, or an agent that is
    started again, is waited for: `polling` says why events are late.
    """

    def __init__(
        self,
        connection: Connection,
        cursor: object,
        runs: Iterable[str] | None,
        streams: Iterable[str],
    ) -> None:
        self._connection = connection
        self._following = following = Following(connection.place, cursor, runs, streams)
        super().__init__(following)
        self._reader = _Reader(connection, following)
        name = f"a follower of spool {connection.place.text!r}"
        self._unclosed = close_when_dropped(self, self._reader.close, name)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the cursor can still be read."""
        self._unclosed.detach()
        self._reader.close()

    def collect(self, run_id: str) -> None:
        """As `chaperone.Follower.collect`."""
        self._connection.perform(self._following.collect(run_id))

    def __iter__(self) -> Follower:
        return self

    def __next__(self) -> Event:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout: float | None = None) -> Event | None:
        """As `chaperone.Follower.next`."""
        return self._reader.next(timeout)

    def fileno(self) -> int:
        """As `chaperone.Follower.fileno`."""
        return self._reader.fileno()


class _Reader:
    """
    The thread that reads, and what it shares with the follower.

    It does not know the follower: one that is dropped must not be kept by its own thread.
    """

    def __init__(self, connection: Connection, following: Following) -> None:
        self._connection, self._following = connection, following
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_closed = False
        self._socket: socket.socket | None = None
        self._bell = -1

    def next(self, timeout: float | None) -> Event | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._begin()
            while True:
                if self._is_closed:
                    return None
                event = self._following.take()
                self._ring()
                if event is not None:
                    self._changed.notify_all()
                    return event
                if self._error is not None:
                    error, self._error, self._thread = self._error, None, None
                    raise error
                if self._following.is_over():
                    return None
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                # No condition waits as long as a century, which a caller may have.
                self._changed.wait(None if left is None else min(left, threading.TIMEOUT_MAX))

    def fileno(self) -> int:
        with self._changed:
            if self._bell < 0:
                self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._begin()
            self._ring()
            return self._bell

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread, reading = self._thread, self._socket
            if reading is not None:
                _shut(reading)
            if self._bell >= 0:
                os.close(self._bell)
                self._bell = -1
        if thread is not None and thread is not threading.current_thread():
            thread.join(LEAVING_S)

    def _begin(self) -> None:
        """Start the thread, also again after an error: the caller asks again."""
        if self._thread is None and not self._is_closed and not self._following.is_closed:
            self._thread = threading.Thread(
                target=self._run, name="chaperone-follower", daemon=True
            )
            self._thread.start()

    def _ring(self) -> None:
        if self._bell < 0:
            return
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass
        following = self._following
        if following.has_news() or following.is_closed or self._error is not None:
            os.eventfd_write(self._bell, 1)

    # -- in the thread

    def _run(self) -> None:
        reading = self._following.reading()
        try:
            with self._connection.client() as client:
                self._read(reading, client)
        except Exception as error:  # noqa: BLE001  the caller gets it, a bug of ours too
            with self._changed:
                self._error = error
        finally:
            with self._changed:
                self._ring()
                self._changed.notify_all()

    def _read(self, reading: Any, client: httpx.Client) -> None:
        """Perform the steps of `reading`, of which each is made under the lock."""
        steps = Steps(reading)
        with _Stream(self, self._connection, client) as stream:
            while True:
                with self._changed:
                    step = steps.next()
                    # Not for each piece of a long line: to wake the caller costs more than the
                    # piece.
                    if self._following.has_news() or step is None:
                        self._ring()
                        self._changed.notify_all()
                    if step is None or self._is_closed:
                        return
                    if step is Room:
                        self._changed.wait()
                    elif isinstance(step, Pause):
                        self._changed.wait_for(lambda: self._is_closed, step.seconds)
                    if self._is_closed:
                        return
                try:
                    steps.did(stream.result(step))
                except Unanswered as error:
                    steps.failed(error)

    def lend(self, reading: socket.socket | None) -> None:
        """Say which socket `close` must shut down to wake the thread; None for none."""
        with self._changed:
            self._socket = reading
            if self._is_closed and reading is not None:
                _shut(reading)


class _Stream:
    """The connection of the thread, which it opens again and again."""

    def __init__(self, reader: _Reader, connection: Connection, client: httpx.Client) -> None:
        self._reader, self._connection, self._client = reader, connection, client
        self._opened = contextlib.ExitStack()
        self._parts: Iterator[bytes] = iter(())

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        self._reader.lend(None)
        self._opened.close()

    def result(self, step: Any) -> Answer | bytes | None:
        """Do what a step of `Following.reading` says, as far as it is about the connection."""
        if step is Read:
            return self._read()
        if not isinstance(step, Question):
            return None
        if not step.is_stream:
            return self._connection.kept_answer(step)
        self._close()
        response = self._opened.enter_context(self._connection.stream(self._client, step))
        if not response.is_success:
            return self._connection.gathered(response, step)
        self._parts = response.iter_raw()
        self._reader.lend(response.extensions["network_stream"].get_extra_info("socket"))
        return Answer(status=response.status_code, headers=response.headers, body=b"")

    def _read(self) -> bytes:
        try:
            return next(self._parts, b"")
        except httpx.TransportError as error:
            raise self._connection.failure(error) from error


def _shut(reading: socket.socket) -> None:
    """
    Wake the thread that reads from a socket; close(2) would not.

    Not by the method of an SSLSocket, which would take TLS away under the thread.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(reading, socket.SHUT_RDWR)
