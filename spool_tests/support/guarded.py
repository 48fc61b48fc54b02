"""
Trees of processes below a guard.
"""

import os
import shutil
import subprocess
import sys

import pytest

from spool_tests.support.runs import running
from spool_tests.support.waiting import absent, until

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def as_nobody(tmp_path):
    """A program that makes a root process of what a plain user starts; a spool of that user."""
    raised = tmp_path / "raised"
    shutil.copy("/usr/bin/setpriv", raised)
    raised.chmod(0o4755)
    place = tmp_path / "nobody"
    place.mkdir(0o700)
    os.chown(place, 65534, 65534)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and not path.stat().st_mode & 1:
            path.chmod(path.stat().st_mode | 0o111)
    if (
        subprocess.run([*NOBODY, str(raised), "--reuid=0", "id", "-u"], capture_output=True).stdout
        != b"0\n"
    ):
        absent("a filesystem that heeds setuid, and a path that every user may go")
    return f"{raised} --reuid=0 --regid=0 --clear-groups", place


def stat_of(pid):
    """(state, parent, group, session, start time) of a process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (fields[0], *map(int, fields[1:4]), int(fields[19]))


def text_of(path):
    with open(path) as file:
        return file.read()


def begun_in(spool, run_id="r"):
    """The status of a run that somebody starts just now, once it runs."""
    until((spool / run_id / "running.json").exists)
    return running(spool, run_id)


def is_gone(pid, started=None):
    found = stat_of(pid)
    return found is None or found[0] in "ZX" or (started is not None and found[4] != started)


# A program that leaves everything that ordinary programs leave, and writes down what that is: a
# line for each, pid and start time.
TREE = r"""
import ctypes, os, signal, subprocess, sys, time
libc = ctypes.CDLL(None)

def say():
    started = open("/proc/self/stat").read().rpartition(")")[2].split()[19]
    os.write(1, f"{os.getpid()} {started}\n".encode())

def child(*steps):
    pid = os.fork()
    if pid:
        return
    for step in steps:
        step()
    say()
    time.sleep(1000)

def again():
    if os.fork():
        os._exit(0)

def ignore():
    for number in (1, 2, 3, 15):
        signal.signal(number, signal.SIG_IGN)

def clear():
    if not os.environ.get("CLEAR"):
        argv = [sys.executable, "-S", "-c", open(sys.argv[1]).read(), "sleep"]
        os.execve(sys.executable, argv, {"CLEAR": "1"})

if sys.argv[1:] == ["sleep"]:
    ignore(), say(), time.sleep(1000)
child()
child(os.setsid)
child(os.setsid, again, os.setsid)
child(ignore, os.setsid, again)
child(lambda: libc.prctl(4, 0, 0, 0, 0), os.setsid)
child(lambda: libc.prctl(36, 1, 0, 0, 0), lambda: child(os.setsid, again), os.setsid)
child(os.setsid, clear)
say()
os.write(1, b"ready\n")
time.sleep(1000)
"""


@pytest.fixture
def tree(tmp_path):
    """A program (dict) that leaves a tree of strange processes, and how many lines it writes."""
    path = tmp_path / "tree.py"
    path.write_text(TREE)
    return {"argv": [sys.executable, "-S", str(path), str(path)]}, 9
