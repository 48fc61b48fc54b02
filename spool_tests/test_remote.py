"""A program behind ssh or sudo, held by real chaperones over a real sshd."""

import json
import signal
import sys

import pytest

from spool_tests import sshd as server
from spool_tests.conftest import until
from spool_tests.test_supervise import final, live, py, running, sh, start, stdout

sshd = server.sshd


def held(spool, sshd, program, run_id="r", remote=None, timeout=30, **spec):
    """Run to the end: the final status."""
    chaperone = start(spool, program, run_id, remote=remote or sshd.remote(), **spec)
    assert chaperone.wait(timeout) == 0
    return final(spool, run_id)


def test_program_over_ssh_is_recorded(spool, sshd):
    status = held(spool, sshd, sh("echo out; echo err >&2; echo \"$A\"; pwd; exit 7", env={"A": "x'y\n\\z!"}, cwd="/tmp"))
    assert (status["state"], status["return_code"], status["signal"], status["complete"]) == ("terminated", 7, None, True)
    assert stdout(spool) == b"out\nx'y\n\\z!\n/tmp\n"
    assert (spool / "r" / "stderr").read_bytes() == b"err\n"
    assert status["connection"]["state"] == "up" and status["connection"]["drops"] == 0
