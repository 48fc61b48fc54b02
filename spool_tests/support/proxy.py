"""
What may stand between a client and an agent: it cuts, delays, loses and repeats.

Knows: TCP, TLS, where a request of HTTP ends.  Must not know: what is asked.
"""

import asyncio
import contextlib
import random
import ssl
import threading

from spool_tests.support.agents import authority, certificate

PIECE = 16_384
TURNS = 4  # of the loop, after which a transport that was aborted has closed its socket


class Proxy:
    """
    A proxy on 127.0.0.1, before an agent of this host; its URL is that of the agent but for the
    port.

    Attributes:
        connections (int): How many there were.
        requests (list): Of a proxy that ends TLS: "PUT /api/v1/...", in their order.
    """

    def __init__(self, agent):
        self._agent = agent
        self.connections = 0
        self.requests = []
        self._loop = asyncio.new_event_loop()
        self._tasks = set()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(self, *exception):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def url(self, name="etl"):
        return f"https://127.0.0.1:{self.port}/{name}"

    def _run(self):
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._met, "127.0.0.1", 0, ssl=self.context())
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._end.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def _met(self, reader, writer):
        self.connections += 1
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self.carry(reader, writer)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def connected(self, context=None):
        """A connection to the agent."""
        port = int(self._agent.listen.rpartition(":")[2])
        name = None if context is None else "127.0.0.1"
        return await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)

    async def _pumped(self, reader, writer, most=None, delay_s=0.0):
        """Carry bytes, up to so many."""
        while most is None or most > 0:
            data = await reader.read(PIECE)
            if not data:
                return
            if delay_s:
                await asyncio.sleep(delay_s)
            part = data if most is None else data[:most]
            most = None if most is None else most - len(part)
            writer.write(part)
            await writer.drain()

    async def _both(self, near, far, fate):
        """Carry bytes both ways until one way has ended; then the connection is cut."""
        ways = [
            asyncio.ensure_future(self._pumped(near[0], far[1], fate.up, fate.delay_s)),
            asyncio.ensure_future(self._pumped(far[0], near[1], fate.down, fate.delay_s)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)


class Fate:
    """
    What becomes of a connection.

    Args:
        up, down (int): How many bytes are carried to the agent, and to the client, before it is
            cut; None for no limit.
        delay_s (float): Before each piece.
    """

    def __init__(self, up=None, down=None, delay_s=0.0):
        self.up, self.down, self.delay_s = up, down, delay_s

    @classmethod
    def any(cls, dice):
        """Cut at any byte, of the handshake or later, or not at all."""
        most = dice.choice([300, 3_000, 10_000, 100_000, 1_000_000])
        cut = dice.randrange(most)
        delay_s = dice.choice([0, 0, 0, 0.002])
        return dice.choice([cls(up=cut), cls(down=cut), cls(down=cut), cls(delay_s=delay_s)])


class CuttingProxy(Proxy):
    """
    It does not see what it carries.

    Args:
        seed: Of what becomes of each connection.
    """

    def __init__(self, agent, seed):
        super().__init__(agent)
        self._dice = random.Random(seed)
        self.is_kind = False  # carries everything

    def context(self):
        return None

    async def carry(self, reader, writer):
        fate = Fate() if self.is_kind else Fate.any(self._dice)
        far = await self.connected()
        try:
            await self._both((reader, writer), far, fate)
        finally:
            far[1].transport.abort()


class SilentProxy(Proxy):
    """It carries everything; while it is silent nothing, and nothing is closed."""

    def context(self):
        return None

    def set_silent(self, is_silent):
        self._loop.call_soon_threadsafe(self._speaks.clear if is_silent else self._speaks.set)

    async def _serve(self):
        self._speaks = asyncio.Event()
        self._speaks.set()
        await super()._serve()

    async def _carried(self, reader, writer):
        while data := await reader.read(PIECE):
            await self._speaks.wait()
            writer.write(data)
            await writer.drain()
        await self._speaks.wait()
        writer.write_eof()

    async def carry(self, reader, writer):
        await self._speaks.wait()
        far = await self.connected()
        try:
            await asyncio.gather(self._carried(reader, far[1]), self._carried(far[0], writer))
        finally:
            far[1].transport.abort()


class LosingProxy(Proxy):
    """
    It ends TLS, so that it knows where a request ends.

    Args:
        fate: Of "PUT /api/v1/..." and how often it was asked before: `pass`; `lost`, if the agent
            answers and the client does not hear it; `never`, if the agent does not hear it;
            `twice`, if the agent hears it twice.
    """

    def __init__(self, agent, fate):
        super().__init__(agent)
        self._fate = fate

    def context(self):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate().configure_cert(context)
        return context

    async def carry(self, reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
            name = " ".join(head.decode("latin-1").split(" ", 2)[:2])
            before = self.requests.count(name)
            self.requests.append(name)
            fate = self._fate(name, before)
            if fate == "never":
                return
            if fate in ("lost", "twice"):
                await self._asked(head, body)
            if fate == "lost":
                return
            if not await self._answered(head, body, writer):
                return

    async def _asked(self, head, body):
        """Ask the agent, and drop its answer."""
        async with self._opened() as (reader, writer):
            writer.write(head.replace(b"keep-alive", b"close") + body)
            await reader.read()

    async def _answered(self, head, body, writer):
        """Carry one answer; whether the connection can carry another."""
        async with self._opened() as (reader, out):
            out.write(head.replace(b"keep-alive", b"close") + body)
            await self._pumped(reader, writer)
        return False

    @contextlib.asynccontextmanager
    async def _opened(self):
        context = ssl.create_default_context()
        authority().configure_trust(context)
        reader, writer = await self.connected(context)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
