"""
Specs and calls that tests of the command line share.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

from spool_tests.support.places import CHAPERONE

ECHO = {"id": "echo", "program": {"argv": ["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]}}
SLEEP = {"id": "sleep", "program": {"argv": ["/bin/sleep", "1000"]}}
READY = {"id": "ready", "program": {"argv": ["/bin/sh", "-c", "echo ready; exec sleep 1000"]}}


def shell(run_id, text, **fields):
    return {"id": run_id, "program": {"argv": ["/bin/sh", "-c", text]}, **fields}


def streams(result):
    return result.returncode, result.stdout, result.stderr


def on_terminal(*arguments, columns=80, environ=()):
    """
    What a command writes to a terminal of so many columns: (exit code, bytes), line ends as
    written.
    """
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm", **dict(environ)}
    env.pop("NO_COLOR", None) if "NO_COLOR" not in dict(environ) else None
    process = subprocess.Popen(
        [*CHAPERONE, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=env,
    )
    os.close(theirs)
    written = b""
    with open(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                written += terminal.read(65_536)
            except OSError:  # EIO: no process has the other side open any more
                return process.wait(), written


def masked(text):
    """A table with its times, which differ from run to run, as `T` of the same width."""
    return re.sub(r"\b\d+\.\d+s\b", lambda found: "T" * len(found.group()), text)
