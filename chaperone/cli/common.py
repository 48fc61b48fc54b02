"""
What several verbs use: run ids, ages, the user's name, packages that a quick start leaves out.

Knows: the spool that was given.  Must not know: a particular verb.
"""

from __future__ import annotations

import errno
import os
import sys

from ..errors import NoRunError
from ..model import spec as specs
from ..model.status import moment_ns
from ..program.fds import owned
from ..spool import format
from .verb import UsageError, spool_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .terminal import Terminal
    from .verb import Given


# -- the runs of a spool


def ids_meant(spool_fd: int, words: Iterable[str]) -> list[str]:
    """
    The runs that words mean, each once: an exact id beats a prefix, a prefix must fit one run
    alone, of those that `ls` lists or, where it fits none of them, of the collected ones.

    The names are listed once for all prefixes: a hundred words beside 5,000 live runs cost no
    hundred listings.

    Raises:
        NoRunError: If there is none for a word, or its prefix is ambiguous; for the first such.
    """
    found = {word: [word] if _is_run(spool_fd, word) else [] for word in words}
    for listed in (_uncollected, format.all_ids):
        left = tuple(word for word, ids in found.items() if not ids and specs.is_run_id(word))
        ids = listed(spool_fd, left) if left else []
        found.update((word, [each for each in ids if each.startswith(word)]) for word in left)
    return list(dict.fromkeys(id_meant(ids, word) for word, ids in found.items()))


def _is_run(spool_fd: int, word: str) -> bool:
    if not specs.is_run_id(word):
        return False
    try:
        os.close(format.open_run(spool_fd, word))
    except NoRunError:
        return False
    return True


def id_meant(found: list[str], text: str) -> str:
    """
    The only one of the ids that begin with a text.

    Raises:
        NoRunError: If there is none, or there are several.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise NoRunError(
            f"unable to find run {text!r}: no run id in this spool begins with that", errno.ENOENT
        )
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise NoRunError(
        f"unable to find run {text!r}: it is ambiguous; it matches: {some}", errno.ENOTUNIQ
    )


def _uncollected(spool_fd: int, prefixes: tuple[str, ...]) -> list[str]:
    """
    Of the live and the uncollected runs: `ls` shortens an id so that it fits no other of these, and
    a look at them does not grow with the history.
    """
    ids = {*format.live_ids(spool_fd, prefixes), *format.ended_ids(spool_fd, prefixes)}
    return sorted(run_id for run_id in ids if format.found(spool_fd, run_id))


def found_ids(given: Given, texts: list[str]) -> list[str]:
    """The ids of the runs that words mean, each once."""
    with owned(format.open_spool(spool_path(given))) as spool_fd:
        return ids_meant(spool_fd, texts)


def user_name() -> str:
    """The name of the user of this process."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a uid without a name, in a container
        return str(os.geteuid())


# -- amounts

AGES = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def age_s(option: str, text: str | None) -> float | None:
    """
    An AGE such as `90s`, `30m`, `12h` or `7d` in seconds; None for what was not given.

    Raises:
        UsageError: For anything else, a bare number too: whether 7 means days is a guess.
    """
    if text is None:
        return None
    return quantity(option, text, AGES, "an age such as 90s, 30m, 12h or 7d")


def when_ns(option: str, text: str | None, now_ns: int) -> int | None:
    """
    A WHEN as nanoseconds since the epoch: an AGE ago, `yesterday` or a date at its first moment in
    local time, or a time as in RFC 3339; None for what was not given.

    Raises:
        UsageError: For anything else.
    """
    if text is None:
        return None
    try:
        return now_ns - int((age_s(option, text) or 0) * 1e9)
    except UsageError:
        moment = moment_ns(text.replace("t", "T").replace("z", "Z"))
    from datetime import datetime, timedelta

    try:
        if moment is None and text == "yesterday":
            day = datetime.combine(datetime.now() - timedelta(days=1), datetime.min.time())
            moment = int(day.timestamp() * 1e9)
        elif moment is None:
            moment = int(datetime.strptime(text, "%Y-%m-%d").timestamp() * 1e9)
    except (ValueError, OverflowError) as error:
        want = "an age such as 1h, yesterday, a date, or a time such as 2026-11-25T08:00:00Z"
        raise UsageError(f"unable to understand {option!r}: want {want}, got {text!r}") from error
    return moment


def quantity(option: str, text: str, units: dict[str, int], want: str) -> float:
    """`7d` as seconds, `10G` as bytes."""
    number = text.rstrip("".join(units))
    unit = text[len(number) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"unable to understand {option!r}: want {want}, got {text!r}")
    return value


# -- what a quick start leaves out


def add_site_packages(terminal: Terminal) -> None:
    """
    Find attrs, filelock and inotify_simple after a start without site (`-S`), and print warnings
    as one sentence without a place in the code.
    """
    if sys.flags.no_site:
        import site

        site.main()
    import warnings

    def show(message: Warning | str, *_: object, **__: object) -> None:
        terminal.note(str(message))

    warnings.showwarning = show
