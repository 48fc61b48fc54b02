"""
What chaperone reads from others never makes it crash: a little of it here, coverage-guided and for
long with --long.
"""

import os
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaperone.hold import chaperone
from chaperone.model import spec as specs
from chaperone.model import transitions
from spool_tests.support import fuzz
from spool_tests.support.waiting import absent

pytestmark = pytest.mark.once

WORDS = [
    b"\0\0",
    b"\n",
    b"\x1en ",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"-1",
    b"1e999",
    b"9" * 400,
    b'"\\ud800"',
    b"\xff",
]
WORDS += [b"\x1en start x\n", b"\x1en eof 1 x\n"]


@st.composite
def mutated(draw, seeds):
    """A seed with some of its parts cut out, doubled, or taken from elsewhere."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 30)))
        data = (
            data[:start]
            + draw(st.sampled_from([b"", data[start:end] * 2, *WORDS]) | st.binary(max_size=6))
            + data[end:]
        )
    return data


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_that_is_read_makes_it_crash(target):
    @settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=60)
    @given(mutated(fuzz.SEEDS[target]) | st.binary(max_size=200))
    def takes(data):
        fuzz.TARGETS[target](data)

    takes()


def test_far_side_that_tells_two_ends_is_believed_once():
    fuzz.far_side(
        b"\1\2\3\4\5\6\7\1noise\x1en out\n\x1en hello\n\x1en fail setup\n\x1en fail setup\n"
    )


@pytest.mark.parametrize("life", [b"\1\2", b"\2\2", b"\3\2"])
def test_far_side_that_failed_to_start_what_runs_ends_nothing(life):
    fuzz.far_side(
        life
        + (
            b"\3\4\5\6\7\1noise\x1en out\n\x1en hello\n\x1en start 77\n\x1en fail setup\n"
            b"\x1en fail exec 2\n"
        )
    )


@pytest.mark.parametrize("life", [b"\1\2", b"\2\2", b"\3\2", b"\4\2"])
def test_far_side_that_started_what_failed_to_start_ends_nothing(life):
    fuzz.far_side(
        life
        + (
            b"\3\4\5\6\7\1noise\x1en out\n\x1en hello\n\x1en fail setup\n\x1en start 77\n"
            b"\x1en end R0\n"
        )
    )


@pytest.mark.parametrize("life", [b"\1\2", b"\2\2", b"\3\2", b"\4\2"])
@pytest.mark.parametrize(
    "ends", [(b"R7", b"R265"), (b"R265", b"R7"), (b"R256",), (b"R512",), (b"R321",), (b"R777",)]
)
def test_far_side_that_tells_the_end_twice_or_by_no_signal_ends_nothing(life, ends):
    said = b"".join(b"\x1en end " + end + b"\n" for end in ends)
    fuzz.far_side(
        life
        + b"\3\4\5\6\7\1noise\x1en out\n\x1en hello\n\x1en start 77\n"
        + said
        + b"\x1en left 0\n\x1en eof 0 0\n\x1en bye\n"
    )


@pytest.mark.parametrize(
    "said",
    [
        b"start x",
        b"start",
        b"start 1 2",
        b"left -1",
        b"short",
        b"short x",
        b"eof 1",
        b"eof 1 x",
        b"left " + b"9" * 19,
    ],
)
def test_far_side_that_brings_no_number_ends_nothing(said):
    fuzz.far_side(b"\1\2\3\4\5\6\7\1noise\x1en out\n\x1en hello\n\x1en " + said + b"\n")


@pytest.mark.long
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_that_a_fuzzer_finds_makes_it_crash(target, tmp_path, told):
    """CHAPERONE_FUZZ_S seconds of it, 600 without that."""
    if subprocess.run(
        [sys.executable, "-c", "import atheris"], capture_output=True, check=False
    ).returncode:
        absent("needs atheris (pip install atheris)")
    seconds = int(os.environ.get("CHAPERONE_FUZZ_S", 600))
    argv = [sys.executable, fuzz.__file__, target, str(seconds), str(tmp_path)]
    # atheris takes half a minute of CPU to begin with: several minutes on a busy machine.
    result = subprocess.run(
        argv, capture_output=True, text=True, errors="replace", timeout=seconds + 1_200, check=False
    )
    taken = re.findall(rf"^{target}: \d+ inputs in \d+ s$", result.stderr, re.M)
    told(taken[-1] if taken else f"{target}: no input")
    assert result.returncode == 0 and taken, result.stderr[-6000:]


def test_adopter_of_a_run_whose_start_is_no_time_counts_from_its_own():
    asked = specs.checked(
        {"id": "r", "program": {"argv": ["x"]}, "remote": {"host": "h"}, "timeouts": {"run": 60}},
        "/",
    )
    left = {**transitions.starting(asked, 1, "here", None, 0), "start_time": "yesterday"}
    status = {**left, "state": "running", "pid": 7}
    run = fuzz.Run(fuzz.NULL)
    with chaperone.Chaperone(run, asked, status, lambda holder: None) as adopter:
        before = adopter.loop.now()
        adopter.resumed(7)
        assert before <= adopter._started_at <= adopter.loop.now()
