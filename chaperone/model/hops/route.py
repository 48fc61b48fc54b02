"""
All hops of a run as one way: how a command reaches the user and the host it is meant for.

Knows: which kinds there are.  Must not know: what a kind is like.
A further kind is one more class in `KINDS`: no other file names a kind.
"""

from __future__ import annotations

from .kinds import Exec, Ssh, Sudo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .kinds import Kind

    Hop = dict[str, dict[str, Any]]

KINDS: dict[str, type[Kind]] = {"ssh": Ssh, "sudo": Sudo, "exec": Exec}


class Route:
    """
    All hops of a run as one way: what is known of it without a look at its kinds.

    Args:
        hops (list): Of `Kind`, nearest first; none is this host, as we are.

    Attributes:
        own_codes (tuple): Exit codes that mean that a hop failed, and not what is behind it.
        may_be_killed, farewell: As in `Kind`; of the first hop, the one that we start.
        carries_eof, can_survive (bool): As in `Kind`; true of all hops.
        slot_name (str): Of the first hop with a limit; None without one.
    """

    def __init__(self, hops: Sequence[Kind]) -> None:
        self._hops = hops
        self.own_codes = tuple(code for hop in hops for code in hop.own_codes)
        self.may_be_killed = bool(hops) and hops[0].may_be_killed
        self.farewell = hops[0].farewell if hops else None
        self.carries_eof = all(hop.carries_eof for hop in hops)
        self.can_survive = all(hop.can_survive for hop in hops)
        limited = [[hop.fields[name] for name in hop.slot_fields] for hop in hops]
        names = [",".join(str(value or "") for value in values) for values in limited if values]
        self.slot_name = names[0] if names else None

    @classmethod
    def of(cls, hops: Sequence[Hop]) -> Route:
        """The way that hops as in a spec describe; none are this host, as we are."""
        return cls([KINDS[kind](fields) for hop in hops for kind, fields in hop.items()])

    def argv(self, argv: Sequence[str], log: str | None = None) -> list[str]:
        """
        The argv that runs `argv` at the end of all hops.

        Args:
            log (str): A file for the first hop's own words, if it can write there; the others run
                where, or as whom, it can't be opened.
        """
        words = list(argv)
        for hop in reversed(self._hops):
            words = hop.argv(words, log if hop is self._hops[0] else None)
        return words

    def place(self, user: str) -> str:
        """Where it leads, for a reader: `here, as etl`; `user` is whom we run as."""
        where = "here"
        for hop in self._hops:
            where, user = hop.leads(where, user)
        return f"{where}, as {user}"

    def refusal(self, words: str) -> tuple[str | None, bool]:
        """
        What the hops' words mean.

        Returns:
            tuple: The stage at which one of them failed, None if they don't say; whether a further
                attempt may help.
        """
        stages = [
            stage
            for hop in self._hops
            for stage, signs in hop.refusals
            if any(sign in words for sign in signs)
        ]
        passing = any(sign in words for hop in self._hops for sign in hop.passing)
        return (stages[0], passing) if stages else (None, True)

    def is_too_new(self, words: str) -> bool:
        """Whether a hop's client ended with these words because it is too old for `argv`."""
        return any(hop.is_too_new(words) for hop in self._hops)

    def older(self) -> Route:
        """The same way, without what old clients do not know."""
        return Route([hop.older() for hop in self._hops])

    def announcing(self, word: str) -> Route | None:
        """
        The same way, its first hop writing `word` to stderr once it is through; None if it can't.
        The hops behind it can't be tried again then, so they take what old clients know.
        """
        first = self._hops[0].announcing(word) if self._hops else None
        if first is None:
            return None
        return Route([first, *(hop.older() for hop in self._hops[1:])])
