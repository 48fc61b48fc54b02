"""
Runs that a test starts, and what they leave.
"""

import json
import os
import signal
import subprocess
import sys

from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

IGNORED_BY_DEFAULT = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
DEADLY = sorted(
    set(range(1, 65)) - {32, 33} - IGNORED_BY_DEFAULT - STOPPING
)  # 32, 33: libc keeps them for itself


def sh(text, **program):
    return {"argv": ["/bin/sh", "-c", text], **program}


def py(text, **program):
    return {"argv": [sys.executable, "-I", "-S", "-c", text], **program}


def start(spool, program, run_id="r", **spec):
    """Start `chaperone run` as a scheduler does, and wait until the run directory is there."""
    if spec.get("remote"):  # as long as a busy machine may take
        spec.setdefault("timeouts", {"connect": 300})
    text = json.dumps({"id": run_id, "program": program, **spec})
    chaperone = subprocess.Popen(
        [*CHAPERONE, "run", "--spool", str(spool), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    chaperone.stdin.write(text)
    chaperone.stdin.close()
    assert chaperone.stdout.readline() == f"{run_id}\n"
    chaperone.stdout.close()
    return chaperone


def held(spool, program, run_id="r", **spec):
    """Run to the end: the final status."""
    assert start(spool, program, run_id, **spec).wait(300) == 0
    return final(spool, run_id)


def final(spool, run_id="r"):
    return json.loads((spool / run_id / "status.json").read_text())


def live(spool, run_id="r"):
    return json.loads((spool / run_id / "running.json").read_text())


def running(spool, run_id="r"):
    return until(lambda: (status := live(spool, run_id))["state"] == "running" and status)


def stdout(spool, run_id="r"):
    return (spool / run_id / "stdout").read_bytes()


def log(spool, run_id="r"):
    path = spool / run_id / "log"
    return (
        [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []
    )


def ask(spool, line, run_id="r"):
    fd = os.open(spool / run_id / "control", os.O_WRONLY | os.O_NONBLOCK)
    with open(fd, "w") as control:
        control.write(line + "\n")
