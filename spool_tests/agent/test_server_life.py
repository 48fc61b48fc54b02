"""
An agent from its start to its end: what it reads again, what it logs, how it leaves.

Knows: signals, certificates, tokens.  Must not know: how the server answers.
"""

import asyncio
import hashlib
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import types
import uuid

import httpx
import pytest

from chaperone.agent.server import exchange, serving
from chaperone.agent.server.application import Agent, Application
from chaperone.agent.server.routes import streams
from chaperone.agent.server.tokens import Tokens
from spool_tests.support import agents
from spool_tests.support.agents import events
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import final, running, sh
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer


def connected(agent):
    """A socket with TLS, on which nothing was sent."""
    port = int(agent.url.rpartition(":")[2])
    sock = socket.create_connection(("127.0.0.1", port), 60)
    return agent.trust().wrap_socket(sock, server_hostname="127.0.0.1")


def asked(agent, line, right="run"):
    """The same, on which a request was sent."""
    sock = connected(agent)
    head = f"{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agents.TOKENS[right]}\r\n\r\n"
    sock.sendall(head.encode())
    return sock


@pytest.mark.parametrize(
    "query",
    ["?follow", pytest.param("", marks=pytest.mark.tier("agents"))],  # that takes 5 s
)
def test_agent_leaves_beside_stalled_readers(agent, query):
    with agent.client() as client:
        size = 30_000_000
        agent.put(client, "big", sh(f"head -c {size} /dev/zero; exec sleep 1000"))
        until(lambda: client.head("/etl/runs/big/stdout").headers["content-length"] == str(size))
        stalled = [asked(agent, f"GET /api/v1/etl/runs/big/stdout{query}") for _ in range(4)]
        for sock in stalled:
            assert sock.recv(4) == b"HTTP"
        with client.stream("POST", "/etl/events", json={"streams": []}) as response:
            found = events(response)
            assert next(found)["event"] == "started"
            assert agent.stop() == 0
            with pytest.raises(httpx.RemoteProtocolError):  # cut, not ended
                list(found)
        for sock in stalled:
            sock.close()
    assert running(agent.spool, "big")["state"] == "running"


def test_request_that_is_being_answered_is_answered_at_the_end(agent):
    with agent.client() as client:
        agent.put(client, "r", sh("exec sleep 1000"))
        with asked(agent, "GET /api/v1/etl/runs/r?wait=1") as sock:
            log = agent.log
            until(lambda: log.read_text().count("PUT") == 1)
            agent.process.terminate()
            received = b""
            while data := sock.recv(65_536):
                received += data
        assert received.startswith(b"HTTP/1.1 200 ") and b'"state": "r' in received
        assert agent.process.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        connected(agent)


def test_certificate_is_read_again(agent):
    def serial():
        with connected(agent) as sock:
            return sock.getpeercert()["serialNumber"]

    first = serial()
    with agent.client() as client:
        agent.put(client, "r", sh("exec sleep 1000"))
        with client.stream("POST", "/etl/events", json={"runs": ["r"]}) as response:
            found = events(response)
            assert next(found)["event"] == "started"
            agent.show(agents.authority().issue_cert("127.0.0.1"))
            second = until(lambda: (now := serial()) != first and now)
            agent.cert.write_text("no certificate")
            assert serial() == second
            client.post("/etl/runs/r/control", content="kill")
            assert [event["event"] for event in found][-1] == "ended"
    lines = agent.log.read_text().splitlines()
    (line,) = [line for line in lines if "unable" in line]
    assert re.fullmatch(
        rf"chaperone: \S+Z unable to use certificate '{agent.cert}' with key '{agent.key}': .*;"
        " the old one stays in use",
        line,
    )


def token(agent, *words):
    command = [*CHAPERONE, "token", *words, "--tokens", agent.tokens]
    return subprocess.run(map(str, command), capture_output=True, text=True)


