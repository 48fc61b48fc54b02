"""
Waiting for a condition, and skipping a test that lacks something.
"""

import os
import shutil
import time

import pytest


def until(condition, timeout=60.0, what=None):
    """
    Wait until `condition()` is true, and return what it returned.

    For tests that have no fd to wait on; asks often at first, then every 20 ms. The patience costs
    nothing where the condition comes true, and a machine with a load of 30 needs it.

    Raises:
        AssertionError: If it was not true within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while not (result := condition()):
        assert time.monotonic() < deadline, (
            f"not within {timeout} s: {what or getattr(condition, '__name__', condition)}"
        )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return result


def patiently(attempt, *seconds):
    """
    Try with more and more time, until the test's own step came before the end of it: the short
    times are enough for a quiet machine, and a busy one needs the long ones.

    Args:
        attempt: Called with a number and each of `seconds`; whether the step came in time.
    """
    assert any(attempt(number, time_s) for number, time_s in enumerate(seconds))


def need(*programs):
    """
    Skip the test unless these programs are installed; in CI, where bin/test has installed them,
    fail.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent(f"needs {', '.join(missing)}") if (
        missing := [p for p in programs if not shutil.which(p, path=path)]
    ) else None


def absent(what):
    """Skip the test for want of `what`; in CI, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"in CI nothing may be missing: {what}")
    pytest.skip(what)
