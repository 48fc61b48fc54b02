"""
Many clients that mean harm, for a while, beside one that follows: the heavy forms of test_enemy.py.

Knows: sockets, TLS, HTTP as bytes, the memory of a process.  Must not know: the code of the server.
"""

import contextlib
import itertools
import json
import select
import socket
import threading
import time

import httpx
import pytest

from spool_tests.support.agents import TOKENS, events
from spool_tests.support.runs import sh
from spool_tests.support.waiting import until

pytestmark = pytest.mark.tier("agents")
HEAD = f"Host: x\r\nAuthorization: Bearer {TOKENS['run']}\r\n"
ENEMY = "127.0.0.2"  # the address that they come from
MOST_KIB = 64 * 1024  # of memory that the agent may have at any moment
TICKS = "i=0; while sleep 0.01; do i=$((i + 1)); echo $i; done"


def peak_kib(agent):
    with open(f"/proc/{agent.process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def tcp(agent, source=ENEMY):
    port = int(agent.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), 60, (source, 0))


def tls(agent, source=ENEMY):
    return agent.trust().wrap_socket(tcp(agent, source), server_hostname="127.0.0.1")


def closed_after(sock, drip=b""):
    """After how many seconds the other end closes; a byte of `drip` is sent each second."""
    began = time.monotonic()
    drips = iter(drip)
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 40:
            if select.select([sock], [], [], 1)[0]:
                if not sock.recv(65_536):
                    break
            elif (byte := next(drips, None)) is not None:
                sock.sendall(bytes([byte]))
    return time.monotonic() - began


class Follower(threading.Thread):
    """A client that follows a run which prints the numbers from 1 on."""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent
        self.heard = 0
        self.error = None

    def run(self):
        text = ""
        try:
            body = {"runs": ["ticks"], "streams": ["stdout"]}
            with (
                self.agent.client() as client,
                client.stream("POST", "/etl/events", json=body) as response,
            ):
                for event in events(response):
                    if event["event"] == "output":
                        *lines, text = (text + event["text"]).split("\n")
                        for line in lines:
                            assert int(line) == self.heard + 1
                            self.heard += 1
        except BaseException as error:
            self.error = error
            raise


@contextlib.contextmanager
def followed(agent):
    """A client follows meanwhile; at the end it has heard each line."""
    with agent.client() as client:
        assert agent.put(client, "ticks", sh(TICKS)).status_code == 201
        follower = Follower(agent)
        follower.start()
        until(lambda: follower.heard)
        yield follower
        heard = follower.heard
        until(lambda: follower.heard > heard + 20)
        assert client.post("/etl/runs/ticks/control", content="kill").status_code == 200
        follower.join(30)
        assert follower.error is None and not follower.is_alive()
        assert follower.heard == (agent.spool / "ticks/stdout").read_text().count("\n")


def test_client_that_is_silent_or_slow_is_closed(agent):
    """From 5 to 10 s, each; the seconds of the one that may send a body count from its head on."""
    post = f"POST /api/v1/etl/collect HTTP/1.1\r\n{HEAD}"
    clients = {
        "silent": (tcp, b"", b""),
        "silent in TLS": (tls, b"", b""),
        "half a handshake": (tcp, b"\x16\x03\x01", b"\x01" * 60),
        "half a head": (tls, b"GET /api/v1 HTTP/1.1\r\nHost: x\r\n", b""),
        "a slow head": (tls, b"GET /api/v1 HTTP/1.1\r\nX: ", b"a" * 60),
        "silent again": (tls, f"GET /api/v1 HTTP/1.1\r\n{HEAD}\r\n".encode(), b""),
        "no body": (tls, f"{post}Content-Length: 100\r\n\r\n".encode(), b""),
        "a slow body": (tls, f"{post}Content-Length: 100\r\n\r\n".encode(), b" " * 60),
        "slow chunks": (
            tls,
            f"{post}Transfer-Encoding: chunked\r\n\r\n".encode(),
            b"1\r\n \r\n" * 9,
        ),
    }
    found = {}

    def measure(name, connect, first, drip):
        with connect(agent) as sock:
            sock.sendall(first)
            found[name] = closed_after(sock, drip)

    threads = [threading.Thread(target=measure, args=(n, *how)) for n, how in clients.items()]
    with followed(agent):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found.keys() == clients.keys()
    assert {name: took for name, took in found.items() if not 5 <= took <= 16} == {}
    assert "bug" not in agent.log_at_end()


