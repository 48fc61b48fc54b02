"""
Connections to an agent: they perform calls, one that blocks and one that awaits.

Knows: httpx, TLS, who waits.  Must not know: what is asked, what an answer means.
No redirect is followed, no proxy of the environment is used, and no answer is decompressed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

from ... import __version__
from .. import tls
from ..wire import PING_S
from .place import Place
from .question import (
    ANSWER_S,
    Answer,
    Call,
    Pause,
    Question,
    Steps,
    Unanswered,
    Value,
    misunderstood,
)
from .streaming import Streaming

CONNECT_S = 10.0
ERROR_BYTES = 1 << 20
SILENT_S = 3 * PING_S  # after it a stream without a sign of life is taken for dead
# Less than the 5 s after which an agent closes a connection that is not used.
KEPT_S = 4.0
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=KEPT_S)
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.LocalProtocolError)


class _Line:
    """What both connections have: the place, and how a question is sent there."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place,)

    def settings(self) -> dict[str, Any]:
        """The arguments of a client of httpx."""
        return {
            "verify": self.place.context(),
            "trust_env": False,
            "follow_redirects": False,
            "limits": LIMITS,
            "headers": {
                "User-Agent": f"chaperone/{__version__}",
                "Accept-Encoding": "identity",
            },
        }

    def request(self, client: Any, question: Question) -> Any:
        read_s = SILENT_S if question.is_stream else ANSWER_S + question.wait_s
        name = self.place.server_name
        return client.build_request(
            question.method,
            self.place.origin + question.path,
            headers={**question.headers, "Authorization": f"Bearer {self.place.token()}"},
            content=question.body,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S, read=read_s),
            extensions={} if name is None else {"sni_hostname": name},
        )

    def failure(self, error: httpx.TransportError) -> Unanswered:
        refused = tls.refusal(error)
        was_sent = not isinstance(error, NOT_SENT)
        reason = refused or _reason(error)
        verb = "trust" if refused and not was_sent else "reach"
        sentence = f"unable to {verb} the agent of {self.place.text!r}: {reason}"
        return Unanswered(sentence, reason, was_sent, is_settled=verb == "trust")


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "it did not answer in time"
    if isinstance(error, httpx.RemoteProtocolError):
        return "it closed the connection before its answer was complete"
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, socket.gaierror):
            return found.strerror or "its name is not known"
        if isinstance(found, OSError) and found.errno:
            return os.strerror(found.errno)  # asyncio has a text of its own
        found = found.__cause__ or found.__context__
    return str(error) or "the connection was closed"


class _Body:
    """The bytes of an answer, up to a limit; an error may be longer than the answer would be."""

    def __init__(self, question: Question, response: httpx.Response) -> None:
        self._response = response
        self._parts: list[bytes] = []
        self._room = question.limit if response.is_success else max(question.limit, ERROR_BYTES)

    def add(self, part: bytes) -> None:
        self._room -= len(part)
        if self._room < 0:
            raise misunderstood("a shorter answer", part[:80])
        self._parts.append(part)

    def answer(self) -> Answer:
        status, headers = self._response.status_code, self._response.headers
        return Answer(status=status, headers=headers, body=b"".join(self._parts))


# -- one that blocks


