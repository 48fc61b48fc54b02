"""
Other interpreters: on PATH, in the directories of CHAPERONE_PYTHONS (with colons between them), or
in a Debian that `bin/test` has made.

Knows: where they may be.  Must not know: what is run by them.
"""

import os
import shutil
import subprocess
import tempfile

import pytest

from spool_tests.support import fallbacks
from spool_tests.support.places import ROOT

# What `bin/test --long worlds` has made: a Debian with several of them, named by its suite, and
# `packages-3.N` with what chaperone needs of a Python.
MADE = os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "chaperone-worlds"
)
SUITE = "sid"
# Where the tests, their files and their modules are, seen there under the same names.
BIND = """
root=$0
for place in {places}; do mkdir -p "$root$place"; mount --rbind "$place" "$root$place"; done
mount --bind "$root/usr/bin/{shell}" "$root/usr/bin/dash"
exec chroot "$root" "$@"
"""


def chroot(shell=None):
    """The words that run an argv in that Debian, whose /bin/sh is `shell` (dash if None)."""
    root = os.path.join(MADE, SUITE)
    for program in filter(None, ("python3", shell)):
        if not os.path.exists(f"{root}/usr/bin/{program}"):
            pytest.skip(f"not tried: there is no Debian with {program} in {root}")
    places = " ".join(["/proc", "/dev", ROOT, tempfile.gettempdir(), MADE])
    text = BIND.format(places=places, shell=shell or "dash")
    return ("unshare", "--mount", "/bin/sh", "-c", f"set -e{text}", root)


def _on_this_machine(minor):
    """The path of Python 3.`minor` outside that Debian; None where there is none."""
    places = [os.environ.get("PATH", ""), *os.environ.get("CHAPERONE_PYTHONS", "").split(":")]
    for path in filter(None, [shutil.which(f"python3.{minor}", path=at) for at in places if at]):
        code = "import sys; raise SystemExit(sys.version_info[:2] != (3, int(sys.argv[1])))"
        argv = [path, "-I", "-c", code, str(minor)]
        if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
            return path
    return None


def interpreter(minor):
    """The argv of Python 3.`minor`, on this machine or in that Debian; skips the test without."""
    if path := _on_this_machine(minor):
        return (path,)
    if not os.path.exists(f"{MADE}/{SUITE}/usr/bin/python3.{minor}"):
        pytest.skip(f"not tried: no Python 3.{minor} is here, nor in {MADE}/{SUITE}")
    return (*chroot(), f"/usr/bin/python3.{minor}")


def words(minor):
    """What stands before an argv that Python 3.`minor` is to run; skips the test without one."""
    if not os.path.isdir(f"{MADE}/packages-3.{minor}"):
        pytest.skip(f"not tried: there are no packages for it in {MADE}")
    if _on_this_machine(minor):
        return ()
    if not os.path.exists(f"{MADE}/{SUITE}/usr/bin/python3.{minor}"):
        pytest.skip(f"not tried: no Python 3.{minor} is here, nor in {MADE}/{SUITE}")
    return chroot()


def command(minor):
    """What starts a chaperone of that Python."""
    python = _on_this_machine(minor) or f"/usr/bin/python3.{minor}"
    return fallbacks.argv(python=python, packages=f"{MADE}/packages-3.{minor}")
