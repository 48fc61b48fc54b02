"""
Agents that tests ask: a real `chaperone serve`, its certificate, its tokens.
"""

import contextlib
import functools
import hashlib
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import threading
import uuid

import httpx
import trustme

from spool_tests.support.places import CHAPERONE

TOKENS = {"run": "run-" + "r" * 39, "look": "look-" + "l" * 38}
NAMES = {"run": "runner", "look": "looker"}  # whose they are


@functools.cache
def authority():
    """The authority of all tests of this process."""
    return trustme.CA()


@functools.cache
def certificate(*names):
    """A certificate for these names (for 127.0.0.1 and localhost), by the authority."""
    return authority().issue_cert(*(names or ("127.0.0.1", "localhost")))


@contextlib.contextmanager
def silent():
    """
    A server of TLS that is silent after the handshake, also when its client says farewell.

    Yields:
        (int, SimpleQueue): Its port, and a value for each connection that its client has closed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate().configure_cert(context)
    gone = queue.SimpleQueue()

    def serve(listening):
        with contextlib.suppress(OSError):  # `accept` fails at the end
            while True:
                connection = listening.accept()[0]
                with contextlib.suppress(OSError):
                    wrapped = context.wrap_socket(connection, server_side=True)
                    connection = socket.socket(fileno=wrapped.detach())
                    while connection.recv(4096):
                        pass
                connection.close()
                gone.put(True)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield listening.getsockname()[1], gone
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


class Served:
    """
    An agent that serves a directory.

    Attributes:
        directory (Path): Its spools are directories in it; `etl` is there, empty.
        url (str): https://127.0.0.1:PORT
        spool_url (str): That of the spool `etl`.
        api (str): The URL of its API: {url}/api/v1
        ca (Path): The file of its authority.
        cert, key, tokens (Path): What it was started with; it reads them again when they change.
        token_files (dict): A file with the token for each right: run and look.
        log (Path): Its stderr.
    """

    def __init__(self, place, words=(), environ=(), host="127.0.0.1", before=()):
        self.place = place
        self.directory = place / "served"
        (self.directory / "etl").mkdir(0o700, parents=True)
        self.ca, self.cert, self.key = place / "ca.pem", place / "cert.pem", place / "key.pem"
        authority().cert_pem.write_to_path(self.ca)
        self.show(certificate() if host == "127.0.0.1" else certificate(host))
        self.tokens = place / "tokens"
        self.token_files = {}
        lines = []
        for right, text in TOKENS.items():
            lines.append(f"{NAMES[right]} {right} {hashlib.sha256(text.encode()).hexdigest()}\n")
            self.token_files[right] = self.private(f"{right}.token", text + "\n")
        self.private("tokens", "".join(lines))
        self.log = place / "agent.log"
        self.words = words
        self.environ = dict(environ)
        self.process = None
        self.url = None
        self.before, self.host = before, host
        self.listen = f"{host}:0"

    def private(self, name, text):
        """A file that only this user can read."""
        path = self.place / name
        path.touch(0o600)
        path.write_text(text)
        return path

    def show(self, issued):
        """Replace the certificate and its key."""
        issued.cert_chain_pems[0].write_to_path(self.cert)
        issued.private_key_pem.write_to_path(self.key)

    @property
    def api(self):
        return f"{self.url}/api/v1"

    @property
    def spool(self):
        """The path of the spool `etl`."""
        return self.directory / "etl"

    @property
    def spool_url(self):
        return f"{self.url}/etl"

    def start(self, before=()):
        """
        Start the agent, the second time where it was; returns when it listens.

        Args:
            before (list): Words before its argv, behind those of this agent.
        """
        command = [
            *self.before,
            *before,
            *CHAPERONE,
            "serve",
            self.directory,
            "--listen",
            self.listen,
        ]
        command += ["--cert", self.cert, "--key", self.key, "--tokens", self.tokens, *self.words]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.environ},
                text=True,
            )
        self.url = self.process.stdout.readline().strip()
        self.process.stdout.close()
        assert self.url.startswith(f"https://{self.host}:"), self.log.read_text()
        self.listen = self.url.removeprefix("https://")

    def kill(self):
        """SIGKILL, as out of memory."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout=60):
        """SIGTERM: the exit code."""
        self.process.terminate()
        return self.process.wait(timeout)

    def log_at_end(self):
        """
        Stop the agent, and return its whole log: it writes the line of a request when it has sent
        the answer, so a client may read the log too early.
        """
        assert self.stop() == 0, self.log.read_text()
        return self.log.read_text()

    def trust(self):
        """The context of a client."""
        return ssl.create_default_context(cafile=str(self.ca))

    def client(self, right="run", **how):
        """An httpx.Client for its API, with a token; a right of None has none."""
        headers = {} if right is None else {"Authorization": f"Bearer {TOKENS[right]}"}
        how = {"base_url": self.api, "verify": self.trust(), "timeout": 60, **how}
        return httpx.Client(headers=headers, **how)

    def put(self, client, run_id, program, key=None, warm=False, spool="etl", **spec):
        """Start a run: the response."""
        body = {"spec": {"program": program, **spec}, "key": key or uuid.uuid4().hex, "warm": warm}
        return client.put(f"/{spool}/runs/{run_id}", json=body)


@contextlib.contextmanager
def served(place, words=(), environ=(), **how):
    """
    An agent that serves the directory `served` in a place (Path), which has an empty spool `etl`.

    Args:
        how: `host`, where it listens, and `before`, words before its argv.

    At the end the agent is killed, and what still runs in its spools.
    """
    agent = Served(place, words, environ, **how)
    agent.start()
    try:
        yield agent
    finally:
        if agent.process.poll() is None:
            agent.kill()
        for spool in agent.directory.iterdir():
            end_all(spool)


def end_all(spool):
    """Kill the runs of a spool through their FIFOs, and end its launcher."""
    for control in spool.glob("*/control"):
        with contextlib.suppress(OSError):
            fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(fd, "wb", buffering=0) as fifo:
                fifo.write(b"kill by=teardown\n")
    with contextlib.suppress(OSError, ValueError):
        pid = int((spool / ".launcher.lock").read_text())
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            if b"\0launcher\0" in command.read():
                os.kill(pid, signal.SIGTERM)


def events(response):
    """The events of a response that is streamed, as dicts; signs of life are left out."""
    return (json.loads(line) for line in response.iter_lines() if line)
