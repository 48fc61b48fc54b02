"""
Connections of an agent: which are accepted, how long each may be silent or stalled.

Knows: sockets, TLS, hypercorn's HTTP/1.1.  Must not know: routes, tokens, spools.
Hypercorn's own connections have no limit on their number, their time-out of a read would end a
stream that has nothing to say, and they turn into HTTP/2 or a WebSocket where a head asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import sys
import termios
import time
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

import h11
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState

from ..tls import Certificate
from ..wire import PIECE
from .exchange import bug

HEAD_S = 8.0  # for a handshake and a whole head, and between two requests of a connection
STALL_S = 60.0  # a stream that takes no byte for so long is closed; its cursor brings it back
LEAVE_S = 5.0  # for requests that are being answered when the agent ends
CLOSE_S = 2.0  # for the last bytes, and the farewell of TLS
MOST = 512  # connections: a process may have 1,024 files by default
# Of one address, that have not shown a token; more wait for a place before their TLS begins, which
# takes 200 KiB and the time of a handshake.
MOST_UNKNOWN = 16

App = Callable[[Any, Any, Any], Awaitable[None]]
Log = Callable[[str], None]


class Connections:
    """
    Accepts connections for an ASGI application.

    Args:
        app: The application. `scope["state"]["connection"]` is the `Connection` of a request.
        certificate (Certificate): Looked at for each new connection.
        log: Takes a sentence about what went wrong.
    """

    def __init__(self, app: App, certificate: Certificate, log: Log) -> None:
        # 256 KiB for each connection otherwise, however little it reads. A Python without this
        # attribute has no such buffer, or takes more memory.
        sslproto.SSLProtocol.max_size = PIECE  # type: ignore[attr-defined]
        self.app = ASGIWrapper(app)
        self.certificate = certificate
        self.log = log
        self.config = Config()
        self.config.include_server_header = False
        self.config.max_app_queue_size = 2  # pieces of a body that wait for the application
        self.config._log = _Log(log)  # type: ignore[assignment]
        self.context = WorkerContext(None)
        self.all: set[Connection] = set()
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._watching: asyncio.Task[None] | None = None

    async def accept(self, listening: socket.socket) -> None:
        """Accept connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError:  # the client has gone, or we are out of files, which will pass
                await asyncio.sleep(0.05)
                continue
            if len(self.all) >= MOST:
                sock.close()
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            host = str(address[0])
            places = self._places.setdefault(host, asyncio.Semaphore(MOST_UNKNOWN))
            connection = Connection(self, sock, host, places)
            self.all.add(connection)
            connection.task = loop.create_task(connection.keep())
            if self._watching is None or self._watching.done():
                self._watching = loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Cut what is silent or stalled, as long as there is a connection."""
        while self.all:
            await asyncio.sleep(1)
            for connection in [*self.all]:
                connection.check(time.monotonic())

    async def leave(self) -> None:
        """Let the requests that are being answered end, for `LEAVE_S` at most; cut the others."""
        await self.context.terminated.set()
        for connection in [*self.all]:
            if connection.waits_since is not None or connection.is_stream:
                connection.cut()
        if tasks := [each.task for each in self.all if each.task is not None]:
            await asyncio.wait(tasks, timeout=LEAVE_S)
        for connection in [*self.all]:
            connection.cut()
        await asyncio.sleep(0)


class Connection:
    """
    One connection, from its handshake to its end.

    Attributes:
        is_stream (bool): Whether it follows something; the application sets it.
        waits_since (float): Since when its next head is waited for; None during a request.
    """

    def __init__(
        self, owner: Connections, sock: socket.socket, address: str, places: asyncio.Semaphore
    ) -> None:
        self._owner = owner
        self._sock = sock
        self.address = address
        self._places: asyncio.Semaphore | None = places
        self._has_place = False
        self.task: asyncio.Task[None] | None = None
        self.is_stream = False
        self.waits_since: float | None = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._stalled: tuple[float, int] | None = None

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
            # Before 3.11.5 the transport of TLS can't be aborted when it was closed.
            with contextlib.suppress(AttributeError):
                self._writer.transport.abort()

    def check(self, now: float) -> None:
        """Cut it if it was silent or stalled for too long."""
        if self.waits_since is not None and now - self.waits_since > HEAD_S:
            self.cut()
        elif self._stalled is not None:
            since, left = self._stalled[0], self._unsent()
            if left != self._stalled[1]:
                self._stalled = (now, left)
            elif now - since > STALL_S:
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
            self._stalled = (time.monotonic(), self._unsent())
            try:
                await self._writer.drain()
            except OSError:
                self._reading.cancel()
            finally:
                self._stalled = None
        elif isinstance(event, Updated):
            self.waits_since = time.monotonic() if event.idle else None
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


class _Log:
    """Hypercorn's log: of what it would write only faults matter, and without their values."""

    def __init__(self, log: Log) -> None:
        self._log = log

    async def access(self, *_: object) -> None:
        """Nothing: the application has a log of its own, without secrets."""

    async def exception(self, *_: object) -> None:
        """A bug in the application."""
        if (error := sys.exc_info()[1]) is not None:
            self._log(f"unable to answer a request: {bug(error)}")

    error = warning = info = debug = critical = access
