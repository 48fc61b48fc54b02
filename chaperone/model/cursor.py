"""
How far a scheduler has come with each run: plain JSON that it keeps with its own data.

{"runs": {run id: {"key": ..., "stdout": offset, "stderr": offset, "ended": true}}}

Knows: the fields of a cursor.  Must not know: files, processes, the clock.
"""

from __future__ import annotations

from ..errors import SpecError
from .spec import is_run_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Entry = dict[
        str, Any
    ]  # never changed in place: a step makes a new one, so that whoever holds one may keep it

STREAMS = ("stdout", "stderr")
LARGEST_OFFSET = 2**63 - 1  # off_t


def checked(value: object) -> dict[str, Entry]:
    """
    The entries of a cursor that came back from wherever its scheduler kept it.

    Args:
        value (object): As read from JSON; None and {} are the empty cursor.
    Returns:
        dict: Run id to entry; an entry without a key is of a run that is waited for.
    Raises:
        SpecError: `cursor.PATH: want WANT, got GOT`, for the first field that is wrong: guessing
            would lose bytes or double them.
    """
    if value is None:
        return {}
    runs = _object(value, "cursor", ("runs",)).get("runs", {})
    if not isinstance(runs, dict):
        raise _wrong("cursor.runs", "an object", runs)
    for run_id in runs:
        if not is_run_id(run_id):
            raise _wrong("cursor.runs", "run ids as its keys", run_id)
    return {run_id: _entry(entry, f"cursor.runs.{run_id}") for run_id, entry in runs.items()}


def _entry(value: object, path: str) -> Entry:
    entry = dict(_object(value, path, ("key", *STREAMS, "ended")))
    if "key" in entry and not isinstance(entry["key"], str):
        raise _wrong(f"{path}.key", "a string", entry["key"])
    for stream in STREAMS:
        if stream in entry and (
            type(entry[stream]) is not int or not 0 <= entry[stream] <= LARGEST_OFFSET
        ):
            raise _wrong(f"{path}.{stream}", "an offset in bytes", entry[stream])
    if "ended" in entry and not isinstance(entry["ended"], bool):
        raise _wrong(f"{path}.ended", "true or false", entry["ended"])
    if entry.pop("ended", False):
        if "key" not in entry:
            raise _wrong(path, "a key beside ended", value)
        entry["ended"] = True
    return entry


def _object(value: object, path: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "an object", value)
    for name in value:
        if name not in names:
            raise _wrong(path, f"only {', '.join(names)} in it", name)
    return value


def _wrong(path: str, want: str, got: object) -> SpecError:
    text = repr(got)
    return SpecError(f"{path}: want {want}, got {text if len(text) <= 80 else text[:77] + '...'}")


def entry(key: str, stdout: int = 0, stderr: int = 0, ended: bool = False) -> Entry:
    """
    One run's part of a cursor.

    Args:
        key (str): The run's own, from its spec.json.
        stdout, stderr (int): Bytes handed out so far.
        ended (bool): Whether its ending was.
    """
    made: Entry = {"key": key, "stdout": stdout, "stderr": stderr}
    return {**made, "ended": True} if ended else made


def started(before: Entry, key: str) -> Entry:
    """
    The entry after the start of the run was handed out; offsets that were put in by hand stay.
    """
    return entry(key, before.get("stdout", 0), before.get("stderr", 0))


def advanced(before: Entry, stream: str, offset: int) -> Entry:
    """The entry after the bytes of a stream up to an offset were handed out."""
    return {**before, stream: offset}


def ended(before: Entry) -> Entry:
    """The entry after the ending of the run was handed out."""
    return {**before, "ended": True}


def is_waited_for(value: Entry) -> bool:
    """Whether nothing of the run was handed out yet."""
    return "key" not in value


def has_ended(value: Entry) -> bool:
    """Whether the ending of the run was handed out."""
    return "ended" in value


def of(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """
    The cursor of some entries.

    Returns:
        dict: Plain JSON, new down to the entries: the caller's to keep or to change.
    """
    return {"runs": {run_id: dict(value) for run_id, value in entries.items()}}