def test_tokens_are_made_and_revoked_while_the_agent_runs(agent):
    made = token(agent, "ops", "--right", "look")
    assert (made.returncode, made.stderr) == (0, "")
    text = made.stdout.strip()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", text)
    assert text not in agent.tokens.read_text()
    assert stat.S_IMODE(agent.tokens.stat().st_mode) == 0o600
    with agent.client(right=None) as client:

        def right(given):
            response = client.get(agent.api, headers={"Authorization": f"Bearer {given}"})
            return response.status_code, response.json().get("right")

        assert right(text) == (200, "look")
        again = token(agent, "ops", "--right", "run").stdout.strip()
        assert (right(text), right(again)) == ((401, None), (200, "run"))
        assert right(agents.TOKENS["look"]) == (200, "look")
        assert token(agent, "ops", "--revoke").returncode == 0
        assert right(again) == (401, None)
        agent.tokens.write_text("odd\n")
        assert right(agents.TOKENS["look"]) == (401, None)
    assert "want NAME RIGHT SHA256 in line 1; no token is valid until it can" in (
        agent.log.read_text()
    )


@pytest.mark.parametrize(
    "method, path, body",
    [("GET", "runs/r/stdout?follow", b""), ("POST", "events", b"{}")],
    ids=["bytes", "events"],
)
def test_stream_whose_token_is_revoked_is_cut(spool, tmp_path, monkeypatch, method, path, body):
    monkeypatch.setattr(streams, "LOOK_S", 0.05)
    private = tmp_path / "tokens"
    private.touch(0o600)
    private.write_text(f"ops look {hashlib.sha256(b'secret').hexdigest()}\n")
    served_spool = tmp_path / "served" / "etl"
    served_spool.mkdir(parents=True)
    log, sent = [], []
    told = Agent(str(tmp_path / "served"), Tokens(str(private)), log.append)
    url, _, query = f"/api/v1/etl/{path}".partition("?")
    scope = {"type": "http", "method": method, "path": url, "raw_path": url.encode()}
    scope |= {"query_string": query.encode(), "headers": [(b"authorization", b"Bearer secret")]}
    given = [{"type": "http.request", "body": body}]

    async def receive():
        return given.pop() if given else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if message.get("body"):
            private.write_text("")

    with Writer(served_spool, "r").running() as writer:
        writer.write(b"line\n")
        asked = Application(told, serving.ROUTES)(scope, receive, send)
        asyncio.run(asyncio.wait_for(asked, 60))
    assert sent[0]["status"] == 200
    assert b"line" in b"".join(message["body"] for message in sent[1:])
    assert all(message["more_body"] for message in sent[1:])
    assert log[-1].endswith(" cut")


@pytest.mark.parametrize("piece, is_whole", [(1024 * 1024, True), (1024, False)])
def test_rest_of_a_refused_body_is_taken_if_it_comes_fast(tmp_path, monkeypatch, piece, is_whole):
    """Its client sees the answer then, also on a host where the body takes longer than usual."""
    private = tmp_path / "tokens"
    private.touch(0o600)
    now, left, log, sent = [0], [16], [], []

    async def receive():
        now[0] += 1
        left[0] -= 1
        return {"type": "http.request", "body": bytes(piece), "more_body": left[0] > 0}

    async def send(message):
        sent.append(message)

    monkeypatch.setattr(exchange, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    scope = {"type": "http", "method": "POST", "path": "/api/v1/etl/collect", "raw_path": b"/"}
    scope |= {"query_string": b"", "headers": []}
    agent = Agent(str(tmp_path), Tokens(str(private)), log.append)
    asyncio.run(Application(agent, serving.ROUTES)(scope, receive, send))
    assert sent[0]["status"] == 401
    assert sent[-1].get("more_body", False) is not is_whole
    assert log[-1].endswith(" cut") is not is_whole


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["ops"], 64, "unable to understand 'chaperone token': want --right or --revoke"),
        (["x y", "--right", "run"], 65, "unable to make a token for 'x y': want a name that"),
        (["ops", "--revoke"], 65, "unable to revoke token 'ops': "),
    ],
)
def test_token_that_makes_no_sense_is_refused(spool, tmp_path, words, code, message):
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    command = [*CHAPERONE, "token", *words, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"chaperone: {message}")


