"""
Whom a client trusts: a certificate that is refused is one sentence, and nothing was sent.

Knows: a socket that speaks TLS and writes down what it gets.  Must not know: the client's code.
"""

import asyncio
import contextlib
import datetime
import json
import socket
import ssl
import threading

import pytest
import trustme

import chaperone
from chaperone import aio
from chaperone.errors import AgentError, SpecError

pytestmark = pytest.mark.once
DAY = datetime.timedelta(days=1)


@contextlib.contextmanager
def listening(issued):
    """A port of 127.0.0.1 with this certificate, and all that came over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issued.configure_cert(context)
    heard = []

    def serve():
        while True:
            try:
                accepted, _ = server.accept()
            except OSError:
                return
            accepted.settimeout(10)
            with accepted, contextlib.suppress(OSError):
                with context.wrap_socket(accepted, server_side=True) as connection:
                    heard.append(connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1], heard
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("secret-token\n")
    return path


def asked(name, **proofs):
    """Ask in each way; the one sentence that each raises."""

    async def main():
        await aio.Spool(name, **proofs).live()

    def followed():
        with chaperone.Spool(name, **proofs).follow() as follower:
            follower.next()

    async def taken():
        async with aio.Spool(name, **proofs).follow() as follower:
            await follower.next()

    sentences = set()
    for ask in (
        lambda: chaperone.Spool(name, **proofs).live(),
        lambda: chaperone.Spool(name, **proofs)._run("r").signal("USR1"),
        lambda: asyncio.run(main()),
        followed,
        lambda: asyncio.run(taken()),
    ):
        with pytest.raises(AgentError) as caught:
            ask()
        sentences.add(str(caught.value))
    (sentence,) = sentences
    return sentence


def refused(name, reason):
    return f"unable to trust the agent of {name!r}: its certificate is refused: {reason}"


def issued_by(authority, *names, **how):
    return authority.issue_cert(*(names or ("127.0.0.1",)), **how)


def test_certificate_that_is_no_proof_is_refused_before_anything_is_sent(tmp_path, token):
    ours, other = trustme.CA(), trustme.CA()
    ca = tmp_path / "ca.pem"
    ours.cert_pem.write_to_path(ca)
    now = datetime.datetime.now(datetime.timezone.utc)
    expired = issued_by(ours, not_before=now - 9 * DAY, not_after=now - DAY)
    wrong = "IP address mismatch, certificate is not valid for '127.0.0.1'"
    for issued, reason in (
        (expired, "certificate has expired"),
        (issued_by(ours, "db3.example"), wrong),
        (issued_by(other), "unable to get local issuer certificate"),
    ):
        with listening(issued) as (port, heard):
            name = f"https://127.0.0.1:{port}/etl"
            assert asked(name, token_file=token, ca=ca) == refused(name, reason)
        assert heard == []


def test_certificate_of_another_agent_is_refused(tmp_path, token):
    mine, others = trustme.CA(), trustme.CA()

    def deployed(port, authority, server_name):
        path = tmp_path / f"{server_name}.json"
        path.touch(0o600)
        fields = {"token": "secret-token", "server_name": server_name}
        pem = authority.cert_pem.bytes().decode()
        url = f"https://127.0.0.1:{port}/etl"
        path.write_text(json.dumps({**fields, "url": url, "ca": pem}))
        return f"agent:{path}"

    # A man in the middle with the valid certificate of another agent, and with another name.
    with listening(issued_by(others, "agent-1")) as (port, heard):
        name = deployed(port, mine, "agent-1")
        reason = "unable to get local issuer certificate"
        assert asked(name) == refused(name, reason)
    assert heard == []
    with listening(issued_by(mine, "agent-2")) as (port, heard):
        name = deployed(port, mine, "agent-1")
        reason = "Hostname mismatch, certificate is not valid for 'agent-1'"
        assert asked(name) == refused(name, reason)
        assert heard == []
        # The name is that of the file, and not the host of the URL.
        with pytest.raises(AgentError, match="^unable to signal run 'r': it may have been deliv"):
            chaperone.Spool(deployed(port, mine, "agent-2"))._run("r").signal("USR1")
    assert b"Authorization: Bearer secret-token\r\n" in heard[0]


def test_port_without_tls_gets_no_token(token):
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            accepted, _ = server.accept()
            with accepted:
                heard.append(accepted.recv(1 << 16))
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        name = f"https://127.0.0.1:{server.getsockname()[1]}/etl"
        with pytest.raises(AgentError) as caught:
            chaperone.Spool(name, token_file=token)._run("r").signal("USR1")
        thread.join()
    assert str(caught.value).startswith(
        f"unable to trust the agent of {name!r}: TLS is not possible: "
    )
    assert b"secret-token" not in heard[0]


def test_authority_that_is_none_is_refused(tmp_path, token):
    missing = tmp_path / "missing.pem"
    name = "https://127.0.0.1:1/etl"
    with pytest.raises(SpecError) as caught:
        chaperone.Spool(name, token_file=token, ca=missing).live()
    why = f"unable to trust the authorities in {str(missing)!r}: No such file or directory"
    assert str(caught.value) == f"unable to open spool {name!r}: {why}"
