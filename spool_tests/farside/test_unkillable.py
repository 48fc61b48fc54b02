"""
What a far side can't kill, as it is another user's: named, never said to be gone, not waited for.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from chaperone.farside import payload, records
from spool_tests.support import shells, supervisors
from spool_tests.support.far import log
from spool_tests.support.mounts import WITHOUT_PROC, mounted
from spool_tests.support.places import ROOT as ROOT_OF_ALL
from spool_tests.support.runs import ask, final, running, start, stdout
from spool_tests.support.supervisors import every_sh
from spool_tests.support.waiting import need, until

far, removed = supervisors.far, supervisors.removed
pytestmark = pytest.mark.root

PLAIN = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
# Becomes root, and says so in stdout and in the pipe that it is given.
ROOT = """import os, sys, time
os.setresuid(0, 0, 0)
os.write(1, b"%d\\n" % os.getpid())
[os.write(int(fd), b"x") for fd in sys.argv[1:]]
time.sleep(1000)
"""
# Leaves such a one, in a session of its own.
LEAVES = """import os, sys
reading, writing = os.pipe()
os.set_inheritable(writing, True)
if not os.fork():
    os.setsid()
    os.execv(sys.argv[1], [*sys.argv[1:], str(writing)])
os.read(reading, 1)
"""


@pytest.fixture
def raised(tmp_path):
    """A python that makes itself root for a plain user; what it leaves is killed at the end."""
    need("setpriv", "unshare")
    for path in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o711)
    python = tmp_path / "a raised one"
    shutil.copy(os.path.realpath("/usr/bin/python3"), python)
    python.chmod(0o4755)
    (tmp_path / "far").mkdir()
    os.chown(tmp_path / "far", 65534, 65534)
    yield str(python)
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{name}/exe") == str(python):
                os.kill(int(name), signal.SIGKILL)


@every_sh
@pytest.mark.parametrize("how", ["kernel", "group"])
def test_far_side_names_what_it_can_not_kill(shell, how, far, raised):
    argv = [*PLAIN, shells.as_sh(shell), *payload.CONSTANT[1:]]
    if how == "group":
        argv = [*WITHOUT_PROC, *argv]
    run = far(
        shell,
        {"argv": [raised, "-I", "-S", "-c", ROOT]},
        argv=argv,
        env={**os.environ, "TMPDIR": "/tmp"},
        stop={"grace_period": 0},
    )
    until(lambda: run.read(0.05) or run.output["stdout"])
    pid = run.output["stdout"].decode().strip()
    run.send("z")
    # The kernel keeps 15 bytes of a name; up to its first blank here.
    assert run.wait("unkillable") == ["1", pid, "a" if how == "kernel" else "-"]
    os.kill(int(pid), signal.SIGKILL)
    assert run.outcome()["wait_status"] == signal.SIGKILL


def remote(tmp_path, proc):
    hidden = mounted("mount -t proc -o hidepid=2 proc /proc") if proc == "hidden" else ()
    hop = {"exec": {"argv": [*hidden, *PLAIN]}}
    return {"hops": [hop], "remote_dir": str(tmp_path / "far")}


@pytest.mark.parametrize("life", ["kill", "survive"])
@pytest.mark.parametrize("proc", ["seen", "hidden"])
def test_program_that_can_not_be_killed_is_lost_and_not_said_to_be_gone(
    spool, tmp_path, raised, life, proc
):
    program = {"argv": [raised, "-I", "-S", "-c", ROOT]}
    spec = {"remote": remote(tmp_path, proc), "on_disconnect": life, "stop": {"grace_period": 0}}
    run = start(spool, program, **spec)
    until(lambda: stdout(spool))
    pid = running(spool)["pid"]
    ask(spool, "kill")
    assert run.wait(60) == 0
    status = final(spool)
    sentence = f"1 process can't be killed: {pid} ({'-' if proc == 'hidden' else 'a'})"
    assert (status["state"], status["gone_by"]) == ("lost", None)
    assert (status["exception"]["stage"], status["exception"]["message"]) == (
        "stop",
        f"unable to stop the program: {sentence}",
    )
    assert log(spool).splitlines()[0].partition(" ")[2] == sentence
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("life", ["kill", "survive"])
@pytest.mark.parametrize("proc", ["seen", "hidden"])
def test_leftover_that_can_not_be_killed_is_named_and_not_waited_for(
    spool, tmp_path, raised, life, proc
):
    argv = [sys.executable, "-I", "-S", "-c", LEAVES, raised, "-I", "-S", "-c", ROOT]
    spec = {"remote": remote(tmp_path, proc), "on_disconnect": life, "stop": {"grace_period": 0}}
    run = start(spool, {"argv": argv}, **spec)
    assert run.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["leftovers"]) == ("terminated", 0, 1)
    left = stdout(spool).decode().strip()
    lines = [line.partition(" ")[2] for line in log(spool).splitlines()]
    name = "-" if proc == "hidden" else "a"
    assert f"1 process can't be killed: {left} ({name})" in lines
    os.kill(int(left), signal.SIGKILL)


@pytest.mark.parametrize(
    "words", [[], ["x"], ["1", "2"], ["1", "x", "sh"], ["2", "41", "su", "42"], ["-1"]]
)
def test_record_without_its_numbers_is_none(words):
    assert records.event_of(["unkillable", *words]) is None


def test_record_is_a_sentence():
    words = ["unkillable", "30", "41", "su", "42", "-"]
    assert records.event_of(words) == "unkillable"
    assert records.unkillable(words) == "30 processes can't be killed: 41 (su), 42 (-)"


# What is sent, up to where it would begin; the kill of this shell only prints.
ASKED = """
kill() { echo "kill $*"; }
cookie=none proc=1 home= started= children=/proc/$$/task/$$/children birth= tracking=%s setsid=%s
look $$; birth=$born pid=-1
list_members
echo "members:$inside$outside"
inside='1 -1' outside='-1 0 1 - x'
hit KILL
"""


@every_sh
@pytest.mark.parametrize("tracking", ["kernel", "cookie", "group"])
@pytest.mark.parametrize("setsid", ["setsid", ""])
def test_run_without_a_pid_has_no_members_and_kills_nothing(shell, tracking, setsid):
    """To SIGKILL -1 would end every process of the user: all of the host, as root."""
    members = pathlib.Path(ROOT_OF_ALL, "chaperone/farside/sh/members.sh").read_text()
    text = members + ASKED % (tracking, setsid)
    done = subprocess.run(
        [shells.as_sh(shell), "-c", text], capture_output=True, text=True, cwd="/", timeout=60
    )
    assert done.stdout.splitlines()[-1].startswith("members:"), done
    assert not [line for line in done.stdout.splitlines() if line.startswith("kill -KILL")]
