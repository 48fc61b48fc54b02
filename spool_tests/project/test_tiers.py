"""
`bin/test --long TIER`: which tests it runs, what it says at the end, and what it installs.

Knows: pytest, the shell functions of bin/lib.sh.  Must not know: any test of a tier.
"""

import os
import subprocess
import sys

import pytest

from spool_tests.support.places import ROOT

pytestmark = pytest.mark.once
TESTS = """
import pytest

def test_plain():
    pass

@pytest.mark.long
def test_long():
    pass

@pytest.mark.tier("worlds")
def test_world():
    assert False

@pytest.mark.tier("page")
def test_page():
    pytest.skip("needs chromium")
"""


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ([], ["1 passed"]),
        (["--long"], ["2 passed"]),
        (["--tier=page"], ["1 skipped", "0 passed", "1 skipped: needs chromium"]),
        (
            ["--tier=worlds"],
            [
                *("1 failed", "0 passed, 1 failed, 0 error, 0 skipped"),
                "again: bin/test --as root --long worlds 'test_tiers_of_a_sample.py::test_world'",
            ],
        ),
        (["--long", "--tier=all"], ["1 failed, 2 passed, 1 skipped"]),
    ],
)
def test_tier_runs_its_tests_alone(tmp_path, words, ran):
    (tmp_path / "conftest.py").write_text("from spool_tests.conftest import *\n")
    (tmp_path / "test_tiers_of_a_sample.py").write_text(TESTS)
    options = ["-c", f"{ROOT}/.pytest.ini", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "0", *options, *words, tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    user = "root" if os.geteuid() == 0 else "user"
    for line in ran:
        assert line.replace("--as root", f"--as {user}") in done.stdout, done.stdout + done.stderr


def test_packages_are_named_before_they_come_and_alternatives_stay(tmp_path):
    """apt-get and update-alternatives are replaced by programs that write down their words."""
    state = tmp_path / "awk"
    state.write_text("awk auto /usr/bin/mawk\n")
    for name, text in (
        ("apt-get", f'echo "apt-get $*" >&3\necho "awk auto /usr/bin/gawk" >{state}'),
        ("update-alternatives", f'[ "$1" = --set ] || exec cat {state}\necho "$*" >&3'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    as_root = 'as_root() { case $1 in sh | rm) ;; *) "$@" ;; esac; }'  # no file of this machine
    script = f". {ROOT}/bin/lib.sh; {as_root}; PATH={tmp_path}:$PATH; install_packages gawk jq 3>&2"
    done = subprocess.run(["sh", "-c", script, "bin/test"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        "bin/test: installing gawk jq (once)",
        "apt-get -qq install -y --no-install-recommends gawk jq",
        "--set awk /usr/bin/mawk",
    ]
