"""
Runs that survive their connection and their chaperone.
"""

import subprocess
import sys
import time
import uuid

import pytest

from spool_tests.support.places import ROOT
from spool_tests.support.runs import final, live
from spool_tests.support.waiting import until


@pytest.fixture(params=["here", "ssh"])
def remote(request, tmp_path, monkeypatch):
    """A spec's `remote`, or none; nothing may stay in the directory that the far side keeps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / ".chaperone"
    yield (
        None
        if request.param == "here"
        else request.getfixturevalue("sshd").remote(remote_dir=str(directory))
    )
    until(lambda: list(directory.glob("*")) == [])


ADOPT = """
import sys
sys.path.append(sys.argv[1])
from chaperone.hold import adopt, inherited
shed = inherited.shed_inherited_state()
sys.exit(adopt.hold_left_run(sys.argv[2], sys.argv[3], shed, inherited.print_run_id))
"""


def adopt(spool, run_id="r"):
    """A chaperone that takes the run over; returns when it holds the lock."""
    chaperone = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ADOPT, ROOT, str(spool), run_id],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert chaperone.stdout.readline() == f"{run_id}\n"
    chaperone.stdout.close()
    return chaperone


def ended(spool, run_id="r"):
    return (spool / run_id / "status.json").exists()


def connected(spool, run_id="r"):
    def look():
        try:
            status = live(spool, run_id)
        except FileNotFoundError:  # it has just ended
            return final(spool, run_id)
        return status["state"] == "running" and status["connection"]["state"] == "up" and status

    return until(look)


def booted_anew(tmp_path):
    """
    The words before an argv that let it live in this host's next boot, ten seconds old: another
    boot id, and clocks that begin again.
    """
    boot_id = tmp_path / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    mounted = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    back = f"-{max(0, int(time.monotonic()) - 10)}"
    namespaces = [
        "--mount",
        "--time",
        "--boottime",
        back,
        "--monotonic",
        back,
        "--fork",
        "--kill-child",
    ]
    return [
        "unshare",
        *namespaces,
        "/bin/sh",
        "-c",
        mounted,
        str(boot_id),
    ], boot_id.read_text().strip()
