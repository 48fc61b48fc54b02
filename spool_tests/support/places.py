"""
Where the checkout is, and what a scheduler starts.
"""

import os
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
MAIN = os.path.join(ROOT, "chaperone", "__main__.py")
# What a scheduler starts: the interpreter without site, on the package's own entry.
CHAPERONE = [sys.executable, "-I", "-S", MAIN]
