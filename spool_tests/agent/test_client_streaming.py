"""How a subscriber on an event loop reads an answer in chunks."""

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import subprocess
import sys
import time

import httpx
import pytest

from chaperone import aio
from chaperone.agent.client import connection
from chaperone.agent.client.streaming import Chunks, connected
from spool_tests.support import agents
from spool_tests.support.places import ROOT

MESSAGE = b"5\r\nhello\r\n00A;name=value\r\n, world\r\n!\r\n0\r\n\r\n"


@pytest.mark.once
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_body_is_the_same_however_its_chunks_arrive(size):
    chunks = Chunks()
    body = b""
    for at in range(0, len(MESSAGE), size):
        assert not chunks.is_over or at >= len(MESSAGE) - 2
        body += b"" if chunks.is_over else chunks.body(MESSAGE[at : at + size])
    assert (body, chunks.is_over) == (b"hello, world\r\n!", True)


@pytest.mark.once
@pytest.mark.parametrize(
    "message",
    [
        b"hello\r\n",
        b"\r\n5\r\nhello",
        b"-1\r\n",
        b"0x5\r\nhello",
        b"5\r\nhello!\r\n",
        b"5\nhello\n",
        b"f" * 16 + b"\r\n",
        b"5;" + b"x" * 2_000,
    ],
    ids=lambda message: repr(message[:20]),
)
def test_body_without_chunks_is_refused(message):
    chunks = Chunks()
    with pytest.raises(ValueError, match=r"^want the size of a chunk, got b"):
        for at in range(len(message)):
            chunks.body(message[at : at + 1])


@pytest.mark.once
def test_connection_that_is_cancelled_at_any_turn_of_the_loop_leaves_no_socket():
    """Nor one that the garbage collector would close at some time."""
    context = ssl.create_default_context()

    def opened():
        return {line for line in fds("/proc/self/fd") if line.startswith("socket:")}

    def fds(place):
        for fd in os.listdir(place):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(f"{place}/{fd}")

    async def main(port):
        before = opened()
        for turns in range(40):
            task = asyncio.create_task(connected("127.0.0.1", port, context, "127.0.0.1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            deadline = time.monotonic() + 20
            while (left := opened() - before) and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            assert not left, turns

    with socket.create_server(("127.0.0.1", 0)) as listening:  # TLS is never answered
        gc.disable()
        try:
            asyncio.run(main(listening.getsockname()[1]))
        finally:
            gc.enable()


def test_connection_that_is_cancelled_when_its_handshake_ends_is_cut(monkeypatch):
    """asyncio would wait for the farewell of the server, which a silent one does not send."""
    monkeypatch.setattr("asyncio.constants.SSL_SHUTDOWN_TIMEOUT", 86_400, raising=False)

    class Cancelling(ssl.SSLObject):
        def do_handshake(self):
            super().do_handshake()
            task.cancel()

    context = ssl.create_default_context()
    context.sslobject_class = Cancelling
    agents.authority().configure_trust(context)

    async def main(port, gone):
        nonlocal task
        task = asyncio.create_task(connected("127.0.0.1", port, context, "127.0.0.1"))
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return await asyncio.to_thread(gone.get, timeout=60)

    task = None
    with agents.silent() as (port, gone):
        assert asyncio.run(main(port, gone)), task.cancelled()


@pytest.mark.once
def test_follower_that_is_closed_at_any_turn_of_the_loop_lets_its_task_go_on(tmp_path):
    """Also before what reads for it has begun."""
    agent = agents.Served(tmp_path)  # it does not run
    spool = aio.Spool("https://127.0.0.1:1/etl", token_file=agent.token_files["run"], ca=agent.ca)

    async def closed_after(turns):
        follower = spool.follow()
        waiting = asyncio.ensure_future(follower.next())
        for _ in range(turns):
            await asyncio.sleep(0)
        await follower.close()
        return await asyncio.wait_for(waiting, 30)

    for turns in range(6):
        assert asyncio.run(closed_after(turns)) is None, turns


@pytest.mark.once
def test_question_that_comes_while_a_kept_connection_closes_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "KEPT_S", 0.01)
    close, closing = httpx.AsyncClient.aclose, []

    async def slow(client):
        closing.append(client)
        await close(client)
        await asyncio.sleep(0.2)

    monkeypatch.setattr(httpx.AsyncClient, "aclose", slow)

    async def main(spool):
        assert await spool.live() == []
        while not closing:
            await asyncio.sleep(0)
        return await spool.live()

    with agents.served(tmp_path) as agent:
        where = {"token_file": agent.token_files["run"], "ca": agent.ca}
        assert asyncio.run(main(aio.Spool(agent.spool_url, **where))) == []


DROPPED = """
import asyncio, sys
from chaperone import aio
loop = asyncio.new_event_loop()
loop.run_until_complete(aio.Spool(sys.argv[1]).live())
print("dropped")
"""


def test_loop_that_is_dropped_with_its_tasks_says_nothing(tmp_path):
    """As by Apsis, which ends without cancelling what it has."""
    with agents.served(tmp_path) as agent:
        env = {"CHAPERONE_TOKEN_FILE": agent.token_files["run"], "CHAPERONE_CA": agent.ca}
        done = subprocess.run(
            [sys.executable, "-c", DROPPED, agent.spool_url],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **env},
        )
    assert (done.stdout, done.stderr) == ("dropped\n", "")
