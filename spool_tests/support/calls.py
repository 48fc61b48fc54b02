"""
System calls replaced in the whole package: where a start must be lean its modules have them by
`chaperone.cpython`, others by `os`.

Knows: both.  Must not know: what is replaced, or why.
"""

import os

from chaperone import cpython

HOMES = {os, cpython.os}


def replace_call(monkeypatch, name, call):
    """Have the package call something else, until the test ends or replaces it again."""
    for module in HOMES:
        monkeypatch.setattr(module, name, call)
