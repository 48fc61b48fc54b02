"""
Which code this process runs, as a text that can be compared.

Knows: the files of this package.  Must not know: what they do.
A module of its own, because only a launcher and its clients can afford to look at all these files.
"""

from __future__ import annotations

import os

from .process import PACKAGE

TIME_DIGITS = 20  # of nanoseconds: enough for 3,000 years


def _image() -> str:
    """
    Which code this process runs: a launcher takes a spec only from the same code, which has checked
    the spec.

    The newest time of its files comes first, in TIME_DIGITS. If a packager has set all times alike,
    size and place distinguish two images.
    """
    newest = size = 0
    waiting = [PACKAGE]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.endswith((".py", ".sh")):
                    found = entry.stat()
                    newest, size = max(newest, found.st_mtime_ns), size + found.st_size
    return f"{newest:0{TIME_DIGITS}d} {size} {PACKAGE}"


IMAGE = _image()
