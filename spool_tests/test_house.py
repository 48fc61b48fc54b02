"""
The house rules that a machine can check: floors, headers, sizes, words.

Knows: the source as text and syntax trees.  Must not know: what it does.
"""
import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

from spool_tests.conftest import ROOT

pytestmark = pytest.mark.once
PACKAGE = pathlib.Path(ROOT, "chaperone")
MODULES = sorted(PACKAGE.glob("*.py"))


def source_files():
    """Every text file of the project, as git sees it, or all of them in a tree without git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(p.relative_to(ROOT)) for p in pathlib.Path(ROOT).rglob("*") if not re.search(r"/\.venv|__pycache__|_cache/", str(p))]
    return [pathlib.Path(ROOT, name) for name in listed if name and os.path.isfile(os.path.join(ROOT, name))]


def test_no_file_names_a_place_of_the_machine_it_was_written_on():
    # Put together, so that this file may be looked at too.
    words = re.compile(rb"/ro" + rb"ot/|/ho" + rb"me/[a-z]+/|pye" + rb"nv|\bfiles\.python" + rb"hosted|index-" + rb"url|/wo" + rb"rk/")
    found = [f"{path}: {match.group()!r}" for path in source_files() for match in words.finditer(path.read_bytes())]
    assert found == []


def test_top_level_stays_as_it_is():
    top = {path.relative_to(ROOT).parts[0] for path in source_files()}
    assert {name for name in top if not name.startswith(".")} <= {"setup.py", "chaperone", "spool_tests", "bin", "README.rst", "docs", "LICENSE", "CHANGELOG.rst"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_module_has_a_header_and_no_more_than_400_lines(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "it has two nouns in it"
    header = ast.get_docstring(ast.parse(text))
    assert header, "a module begins by saying what it is"


def test_python_of_this_suite_is_one_that_is_promised():
    assert (3, 10) <= sys.version_info[:2]
