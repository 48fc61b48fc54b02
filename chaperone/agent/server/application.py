"""
The application of an agent: its spools, and which handler answers a request.

Knows: tokens, routes, limits of bodies.  Must not know: sockets, what a handler does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import attrs
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.routing import Route as Matcher

from ... import api
from ...errors import ChaperoneError, SpecError, SpoolError
from ...model import jsontext
from ...model.spec import is_run_id
from ...spool import format
from .. import wire
from . import page
from .exchange import Exchange, NoSpoolError, Receive, RefusedError, Send, refusal
from .tokens import Tokens

BODY = 64 * 1024  # bytes, at most
BIG_BODY = 16 * 1024 * 1024  # a spec or a cursor


@attrs.frozen(kw_only=True)
class Route:
    """
    A route.

    Attributes:
        method (str): GET also answers HEAD.
        path (str): Below /api/v1; `{spool}` and `{run_id}` are what they say.
        right (str): look or run; None if the handler itself checks who asks.
        answer: (Asked) to the response.
        most (int): Bytes that its body may have; None if the handler itself reads it.
        does (str): One line for the OpenAPI document.
    """

    method: str
    path: str
    right: str | None
    answer: Callable[[Asked], Awaitable[Response]]
    does: str
    most: int | None = BODY


class Agent:
    """
    What an agent serves.

    Args:
        directory (str): Its spools are directories directly below it.
        tokens (Tokens): Of those that may ask.
        log: Takes a sentence, for stderr.
        given (dict): Fields that each spec gets if it does not have them, such as `renew`.

    Attributes:
        asked_at (float): When the last request with a valid token came, on the monotonic clock.
        streams (int): How many streams are followed now.
    """

    def __init__(
        self,
        directory: str,
        tokens: Tokens,
        log: Callable[[str], None],
        given: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.directory = os.path.abspath(directory)
        self.tokens = tokens
        self.log = log
        self.given = given
        self.asked_at = time.monotonic()
        self.streams = 0
        self._sweeps: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def alone(self, spool_path: str) -> asyncio.Lock:
        """A lock for what sweeps a spool: two at once would refuse each other."""
        return self._sweeps.setdefault(spool_path, asyncio.Lock())

    def spools(self) -> list[str]:
        """The names of its spools."""
        return sorted(name for name in os.listdir(self.directory) if self._is_spool(name))

    def spool(self, name: str) -> api.Spool:
        """
        The spool with that name.

        Raises:
            SpoolError: If there is none.
        """
        if not self._is_spool(name):
            why = "this agent has no spool of that name"
            raise NoSpoolError(f"unable to open spool {name!r}: {why}", 2)
        return api.Spool(os.path.join(self.directory, name))

    def _is_spool(self, name: str) -> bool:
        """Whether a directory is a spool, or empty: then the first start makes it one."""
        path = os.path.join(self.directory, name)
        if not is_run_id(name) or not os.path.isdir(path):
            return False
        if os.path.isdir(os.path.join(path, format.RUNNING)):
            return True
        with os.scandir(path) as entries:
            return next(entries, None) is None


@attrs.define(kw_only=True)
class Asked:
    """
    A request for a handler.

    Attributes:
        agent (Agent): Which it is for.
        request (Request): Its head.
        body (bytes): All of it, unless the handler reads it.
        exchange (Exchange): What it is a part of.
    """

    agent: Agent
    request: Request
    body: bytes
    exchange: Exchange

    @property
    def run_id(self) -> str:
        """The run that the path names."""
        return str(self.request.path_params["run_id"])

    @property
    def by(self) -> str:
        """The name of the requester."""
        return "" if self.exchange.token is None else self.exchange.token.name

    def spool(self) -> api.Spool:
        """The spool that the path names."""
        return self.agent.spool(str(self.request.path_params["spool"]))

    def run(self) -> api.Run:
        """The run that the path names, which must exist."""
        return self.spool()[self.run_id]

    def json(self) -> object:
        """The body, which must be JSON."""
        try:
            return jsontext.loads(self.body)
        except ValueError as error:
            raise SpecError(f"unable to read the request: {error}") from error

    def query(self, *known: str) -> dict[str, str]:
        """The parameters of the URL, which must be among the known ones."""
        found = dict(self.request.query_params)
        for name in found:
            if name not in known:
                want = f"want {', '.join(known)}" if known else "want none"
                raise SpecError(f"unable to read the request: unknown parameter {name!r}; {want}")
        return found


class Application:
    """
    The ASGI application of an agent.

    Args:
        agent (Agent): What it serves.
        routes (list): All that it answers.
    """

    def __init__(self, agent: Agent, routes: list[Route]) -> None:
        self._agent = agent
        by_path: dict[str, dict[str, Route]] = {}
        for route in routes:
            by_path.setdefault(route.path, {})[route.method] = route
        index = Matcher("/", _page, methods=["GET"])
        matchers = {
            path: Matcher(wire.API + path, self._endpoint(methods), methods=[*methods])
            for path, methods in by_path.items()
        }
        # What asks for a token of its own, or for none.
        self._open = [index, *(matchers[route.path] for route in routes if route.right is None)]
        inner = [index, *matchers.values()]
        self._app = Starlette(routes=inner, exception_handlers={HTTPException: _no_route})
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            raise ValueError(f"unable to answer: want http, got {scope['type']}")
        exchange = Exchange(self._agent.tokens, self._agent.log, scope, receive, send)
        await exchange.answer(self._asked)

    async def _asked(self, exchange: Exchange) -> None:
        is_open = any(each.matches(exchange.scope)[0] is Match.FULL for each in self._open)
        if not is_open:
            exchange.authenticate()
            self._agent.asked_at = time.monotonic()
        await self._app(exchange.scope, exchange.receive, exchange.send)

    def _endpoint(self, methods: dict[str, Route]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            route = methods["GET" if request.method == "HEAD" else request.method]
            exchange: Exchange = request.scope["chaperone"]
            try:
                exchange.require(route.right)
                body = b"" if route.most is None else await exchange.body(route.most)
                asked = Asked(agent=self._agent, request=request, body=body, exchange=exchange)
                return await route.answer(asked)
            except ChaperoneError as error:
                return refusal(error)
            except OSError as error:
                why = error.strerror or type(error).__name__
                return refusal(SpoolError(f"unable to answer: {why}", error.errno))

        return endpoint


async def _page(request: Request) -> Response:
    html, headers = page.document()  # without data, as no token was shown
    return Response(html, headers=headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = {404: "it has no such route", 405: "that route has other methods"}
    sentence = f"unable to ask the agent: {why.get(error.status_code, error.detail)}"
    response = refusal(RefusedError(error.status_code, sentence))
    response.headers.update(error.headers or {})
    return response
