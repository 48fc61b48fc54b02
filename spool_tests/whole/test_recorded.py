"""
The same specs give the same files as version 0.1 gave: names, modes, and bytes, but for what
differs from run to run and for fields that are new.

Knows: what 0.1 left, recorded once and never edited.  Must not know: this version's code.
"""

import json
import pathlib

import pytest

from spool_tests.support import recorded
from spool_tests.support.places import MAIN, ROOT

RUNS = json.loads(pathlib.Path(ROOT, "spool_tests", "data", "runs-of-0.1.json").read_text())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["spec"]["id"])
def test_run_leaves_the_files_that_it_left_in_version_0_1(spool, tmp_path, run):
    recorded.make_place(tmp_path)
    made = recorded.result(MAIN, tmp_path, spool, run)
    assert made["exit"] == run["exit"]
    assert made["files"].keys() == run["files"].keys()
    for name, told in run["files"].items():
        assert recorded.known(made["files"][name], told) == told, name
