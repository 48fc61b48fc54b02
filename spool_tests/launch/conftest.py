"""What the tests of the launcher share."""

import subprocess

import pytest

from chaperone.launch import client
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until


@pytest.fixture
def warm(spool, monkeypatch):
    """A launcher for the spool; its pid. On a busy machine a start would be cold otherwise."""
    monkeypatch.setattr(client, "ANSWER_S", 60)
    process = subprocess.Popen([*CHAPERONE, "launcher", "--spool", spool], stdin=subprocess.DEVNULL)
    until((spool / ".launcher").exists)
    yield process.pid
    process.kill()
    process.wait()
