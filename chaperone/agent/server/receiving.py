"""
The receiver's routes: what an agent that calls back posts, and what it asks for.

Knows: the callbacks as HTTP has them.  Must not know: tokens of clients, files.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...errors import ChaperoneError, SpecError, SpoolError
from ...model import checks, jsontext
from ...spool import format
from .. import wire
from ..fed_run import ConflictError, GapError
from ..reception import Reception
from .application import Agent, Asked
from .application import Route as AgentRoute
from .exchange import Exchange, Receive, RefusedError, Send, answer, refusal

OUTPUT_BODY = 1024 * 1024  # bytes, at most
COMPLETED_BODY = 16 * 1024 * 1024  # a status repeats parts of its spec
REFUSED = "unable to receive: the token is not that of the run"
# Between two looks for agents that are silent for good. The first comes as late: after a long
# absence of the receiver its agents need this time to call again.
SILENT_S = 600.0
REQUESTS_S = 30.0  # a question for requests is answered at the latest then

Handler = Callable[[Exchange, Request, str], Awaitable[Response]]
Value = TypeVar("Value")


class Callbacks:
    """
    Answers the callbacks for one receiver, inside of one event loop.

    Args:
        reception (Reception): Where the runs are; `close` closes it.
    """

    def __init__(self, reception: Reception) -> None:
        self.reception = reception
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._news: dict[str, asyncio.Event] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """Leave the runs as they are."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self.reception.sink.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self.reception.close()

    def watch(self) -> None:
        """Take what is asked in `control` files from now on."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.add_reader(self.reception.sink.fileno(), self._take_requests)
            self._timer = loop.call_later(SILENT_S, self._end_silent)

    def _end_silent(self) -> None:
        for run_id in self.reception.end_silent():
            self._wake(run_id)
        self._timer = asyncio.get_running_loop().call_later(SILENT_S, self._end_silent)

    def _wake(self, run_id: str) -> None:
        """The run has ended: a question for its requests is answered now."""
        if (news := self._news.pop(run_id, None)) is not None:
            news.set()

    def _take_requests(self) -> None:
        for run_id in self.reception.take_requests():
            if (news := self._news.get(run_id)) is not None:
                news.set()

    async def answer(self, handler: Handler, exchange: Exchange, request: Request) -> Response:
        """The response of a handler, or the error that it raised."""
        try:
            self.watch()
            run_id = str(request.path_params["run_id"])
            self.authenticate(request, run_id)
            if exchange.connection is not None:
                exchange.connection.know()
            return await handler(exchange, request, run_id)
        except GapError as error:
            found = {**_error("GapError", error), "sizes": error.sizes}
            return answer(found, 409)
        except ConflictError as error:
            return answer(_error("ConflictError", error), 410)
        except ChaperoneError as error:
            return refusal(error)
        except OSError as error:
            why = error.strerror or type(error).__name__
            return refusal(SpoolError(f"unable to receive: {why}", error.errno))

    def authenticate(self, request: Request, run_id: str) -> None:
        """
        Raises:
            RefusedError: If the request has not the token of the run.
        """
        given = request.headers.getlist("authorization")
        kind, _, token = given[0].partition(" ") if len(given) == 1 else ("",) * 3
        if kind.lower() != "bearer" or not self.reception.admits(run_id, token.strip()):
            raise RefusedError(401, REFUSED)

    # -- the handlers

    async def output(self, exchange: Exchange, request: Request, run_id: str) -> Response:
        """Bytes of a stream."""
        stream = str(request.path_params["stream"])
        if stream not in format.STREAMS:
            raise RefusedError(404, f"unable to receive stream {stream!r}: want stdout or stderr")
        offset = _number(request.headers.get(wire.OFFSET), wire.OFFSET)
        data = await exchange.body(OUTPUT_BODY)
        async with self._alone(run_id):
            run = self.reception.run(run_id, _key(request))
            try:
                size = run.append(stream, offset, data)
            except GapError as error:
                size = error.sizes[stream]
                found = {**_error("GapError", error), "sizes": error.sizes}
                return answer(found, 409, {wire.OFFSET: str(size)})
            if data and run.status["state"] == "starting":
                run.changed({**run.status, "state": "running", "started": True})
        return Response(status_code=204, headers={wire.OFFSET: str(size)})

    async def completed(self, exchange: Exchange, request: Request, run_id: str) -> Response:
        """The final status; it is on this disk when it is acknowledged."""
        status = _object(await exchange.body(COMPLETED_BODY))
        key = status.pop("key", None) or _key(request)
        if key is not None and not isinstance(key, str):
            raise SpecError(f"unable to receive run {run_id!r}: want a key, got {key!r}")
        async with self._alone(run_id):
            run = self.reception.run(run_id, key)
            # It may take long, and other runs must not wait for it.
            await asyncio.to_thread(run.sync)
            run.ended(status)
            self.reception.forget(run)
        self._wake(run_id)
        return Response(status_code=204)

    async def requests(self, exchange: Exchange, request: Request, run_id: str) -> Response:
        """What was asked for the run, as soon as there is something."""
        after = _number(request.query_params.get("after", "0"), "after")
        async with self._alone(run_id):
            run = self.reception.run(run_id, _key(request))
        if run.is_ended():
            raise RefusedError(404, f"unable to get requests for run {run_id!r}: it has ended")
        news = self._news.setdefault(run_id, asyncio.Event())
        news.clear()
        found = self.reception.requests(run, after)
        if not found:
            await _first(exchange.gone(), news.wait(), REQUESTS_S)
            found = self.reception.requests(run, after)
        return answer({"requests": found})

    def _alone(self, run_id: str) -> asyncio.Lock:
        """A lock: two calls about one run come one after the other."""
        return self._locks.setdefault(run_id, asyncio.Lock())


async def _first(one: Any, other: Any, timeout_s: float) -> None:
    """Wait until one of two coroutines returns, or the time is over."""
    tasks = [asyncio.ensure_future(one), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _error(kind: str, error: ChaperoneError) -> dict[str, object]:
    return {"error": {"kind": kind, "message": str(error), "errno": None}}


def _key(request: Request) -> str | None:
    given = request.headers.get("if-match")
    return None if given is None else given.strip().strip('"')


def _number(text: str | None, name: str) -> int:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 19:
        raise RefusedError(400, f"unable to receive: want a number in {name}, got {text!r}")
    return int(text)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = jsontext.loads(body)
    except ValueError as error:
        raise SpecError(f"unable to receive: {error}") from error
    if not isinstance(value, dict):
        checks.fail_unseen("status", "an object", value)
    found: dict[str, Any] = value
    return found


# -- as a part of an agent


class Receptions:
    """
    The receivers of an agent, one for each of its spools.

    Args:
        agent (Agent): What serves the spools.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._open: dict[str, Callbacks] = {}

    def open_all(self) -> None:
        """Take over what an earlier agent received; called while the event loop runs."""
        for name in self._agent.spools():
            path = self._agent.spool(name).path
            if _receives(path):
                try:
                    self._of(path).watch()
                except SpoolError as error:
                    self._agent.log(str(error))

    def _of(self, path: str) -> Callbacks:
        if path not in self._open:
            self._open[path] = Callbacks(Reception(path, f"{wire.API}/{os.path.basename(path)}"))
        return self._open[path]

    def routes(self) -> list[AgentRoute]:
        """What an agent answers that receives."""
        run = "/{spool}/receive/{run_id}"
        return [
            AgentRoute(
                method="PUT",
                path=run,
                right="run",
                answer=self._expect,
                does="Expect a run: where its agent posts, and its token",
            ),
            self._route("POST", f"{run}/output/{{stream}}", "output", "Bytes of a stream"),
            self._route("POST", f"{run}/completed", "completed", "The final status"),
            self._route("GET", f"{run}/requests", "requests", "What was asked for the run"),
        ]

    def _route(self, method: str, path: str, name: str, does: str) -> AgentRoute:
        async def called(asked: Asked) -> Response:
            calls = self._known(asked)
            return await calls.answer(getattr(calls, name), asked.exchange, asked.request)

        return AgentRoute(method=method, path=path, right=None, answer=called, does=does, most=None)

    def _known(self, asked: Asked) -> Callbacks:
        """The receiver of a spool that expects runs; of others not even their absence is said."""
        name = str(asked.request.path_params["spool"])
        path = os.path.join(self._agent.directory, name)
        if path not in self._open:
            if name not in self._agent.spools() or not _receives(path):
                raise RefusedError(401, REFUSED)
        return self._of(path)

    async def _expect(self, asked: Asked) -> Response:
        """Expect a run; the address is the one by which this agent was asked."""
        given = _EXPECT(asked.json() if asked.body else {}, "")
        calls = self._of(asked.spool().path)
        calls.watch()
        host = asked.request.headers.get("host", "")
        url = f"https://{host}{asked.request.url.path.rpartition('/')[0]}"
        found, token = calls.reception.expect(asked.run_id, given["key"], url)
        return answer({"url": found, "token": token})


