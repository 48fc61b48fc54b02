"""
A spool with a launcher, because the schedulers start their runs warm.
"""

import subprocess

import pytest

from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until


@pytest.fixture
def spool(spool):
    """A spool as of the other tests; its launcher ends with the test."""
    launcher = subprocess.Popen(
        [*CHAPERONE, "launcher", "--spool", spool], stdin=subprocess.DEVNULL
    )
    until((spool / ".launcher").exists)
    yield spool
    launcher.kill()
    launcher.wait()
