"""
Clients that mean harm, or know no better: they get no answer that they should not, and hinder no
other client.

Knows: sockets, TLS, HTTP as bytes.  Must not know: the code of the server.
"""

import contextlib
import os
import re
import socket

import pytest

from spool_tests.support.agents import NAMES, TOKENS
from spool_tests.support.runs import sh
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

TOKEN = f"Authorization: Bearer {TOKENS['run']}\r\n"
HEAD = f"Host: x\r\n{TOKEN}"
MOST_KIB = 64 * 1024  # of memory


def connect(agent, source="127.0.0.1"):
    port = int(agent.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), 60, (source, 0))


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
        POST + "Transfer-Encoding: chunked\r\n" * 2 + f"\r\n0\r\n\r\n{SMUGGLED}",
        [501],
    ),
    "other codings": (f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n{SMUGGLED}", [501]),
    "a blank before the colon": (
        f"{POST}Content-Length : 2\r\n\r\n{{}}{SMUGGLED}",
        [400],
    ),
    "a bad chunk": (f"{POST}Transfer-Encoding: chunked\r\n\r\n0x2\r\n{{}}\r\n{SMUGGLED}", [400]),
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
    before = sorted(path for path in agent.directory.rglob("*"))
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
    made = {path.name for path in agent.directory.rglob("*")} - {path.name for path in before}
    assert {name for name in made if "json" in name} <= {"spec.json", "running.json", "status.json"}
    assert sorted(os.listdir(agent.directory)) == ["etl", "x"]
    assert set(os.listdir(agent.directory / "x")) <= {".running", ".ended", ".sweep.lock"}


def test_body_that_is_compressed_or_too_large_is_refused(agent):
    limits = [("/etl/collect", 64 * 1024), ("/etl/events", 16 * 1024 * 1024)]
    with agent.client() as client:
        response = client.post("/etl/collect", content=b"x", headers={"Content-Encoding": "gzip"})
        assert response.status_code == 415
        assert response.json()["error"] == {
            "kind": "AgentError",
            "message": "unable to answer a request: want a body without Content-Encoding",
            "errno": None,
        }
        for path, most in limits:
            for body in (b" " * (most + 1), (b" " * 65_536 for _ in range(most // 65_536 + 1))):
                response = client.post(path, content=body)
                assert response.status_code == 413, path
                want = f"unable to answer a request: want a body of at most {most} bytes"
                assert response.json()["error"]["message"] == want
            assert client.post(path, content=b" " * most).status_code == 422
    with agent.client(right=None) as client:
        assert client.post("/etl/collect", content=b" " * 1_000_000).status_code == 401


def test_head_without_end_is_refused(agent):
    for line in (b"X: " + b"a" * 20_000, b"X: a\r\n" * 4_000, b"a" * 20_000):
        assert answered(agent, b"GET /api/v1 HTTP/1.1\r\nHost: x\r\n" + line) == [431]


def test_client_that_cuts_its_own_body_gets_no_answer(agent):
    head = f"PUT /api/v1/etl/runs/r HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n"
    with tls(agent) as sock:
        sock.sendall(head.encode() + b"{")

    def logged():
        return [line for line in agent.log.read_text().splitlines() if " PUT " in line]

    line = re.sub(r"\d+ms", "Nms", until(logged)[0].split(maxsplit=2)[2])
    assert line == f"127.0.0.1 {NAMES['run']} PUT /api/v1/etl/runs/r - 0B Nms cut"
    assert "(this is a bug)" not in agent.log_at_end()