def enemies(agent):
    """Connections of all sorts, each made by a function without arguments."""

    def silent():
        return tcp(agent)

    def half():
        sock = tcp(agent)
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        return sock

    def noise():
        sock = tcp(agent)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        return sock

    def endless():
        """A head that never ends, as fast as it is taken."""
        sock = tls(agent)
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            sock.sendall(b"GET / HTTP/1.1\r\n")
            for number in range(2_000):
                sock.sendall(b"X%d: %s\r\n" % (number, b"a" * 200))
        return sock

    def unknown():
        """A body of 100 MB without a token."""
        sock = tls(agent)
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            sock.sendall(
                b"PUT /api/v1/etl/runs/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
            )
            for _ in range(200):
                sock.sendall(bytes(65_536))
        return sock

    return [silent, half, noise, silent, endless, unknown]


def test_three_hundred_enemies_hinder_nobody_and_take_no_memory(agent, told):
    with followed(agent) as follower:
        socks, lock = [], threading.Lock()
        kinds = itertools.cycle(enemies(agent))
        work = [next(kinds) for _ in range(300)]

        def attack():
            while True:
                with lock:
                    if not work:
                        return
                    connect = work.pop()
                try:
                    sock = connect()
                except OSError:  # refused, or it had to wait for too long
                    continue
                with lock:
                    socks.append(sock)

        threads = [threading.Thread(target=attack) for _ in range(100)]
        for thread in threads:
            thread.start()
        # Another one is answered meanwhile.
        with agent.client() as client:
            for _ in range(20):
                before = follower.heard
                assert client.get("/etl/runs/ticks").status_code == 200
                until(lambda: follower.heard > before)  # noqa: B023
        for thread in threads:
            thread.join()
        for sock in socks:
            sock.close()
    told(f"an agent beside 300 enemies had {peak_kib(agent):,} KiB")
    assert peak_kib(agent) <= MOST_KIB
    assert "bug" not in agent.log_at_end()


def test_readers_that_stall_hinder_nobody_and_are_closed(agent, told):
    size = 50_000_000
    with agent.client() as client:
        # Text, which is longest as JSON, where each byte of it is escaped.
        agent.put(client, "big", sh(f"head -c {size} /dev/zero; exec sleep 1000"))
        until(lambda: client.head("/etl/runs/big/stdout").headers["content-length"] == str(size))
    body = json.dumps({"runs": ["big"]})
    post = f"POST /api/v1/etl/events HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"
    gets = [f"GET /api/v1/etl/runs/big/stdout{q} HTTP/1.1\r\n{HEAD}\r\n" for q in ("", "?follow")]
    with followed(agent):
        socks = []
        for text in itertools.islice(itertools.cycle([post, *gets]), 24):
            sock = tls(agent)
            sock.sendall(text.encode())
            assert sock.recv(4) == b"HTTP"
            socks.append(sock)
        peak = peak_kib(agent)
        told(f"an agent beside 24 stalled readers had {peak:,} KiB")
        assert peak <= MOST_KIB
        until(lambda: agent.log.read_text().count(" cut\n") >= 24, timeout=90)
        for sock in socks:
            sock.close()
    assert "bug" not in agent.log_at_end()


def test_clients_that_come_at_once_are_all_answered(agent):
    """More than an address may have without a token: the others wait for a moment."""
    codes = []

    def ask():
        with agent.client(timeout=httpx.Timeout(30)) as client:
            codes.append(client.get(agent.api).status_code)

    threads = [threading.Thread(target=ask) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 100
