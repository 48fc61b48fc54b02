"""
What tests of failures share.
"""

import pathlib


def name_of(pid):
    """The name of a process; "" when it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid, name=None):
    found = map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if name in (None, name_of(child))]
