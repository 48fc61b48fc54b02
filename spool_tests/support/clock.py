"""
A wall clock of our own for the chaperones that are given it, which a test can step by days: this
machine's is left alone.

It replaces the two functions by which chaperone reads the wall clock; `test_clock.py` checks that
there are no more.
"""

import os
import sys

from spool_tests.support.places import ROOT

DAY = 86_400
ZERO = 1_000_000_000  # the times of a file can't be negative everywhere
# The offset is the mtime of a file: set and read by one system call, without a descriptor that a
# test of descriptors would miss.
SHIM = f"""
import os, sys, time
path = sys.argv.pop(1)
sys.path.append(sys.argv.pop(1))
real = time.time_ns
time.time_ns = lambda: real() + os.stat(path).st_mtime_ns - {ZERO * 10**9}
time.time = lambda: time.time_ns() / 1e9
"""
ENTER = "import chaperone.__main__"


class Clock:
    """
    Attributes:
        chaperone (list): The beginning of a command line, as `conftest.CHAPERONE`, whose process
            lives by this clock.
        steps (int): How often it was stepped.
    """

    def __init__(self, directory):
        self._path, self.steps = os.path.join(directory, "clock"), -1
        with open(self._path, "x"):
            self.step(0)
        self.chaperone = self.python(ENTER)

    def python(self, text, *flags):
        """
        The beginning of a command line of a Python that lives by it; `text` comes after the package
        was made importable.
        """
        return [sys.executable, *(flags or ("-I", "-S")), "-c", SHIM + text, self._path, ROOT]

    def step(self, seconds):
        """Set it so far from the machine's clock, at once, for all who live by it."""
        os.utime(self._path, (ZERO + seconds, ZERO + seconds))
        self.steps += 1
