"""
A request and its answer: its token, how much and how fast it may be, what is logged.

Knows: tokens, bodies, errors as HTTP has them.  Must not know: routes, spools, sockets.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response

from ...errors import AgentError, ChaperoneError, SpoolError
from ...model import jsontext
from .. import wire
from .tokens import Token, Tokens

BODY_S = 10.0  # until the first bytes of a body; then
BYTES_PER_S = 16 * 1024  # so many at least
LINGER_S = 2.0  # for the rest of a body that was refused
LINGER_BYTES_PER_S = 512 * 1024  # so many at least, if it takes longer
LONGEST_LINGER_S = 30.0

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class NoSpoolError(SpoolError):
    """There is no spool of that name."""


class LiveRunError(SpoolError):
    """The run must end first."""


class RefusedError(AgentError):
    """
    A request that is refused before it reaches a handler.

    Args:
        status (int): As HTTP has it.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers: dict[str, str] = {}


def answer(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON."""
    text = jsontext.dumps(value) + "\n"
    return Response(text, status, headers, media_type="application/json")


def refusal(error: ChaperoneError) -> Response:
    """The response for an error."""
    headers, status = {}, wire.error_status(error)
    if isinstance(error, RefusedError):
        headers, status = error.headers, error.status
    elif isinstance(error, (NoSpoolError, LiveRunError)):
        status = 404 if isinstance(error, NoSpoolError) else 409
    if status == 401:
        headers = {**headers, "WWW-Authenticate": "Bearer"}
    if status == 503:
        headers = {**headers, "Retry-After": "1"}
    return answer(wire.error_object(error), status, headers)


def bug(error: BaseException) -> str:
    """A fault of ours as a sentence: where it is, without values, which may be secrets."""
    places = traceback.extract_tb(error.__traceback__)[-3:]
    shown = ", ".join(f"{os.path.basename(each.filename)}:{each.lineno}" for each in places)
    return f"{type(error).__name__} at {shown} (this is a bug)"


class CutError(Exception):
    """An answer ends before its end: the client sees that and asks again."""


class Exchange:
    """
    A request and its answer, as the server has them.

    Attributes:
        scope (dict): As of ASGI; `chaperone` in it is this.
        token (Token): Of the requester; None as long as none was looked at.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        log: Callable[[str], None],
        scope: Any,
        receive: Receive,
        send: Send,
    ) -> None:
        self.scope = scope
        self.token: Token | None = None
        self._tokens = tokens
        self._say = log
        self._receive = receive
        self._send = send
        self._has_all = False  # of the request
        self._has_gone = False  # the client
        self._status: int | None = None
        self._sent = 0
        self._is_whole = False  # the answer
        scope["chaperone"] = self

    async def answer(self, asked: Callable[[Exchange], Awaitable[None]]) -> None:
        """Answer the request, and log that."""
        began = time.monotonic()
        try:
            await self._answer(asked)
        except CutError:
            pass
        finally:
            self._log(began)
            if not self._is_whole and self.connection is not None:
                self.connection.cut()

    async def _answer(self, asked: Callable[[Exchange], Awaitable[None]]) -> None:
        try:
            await asked(self)
        except CutError:
            raise
        except ChaperoneError as error:
            if self._status is None:
                await refusal(error)(self.scope, self.receive, self.send)
        except Exception as error:  # noqa: BLE001  a bug: its client gets an answer
            self._say(f"unable to answer: {bug(error)}")
            if self._status is None:
                sentence = f"unable to answer: {type(error).__name__} (this is a bug)"
                await refusal(ChaperoneError(sentence))(self.scope, self.receive, self.send)

    @property
    def connection(self) -> Any:
        """The connection that it is on; None where another server than ours has it."""
        return self.scope.get("state", {}).get("connection")

    def _log(self, began: float) -> None:
        host = (self.scope.get("client") or ("-",))[0]
        name = "-" if self.token is None else self.token.name
        # Without what follows a `?`: a mistaken client may put a secret there.
        path = self.scope.get("raw_path", b"?").decode("ascii", "backslashreplace")
        took = f"{(time.monotonic() - began) * 1000:.0f}ms"
        end = "" if self._is_whole else " cut"
        answered = f"{self._status or '-'} {self._sent}B {took}{end}"
        self._say(f"{host} {name} {self.scope['method']} {path} {answered}")

    # -- who asks

    def authenticate(self) -> None:
        """
        Look at the token.

        Raises:
            RefusedError: If there is none, or it is not valid.
        """
        assert self._tokens is not None, "a receiver looks at the tokens of its runs"
        if said := self._tokens.refresh():
            self._say(said)
        given = [value for name, value in self.scope["headers"] if name == b"authorization"]
        kind, _, text = given[0].decode("latin-1").partition(" ") if len(given) == 1 else ("",) * 3
        if kind.lower() == "bearer":
            self.token = self._tokens.find(text.strip())
        if self.token is None:
            why = "its token is not valid" if given else "it has no token"
            raise RefusedError(401, f"unable to answer a request: {why}")
        if self.connection is not None:
            self.connection.know()

    def require(self, right: str | None) -> None:
        """
        Raises:
            RefusedError: If the token does not have the right.
        """
        if right is not None and (self.token is None or not self.token.may(right)):
            name = None if self.token is None else self.token.name
            raise RefusedError(
                403, f"unable to answer a request: token {name!r} has only the right 'look'"
            )

    # -- the request

    async def body(self, most: int) -> bytes:
        """
        All of the body.

        Args:
            most (int): Its bytes, at most.
        Raises:
            RefusedError: If it is too large, too slow, or compressed.
            CutError: If the client has gone.
        """
        headers = dict(self.scope["headers"])
        if b"content-encoding" in headers:
            raise RefusedError(
                415, "unable to answer a request: want a body without Content-Encoding"
            )
        too_large = RefusedError(
            413, f"unable to answer a request: want a body of at most {most} bytes"
        )
        if int(headers.get(b"content-length", b"0")) > most:
            raise too_large
        pieces, size, began = [], 0, time.monotonic()
        while not self._has_all:
            left = began + BODY_S + size / BYTES_PER_S - time.monotonic()
            try:
                message = await asyncio.wait_for(self.receive(), max(left, 0))
            except asyncio.TimeoutError:
                sentence = "unable to answer a request: its body is too slow"
                raise RefusedError(408, sentence) from None
            if message["type"] == "http.disconnect":
                raise CutError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > most:
                raise too_large
        return b"".join(pieces)

    async def receive(self) -> Any:
        """As of ASGI."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._has_all = True
        self._has_gone = self._has_gone or message["type"] == "http.disconnect"
        return message

    async def gone(self) -> None:
        """Return when the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    # -- the answer

    async def send(self, message: Any) -> None:
        """As of ASGI; the rest of a body that was refused is taken, and dropped."""
        if self._has_gone:  # starlette would answer 500 to a `CutError`, as to any other
            raise CutError
        if message["type"] == "http.response.start":
            self._status = message["status"]
        else:
            self._sent += len(message.get("body", b""))
            if not message.get("more_body", False):
                if not self._has_all:
                    await self._send({**message, "more_body": True})
                    await self._linger()
                    message = {"type": "http.response.body"}
                self._is_whole = True
        await self._send(message)

    async def _linger(self) -> None:
        """
        A connection that is closed with bytes to read is reset, and its client may lose the answer.
        """
        began, size = time.monotonic(), 0
        while not self._has_all:
            longest_s = min(LINGER_S + size / LINGER_BYTES_PER_S, LONGEST_LINGER_S)
            try:
                left = max(began + longest_s - time.monotonic(), 0)
                message = await asyncio.wait_for(self.receive(), left)
            except asyncio.TimeoutError:
                raise CutError from None
            if message["type"] == "http.disconnect":
                raise CutError
            size += len(message.get("body", b""))
