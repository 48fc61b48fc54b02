"""
A route: all hops of a run, from this host to the user and the host where the program runs.

Knows: which kinds of hops there are.  Must not know: what a kind does.
A new kind is one more class in `KINDS`: no other file names a kind.
"""

from __future__ import annotations

from .engines import Docker, Podman, Srun
from .kinds import Exec, Ssh, Sudo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .kinds import Kind

    Hop = dict[str, dict[str, Any]]

KINDS: dict[str, type[Kind]] = {
    "ssh": Ssh,
    "sudo": Sudo,
    "srun": Srun,
    "docker": Docker,
    "podman": Podman,
    "exec": Exec,
}


class Route:
    """
    All hops of a run, and what is true of all of them together.

    Args:
        hops (list): Of `Kind`, nearest first. An empty list means this host and this user.

    Attributes:
        is_here (bool): Whether there is no hop: what we start is the shell at its end.
        own_codes (tuple): Exit codes that mean that a hop failed, not the program behind it.
        early_codes (tuple): Exit codes that mean so before all hops are through.
        may_be_killed, farewell: As in `Kind`, of the first hop, which is the process that we start.
        dies_with_client (str): As in `Kind`, of the first hop that has a reason.
        share_key (str): As in `Kind`, of the first hop.
        slot_name (str): The slot of the first hop that limits connections; None if none does.
    """

    def __init__(self, hops: Sequence[Kind]) -> None:
        self._hops = hops
        self.is_here = not hops
        self.own_codes = tuple(code for hop in hops for code in hop.own_codes)
        early = tuple(code for hop in hops for code in hop.early_codes)
        self.early_codes = (*self.own_codes, *early)
        self.may_be_killed = bool(hops) and hops[0].may_be_killed
        self.farewell = hops[0].farewell if hops else None
        self.dies_with_client = next(filter(None, (hop.dies_with_client for hop in hops)), "")
        self.share_key = hops[0].share_key() if hops else ""
        limited = [[hop.fields[name] for name in hop.slot_fields] for hop in hops]
        names = [",".join(str(value or "") for value in values) for values in limited if values]
        self.slot_name = names[0] if names else None

    @classmethod
    def of(cls, hops: Sequence[Hop]) -> Route:
        """The route of hops as a spec has them; no hops mean this host and this user."""
        return cls([KINDS[kind](fields) for hop in hops for kind, fields in hop.items()])

    def argv(self, argv: Sequence[str], log: str | None = None) -> list[str]:
        """
        The argv that runs `argv` at the end of all hops.

        Args:
            log (str): A file for the first hop's own messages; None for none. The later hops run on
                hosts, or as users, that can't open it.
        """
        words = list(argv)
        for hop in reversed(self._hops):
            words = hop.argv(words, log if hop is self._hops[0] else None)
        return words

    def place(self, user: str) -> str:
        """Where it leads, for a reader: `here, as etl`. `user` is the user of this process."""
        where = "here"
        for hop in self._hops:
            where, user = hop.leads(where, user)
        return f"{where}, as {user}"

    def refusal(self, words: str) -> tuple[str | None, bool]:
        """
        What the messages of the hops mean.

        Returns:
            tuple: The stage at which a hop failed, None if the messages don't say; and whether
                another attempt may help.
        """
        stages = [
            stage
            for hop in self._hops
            for stage, signs in hop.refusals
            if any(sign in words for sign in signs)
        ]
        passing = any(sign in words for hop in self._hops for sign in hop.passing)
        return (stages[0], passing) if stages else (None, True)

    def master(self, path: str, log: str) -> list[str]:
        """As `Kind.master`, of the first hop."""
        return self._hops[0].master(path, log)

    def shared(self, path: str) -> Route:
        """The same route, its first hop through a connection that is there."""
        return Route([self._hops[0].shared(path), *self._hops[1:]])

    def is_full(self, words: str) -> bool:
        """Whether the messages say that a shared connection takes no more sessions."""
        full = self._hops[0].full
        return bool(full) and full in words

    def is_too_new(self, words: str) -> bool:
        """Whether the messages say that a hop's client is too old for its options."""
        return any(hop.is_too_new(words) for hop in self._hops)

    def older(self) -> Route:
        """The same route, without the options that old clients do not know."""
        return Route([hop.older() for hop in self._hops])

    def queue(self, words: str) -> str | None:
        """
        Whether a hop waits in an engine's queue.

        Args:
            words (str): All that the hops said so far.
        Returns:
            str: The last line of it while one waits; None while none does.
        """
        waits, last = False, ""
        for line in filter(None, map(str.strip, words.splitlines())):
            last = line
            for hop in self._hops:
                waits = waits or any(sign in line for sign in hop.queueing)
                waits = waits and not any(sign in line for sign in hop.queued)
        return last if waits else None

    def announcing(self, word: str) -> Route | None:
        """
        The same route, whose first hop writes `word` to stderr once it is connected; None if it
        can't. The later hops can't be tried again then, so they get options for old clients.
        """
        first = self._hops[0].announcing(word) if self._hops else None
        if first is None:
            return None
        return Route([first, *(hop.older() for hop in self._hops[1:])])
