"""
The chaperone that a launcher has forked before a run is asked for.

Knows: which processes are below a launcher.  Must not know: how a request reaches it.
"""

import json
import os
import signal

import pytest

from chaperone.hold import begin
from chaperone.launch import launcher
from chaperone.launch import start as starting
from chaperone.model import spec as specs
from spool_tests.support.victims import children_of
from spool_tests.support.waiting import until


@pytest.fixture
def spare(warm):
    """The pids of a guard and of its chaperone, which waits for a run."""
    [guard] = until(lambda: children_of(warm))
    [chaperone] = until(lambda: children_of(guard))
    return {"guard": guard, "chaperone": chaperone}


def started(spool):
    """The final status of a run that takes longer than a look at its guard."""
    run_id = starting.start(str(spool), {"program": {"argv": ["sleep", "0.1"]}}, warm=True)
    until((spool / ".ended" / run_id).is_symlink)
    return json.loads((spool / run_id / "status.json").read_text())


def test_rehearsal_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.listdir("/proc/self/fd")
    begin.rehearse(launcher.EXAMPLE)
    assert os.listdir("/proc/self/fd") == before and os.listdir(tmp_path) == []
    spec = json.loads(launcher.EXAMPLE)
    assert specs.checked(spec, "/") == spec


def test_next_run_has_the_chaperone_that_waits(spool, spare):
    status = started(spool)
    assert {name: status[f"{name}_pid"] for name in spare} == spare


@pytest.mark.parametrize("victim", ["chaperone", "guard"])
def test_it_may_be_killed_and_the_next_run_is_as_good(spool, warm, spare, victim):
    os.kill(spare[victim], signal.SIGKILL)
    until(lambda: spare["guard"] not in children_of(warm))
    assert started(spool)["return_code"] == 0
    assert len(os.listdir(spool / ".ended")) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGXCPU])
@pytest.mark.parametrize("reached", ["chaperone", "guard"])
def test_signal_that_reached_it_is_not_the_next_runs(spool, spare, reached, signum):
    until(lambda: is_asleep(spare["guard"]))
    os.kill(spare[reached], signum)
    until(lambda: is_asleep(spare["guard"]))
    assert started(spool)["return_code"] == 0


def is_asleep(pid):
    """Whether a guard waits, and has passed on the signals that reached it."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return fields["State"].split()[0] == "S" and not int(fields["ShdPnd"], 16)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_launcher(warm, spare, signum):
    os.kill(warm, signum)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in spare.values()))
