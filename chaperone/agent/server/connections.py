"""
Connections of an agent: which are accepted, and how many.

Knows: sockets, how hypercorn is set.  Must not know: HTTP, routes, tokens, spools.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config

from ..tls import Certificate
from ..wire import PIECE
from .connection import Connection
from .exchange import bug

LEAVE_S = 5.0  # for requests that are being answered when the agent ends
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

    async def leave(self) -> None:
        """Let the requests that are being answered end, for `LEAVE_S` at most; cut the others."""
        await self.context.terminated.set()
        for connection in [*self.all]:
            if connection.is_idle or connection.is_stream:
                connection.cut()
        if tasks := [each.task for each in self.all if each.task is not None]:
            await asyncio.wait(tasks, timeout=LEAVE_S)
        for connection in [*self.all]:
            connection.cut()
        await asyncio.sleep(0)


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
