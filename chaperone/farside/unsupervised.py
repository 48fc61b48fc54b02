"""
A program behind hops with nothing of ours beside it: for hosts that run no sh for us (a forced
command, network gear).

Knows: what a client's exit code can and can't say.  Must not know: how a connection is made, the
spool, statuses.
"""

from __future__ import annotations

from ..errors import StartError
from ..model.hops.route import Route
from ..program.spawn import Stdin
from . import payload
from .connect.dialer import Dialer
from .contact import Contact
from .records import ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..program.interface import Chaperone
    from ..program.streams import Stream


class Plain:
    """
    A dialogue with the program alone: its input, and then its output as it is.

    Args:
        ready_word, stdin: As in `Dialogue`.
    """

    payload = b""
    takes_lines = False

    def __init__(self, ready_word: bytes, stdin: tuple[int, int] | None = None) -> None:
        self.ready_word, self.stdin = ready_word, stdin

    def feed(self, stream: str, data: bytes) -> tuple[bytes, list[list[str]]]:
        """All of it is the program's."""
        return data, []

    def end(self, stream: str) -> bytes:
        """Nothing was kept back."""
        return b""

    def noise(self) -> bytes:
        """None: it can't be told from the program's bytes."""
        return b""


class UnsupervisedProgram:
    """
    The program of a run with `"supervise": false`.

    It can't be signalled, its pid is not known, what it leaves running is not found, and a killed
    client may leave it an orphan.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): Learns what happens.
    """

    def __init__(self, spec: dict[str, Any], chaperone: Chaperone) -> None:
        self._spec, self._chaperone = spec, chaperone
        route = Route.of(spec["remote"]["hops"])
        # Without a supervisor, only the first hop can send a ready word. If it can't, the hops
        # count as ready at once.
        announcing = route.announcing(payload.READY.decode().strip())
        self._ready_word = payload.READY if announcing is not None else b""
        self._dialer = Dialer(
            chaperone,
            # Without a ready word a client that is too old looks like a program that has ended.
            announcing or route.older(),
            inner=list(spec["program"]["argv"]),
            patience_s=spec["timeouts"]["connect"],
            owner=self,
        )
        self._own_codes = route.own_codes
        self._contact = Contact(spec, chaperone.loop)
        self._stdin = Stdin()
        self._stopped = False

    def start(self) -> None:
        """
        Set out for the far side.

        Raises:
            StartError: If something is asked for that only a supervisor can do.
        """
        program = self._spec["program"]
        asked = [name for name in ("cwd", "env", "umask", "rlimits") if program[name]]
        if asked:
            raise StartError(
                "far-side",
                f"unable to set program.{asked[0]}: there is no supervisor, because"
                " remote.supervise is false",
            )
        self._stdin.open(program["stdin"])
        self._dialer.dial(lambda: Plain(self._ready_word, self._stdin.source()))

    def children_changed(self) -> None:
        """SIGCHLD: nothing to do, the connection watches its own process."""

    def signal(self, signum: int) -> None:
        """Only log it: there is no supervisor that could pass it on."""
        self._chaperone.log(
            f"unable to send signal {signum}: there is no supervisor, because"
            " remote.supervise is false"
        )

    def stop(self, signum: int) -> None:
        """End the connection, the only thing we hold of it."""
        self._stopped = True
        self._dialer.give_up()

    def kill(self) -> None:
        """As `stop`: there is nothing stronger."""
        self.stop(9)

    def finish(self, grace_s: float) -> None:
        """The program has ended: what it left is not known."""

    # -- what the connection brings

    def waits(self, queue: str | None) -> None:
        """An engine makes it wait."""
        self._contact.queue = queue
        self._chaperone.noted(connection=self._contact.facts(self._dialer.argv, self._dialer.pid()))

    def connected(self) -> None:
        """We were let in, as far as can be known: what is asked for runs now, with a pid of its own
        that is not known."""
        self._contact.went_up()
        facts = self._contact.facts(self._dialer.argv, self._dialer.pid())
        self._chaperone.started(None, connection=facts)

    def output(self, stream: str, data: bytes) -> None:
        """Bytes of the program, into its streams."""
        self._stream(stream).write(data)

    def is_full(self, stream: str, freed: Callable[[], None]) -> bool:
        """As `Stream.is_full`."""
        return self._stream(stream).is_full(freed)

    def _stream(self, stream: str) -> Stream:
        merged = self._spec["program"]["merge_stderr"]
        return self._chaperone.streams["stdout" if merged else stream]

    def record(self, words: list[str]) -> None:
        """There are none in a `Plain` dialogue."""

    def unreachable(self, stage: str, message: str) -> None:
        """No connection: nothing was started."""
        self._chaperone.failed(stage, message, started=False)

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """
        No exit code says whether it was a signal, and some are a client's own word for all that
        went wrong.
        """
        told = code >= 0 and code not in self._own_codes
        if told and not (self._stopped and code > 128):
            self._chaperone.ended(
                None if code > 128 else code << 8, return_code=code, ambiguous=code > 128
            )
            self._chaperone.program_ended()
            self._chaperone.finished(leftovers=None, complete=True)
            return
        why = self._dialer.words() or "no word"
        if self._stopped:
            why = "it was stopped by closing the connection"
        self._chaperone.lost(
            f"{self._dialer.argv[0]} ended with {ending(code)},"
            f" which says nothing about the program: {why}"
        )