def _receives(path: str) -> bool:
    return os.path.isdir(os.path.join(path, format.RECEIVE))


_EXPECT = checks.Fields({"key": (checks.OrNull(checks.string), None)}, "request")


# -- as an application of its own


class Receiver:
    """
    An ASGI application that receives the runs of a spool; `chaperone.agent.receiver` makes it.

    It can be mounted in any other one, under the path of its URL, in one process.

    Args:
        reception (Reception): What it is for.
    """

    def __init__(self, reception: Reception) -> None:
        self._callbacks = calls = Callbacks(reception)
        routes = [
            self._route("/{run_id}/output/{stream}", "POST", calls.output),
            self._route("/{run_id}/completed", "POST", calls.completed),
            self._route("/{run_id}/requests", "GET", calls.requests),
        ]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        self._app.router.redirect_slashes = False

    def expect(self, run_id: str, key: str | None = None) -> tuple[str, str]:
        """As `chaperone.agent.reception.Reception.expect`."""
        return self._callbacks.reception.expect(run_id, key)

    def close(self) -> None:
        """Stop receiving; a later receiver of the spool goes on with its runs."""
        self._callbacks.close()

    def _route(self, path: str, method: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            return await self._callbacks.answer(handler, request.scope["chaperone"], request)

        return Route(path, endpoint, methods=[method])

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(None, logging.getLogger(__name__).info, scope, receive, send)
        await exchange.answer(self._asked)

    async def _asked(self, exchange: Exchange) -> None:
        await self._app(exchange.scope, exchange.receive, exchange.send)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = {404: "it has no such route", 405: "that route has other methods"}
    sentence = f"unable to ask the receiver: {why.get(error.status_code, error.detail)}"
    return refusal(RefusedError(error.status_code, sentence))
