"""
A receiver of callbacks that is as bad as a test wants it: it answers 500, cuts connections, loses
its answers, forgets bytes, is slow, or is down for a while.

Knows: the routes that an agent posts to.  Must not know: the code of the agent.
"""

import contextlib
import http.server
import json
import random
import socket
import ssl
import threading

import trustme

TOKEN = "kHJBeIu1r0Xhb9y0FGeDU-sVPPfmoqaMlNSAw0L9ipU"
MOST = 1 << 20


class ReceiverDouble:
    """
    A receiver of one run, over TLS on 127.0.0.1, in threads of this process.

    Args:
        directory (pathlib.Path): For `ca.pem` and the server's certificate.
        run_id (str): The last segment of its URL.
        fault: Called with the route (`output/stdout`, `completed`, `requests`) for each request
            that is authorised; returns what to do wrong, or None. See `_Handler`.
    Attributes:
        streams (dict): `stdout` and `stderr` to what arrived, as bytearrays.
        final (dict): The final status; None until it is completed.
        posts (list): (route, offset, length, code) of each answer that was sent.
        begun (list): Each (route, offset, length), as soon as its head was read.
        heads (list): The headers of each request.
        requests (list): Lines for the program; None answers 404.
    """

    def __init__(self, directory, run_id="PROG-ID", fault=lambda route: None):
        self.run_id, self.fault = run_id, fault
        self.streams = {"stdout": bytearray(), "stderr": bytearray()}
        self.final, self.requests = None, None
        self.posts, self.begun, self.heads = [], [], []
        self.changed = threading.Condition()
        self.connections = set()
        authority = trustme.CA()
        self.ca_file = directory / "ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._server = None
        self.port = 0
        self.listen()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def url(self):
        return f"https://127.0.0.1:{self.port}/api/v1/agent/{self.run_id}"

    def listen(self):
        """Listen again, on the same port."""
        double = self

        class Handler(_Handler):
            receiver = double

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = False
            allow_reuse_address = True

            def handle_error(self, request, address):
                pass  # cuts are what it is for

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        """Refuse connections, as a receiver that is down."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            self._thread.join()
            with self.changed:
                for connection in self.connections:
                    cut(connection)
                self.changed.notify_all()
            server.server_close()  # joins the threads of the connections

    def wait(self, condition, timeout=60.0):
        """Wait until something that arrived makes a condition true."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout), (self.posts[-5:], self.final)

    def ask(self, line):
        """Give the program a request."""
        with self.changed:
            self.requests = [*(self.requests or ()), line]
            self.changed.notify_all()

    def is_up(self):
        return self._server is not None

    def spec(self, argv, **fields):
        """A spec that posts here, quick to try again."""
        callback = {"url": self.url, "token": TOKEN, "ca": str(self.ca_file)}
        config = {"retry_frequency": 0.05, "output_latency": 0.02, **fields.pop("config", {})}
        return {
            "program": {"argv": argv},
            "callback": {**callback, **fields.pop("callback", {})},
            "config": config,
            **fields,
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    """
    Faults: a number is an HTTP status; a dict has `code`, and may have `offset` and `body`; "cut"
    closes after half of the body, "lost" does all of it and closes without an answer, "forget"
    forgets half of the stream before it looks, "half" keeps half of the body and closes, "noise"
    answers what is no HTTP.
    """

    protocol_version = "HTTP/1.1"
    receiver = None

    def setup(self):
        self.request.settimeout(30)
        plain = self.request
        with self.receiver.changed:
            self.receiver.connections.add(plain)
        try:
            self.request = self.receiver._context.wrap_socket(plain, server_side=True)
        finally:
            with self.receiver.changed:
                self.receiver.connections.discard(plain)
        with self.receiver.changed:
            self.receiver.connections.add(self.request)
        super().setup()

    def finish(self):
        with self.receiver.changed:
            self.receiver.connections.discard(self.request)
        try:
            super().finish()
        finally:
            self.rfile.close()
            self.request.close()

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer("requests")

    def do_POST(self):
        self._answer("post")

    def _answer(self, kind):
        receiver = self.receiver
        prefix = f"/api/v1/agent/{receiver.run_id}/"
        path, _, query = self.path.partition("?")
        route = path.removeprefix(prefix)
        length = int(self.headers.get("Content-Length", -1))
        with receiver.changed:
            receiver.heads.append(dict(self.headers))
            receiver.begun.append((route, self.headers.get("Upload-Offset"), length))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(route, 401)
        fault = receiver.fault(route)
        if isinstance(fault, int):
            fault = {"code": fault}
        if isinstance(fault, dict):
            self.rfile.read(max(0, length))
            return self._send(route, fault["code"], fault.get("offset"), fault.get("body", b""))
        if fault == "noise":
            self.wfile.write(b"\x15\x03\x03 nothing that is HTTP\r\n\r\n")
            return self._cut()
        if kind == "requests":
            return self._requests(route, int(query.partition("=")[2]))
        if fault == "cut":
            self.rfile.read(length // 2)
            return self._cut()
        body = self.rfile.read(length // 2 if fault == "half" else length)
        with receiver.changed:
            answer = self._taken(route, body, fault)
            receiver.changed.notify_all()
        if fault in ("lost", "half"):
            return self._cut()
        return self._send(route, *answer)

    def _taken(self, route, body, fault):
        receiver = self.receiver
        if route == "completed":
            final = json.loads(body)
            sizes = {name: len(data) for name, data in receiver.streams.items()}
            if sizes != {name: final[name]["bytes"] for name in sizes}:
                return 409, None, json.dumps({"error": {}, "sizes": sizes}).encode()
            if receiver.final not in (None, final):
                return (410,)
            receiver.final = final
            return (204,)
        stream = receiver.streams[route.removeprefix("output/")]
        if fault == "forget":
            del stream[len(stream) // 2 :]
        offset = int(self.headers["Upload-Offset"])
        if offset > len(stream):
            return 409, len(stream)
        stream += body[len(stream) - offset :]
        return 204, len(stream)

    def _requests(self, route, after):
        receiver = self.receiver
        with receiver.changed:
            if receiver.requests is None:
                return self._send(route, 404)
            receiver.changed.wait_for(
                lambda: len(receiver.requests) > after or not receiver.is_up(), 5
            )
            found = [
                {"seq": seq, "line": line}
                for seq, line in enumerate(receiver.requests, 1)
                if seq > after
            ]
        return self._send(route, 200, None, json.dumps({"requests": found}).encode())

    def _send(self, route, code, offset=None, body=b""):
        receiver = self.receiver
        length = int(self.headers.get("Content-Length", 0))
        with receiver.changed:
            receiver.posts.append((route, self.headers.get("Upload-Offset"), length, code))
            receiver.changed.notify_all()
        self.send_response(code)
        if offset is not None:
            self.send_header("Upload-Offset", str(offset))
        if code != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if code != 204 else b"")

    def _cut(self):
        self.close_connection = True
        cut(self.request)


def cut(connection):
    """End a connection at once, whatever it carries."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def faults(seed, chance=0.6):
    """A fault function that does wrong what chance says; the seed is a test's id."""
    source = random.Random(seed)
    kinds = [500, 503, 408, 429, 302, "cut", "lost", "forget", "half", "noise"]
    lock = threading.Lock()

    def fault(route):
        with lock:
            return source.choice(kinds) if source.random() < chance else None

    return fault
