"""A run directory in which a file is torn, empty, garbage or something else: readers give a state, verbs a sentence, and nothing raises."""

import json
import os
import signal
import subprocess

import pytest

from chaperone import recover, spool
from chaperone import status as statuses
from chaperone.errors import SpoolError
from chaperone.scheduler import Spool
from spool_tests.conftest import CHAPERONE, until

GARBAGE = bytes(range(256)) * 4
DAMAGES = {
    "gone": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.old[: len(path.old) // 2]),
    "garbage": lambda path: path.write_bytes(GARBAGE),
    "other-json": lambda path: path.write_text('[1, {"state": []}]'),
    "odd-types": lambda path: path.write_text(json.dumps(odd(json.loads(path.old)) if path.old[:1] == b"{" else {"state": 3})),
    "newer": lambda path: path.write_text(json.dumps({**(json.loads(path.old) if path.old[:1] == b"{" else {}), "version": 99, "quantum": [1]})),
    "deep": lambda path: path.write_text("[" * 100_000),
}
PLANTED = {
    "directory": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "symlink": lambda path: path.symlink_to("/etc/passwd"),
    "dangling": lambda path: path.symlink_to("nowhere"),
}


FILES = [spool.SPEC, spool.FINAL_STATUS, spool.LIVE_STATUS, spool.LOCK, "stdout", spool.LOG, spool.CONTROL]


def odd(value):
    """Every field of another type than it should be."""
    return {name: "x" if not isinstance(field, str) else [field] for name, field in value.items()} | {"state": value.get("state")}


def damaged(path, how):
    """Replace a file of a run directory, or make what was not there."""
    kind = type(path)
    old = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)

    class Place(kind):
        pass

    place = Place(path)
    place.old = old
    (DAMAGES | PLANTED)[how](place)


@pytest.fixture
def run(spool):
    """An ended run, or one whose chaperone was killed."""

    def make(dead):
        text = "echo out; echo err >&2; exit 3" if not dead else "echo out; echo err >&2; exec sleep 60"
        command = [*CHAPERONE, "run", "--spool", str(spool), "-"]
        chaperone = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        chaperone.stdin.write(json.dumps({"id": "r", "program": {"command": text}}).encode())
        chaperone.stdin.close()
        if dead:
            until(lambda: (spool / "r" / "stderr").exists() and (spool / "r" / "stderr").read_bytes() == b"err\n")
            status = until(lambda: (found := json.loads((spool / "r" / "running.json").read_text()))["state"] == "running" and found)
            os.kill(status["chaperone_pid"], signal.SIGKILL)
            until(lambda: not os.path.exists(f"/proc/{status['pid']}"))
        chaperone.wait(20)
        return spool / "r"

    return make


def verbs(path):
    """All the verbs that only look; each exits, none with a traceback or a bug's exit code."""
    for words in (["ls", "--all"], ["ls", "--json"], ["status", "r"], ["tail", "r"], ["wait", "r"]):
        done = subprocess.run([*CHAPERONE, *words, "--spool", str(path)], capture_output=True, timeout=20, stdin=subprocess.DEVNULL, check=False)
        assert b"Traceback" not in done.stderr and done.returncode not in (os.EX_SOFTWARE, -signal.SIGSEGV), (words, done)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dead", [False, True], ids=["ended", "killed"])
def test_damage_is_told_and_never_raised(run, dead, name, how):
    path = run(dead)
    damaged(path / name, how)
    seen = Spool(path.parent)["r"].status()
    assert seen.state in statuses.STATES
    if name not in (spool.FINAL_STATUS, spool.LOCK, spool.LIVE_STATUS) and not dead:
        assert (seen.state, seen.return_code) == ("terminated", 3)
    if dead and name not in (spool.FINAL_STATUS, spool.LOCK):
        assert seen.state == "lost"
    if how in ("torn", "garbage", "deep"):
        verbs(path.parent)
    recover.reap(str(path.parent))
    assert Spool(path.parent)["r"].status().state in statuses.STATES


@pytest.mark.parametrize("how", PLANTED)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_ours_is_refused_in_a_sentence(run, name, how):
    """Also for `ls` of the whole spool: the runs beside it are listed."""
    path = run(True)
    damaged(path / name, how)
    try:
        assert Spool(path.parent)["r"].status().state in statuses.STATES
    except SpoolError as error:
        assert str(error).startswith(f"unable to open '{name}': ") and "\n" not in str(error)
    verbs(path.parent)
    recover.reap(str(path.parent))
    if how in ("symlink", "dangling"):
        assert not os.path.lexists(path / name) or os.path.islink(path / name)
    assert not (path / "nowhere").exists()