def test_agent_refuses_to_start_with_what_it_cannot_use(spool, tmp_path):
    agent = agents.Served(tmp_path)

    def refused(**changes):
        given = {"--listen": "127.0.0.1:0", "--cert": agent.cert, "--key": agent.key}
        given |= {"--tokens": agent.tokens, **changes}
        words = [word for pair in given.items() for word in pair]
        command = [*CHAPERONE, "serve", agent.directory, *words]
        done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=60)
        assert done.stdout == ""
        return done.returncode, done.stderr.removeprefix("chaperone: ").rstrip("\n")

    none = tmp_path / "none"
    assert refused(**{"--listen": "8470"}) == (65, "unable to listen on '8470': want HOST:PORT")
    why = f"unable to read tokens '{none}': No such file or directory"
    assert refused(**{"--tokens": none}) == (65, why)
    why = f"unable to read certificate '{none}' with key '{agent.key}': No such file or directory"
    assert refused(**{"--cert": none}) == (65, why)
    agents.authority().private_key_pem.write_to_path(tmp_path / "other")
    code, why = refused(**{"--key": tmp_path / "other"})
    assert (code, why.rpartition(": ")[2]) == (65, "key values mismatch")
    agent.tokens.chmod(0o640)
    why = f"unable to use tokens '{agent.tokens}': want mode 0600, got 0640"
    assert refused() == (65, why)


def test_log_has_each_request_and_no_secret(agent):
    program = {**sh("true"), "env": {"PASSWORD": "swordfish"}}
    key = uuid.uuid4().hex
    with agent.client() as client:
        agent.put(client, "r", program, key)
        client.get("/etl/runs/r", params={"wait": 20})
        client.get("/etl/runs/r?token=swordfish")
        client.post("/etl/collect", json={"runs": {"r": key}})
    with agent.client(right=None) as client:
        client.get("/etl/runs/r", headers={"Authorization": "Bearer swordfish"})
    text = agent.log_at_end()
    put = r"chaperone: [\d-]{10}T[\d:]{8}Z 127.0.0.1 runner PUT /api/v1/etl/runs/r 201 \d+B \d+ms\n"
    assert re.match(put, text)
    assert re.search(r"Z 127.0.0.1 - GET /api/v1/etl/runs/r 401 \d+B \d+ms\n", text)
    assert text.count("\n") == 5
    for secret in ("swordfish", key, *agents.TOKENS.values()):
        assert secret not in text


def test_run_whose_chaperone_died_is_recorded_and_collected(agent):
    with agent.client() as client:
        agent.put(client, "r", sh("exec sleep 1000"))
        status = running(agent.spool, "r")
        agent.kill()
        os.kill(status["guard_pid"], signal.SIGSTOP)
        os.kill(status["chaperone_pid"], signal.SIGKILL)
        os.kill(status["guard_pid"], signal.SIGCONT)
        agent.start()
        until((agent.spool / ".ended" / "r").is_symlink)
        assert final(agent.spool)["state"] == "lost"
    with agent.client() as client:
        answer = client.post("/etl/collect", json={"runs": {"r": None}}).json()
        assert answer == {"collected": ["r"], "waiting": []}


def test_old_tls_and_a_client_that_trusts_another_are_refused(agent):
    old = agent.trust()
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    port = int(agent.url.rpartition(":")[2])
    for context in (old, ssl.create_default_context()):
        sock = socket.create_connection(("127.0.0.1", port), 60)
        with pytest.raises(ssl.SSLError), context.wrap_socket(sock, server_hostname="127.0.0.1"):
            pass
        sock.close()
    with agent.client() as client:
        assert client.get(agent.api).status_code == 200
    assert "bug" not in agent.log_at_end()
