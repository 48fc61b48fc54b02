"""
An agent from its start to its end: it listens, serves, looks after its spools, and leaves.

Knows: addresses, signals, the order of these.  Must not know: routes, HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable

from ...errors import ChaperoneError, SpecError, SpoolError
from ...spool import reap
from ..callback import served
from ..tls import Certificate
from .application import Agent, Application, Route
from .connections import Connections
from .exchange import bug
from .routes import endings, openapi, runs, streams

BACKLOG = 1024
REAP_S = 60.0  # between two looks for runs whose chaperone died: nothing else does it here
ROUTES = [*runs.ROUTES, *endings.ROUTES, *streams.ROUTES]


def listen(address: str) -> socket.socket:
    """
    A listening socket.

    Args:
        address (str): HOST:PORT or [HOST]:PORT; port 0 is any free one.
    Raises:
        SpecError: If it is not an address.
        SpoolError: If it can't be listened to.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise SpecError(f"unable to listen on {address!r}: want HOST:PORT")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        family, kind, _, _, place = found[0]
        listening = socket.socket(family, kind)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise SpoolError(
            f"unable to listen on {address!r}: {error.strerror}", error.errno
        ) from error
    listening.setblocking(False)
    return listening


def url(listening: socket.socket) -> str:
    """The URL of what is served there."""
    host, port = listening.getsockname()[:2]
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


async def serve(
    agent: Agent,
    listening: socket.socket,
    certificate: Certificate,
    ready: Callable[[], None],
    routes: list[Route] = ROUTES,
    end: asyncio.Event | None = None,
) -> None:
    """
    Serve until SIGTERM or SIGINT, or until `end` is set.

    Args:
        agent (Agent): What is served.
        listening (Socket): From `listen`; closed at the end.
        certificate (Certificate): What the agent shows.
        ready: Called when requests are answered.
        routes (list): What it answers.
        end (Event): Set by whoever ends it otherwise.
    """
    loop = asyncio.get_running_loop()
    end = end or asyncio.Event()
    loop.set_exception_handler(lambda loop, context: _log_fault(agent, context))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    application = Application(agent, [*routes, openapi.route(routes)])
    connections = Connections(application, certificate, agent.log)
    tasks = [
        loop.create_task(connections.accept(listening)),
        loop.create_task(_reap(agent)),
        loop.create_task(served.post_each(lambda: _spool_paths(agent), agent.log)),
    ]
    ready()
    await end.wait()
    for task in tasks:
        task.cancel()
    listening.close()
    await connections.leave()


def _log_fault(agent: Agent, context: dict[str, object]) -> None:
    """A fault that no task has answered; what a client did to TLS is none."""
    error = context.get("exception")
    if isinstance(error, Exception) and not isinstance(error, OSError):
        agent.log(f"unable to go on: {bug(error)}")


def _spool_paths(agent: Agent) -> list[str]:
    return [agent.spool(name).path for name in agent.spools()]


async def _reap(agent: Agent) -> None:
    """
    Record runs whose chaperone died as lost, now and each minute: a scheduler elsewhere can't, and
    their endings could not be collected.
    """
    while True:
        # The directory may be away for a while, another reap may be at work: there is a next time.
        with contextlib.suppress(OSError):
            for name in agent.spools():
                path = os.path.join(agent.directory, name)
                async with agent.alone(path):
                    await asyncio.to_thread(_reap_one, path)
        await asyncio.sleep(REAP_S)


def _reap_one(path: str) -> None:
    with contextlib.suppress(ChaperoneError):
        reap.reap(path)
