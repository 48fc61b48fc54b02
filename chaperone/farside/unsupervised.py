"""
A program behind hops with nobody beside it over there: for hosts that run no sh for us (a forced
command, network gear).

Knows: what ssh's exit code can and can't tell.  Must not know: how a connection is made, the spool,
statuses.
"""

from __future__ import annotations

from ..errors import StartError
from ..program.spawn import Stdin
from .contact import Contact
from .dialer import Dialer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..program.interface import Chaperone


class UnsupervisedProgram:
    """
    The program of a run with `"supervise": false`.

    It can't be signalled, its pid is not known, what it leaves running is not found, and a killed
    client may leave it an orphan.

    Args:
        spec (dict): Canonical.
        chaperone (Chaperone): Told what happens.
    """

    def __init__(self, spec: dict[str, Any], chaperone: Chaperone) -> None:
        self._spec, self._chaperone = spec, chaperone
        self._dialer = Dialer(spec, chaperone, list(spec["program"]["argv"]), "", self, bare=True)
        self._contact = Contact(spec, self._dialer, chaperone.loop)
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
                f"unable to set program.{asked[0]}: nobody is there to do it where remote.supervise is false",
            )
        self._stdin.open(program["stdin"])
        self._dialer.dial(b"", self._stdin.source())

    def children_changed(self) -> None:
        """SIGCHLD: the connection watches its own."""

    def signal(self, signum: int) -> None:
        """There is nobody to pass it on."""
        self._chaperone.log(
            f"unable to send signal {signum}: nobody is there to pass it on where remote.supervise is false"
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

    def close(self) -> None:
        """Let go of everything."""
        self._dialer.give_up()

    # -- what the connection brings

    def connected(self) -> None:
        """ssh was let in: what is asked for runs now. Nobody knows its pid."""
        self._contact.went_up()
        self._chaperone.started(None, connection=self._contact.facts())

    def output(self, stream: str, data: bytes) -> None:
        """Bytes of the program, into its streams."""
        self._chaperone.streams[
            "stdout" if self._spec["program"]["merge_stderr"] else stream
        ].write(data)

    def record(self, words: list[str]) -> None:
        """Nobody writes any."""

    def unreachable(self, stage: str, message: str) -> None:
        """No connection: nothing was started."""
        self._chaperone.failed(stage, message, started=False)

    def closed(self, code: int, ready: bool, noise: bytes) -> None:
        """
        Nobody over there tells an exit from a signal, and 255 is ssh's own word for all that went
        wrong.
        """
        if 0 <= code < 255 and not (self._stopped and code > 128):
            self._chaperone.ended(
                None if code > 128 else code << 8, return_code=code, ambiguous=code > 128
            )
            self._chaperone.program_ended()
            self._chaperone.finished(leftovers=None, complete=True)
            return
        client = self._dialer.argv[0]
        why = (
            "it was stopped by closing the connection"
            if self._stopped
            else self._dialer.words() or "no word"
        )
        ending = f"code {code}" if code >= 0 else f"signal {-code}"
        self._chaperone.lost(
            f"{client} ended with {ending}, which tells nothing of the program: {why}"
        )
