"""
A question to an agent and its answer, and how often a question is asked until it is answered.

Knows: HTTP's methods, statuses and headers.  Must not know: a socket, a library for HTTP, what is
asked.
A call is a generator of steps: it yields what is to be done, and gets what came of it. So each call
is written once, and two connections perform it: one that blocks and one that awaits.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import attrs

from ...errors import AgentError, ChaperoneError
from ..wire import API, error_from

Value = TypeVar("Value")

ANSWER_S = 30.0  # in which an agent answers what it can answer at once
PATIENCE_S = 5.0  # in which an agent is started again by systemd, and takes requests
LIMIT = 64 * 1024 * 1024  # bytes of an answer, as of a JSON file of a spool
PASSING = (429, 502, 503, 504)  # of a proxy, or of an agent that has too much to do


@attrs.frozen(kw_only=True)
class Question:
    """
    What an agent is asked.

    Attributes:
        path (str): Quoted, with its query.
        wait_s (float): How long the agent may wait before it answers, in seconds.
        is_once (bool): Whether it must not be sent twice.
        is_stream (bool): Whether the body of the answer is read in pieces, as long as it lasts.
        limit (int): Bytes of the answer's body.
    """

    method: str
    path: str
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes | None = attrs.field(default=None, repr=False)
    wait_s: float = 0.0
    is_once: bool = False
    is_stream: bool = False
    limit: int = LIMIT


@attrs.frozen(kw_only=True)
class Answer:
    """
    What an agent answered.

    Attributes:
        headers: By name, whatever its case.
        body (bytes): Empty for a stream that was opened.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=False)


@attrs.frozen
class Pause:
    """A step of a call: wait for some seconds."""

    seconds: float


class Unanswered(AgentError):
    """
    There was no answer, or only a part of it.

    Args:
        sentence (str): The whole message.
        reason (str): Its part after the colon.
        was_sent (bool): Whether the agent may have got the question.
        is_settled (bool): Whether asking again is of no use: the agent's certificate is refused.
    """

    def __init__(
        self, sentence: str, reason: str, was_sent: bool = True, is_settled: bool = False
    ) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.was_sent = was_sent
        self.is_settled = is_settled


Step = Question | Pause
Call = Generator[Any, Any, Value]  # yields a Step; gets the Answer of a Question


class Steps:
    """
    The steps of a call, for a connection that takes them one after the other.

    Attributes:
        value: What the call returned, after its last step.
    """

    def __init__(self, call: Call[Any]) -> None:
        self._call = call
        self._go_on: Callable[[Any], Any] = call.send
        self._with: Any = None
        self.value: Any = None

    def next(self) -> Any:
        """The next step; None after the last one."""
        try:
            return self._go_on(self._with)
        except StopIteration as over:
            self.value = over.value
            return None

    def did(self, result: Any) -> None:
        """A step was taken; the call gets what came of it."""
        self._go_on, self._with = self._call.send, result

    def failed(self, error: Unanswered) -> None:
        """A question was not answered."""
        self._go_on, self._with = self._call.throw, error


def resource(name: str, *parts: str, **query: object) -> str:
    """The path of a resource of a spool, quoted; what is None in the query is left out."""
    given = {key: str(value) for key, value in query.items() if value is not None}
    path = "/".join((API, *(quote(part, safe="") for part in (name, *parts))))
    return path + (f"?{urlencode(given)}" if given else "")


def pauses(first_s: float, most_s: float) -> Iterator[float]:
    """How long to wait before each next try, in seconds: up to twice as long each time."""
    pause_s = first_s
    while True:
        # By chance: a thousand clients of an agent that starts again do not come at one time.
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(pause_s * 2, most_s)


def answered(
    question: Question, patience_s: float | None = None, accepted: tuple[int, ...] = ()
) -> Call[Answer]:
    """
    Ask until there is an answer.

    Args:
        patience_s (float): Seconds after which an agent that does not answer is given up; None for
            `PATIENCE_S`, as for one that never got the question. A question that must not be sent
            twice is asked again only if it was not sent.
        accepted (tuple): Statuses that report no error here.
    Raises:
        ChaperoneError: The error that the agent reported, of the class of the local call.
        AgentError: If there was no answer.
    """
    began = time.monotonic()
    give_up_s, was_sent = PATIENCE_S, False
    for pause_s in pauses(0.1, 2.0):
        error: ChaperoneError
        try:
            answer: Answer = yield question
            found = refusal(answer)
            if found is None or answer.status in accepted:
                return answer
            error = found
            if question.is_once or not is_passing(answer, error):
                raise error
        except Unanswered as unanswered:
            error = unanswered
            # By any try: what the agent got then it may have done.
            was_sent = unanswered.was_sent = was_sent or unanswered.was_sent
            if unanswered.is_settled or (question.is_once and unanswered.was_sent):
                raise
            if unanswered.was_sent:
                give_up_s = patience_s or PATIENCE_S
        if time.monotonic() + pause_s > began + give_up_s:
            raise error
        yield Pause(pause_s)
    raise AssertionError  # the pauses have no end


def refusal(answer: Answer) -> ChaperoneError | None:
    """The error that an answer reports; None if it reports none."""
    # A redirect is none of the answers of an agent, and the token is for this one alone.
    if 200 <= answer.status < 300:
        return None
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        value = None
    return error_from(value, answer.status)


def is_passing(answer: Answer, error: ChaperoneError) -> bool:
    """Whether the same question may be answered a little later."""
    return answer.status in PASSING and type(error) is AgentError


def object_in(answer: Answer) -> dict[str, Any]:
    """
    The JSON object of an answer.

    Raises:
        AgentError: If it is none.
    """
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise misunderstood("a JSON object", answer.body[:80])
    return value


def misunderstood(want: str, got: object) -> AgentError:
    """The error about an answer that no agent gives."""
    return AgentError(f"unable to understand the agent: want {want}, got {got!r}")
