"""
Clients that mean harm, or know no better: they get no answer that they should not, and hinder no
other client.

Knows: sockets, TLS, HTTP as bytes.  Must not know: the code of the server.
"""

import contextlib
import os
import re
import select
import socket
import time

import pytest

from spool_tests.support.agents import TOKENS, events, served
from spool_tests.support.runs import sh
from spool_tests.support.waiting import until

TOKEN = f"Authorization: Bearer {TOKENS['run']}\r\n"
HEAD = f"Host: x\r\n{TOKEN}"
MOST_KIB = 64 * 1024  # of memory


@pytest.fixture
def agent(spool, tmp_path):
    with served(tmp_path) as agent:
        yield agent


def connect(agent, source="127.0.0.1"):
    port = int(agent.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), 20, (source, 0))


def tls(agent, source="127.0.0.1"):
    return agent.trust().wrap_socket(connect(agent, source), server_hostname="127.0.0.1")


def until_closed(sock):
    """What is received until the other end closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65_536):
            received += data
    return received


def answered(agent, text):
    """The statuses of all answers to these bytes; the server must close by itself."""
    with tls(agent) as sock:
        sock.sendall(text.encode() if isinstance(text, str) else text)
        received = until_closed(sock)
    return [int(code) for code in re.findall(rb"^HTTP/1.1 (\d+)", received, re.M)]


SMUGGLED = f"DELETE /api/v1/etl/runs/r HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n"
POST = f"POST /api/v1/etl/collect HTTP/1.1\r\n{HEAD}"
AMBIGUOUS = {
    "length and chunks": (
        f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
        [400],
    ),
    "chunks and length": (
        f"{POST}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{SMUGGLED}",
        [400],
    ),
    "two lengths": (f"{POST}Content-Length: 0\r\nContent-Length: 2\r\n\r\n{{}}{SMUGGLED}", [400]),
    "a list of lengths": (f"{POST}Content-Length: 0, 2\r\n\r\n{{}}{SMUGGLED}", [400]),
    "a signed length": (f"{POST}Content-Length: +2\r\n\r\n{{}}{SMUGGLED}", [400]),
    "chunks twice": (
        f"{POST}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
        [501],
    ),
    "other codings": (f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n{SMUGGLED}", [501]),
    "a blank before the colon": (
        f"{POST}Content-Length : 2\r\n\r\n{{}}{SMUGGLED}",
        [400],
    ),
    "a bad chunk": (f"{POST}Transfer-Encoding: chunked\r\n\r\n0x2\r\n{{}}\r\n{SMUGGLED}", []),
    "a bare return": (f"{POST}X: a\rContent-Length: 2\r\n\r\n{{}}{SMUGGLED}", [400]),
    "another protocol": (f"{POST}Upgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n{SMUGGLED}", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), [400]),
    "a proxy's target": (f"GET https://x/api/v1 HTTP/1.1\r\n{HEAD}\r\n{SMUGGLED}", [400]),
    "TLS in TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), [400]),
}


def test_request_with_two_readings_is_refused(agent):
    """One answer at most, and what is hidden behind it is no request."""
    with agent.client() as client:
        agent.put(client, "r", sh("true"))
        for name, (text, codes) in AMBIGUOUS.items():
            assert answered(agent, text) == codes, name
            assert client.get("/etl/runs/r").status_code == 200, name


def test_name_that_is_no_name_finds_nothing(agent):
    names = (
        "..",
        "%2e%2e",
        "..%2fetl",
        "%2e%2e%2f",
        ".running",
        "r%00",
        "r" * 129,
        "%ff",
        "r%0a",
        "",
    )
    names += ("../x", "%2Fetc%2Fpasswd", "r%2f..%2fr", "spec.json", "..%5c")
    (agent.directory / "x").mkdir(0o700)
    before = sorted(os.walk(agent.directory))
    for name in names:
        for start in (
            "GET /api/v1/{}/runs",
            "GET /api/v1/etl/runs/{}",
            "GET /api/v1/etl/runs/{}/stdout",
        ):
            (code,) = answered(
                agent, f"{start.format(name)} HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n"
            )
            assert code == 404 or name in ("", ".."), (code, start, name)
        body = '{"key": "' + "0" * 32 + '", "spec": {"program": {"argv": ["true"]}}}'
        head = f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        (code,) = answered(agent, f"PUT /api/v1/etl/runs/{name} HTTP/1.1\r\n{head}{body}")
        assert code in (404, 405, 422) or name == "spec.json", (code, name)
