"""
`chaperone agent` as tests start it, and the log of its run.
"""

import contextlib
import json
import subprocess

from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until


def begin(spec, **options):
    """An agent that has that spec on its stdin, as a process."""
    process = subprocess.Popen(
        [*CHAPERONE, "agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    process.stdin.write(spec if isinstance(spec, str) else json.dumps(spec))
    process.stdin.close()
    process.stdin = None
    return process


def kill(process):
    """SIGKILL, as out of memory."""
    process.kill()
    process.communicate()


@contextlib.contextmanager
def agent(spec, **options):
    """As `begin`; killed at the end if it is still there."""
    process = begin(spec, **options)
    try:
        yield process
    finally:
        kill(process)


def posted(spec, **options):
    """What becomes of an agent that has come to its end: its exit code, stdout and stderr."""
    with agent(spec, **options) as process:
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


def log(spool, run_id="PROG-ID"):
    """The sentences in the log of a run."""
    path = spool / run_id / "log"
    text = path.read_text() if path.exists() else ""
    return [line.split(" ", 1)[1] for line in text.splitlines()]


def files_with(word, spool, run_id="PROG-ID"):
    """The names of a run's files that have a word in them, once its chaperone has gone."""
    until(lambda: not (spool / run_id / "lock").exists())
    files = [path for path in (spool / run_id).iterdir() if path.is_file()]
    return [path.name for path in files if word in path.read_text()]
