"""
Each private module of CPython replaced by its public one: whole runs, and the tests of JSON.

Knows: `chaperone.cpython`.  Must not know: what uses it.
"""

import json
import os
import pathlib
import subprocess

import pytest

from spool_tests.support.fallbacks import FORCED, argv
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once


def told(command, **keywords):
    """What a command prints that ends well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **keywords)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def chaperone(name, *words, spec=None):
    """What the command prints where a fallback is forced."""
    return told([*argv(name), *words], input=None if spec is None else json.dumps(spec))


def followed(name, ends):
    """The events of `chaperone follow` up to the last of some endings."""
    events = []
    command = [*argv(name), "follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        while sum(event["event"] == "ended" for event in events) < ends:
            events.append(json.loads(follower.stdout.readline()))
        follower.terminate()
    return events


def test_each_fallback_is_the_public_module():
    code = """
import json, os
from chaperone import cpython
from chaperone.model import jsontext
print(
    cpython.signal.__name__, cpython.socket.__name__, cpython.stat.__name__,
    cpython.environ == os.environb,
    cpython.prctl(36, 1), cpython.prctl(-1, 0),
)
"""
    assert told(argv("all", code)) == "signal socket stat True 0 -1\n"
    code = "from chaperone.model import jsontext; print(jsontext._encode.__class__.__name__)"
    kinds = {name: told(argv(name, code)).strip() for name in FORCED}
    assert {name for name, kind in kinds.items() if kind == "function"} == {
        *(name for name in FORCED if "json" in name and name != "_json with a new hook"),
        "all",
    }


@pytest.mark.parametrize("name", FORCED)
def test_whole_run_is_the_same_with_a_fallback(spool, name):
    """
    Output, signals, a leftover that prctl finds, a stop, the reader: each private module has work.
    """
    left = {"command": "echo out; echo ü >&2; setsid sleep 600 & kill -USR1 $$"}
    assert chaperone(name, "run", "-", spec={"id": "ended", "program": left}) == "ended\n"
    waits = {"argv": ["sleep", "600"], "env": {"NAME": "\udcff"}}
    chaperone(name, "run", "--detach", "-", spec={"id": "stopped", "program": waits})
    status = spool / "stopped" / "running.json"
    until(lambda: json.loads(status.read_bytes())["state"] == "running")
    (spool / "stopped" / "control").write_text("signal USR9\nstop 5 by=test\n")
    until((spool / "stopped" / "status.json").exists)
    listed = [json.loads(line) for line in chaperone(name, "ls", "--all", "--json").splitlines()]
    outcomes = {run["run_id"]: (run["signal"], run["leftovers"]) for run in listed}
    assert outcomes == {"ended": ("SIGUSR1", 1), "stopped": ("SIGTERM", 0)}
    ended = json.loads(chaperone(name, "status", "ended"))
    assert (ended["state"], ended["complete"], ended["stdout"]["bytes"]) == ("terminated", True, 4)
    events = [event for event in followed(name, 2) if event["event"] == "output"]
    assert {(event["run_id"], event["text"]) for event in events} == {
        ("ended", "out\n"),
        ("ended", "ü\n"),
    }


@pytest.mark.parametrize("name", ["_signal", "_socket", "all"])
def test_launcher_is_the_same_with_a_fallback(spool, name):
    with subprocess.Popen([*argv(name), "launcher"], stdin=subprocess.DEVNULL) as launcher:
        until((spool / ".launcher").exists)
        spec = {"id": "warm", "program": {"command": "echo out; exit 3"}}
        assert chaperone(name, "run", "--warm", "-", spec=spec) == "warm\n"
        until((spool / "warm" / "status.json").exists)
        status = json.loads((spool / "warm" / "status.json").read_bytes())
        launcher.terminate()
    assert (status["return_code"], status["stdout"]["bytes"]) == (3, 4)


@pytest.mark.parametrize("name", ["json in Python", "_json with a new hook"])
def test_json_is_the_same_with_a_fallback(name, tmp_path):
    """The tests of jsontext pass, sentence by sentence, in an interpreter without `_json`."""
    (module,) = pathlib.Path(ROOT, "spool_tests").rglob("test_jsontext.py")
    code = f"""
import os, pytest
os.chdir({ROOT!r})
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {str(module)!r}]))
"""
    environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)}
    told(argv(name, code), env=environment)
