"""
One connection of an agent: how long it may be silent or stalled, and what it refuses.

Knows: sockets, TLS, hypercorn's HTTP/1.1.  Must not know: routes, tokens, spools.
Hypercorn's own end a stream that is silent, and turn into HTTP/2 where a head asks for it
(test_client_that_is_silent_or_slow_is_closed, test_request_with_two_readings_is_refused).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import time
from typing import Any

import h11
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState

from ..tls import abort
from ..wire import PIECE
from .exchange import bug

HEAD_S = 8.0  # for a handshake and a whole head, and between two requests of a connection
STALL_S = 60.0  # a stream that takes no byte for so long is closed; its cursor brings it back
CLOSE_S = 2.0  # for the last bytes, and the farewell of TLS


class Connection:
    """
    One connection of `connections.Connections`, from its handshake to its end.

    Attributes:
        is_stream (bool): Whether it follows something; the application sets it.
    """

    def __init__(
        self, owner: Any, sock: socket.socket, address: str, places: asyncio.Semaphore
    ) -> None:
        self._owner, self._sock, self.address = owner, sock, address
        self._places: asyncio.Semaphore | None = places
        self._has_place = False
        self.task: asyncio.Task[None] | None = None
        self.is_stream = False
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._wait()

    @property
    def is_idle(self) -> bool:
        """Whether its next head is waited for."""
        return self._silent is not None

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._silent: asyncio.TimerHandle | None = loop.call_later(HEAD_S, self.cut)

    def _wait_no_more(self) -> None:
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None

    def know(self) -> None:
        """A valid token was shown: its place among the unknown is free."""
        if self._has_place and self._places is not None:
            self._places.release()
        self._has_place, self._places = False, None

    def cut(self) -> None:
        """End it now; an answer that was not sent to its end is seen as cut."""
        self._abort()
        if self.task is not None:
            self.task.cancel()

    def _abort(self) -> None:
        if self._writer is not None:
            abort(self._writer)

    async def _watch(self) -> None:
        """Cut it if the client takes no byte for too long."""
        since, left = time.monotonic(), -1
        while left != (unsent := self._unsent()) or time.monotonic() - since <= STALL_S:
            since, left = since if left == unsent else time.monotonic(), unsent
            await asyncio.sleep(1)
        self.cut()

    def _unsent(self) -> int:
        """Bytes that we have not passed on, and those that the client has not acknowledged."""
        if self._writer is None or self._writer.is_closing():
            return 0
        queued = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))[0]
        return int(queued) + self._writer.transport.get_write_buffer_size()

    async def keep(self) -> None:
        """Stay with it to its end."""
        try:
            assert self._places is not None
            await self._places.acquire()
            self._has_place = True
            await self._open()
            await self._talk()
        except (OSError, asyncio.CancelledError, asyncio.TimeoutError):
            pass  # the client has gone, does not speak TLS, or was cut
        except Exception as error:  # noqa: BLE001  whatever one client does, the others go on
            self._owner.log(f"unable to answer a client: {bug(error)}")
        finally:
            self._wait_no_more()
            self.know()
            self._abort()
            self._sock.close()
            self._owner.all.discard(self)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if said := self._owner.certificate.refresh():
            self._owner.log(said)
        reader = asyncio.StreamReader(PIECE)
        # Our own copy of the socket: the transport closes its one.
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader),
            self._sock.dup(),
            ssl=self._owner.certificate.context,
            ssl_handshake_timeout=HEAD_S,
        )
        transport.set_write_buffer_limits(PIECE)
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self._reader = reader

    async def _talk(self) -> None:
        assert self._writer is not None
        loop = asyncio.get_running_loop()
        async with TaskGroup(loop) as group:
            self._protocol = _Protocol(
                self._owner.app,
                self._owner.config,
                self._owner.context,
                group,
                ConnectionState({"connection": self}),
                True,
                (self.address, 0),
                None,
                self._send,
            )
            self._reading = loop.create_task(self._read())
            await asyncio.wait([self._reading])
            await self._protocol.handle(Closed())
        self._writer.close()
        await asyncio.wait_for(self._writer.wait_closed(), CLOSE_S)

    async def _read(self) -> None:
        with contextlib.suppress(OSError, _RefusedError):
            while data := await self._reader.read(PIECE):
                await self._protocol.handle(RawData(data))

    async def _send(self, event: Event) -> None:
        """What hypercorn's protocol sends: bytes, or what became of the request."""
        assert self._writer is not None and self._reading is not None
        if isinstance(event, RawData):
            self._writer.write(event.data)
            is_slow = self._writer.transport.get_write_buffer_size() > 0
            watching = asyncio.create_task(self._watch()) if is_slow else None
            try:
                await self._writer.drain()
            except OSError:
                self._reading.cancel()
            finally:
                if watching is not None:
                    watching.cancel()
        elif isinstance(event, Updated):
            self._wait_no_more()
            if event.idle:
                self._wait()
        elif isinstance(event, Closed):
            self._reading.cancel()


class _RefusedError(Exception):
    """A head that we refused and answered."""


class _Protocol(H11Protocol):
    """HTTP/1.1 alone, and no request whose end two readers could see at different places."""

    async def _check_protocol(self, event: h11.Request) -> None:
        names = {name for name, _ in event.headers}
        is_ambiguous = {b"content-length", b"transfer-encoding"} <= names
        if is_ambiguous or b"upgrade" in names or not event.target.startswith(b"/"):
            await self._send_error_response(400)
            raise _RefusedError
