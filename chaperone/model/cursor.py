"""
A cursor: which bytes and events of each run a scheduler has received. It is plain JSON, which the
scheduler stores with its own data.

{"runs": {run id: {"key": ..., "stdout": offset, "stderr": offset, "ended": true}}}

Knows: the fields of a cursor.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

from ..errors import SpecError
from . import checks
from .spec import is_run_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    Entry = dict[str, Any]  # never changed in place: each step makes a new entry

LARGEST_OFFSET = 2**63 - 1  # off_t


def checked(value: object) -> dict[str, Entry]:
    """
    Check a cursor that its scheduler has stored, and return its entries.

    Args:
        value (object): As read from JSON; None and {} are the empty cursor.
    Returns:
        dict: Run id to entry. An entry without a key means a run that the scheduler expects, and of
            which nothing was delivered.
    Raises:
        SpecError: `cursor.PATH: want WANT, got GOT`, for the first field that is wrong. A guess
            would lose bytes or deliver them twice.
    """
    found: dict[str, Entry] = {} if value is None else _CURSOR(value, "cursor")["runs"]
    return found


def named(runs: Iterable[str] | None) -> dict[str, None] | None:
    """
    Check the ids of runs that are to be followed.

    Returns:
        dict: Their ids as its keys, in order; None for all runs.
    Raises:
        SpecError: If one is no run id; such a run would be waited for in vain.
    """
    if runs is None:
        return None
    found = (runs,) if isinstance(runs, str) else tuple(runs)
    if isinstance(runs, str) or not all(map(is_run_id, found)):
        raise SpecError(f"unable to follow runs {found!r}: want a list of run ids")
    return dict.fromkeys(found)


def _runs(value: Any, path: str) -> dict[str, Entry]:
    if not isinstance(value, dict):
        checks.fail_unseen(path, "an object", value)
    for run_id in value:
        if not is_run_id(run_id):
            checks.fail(path, "run ids as its keys", run_id)
    return {run_id: _entry(inner, checks.at(path, run_id)) for run_id, inner in value.items()}


def _entry(value: Any, path: str) -> Entry:
    found: Entry = _ENTRY(value, path)
    if not found.get("ended", True):  # as if it were absent
        del found["ended"]
    if "ended" in found and "key" not in found:
        checks.fail(path, "a key beside ended", value)
    return found


_OFFSET = checks.Number(0, whole=True, most=LARGEST_OFFSET)
_ENTRY = checks.Fields(
    {
        "key": (checks.string, checks.ABSENT),
        "stdout": (_OFFSET, checks.ABSENT),
        "stderr": (_OFFSET, checks.ABSENT),
        "ended": (checks.boolean, checks.ABSENT),
    }
)
_CURSOR = checks.Fields({"runs": (_runs, checks.OBJECT)})


def entry(key: str, stdout: int = 0, stderr: int = 0, ended: bool = False) -> Entry:
    """
    One run's part of a cursor.

    Args:
        key (str): The run's own, from its spec.json.
        stdout, stderr (int): Bytes delivered so far.
        ended (bool): Whether its ending was delivered.
    """
    made: Entry = {"key": key, "stdout": stdout, "stderr": stderr}
    return {**made, "ended": True} if ended else made


def started(before: Entry, key: str) -> Entry:
    """
    The entry after `Started` was delivered; offsets that somebody wrote into the cursor stay.
    """
    return entry(key, before.get("stdout", 0), before.get("stderr", 0))


def advanced(before: Entry, stream: str, offset: int) -> Entry:
    """The entry after the bytes of a stream up to an offset were delivered."""
    return {**before, stream: offset}


def ended(before: Entry) -> Entry:
    """The entry after the ending of the run was delivered."""
    return {**before, "ended": True}


def is_waited_for(value: Entry) -> bool:
    """Whether nothing of the run was delivered yet."""
    return "key" not in value


def has_ended(value: Entry) -> bool:
    """Whether the ending of the run was delivered."""
    return "ended" in value


def of(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """
    The cursor that has these entries.

    Returns:
        dict: Plain JSON. The entries are copies: the caller may keep and change them.
    """
    return {"runs": {run_id: dict(value) for run_id, value in entries.items()}}
