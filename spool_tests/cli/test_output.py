"""
Terminals that go, a stdout that is full, and values as text.
"""

import json
import os
import re
import signal
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaperone.cli import tables, terminal
from chaperone.cli.verbs import read
from chaperone.model import status
from spool_tests.support.commands import ECHO, READY, shell
from spool_tests.support.places import CHAPERONE

pytestmark = pytest.mark.once

# -- a terminal that goes, a disk that is full


def test_nobody_reads_any_more_is_no_traceback(chaperone, spool):
    chaperone("run", "-", spec=shell("many", "seq 1000000"))
    with subprocess.Popen(
        [*CHAPERONE, "tail", "-n", "all", "many"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize("options", [[], ["--detach"]])
def test_run_id_that_stdout_does_not_take_is_lost_and_nothing_else(chaperone, options):
    with open("/dev/full", "wb") as full:
        result = chaperone("run", *options, "-", spec=ECHO, stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, "")
    assert chaperone("wait", "echo").returncode == 3


def test_full_stdout_is_told(chaperone):
    with open("/dev/full", "wb") as full:
        result = chaperone("ls", stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (
        os.EX_IOERR,
        "chaperone: unable to write to stdout: No space left on device\n",
    )


def test_closed_stdout_is_told(spool):
    result = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *CHAPERONE, "ls"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (
        os.EX_IOERR,
        "chaperone: unable to write to stdout: Bad file descriptor\n",
    )


def test_interrupt_is_no_traceback(held):
    held(READY)
    with subprocess.Popen(
        [*CHAPERONE, "tail", "-f", "ready"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_non_blocking_stdout_gets_it_all(chaperone, spool):
    chaperone("run", "-", spec=shell("many", "seq 100000"))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with (
        subprocess.Popen([*CHAPERONE, "tail", "-n", "all", "many"], stdout=writing) as process,
        open(reading, "rb") as pipe,
    ):
        os.close(writing)
        assert pipe.read() == (spool / "many" / "stdout").read_bytes()
    assert process.returncode == 0


# -- values as text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.0K"),
        (1_023, "1.0K"),
        (10_239, "10K"),
        (1 << 20, "1.0M"),
        (153 << 20, "153M"),
        (1 << 60, "1024P"),
        (None, "-"),
        ("x", "-"),
    ],
)
def test_amounts_are_short(count, text):
    assert terminal.amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0.0s"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (123, "2m03s"),
        (3_900, "1h05m"),
        (273_600, "3d04h"),
        (float("inf"), "-"),  # what a damaged status may hold as 1e999
    ],
)
def test_durations_are_short(seconds, text):
    assert terminal.duration(seconds) == text


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
FIELDS = st.sampled_from(sorted(status.last_known(None, "x")))


@settings(max_examples=200)
@given(
    st.dictionaries(FIELDS, JSON),
    st.sampled_from(status.STATES),
    st.none() | st.integers(0, 200),
    st.booleans(),
)
def test_any_status_is_shown(fields, state, width, colour):
    found = status.last_known({**fields, "state": state}, "x")
    text = tables.table([(found, "here")], 0.0, width, colour)
    plain = re.sub(r"\x1b\[\d+m", "", text)
    assert all(char.isprintable() or char == "\n" for char in plain) and text.count("\n") == 2
    assert width is None or all(
        tables.columns_of(line) <= max(1, width) for line in plain.splitlines()
    )
    assert json.loads(terminal.indented(found)) == found
    assert all(
        isinstance(sentence, str)
        for stream in ("stdout", "stderr")
        for sentence in read.gaps(found, stream, 0)
    )
