"""
The table of worlds, its page, and the summary of a run of it.

Knows: docs/reliability.rst.  Must not know: how any world is made.
"""

import pathlib
import re
import types

import pytest

from spool_tests.support.places import ROOT
from spool_tests.support.rows import rows
from spool_tests.worlds.table import WORLDS

pytestmark = pytest.mark.once


def test_each_world_has_one_name_and_tests_elsewhere_that_exist():
    names = [world.name for world in WORLDS]
    assert len(set(names)) == len(names)
    found = set()
    for path in pathlib.Path(ROOT, "spool_tests").rglob("test_*.py"):
        found |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    assert {name for world in WORLDS for name in world.also} - found == set()


def test_page_has_a_row_for_each_world_with_the_command_that_ran_it():
    page = pathlib.Path(ROOT, "docs", "reliability.rst").read_text()
    row = re.compile(r"^``'\[(\S+):'`` +\S.*? {1,}(kernel|cookie|group|\\) +(\S+) +(\S.*)$", re.M)
    found = [(name, here, far) for name, here, far, _ in row.findall(page)]
    assert found == [(world.name, world.near or "\\", world.far or "\\") for world in WORLDS]


def report(world, check, **facts):
    return types.SimpleNamespace(nodeid=f"w.py::test_world[{world}:{check}]", **facts)


def test_summary_has_a_line_for_each_world():
    skipped = report("c", "run", longrepr=("w.py", 1, "Skipped: not tried: there is no c"))
    stats = {
        "passed": [report("a-b", "run"), report("a-b", "stop"), report("d", "run")],
        "error": [report("d", "far_run")],
        "skipped": [skipped],
    }
    assert rows(stats) == [
        "a-b: 2 of 2 checks hold",
        "d: 1 of 2 checks hold; far_run does not",
        "c: not tried: there is no c",
    ]