class Connection(_Line):
    """
    A connection for callers that block; any number of threads may use it.

    It keeps some connections open for a few seconds, for the next call.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._client: httpx.Client | None = None
        self._pid = 0

    def perform(self, call: Call[Value]) -> Value:
        """Take the steps of a call; the value that it returns."""
        steps = Steps(call)
        while (step := steps.next()) is not None:
            try:
                steps.did(self._take(step))
            except Unanswered as error:
                steps.failed(error)
        value: Value = steps.value
        return value

    def _take(self, step: Question | Pause) -> Answer | None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        if step.is_once:
            # By a connection of its own: one that was kept open may have been closed meanwhile,
            # and the question would be lost in it without a proof.
            with self.client() as client:
                return self.answer(client, step)
        return self.kept_answer(step)

    def client(self) -> httpx.Client:
        """A client of its own, which the caller closes."""
        return httpx.Client(**self.settings())

    def _kept(self) -> httpx.Client:
        # The sockets of a process belong to it alone: a child of a fork opens its own.
        if self._client is None or self._pid != os.getpid():
            self._client, self._pid = self.client(), os.getpid()
            weakref.finalize(self, self._client.close)
        return self._client

    def kept_answer(self, question: Question) -> Answer:
        """The answer to a question, over a connection that is kept open for the next one."""
        return self.answer(self._kept(), question)

    def answer(self, client: httpx.Client, question: Question) -> Answer:
        """
        The answer to a question.

        Raises:
            Unanswered: If there is none, or a part of it.
        """
        with self.stream(client, question) as response:
            return self.gathered(response, question)

    def gathered(self, response: httpx.Response, question: Question) -> Answer:
        """The whole answer of a response; to be called inside of `stream`."""
        body = _Body(question, response)
        for part in response.iter_raw():
            body.add(part)
        return body.answer()

    @contextmanager
    def stream(self, client: httpx.Client, question: Question) -> Iterator[httpx.Response]:
        """The response to a question, whose body the caller reads."""
        request = self.request(client, question)
        try:
            response = client.send(request, stream=True)
            try:
                yield response
            finally:
                response.close()
        except httpx.TransportError as error:
            raise self.failure(error) from error


# -- one that awaits


class AioConnection(_Line):
    """
    A connection for the tasks of event loops.

    What it keeps open is closed a few seconds after its last use, or when the loop ends.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._kept: _Kept | None = None

    async def perform(self, call: Call[Value]) -> Value:
        """As `Connection.perform`."""
        steps = Steps(call)
        while (step := steps.next()) is not None:
            try:
                steps.did(await self._take(step))
            except Unanswered as error:
                steps.failed(error)
        value: Value = steps.value
        return value

    async def _take(self, step: Question | Pause) -> Answer | None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        if step.is_once:  # as of `Connection`
            async with self.client() as client:
                return await self.answer(client, step)
        return await self.kept_answer(step)

    def client(self) -> httpx.AsyncClient:
        """As of `Connection`."""
        return httpx.AsyncClient(**self.settings())

    def streaming(self) -> httpx.AsyncClient:
        """A client of its own for answers that go on, which the caller closes."""
        settings = self.settings()
        return httpx.AsyncClient(transport=Streaming(settings["verify"]), **settings)

    async def kept_answer(self, question: Question) -> Answer:
        """As of `Connection`."""
        if self._kept is None or not self._kept.is_usable():
            self._kept = _Kept(self.client())
        with self._kept as client:
            return await self.answer(client, question)

    async def answer(self, client: httpx.AsyncClient, question: Question) -> Answer:
        """As of `Connection`."""
        async with self.stream(client, question) as response:
            return await self.gathered(response, question)

    async def gathered(self, response: httpx.Response, question: Question) -> Answer:
        """As of `Connection`."""
        body = _Body(question, response)
        async for part in response.aiter_raw():
            body.add(part)
        return body.answer()

    @asynccontextmanager
    async def stream(
        self, client: httpx.AsyncClient, question: Question
    ) -> AsyncIterator[httpx.Response]:
        """As of `Connection`."""
        request = self.request(client, question)
        opened: list[Any] = []

        async def trace(name: str, info: dict[str, Any]) -> None:
            if name == "connection.connect_tcp.complete":
                opened.append(info["return_value"])

        # httpcore leaves the socket open if a task is cancelled within the handshake of TLS.
        request.extensions["trace"] = trace
        try:
            try:
                response = await client.send(request, stream=True)
            except asyncio.CancelledError:
                for each in opened:
                    await each.aclose()
                raise
            try:
                yield response
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            raise self.failure(error) from error


class _Kept:
    """
    A client whose connections stay open for the next question.

    A task closes them. To close them takes turns of the loop, which an object that is dropped at
    the end of a loop does not get any more, nor does an asynchronous generator then; but a loop
    that ends cancels its tasks and waits for them.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._users = 0
        self._is_open = True
        self._used_at = self._loop.time()
        self._task = self._loop.create_task(self._close(), name="chaperone-connections")
        # A loop that is dropped with its tasks, as by Apsis, would log that this one is pending.
        self._task._log_destroy_pending = False  # type: ignore[attr-defined]

    def is_usable(self) -> bool:
        """Whether it is open, and of the running loop."""
        return self._is_open and self._loop is asyncio.get_running_loop()

    def __enter__(self) -> httpx.AsyncClient:
        self._users += 1
        return self._client

    def __exit__(self, *exception: object) -> None:
        self._users -= 1
        self._used_at = self._loop.time()

    async def _close(self) -> None:
        try:
            while self._users or self._used_at + KEPT_S > self._loop.time():
                await asyncio.sleep(KEPT_S)
        except GeneratorExit:  # dropped with its loop: nothing can be awaited
            raise
        except BaseException:
            await self._end()
            raise
        await self._end()

    async def _end(self) -> None:
        self._is_open = False  # first: to close it takes turns, in which a question may come
        await self._client.aclose()
