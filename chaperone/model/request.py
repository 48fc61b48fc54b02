"""
Requests to a chaperone: the lines of `control`. Only this module writes and parses them.

    stop [SECONDS]    kill    signal NAME    renew    each with an optional by=WORD

Knows: the words of a request.  Must not know: its sender, or what is done about it.
"""

from __future__ import annotations

from ..errors import SpecError
from . import spec as specs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 4_096  # bytes of a line: PIPE_BUF; a longer write could mix with another writer's
LONGEST_GRACE_S = 1e10  # as the longest time of a spec
# How many invalid requests are logged: a mistake must not fill the log of a run.
MOST_REFUSALS = 100
BY_LENGTH = 128  # characters


class Request:
    """
    One request to a chaperone.

    Args:
        verb (str): stop, kill, signal or renew.
        grace_s (float): Of a stop: seconds, 0 to 1e10; None for the spec's.
        signal (str): Of `signal`: `SIGUSR1`, `USR1` or a number.
        by (str): The requester, as one word of at most 128 characters, or None.
    """

    def __init__(
        self,
        verb: str,
        grace_s: float | None = None,
        signal: str | None = None,
        by: str | None = None,
    ) -> None:
        self.verb, self.grace_s, self.signal, self.by = verb, grace_s, signal, by

    def line(self, run_id: str) -> bytes:
        """
        The line for `control`, with its newline; at most `LIMIT` bytes.

        Args:
            run_id (str): The run that the request is for; error messages name it.
        Raises:
            SpecError: If the grace, the signal or the requester's word is invalid.
        """
        words = [self.verb]
        if self.grace_s is not None:
            words.append(_grace(self.grace_s, run_id))
        if self.verb == "signal":
            words.append(_signal(self.signal, run_id))
        if self.by is not None:
            words.append(f"by={_word(self.by, run_id)}")
        return f"{' '.join(words)}\n".encode()


def _grace(grace_s: float, run_id: str) -> str:
    is_number = isinstance(grace_s, (int, float))
    if not is_number or not 0 <= grace_s <= LONGEST_GRACE_S:
        limit = f"at most {LONGEST_GRACE_S:g}" if is_number and grace_s > 0 else "at least 0"
        raise SpecError(
            f"unable to stop run {run_id!r}: want a grace of {limit} seconds, got {grace_s!r}"
        )
    return repr(float(grace_s))


def _signal(name: str | None, run_id: str) -> str:
    full = specs.signal_name(name) if isinstance(name, str) else None
    if full is None:
        want = "a signal's name such as 'SIGTERM'"
        raise SpecError(f"unable to signal run {run_id!r}: want {want}, got {name!r}")
    return full


def _word(by: str, run_id: str) -> str:
    if (
        not isinstance(by, str)
        or not by.isprintable()
        or len(by.split()) != 1
        or len(by) > BY_LENGTH
    ):
        want = f"one word of at most {BY_LENGTH} characters for `by`"
        raise SpecError(f"unable to send a request to run {run_id!r}: want {want}, got {by!r}")
    return by


def parsed(line: str) -> Request | None:
    """
    Parse a line, which a person may have written with `echo`.

    Args:
        line (str): Without its newline.
    Returns:
        Request: With the full name of its signal; None if the line is not a request.
    """
    words = line.split()
    by = next((word[3:] for word in words if word.startswith("by=")), None)
    match [word for word in words if not word.startswith("by=")]:
        case ["stop"]:
            return Request("stop", by=by)
        case ["stop", text] if (grace_s := _seconds(text)) is not None:
            return Request("stop", grace_s, by=by)
        case ["kill" | "renew" as verb]:
            return Request(verb, by=by)
        case ["signal", text] if (name := specs.signal_name(text)) is not None:
            return Request("signal", signal=name, by=by)
    return None


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_GRACE_S else None


class Reader:
    """Makes requests of the bytes of `control`, which arrive in pieces of any size."""

    def __init__(self) -> None:
        self._left = b""
        self._is_overlong = False
        self._refusals = 0

    def feed(self, data: bytes) -> Iterator[Request | str]:
        """
        Take bytes that arrived.

        Yields:
            Request: Each request that is complete now.
            str: A sentence for the log in place of an invalid request; only for the first
                `MOST_REFUSALS` of them.
        """
        for found in self._found(data):
            if isinstance(found, str):
                self._refusals += 1
                if self._refusals > MOST_REFUSALS:
                    continue
                if self._refusals == MOST_REFUSALS:
                    found += "; no further one is logged"
            yield found

    def _found(self, data: bytes) -> Iterator[Request | str]:
        *lines, self._left = (self._left + data).split(b"\n")
        for line in lines:
            if not self._is_overlong:
                text = line.decode("utf-8", "backslashreplace")
                yield parsed(text) or f"unable to take the request {text[:200]!r}: want {WANT}"
            self._is_overlong = False
        if len(self._left) > LIMIT:
            self._left = b""
            if not self._is_overlong:
                self._is_overlong = True
                size = f"more than {LIMIT} bytes"
                yield f"unable to take a request: it has {size}, and is ignored"


WANT = "stop [SECONDS], signal NAME, kill or renew"
