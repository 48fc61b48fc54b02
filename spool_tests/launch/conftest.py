"""What the tests of the launcher share."""

import subprocess

import pytest

from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until


@pytest.fixture
def warm(spool):
    """A launcher for the spool; its pid."""
    process = subprocess.Popen([*CHAPERONE, "launcher", "--spool", spool], stdin=subprocess.DEVNULL)
    until((spool / ".launcher").exists)
    yield process.pid
    process.kill()
    process.wait()
