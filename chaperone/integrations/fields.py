"""
Fields of a spec from two sources: what a job of a scheduler says in its own words, and the rest.

Knows: JSON objects.  Must not know: any scheduler.
"""

from __future__ import annotations

from typing import Any

from ..errors import SpecError


def merged(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> dict[str, Any]:
    """
    The fields of both.

    Args:
        ours (dict): Made of the job.
        theirs (dict): What the job has of a spec.
        path (str): Where `theirs` is in the job, for the error.
    Raises:
        SpecError: If both have a field, so that one of them would be ignored.
    """
    found = {**theirs, **ours}
    for name in ours.keys() & theirs.keys():
        at = f"{path}.{name}"
        if not (isinstance(ours[name], dict) and isinstance(theirs[name], dict)):
            raise SpecError(f"{at}: already set by the scheduler or by another field of the job")
        found[name] = merged(ours[name], theirs[name], at)
    return found
