"""
Over the hops to another host: what is sent there so that an agent runs, and what comes back.

Knows: the ready word, the text before and after it.  Must not know: certificates, what a client
does with the answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ...errors import AgentError
from ...farside.connect.dialer import Dialer
from ...farside.payload import CONSTANT, READY
from ...farside.records import ending
from ...farside.unsupervised import Plain
from ...model.hops.route import Route
from ...program.loop import Loop
from . import far

PATIENCE_S = 60.0  # for a connection, as `timeouts.connect` of a spec
ANSWER_S = 2 * far.READY_S  # from the ready word to the answer
# Python reads the text that runs there from the same pipe, and counts it.
READER = (
    "import os,sys;r=sys.stdin.buffer.read;n=int(r(8)or 0);s=r(n);"
    f"len(s)==n>0 or os._exit({far.CUT});exec(s.decode())"
)
# A host may have a python3 that is too old, and a later one beside it.
NAMES = ("python3", *(f"python3.{minor}" for minor in range(15, 9, -1)))
TOO_OLD = "import sys;sys.exit(sys.version_info<(3,10))"
NONE = "no python"


def send(route: Route, place: str, settings: dict[str, Any], packed: bytes) -> dict[str, Any]:
    """
    Send an agent, and wait until it listens.

    Args:
        route (Route): The hops.
        place (str): Where they lead, for messages.
        settings (dict): As `far.main` reads them; they may be secret, and travel on stdin alone.
        packed (bytes): The code, as from `bundle`.
    Returns:
        dict: The answer of `far.main`.
    Raises:
        AgentError: If no agent runs there; one may, if the connection was lost too early.
    """
    word = f"chaperone-{os.urandom(8).hex()}"
    sending = Sending(route, payload({**settings, "word": word}, packed))
    try:
        sending.run()
    finally:
        sending.close()
    lines = sending.said.decode(errors="replace").splitlines()
    answer = next((line[len(word) + 1 :] for line in lines if line.startswith(word)), None)
    if answer == NONE:
        raise AgentError(
            f"unable to deploy an agent {place}: python3 of 3.10 or later is required there;"
            " to run a program over ssh on a host without it, use `remote` in a spec"
        )
    found = {"error": sending.why} if answer is None else json.loads(answer)
    if "error" in found:
        raise AgentError(f"unable to deploy an agent {place}: {found['error']}")
    return dict(found)


def payload(settings: dict[str, Any], packed: bytes) -> bytes:
    """All that goes there after the ready word: one line for sh, then three counted parts."""
    tries = ";".join(
        f"{name} -I -S -c '{TOO_OLD}' </dev/null >/dev/null 2>&1 && exec {name} -I -S -c '{READER}'"
        for name in NAMES
    )
    line = f"{tries};echo;echo {settings['word']} {NONE};exit 69\n"
    with open(far.__file__, encoding="ascii") as file:
        text = file.read()
    parts = [text.encode(), json.dumps(settings).encode(), packed]
    counted = (f"{len(part):0{far.DIGITS}d}".encode() + part for part in parts)
    return line.encode() + b"".join(counted)


class Sending:
    """
    One connection, tried again as for a run until it is there.

    Args:
        route (Route): The hops.
        payload (bytes): What goes there.

    Attributes:
        said (bytes): What came on stdout.
        why (str): Why there is no answer, if there is none.
    """

    spool_fd = -1  # it takes no slot and shares no connection: both are a spool's

    def __init__(self, route: Route, payload: bytes) -> None:
        self.loop = Loop()
        # ssh's own messages, apart from what startup files print: by a name that a child can open.
        self._log_fd = os.memfd_create("log")
        self.log_path = f"/proc/{os.getpid()}/fd/{self._log_fd}"
        self.said, self.why = b"", ""
        self._payload = payload
        self._dialer = Dialer(self, route, list(CONSTANT), PATIENCE_S, owner=self)

    def run(self) -> None:
        """Send it, and read until the other side closes the connection."""
        self._dialer.dial(self._dialogue)
        self.loop.run()

    def close(self) -> None:
        """Close what ssh wrote its messages into."""
        os.close(self._log_fd)

    def _dialogue(self) -> Plain:
        dialogue = Plain(READY)
        dialogue.payload = self._payload
        return dialogue

    def log(self, text: str) -> None:
        """A run's log has these lines; here the last message says enough."""

    # -- what the connection brings

    def waits(self, queue: str | None) -> None:
        """An engine makes it wait."""

    def connected(self) -> None:
        """The payload goes out now; without an answer in time the connection ends."""
        self.loop.later(ANSWER_S, self._dialer.terminate)

    def output(self, stream: str, data: bytes) -> None:
        """Its answer, on stdout."""
        if stream == "stdout":
            self.said = (self.said + data)[-1_000_000:]

    def is_full(self, stream: str, freed: Callable[[], None]) -> bool:
        """Never: there is little."""
        return False

    def record(self, words: list[str]) -> None:
        """There are none in a `Plain` dialogue."""

    def unreachable(self, stage: str, message: str) -> None:
        """No connection: nothing was started."""
        self.why = message.removeprefix("unable to connect: ")
        self.loop.end()

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """It is over; the answer has come before, or never comes."""
        said = self._dialer.words() or noise.decode(errors="replace").strip().replace("\n", " ")
        cut = "the text was cut" if code == far.CUT else said or "no message"
        self.why = f"the connection ended with {ending(code)} and no answer: {cut}"
        self.loop.end()
