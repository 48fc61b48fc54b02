"""
The shells that the far side's text has to run in, and the login shells it has to come through.
"""

import functools
import os
import shutil
import tempfile

from spool_tests.support.mounts import links, over
from spool_tests.support.waiting import absent

PACKAGES = {
    "bash": "bash",
    "busybox": "busybox",
    "dash": "dash",
    "fish": "fish",
    "ksh93": "ksh93u+m",
    "mksh": "mksh",
    "tcsh": "tcsh",
    "zsh": "zsh",
}
SH = ("dash", "bash", "busybox", "mksh", "ksh93", "zsh")  # what /bin/sh may be
LOGIN = (*SH, "fish", "tcsh")


def path_of(shell):
    path = shutil.which(shell) or shutil.which(shell, path="/bin:/usr/bin")
    return path or absent(
        f"the shell {shell} (Debian's package {PACKAGES[shell]}) is not installed"
    )


@functools.cache
def _directory():
    path = tempfile.mkdtemp(prefix="chaperone-test-sh.")
    os.chmod(path, 0o755)  # tests run them as other users too
    return path


@functools.cache
def as_sh(shell):
    """A path ending in /sh: several shells keep to POSIX only under that name."""
    directory = os.path.join(_directory(), shell)
    os.mkdir(directory, 0o755)
    path = os.path.join(directory, "sh")
    if shell == "busybox":  # the applet's name is the link's
        path = os.path.join(directory, "ash")
    os.symlink(path_of(shell), path)
    return path


def in_place_of_sh(shell, directory):
    """
    The words before an argv that give it a /bin/sh of its own; as root alone.

    It sees the machine's /usr/bin through a directory in which `sh` is another link; no other
    process does, and nothing is left when it has ended.
    """
    return over("/usr/bin", links(os.path.join(directory, "bin"), {"sh": path_of(shell)}))


def remove():
    """Take back what `as_sh` made."""
    shutil.rmtree(_directory(), ignore_errors=True)
    as_sh.cache_clear()
    _directory.cache_clear()
