"""
A transport of httpx for answers that go on: asyncio's TLS, and a connection for each request.

Knows: asyncio, TLS, HTTP/1.1.  Must not know: what is asked, what the bytes mean.
For a line that comes alone httpx's own transport takes twice the CPU (measured): there each read
goes through a pool, TLS by anyio, and several scopes for time-outs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import anyio
import h11
import httpx

from ..tls import abort
from ..wire import PIECE

ATTEMPT_S = 0.25  # until the next address of a host is tried too; RFC 8305, 8
LONGEST_HEAD = 1024  # bytes before a chunk
# The end of the chunk before, the size, and an extension, which means nothing here.
_HEAD = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_BEGUN = re.compile(rb"|\r|\r\n[0-9A-Fa-f]{0,15}[ \t]*(?:;[^\r\n]*)?\r?")


class Streaming(httpx.AsyncBaseTransport):
    """
    Asks for streams.

    Args:
        context (SSLContext): What a certificate is verified by.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As of httpx; the end of the response closes its connection."""
        times = request.extensions["timeout"]
        host = request.url.host
        try:
            with anyio.fail_after(times["connect"]):
                reader, writer = await connected(
                    host,
                    request.url.port or 443,
                    self._context,
                    request.extensions.get("sni_hostname", host),
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout("it is too late") from error
        except OSError as error:
            # With several addresses that fail in different ways the text has all of them.
            why = str(error) if error.errno else "no address of it can be connected to"
            raise httpx.ConnectError(why) from error
        talk = _Talk(reader, writer, times["read"])
        try:
            return await talk.response(request)
        except BaseException:
            await talk.aclose()
            raise


async def connected(
    host: str, port: int, context: ssl.SSLContext, server_name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """
    A connection with TLS, as of `asyncio.open_connection`; a cancelled one is cut at once.

    asyncio would wait up to 30 s for the farewell of the server, or leave the socket to the garbage
    collector. uvloop closes the socket, but if the handshake ends in the same turn, its TLS writes
    to the closed socket and logs an error.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=PIECE, loop=loop)
    writers: list[asyncio.StreamWriter] = []  # none until the handshake is over
    protocol = asyncio.StreamReaderProtocol(
        reader, lambda reader, writer: writers.append(writer), loop=loop
    )
    sock = await _reached(loop, host, port)
    try:
        await loop.create_connection(
            lambda: protocol, ssl=context, sock=sock, server_hostname=server_name
        )
    except BaseException:
        for writer in writers:
            abort(writer)
        # A transport that has not begun is not closed by asyncio; it closes itself when it reads
        # the end. Its owner must not: the number of its fd would be another's.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        raise
    return reader, writers[0]


