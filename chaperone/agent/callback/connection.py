"""
The connection to a receiver: one run's output, its final status, and the requests to it.

Knows: httpx, TLS, the routes of a receiver.  Must not know: what to post, when to try again.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx

from ...errors import AgentError
from .. import tls, wire

Value = TypeVar("Value")

CONNECT_S = 10.0
ANSWER_S = 120.0  # for a whole exchange: 1 MiB at 16 KiB a second takes 64 s
POLL_S = 60.0  # how long a receiver may hold the answer to `requests`
# A server closes an idle connection after some seconds (hypercorn: 5); a request that crosses that
# would fail.
IDLE_S = 2.0
MOST = 65_536  # bytes of an answer


class Answer:
    """
    What a receiver answered.

    Attributes:
        code (int): HTTP's.
        offset (int): The value of Upload-Offset; None if it has none, or no number.
        value: Its body as JSON; None if it is no JSON.
    """

    def __init__(self, code: int, offset: int | None, value: Any) -> None:
        self.code, self.offset, self.value = code, offset, value

    def __str__(self) -> str:
        return f"it answered with HTTP status {self.code}"


def client(ca_file: str | None) -> httpx.AsyncClient:
    """
    A client that several connections may share, for `async with`.

    Args:
        ca_file (str): The authorities to trust; None for those of this host.
    Raises:
        SpecError: If they can't be read.
    """
    return httpx.AsyncClient(
        verify=tls.client_context(ca_file),
        # Nothing of the environment: a proxy or a netrc would see, or replace, the token.
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(POLL_S + CONNECT_S, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S),
        headers={"Accept-Encoding": "identity", "User-Agent": "chaperone"},
    )


class Connection:
    """
    What one run is posted by.

    Args:
        shared (httpx.AsyncClient): From `client`.
        callback (dict): As in a spec, with its token.
        key (str): The run's: by it a receiver distinguishes two runs with one URL.
    Raises, in each call:
        AgentError: The reason why there was no answer, as the end of a sentence.
    """

    def __init__(self, shared: httpx.AsyncClient, callback: dict[str, Any], key: str) -> None:
        self._shared, self._key = shared, key
        self.url = str(callback["url"]).rstrip("/")
        self._token = callback.get("token")
        self._token_file = callback.get("token_file")

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    async def output(self, stream: str, offset: int, data: bytes) -> Answer:
        """Post bytes of a stream, which begin at an offset."""
        headers = {wire.OFFSET: str(offset), "Content-Type": "application/octet-stream"}
        return await self._exchange("POST", f"output/{stream}", headers, data)

    async def completed(self, status: dict[str, Any]) -> Answer:
        """Post the final status."""
        headers = {"Content-Type": "application/json"}
        return await self._exchange("POST", "completed", headers, json.dumps(status).encode())

    async def requests(self, after: int) -> Answer:
        """Ask for the requests behind that number; the answer may take a minute."""
        return await self._exchange("GET", f"requests?after={after}", {}, None)

    async def _exchange(
        self, method: str, path: str, headers: dict[str, str], data: bytes | None
    ) -> Answer:
        try:
            proof = {"Authorization": f"Bearer {self._present_token()}"}
            if self._key:
                proof["If-Match"] = f'"{self._key}"'
            url = f"{self.url}/{path}"
            asked = self._shared.build_request(method, url, headers=headers | proof, content=data)
            answer = await within(self._sent(asked), ANSWER_S)
        except AgentError:  # an OSError too
            raise
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise AgentError(_reason(error)) from error
        if answer is None:
            raise AgentError(f"it did not answer within {ANSWER_S:g} s")
        return answer

    async def _sent(self, asked: httpx.Request) -> Answer:
        answered = await self._shared.send(asked, stream=True)
        try:
            body = bytearray()
            async for piece in answered.aiter_raw():
                body += piece
                if len(body) > MOST:
                    raise AgentError(f"its answer has more than {MOST} bytes")
        finally:
            await answered.aclose()
        offset = answered.headers.get(wire.OFFSET, "")
        is_number = offset.isascii() and offset.isdigit() and len(offset) < 20
        try:
            value = json.loads(body) if body else None
        except (ValueError, RecursionError):
            value = None
        return Answer(answered.status_code, int(offset) if is_number else None, value)

    def _present_token(self) -> str:
        """The token; from its file each time, which may have been replaced."""
        if self._token is not None:
            return str(self._token)
        if self._token_file is None:
            raise AgentError("the token is in no file, and was not kept: use callback.token_file")
        try:
            with open(self._token_file, encoding="ascii") as file:
                token = file.read(8_192).strip()
        except (OSError, ValueError) as error:
            why = (isinstance(error, OSError) and error.strerror) or "it is not ASCII"
            raise AgentError(f"unable to read token file {self._token_file!r}: {why}") from error
        if not token.isprintable() or len(token.split()) != 1:
            raise AgentError(f"unable to read token file {self._token_file!r}: want one line")
        return token


async def within(work: Coroutine[Any, Any, Value], timeout_s: float | None) -> Value | None:
    """
    The result of a coroutine; None if it takes longer, and it is cancelled. Not asyncio.wait_for,
    which may swallow a cancellation, up to Python 3.11.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _reason(error: BaseException) -> str:
    """Why there was no answer, without what was sent."""
    refused = tls.refusal(error)
    if refused is not None:
        return refused
    if isinstance(error, httpx.TimeoutException):
        return "it did not answer in time"
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno is not None:
            # asyncio says which address, and not what the system said; of a name errno is below 0.
            known = os.strerror(found.errno) if found.errno > 0 else found.strerror
            return f"unable to connect: {known}"
        found = found.__cause__ or found.__context__
    if isinstance(error, httpx.ConnectError):
        return "unable to connect"
    return "the connection was cut"
