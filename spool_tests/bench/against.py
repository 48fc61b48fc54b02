"""
An older version of chaperone beside today's, row by row and in turns.

Knows: git, the bench's own command line.  Must not know: what a row measures.
"""

import json
import os
import subprocess
import sys

from .lab import ROOT
from .table import number

TURNS = 3
WORSE = 0.05  # how much worse a figure may be: less is the noise of a quiet machine
RATES = ("/s", "B/s")  # units of which more is better


class UnknownRevisionError(ValueError):
    """There is no such revision in this checkout."""


def unpacked(directory, rev):
    """Unpack and compile the package of a revision; returns the directory that has it."""
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", rev, "chaperone"], capture_output=True, check=False
    )
    if archive.returncode:
        raise UnknownRevisionError(archive.stderr.decode().strip())
    subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", directory], check=True)
    return directory


def compared(root, row, words, turns=TURNS):
    """
    Measure a row of both versions in turns.

    Args:
        root (str): The directory that has the older package.
        row (str): The name of the row.
        words (list): Further words for the bench.
    Returns:
        list: (label, unit, older, today), each the median of the turns; None where a version has no
            such figure.
    """
    found = {}
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            for figure in _figures(root if which == 0 else "", row, words):
                name = figure["label"], figure["unit"]
                found.setdefault(name, ([], []))[which].append(figure["median"])
    middle = {name: [_median(values) for values in both] for name, both in found.items()}
    return [(label, unit, older, today) for (label, unit), (older, today) in middle.items()]


def _figures(root, row, words):
    env = {**os.environ, "CHAPERONE_BENCH_ROOT": root}
    done = subprocess.run(
        [sys.executable, "-m", "spool_tests.bench", row, "--json", "-", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    try:
        return [figure for row in json.loads(done.stdout)["rows"] for figure in row["figures"]]
    except ValueError:  # the older version lacks what the row needs
        return []


def _median(values):
    return sorted(values)[len(values) // 2] if values else None


def is_worse(unit, older, today):
    """Whether today's figure is worse by more than the noise."""
    if older is None or today is None or not older or not today:
        return False
    ratio = older / today if unit.endswith(RATES) else today / older
    return ratio > 1 + WORSE


def as_text(row, figures):
    width = max((len(label) for label, *_ in figures), default=0)
    lines = [f"{row}:", f"  {'':{width}}  {'before':>10}  {'today':>10}            ratio"]
    for label, unit, older, today in figures:
        both = [number(value) if value is not None else "-" for value in (older, today)]
        ratio = f"{today / older:8.2f}" if older and today is not None else ""
        mark = "  WORSE" if is_worse(unit, older, today) else ""
        lines.append(f"  {label:{width}}  {both[0]:>10}  {both[1]:>10}  {unit:6}  {ratio}{mark}")
    return "\n".join(lines)