async def _reached(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """
    A socket that is connected to the first address of a host that answers.

    As `create_connection` with `happy_eyeballs_delay`, which uvloop, that Apsis runs in, does not
    have, and which loses a socket if it is cancelled in the turn in which that is connected.
    """
    left = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    tries: list[asyncio.Task[socket.socket]] = []
    try:
        while True:
            if left:
                tries.append(loop.create_task(_try(loop, left.pop(0))))
            waiting = [each for each in tries if not each.done()]
            if not waiting:
                errors = [error for each in tries if (error := each.exception())]
                texts = [str(error) for error in errors]
                # One error for all addresses: without an errno where they differ.
                raise errors[0] if len(set(texts)) == 1 else OSError(", ".join(texts))
            await asyncio.wait(
                waiting,
                timeout=ATTEMPT_S if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for each in tries:
                if each.done() and each.exception() is None:
                    tries.remove(each)
                    return each.result()
    finally:
        for each in tries:
            each.cancel()
            each.add_done_callback(_close)


async def _try(loop: asyncio.AbstractEventLoop, address: Any) -> socket.socket:
    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, place)
    except BaseException:
        sock.close()
        raise
    return sock


def _close(task: asyncio.Task[socket.socket]) -> None:
    """Close what was connected, and is not needed any more."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


class _Talk(httpx.AsyncByteStream):
    """One request, and the response to it, of which this is the body."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silent_s: float
    ) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)
        self._silent_s = silent_s
        self._is_late = self._is_chunked = False
        self._loop = loop = asyncio.get_running_loop()
        self._waits_since: float | None = loop.time()
        # One timer for all reads: to set one for each costs more than to look at the clock.
        self._timer = loop.call_later(silent_s, self._check)

    def _check(self) -> None:
        """Cut the connection if the agent was waited for too long."""
        now = self._loop.time()
        since = now if self._waits_since is None else self._waits_since
        left_s = since + self._silent_s - now
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check)
        else:
            self._is_late = True
            abort(self._writer)

    async def response(self, request: httpx.Request) -> httpx.Response:
        """The response, when its head has arrived."""
        head = h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        )
        body = h11.Data(data=await request.aread())
        parts = [self._http.send(each) for each in (head, body, h11.EndOfMessage())]
        self._writer.write(b"".join(part for part in parts if part))
        try:
            await self._writer.drain()
        except OSError as error:
            raise self._failure(error) from error
        while not isinstance(event := await self._event(), h11.Response):
            pass
        self._is_chunked = (b"transfer-encoding", b"chunked") in event.headers
        return httpx.Response(event.status_code, headers=list(event.headers), stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, in the pieces that arrive."""
        if not self._is_chunked:
            while isinstance(event := await self._event(), h11.Data):
                yield bytes(event.data)
            return
        chunks = Chunks()
        data = self._http.trailing_data[0]
        while True:
            try:
                body = chunks.body(data)
            except ValueError as error:
                raise httpx.RemoteProtocolError(str(error)) from error
            self._waits_since = None
            if body:
                yield body
            if chunks.is_over:
                return
            data = await self._read()
            if not data:
                raise httpx.RemoteProtocolError("the body is not complete")

    async def _event(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._read())
            return event
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error)) from error

    async def _read(self) -> bytes:
        self._waits_since = self._loop.time()
        try:
            data = await self._reader.read(PIECE)
        except OSError as error:
            raise self._failure(error) from error
        if self._is_late:
            raise self._failure(None)
        return data

    def _failure(self, error: OSError | None) -> httpx.TransportError:
        late = httpx.ReadTimeout("it is too late")
        return late if error is None or self._is_late else httpx.ReadError(str(error))

    async def aclose(self) -> None:
        """Close the connection."""
        self._timer.cancel()
        abort(self._writer)
        await asyncio.sleep(0)  # for the transport to close its socket


class Chunks:
    """
    The body of a message in chunks; h11 takes 75 us of CPU more for a chunk with one line.

    Source: RFC 9112, 7.1; what is behind the last chunk is not looked at.

    Attributes:
        is_over (bool): Whether the last chunk has arrived.
    """

    def __init__(self) -> None:
        self._rest = b"\r\n"  # of a head that has not arrived to its end
        self._left = 0  # bytes of the chunk
        self.is_over = False

    def body(self, data: bytes) -> bytes:
        """
        The bytes of the body in the next bytes of the message.

        Raises:
            ValueError: If they are not in chunks.
        """
        data = self._rest + data
        self._rest = b""
        parts = []
        at = 0
        while True:
            parts.append(data[at : at + self._left])
            at += len(parts[-1])
            self._left -= len(parts[-1])
            if self._left:
                break
            head = _HEAD.match(data, at)
            if head is None:
                self._rest = data[at:]
                if len(self._rest) > LONGEST_HEAD or not _BEGUN.fullmatch(self._rest):
                    raise ValueError(f"want the size of a chunk, got {self._rest[:20]!r}")
                break
            at, self._left = head.end(), int(head[1], 16)
            if not self._left:
                self.is_over = True
                break
        return b"".join(parts)
