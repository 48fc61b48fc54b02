"""
What may vanish: whatever dies, for a while or for good, and two of them at once, no program lives
longer than its lease, no outcome is invented, and no byte is lost or doubled.

Each row of the table in docs/agents.rst is a test here.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess

import pytest

import chaperone
from spool_tests.support.agents import served
from spool_tests.support.deployed import Far
from spool_tests.support.fleet import WRITER, Fleet, grow, reason, state
from spool_tests.support.mirrors import Mirrored, same
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.runs import final, live, py, sh, stdout
from spool_tests.support.surviving import booted_anew
from spool_tests.support.waiting import need, until

pytestmark = pytest.mark.once

FOREVER = 3600  # a lease that no test waits for
# It ignores the stop's signal, and has a child that left its session.
STUBBORN = (
    "trap '' TERM; (setsid sh -c \"trap '' TERM; while :; do sleep 0.05; done\" &);"
    " echo ready; while :; do sleep 0.05; done"
)
SHORT = {"renew": 3, "stop": {"grace_period": 0.2}}
TURNS = 0.8, 3, 12  # leases in seconds: a longer one if the machine is too slow for a shorter one

# Each row of the table in docs/agents.rst, and the test of it.
ROWS = {
    "the scheduler": "test_run_ends_by_itself_while_there_is_no_scheduler",
    "the mirror, for less than the lease": (
        "test_mirror_that_is_away_for_less_than_the_lease_loses_nothing"
    ),
    "the mirror or its host, for good": "test_run_is_stopped_when_its_mirror_is_gone_for_good",
    "the same, with a deployed agent": (
        "test_deployed_agent_leaves_nothing_when_nothing_comes_for_its_runs"
    ),
    "the network, for less than the lease": (
        "test_silent_network_for_less_than_the_lease_loses_nothing"
    ),
    "the network, for longer than the lease": "test_silent_network_ends_the_run_by_its_lease",
    "the agent": "test_runs_go_on_while_their_agent_is_dead",
    "the chaperone of the run": "test_program_dies_with_its_chaperone",
    "the agent's host, by a reboot": "test_boot_of_the_far_host_is_reported_as_a_loss",
    "this host, by a reboot within the lease": (
        "test_boot_of_the_near_host_within_the_lease_changes_nothing"
    ),
    "the receiver of callbacks, for a while": (
        "test_receiver_that_is_down_for_a_while_gets_every_byte"
    ),
    "two of these at once": "test_two_deaths_leave_no_program_and_no_lie",
}


@pytest.fixture
def fleet(agent, spool, tmp_path):
    fleet = Fleet(agent, spool, tmp_path)
    fleet.mirror.start()
    try:
        yield fleet
    finally:
        fleet.end()


def events(spool):
    """All that a follower delivers of a spool without live runs, by the name of its class."""
    with chaperone.Spool(spool).follow() as follower:
        return list(iter(lambda: follower.next(0), None))


# -- the scheduler, the mirror


@pytest.mark.tier("agents")
def test_run_ends_by_itself_while_there_is_no_scheduler(fleet):
    """The mirror goes on renewing."""
    fleet.await_mirror()

    def attempt(number, renew):
        run_id = f"r{number}"
        fleet.write(run_id, renew=renew)
        control = fleet.far / run_id / "control"
        with contextlib.suppress(FileNotFoundError):  # it was stopped
            first = os.stat(control).st_atime
            until(lambda: first + 1.5 * renew < os.stat(control).st_atime < 1e9, 60)
        fleet.go.touch()
        status = fleet.copied(run_id)
        fleet.go.unlink()
        return reason(status) is None and status["return_code"] == 3

    assert any(itertools.starmap(attempt, enumerate(TURNS)))
    kinds = [type(event).__name__ for event in events(fleet.near)]
    assert kinds.count("Ended") == len(list((fleet.near / ".ended").iterdir()))


@pytest.mark.tier("agents")
def test_mirror_that_is_away_for_less_than_the_lease_loses_nothing(fleet):
    fleet.write(renew=FOREVER)
    grow(fleet.near)
    fleet.mirror.kill()
    assert state(fleet.near) == "unattended"
    grow(fleet.far)
    fleet.mirror.start()
    until(lambda: state(fleet.near) == "running")
    grow(fleet.near)
    fleet.go.touch()
    status = fleet.copied()
    assert (status["return_code"], status["complete"], reason(status)) == (3, True, None)


@pytest.mark.tier("agents")
def test_run_is_stopped_when_its_mirror_is_gone_for_good(fleet):
    fleet.await_mirror()
    fleet.put("r", sh(STUBBORN), **SHORT)
    fleet.mirror.kill()
    assert state(fleet.near) in ("unattended", "lost")
    status = fleet.ended(fleet.far)
    assert (reason(status), status["signal"]) == ("lease", "SIGKILL")
    assert not fleet.programs()
    until(lambda: state(fleet.near) == "lost")
    done = subprocess.run([*CHAPERONE, "reap"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lost = fleet.ended(fleet.near)
    assert (lost["state"], lost["complete"]) == ("lost", False)
    assert lost["gone_by"] > status["end_time"]


@pytest.mark.tier("agents")
def test_deployed_agent_leaves_nothing_when_nothing_comes_for_its_runs(tmp_path, monkeypatch):
    """Its runs end by the lease that it gives them; then it removes them, itself, and its code."""
    need("openssl")
    far = Far(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "near"))
    try:
        agent = far.deploy(idle_s=0.5, lease_s=1.0)
        agent.start("r", "/bin/sh", "-c", STUBBORN, stop={"grace_period": 0.2})
        until(far.is_clean, 60)
    finally:
        far.end()


@pytest.mark.tier("agents")
def test_second_mirror_of_a_spool_is_refused(fleet):
    second = Mirrored(fleet.agent, fleet.near)
    second.log = fleet.near.parent / "second.log"
    fleet.put("r", sh("exec sleep 60"))
    second.start()
    assert second.process.wait(60) == os.EX_IOERR
    assert "another mirror is already running" in second.log.read_text()
    assert state(fleet.near) == "running"


# -- the agent


@pytest.mark.tier("agents")
def test_runs_go_on_while_their_agent_is_dead(fleet):
    fleet.write(renew=FOREVER)
    grow(fleet.near)
    fleet.agent.kill()
    grow(fleet.far)
    assert state(fleet.near) == "running"
    fleet.agent.start()
    grow(fleet.near)
    fleet.agent.kill()
    fleet.go.touch()
    fleet.ended(fleet.far)  # while nothing serves it
    fleet.agent.start()
    assert (fleet.copied()["return_code"], fleet.programs()) == (3, {})


# -- the far chaperone, the far host, the near host


@pytest.mark.tier("agents")
def test_program_dies_with_its_chaperone(fleet):
    fleet.write(renew=FOREVER)
    grow(fleet.near)
    os.kill(live(fleet.far)["chaperone_pid"], signal.SIGKILL)
    until(lambda: not fleet.programs())
    fleet.reap()
    status = fleet.copied()
    assert (status["state"], status["return_code"], status["complete"]) == ("lost", None, False)


@pytest.mark.tier("agents")
@pytest.mark.root
def test_boot_of_the_far_host_is_reported_as_a_loss(fleet, tmp_path):
    fleet.write(renew=FOREVER)
    grow(fleet.near)
    fleet.end_far_host()
    until(lambda: not fleet.programs())
    booted, boot_id = booted_anew(tmp_path)
    fleet.agent.start(booted)
    with fleet.agent.client() as client:
        assert client.get(fleet.agent.api).json()["boot_id"] == boot_id
    status = fleet.copied()  # with the bytes up to the cut
    assert (status["state"], status["return_code"], status["complete"]) == ("lost", None, False)


@pytest.mark.tier("agents")
@pytest.mark.root
def test_boot_of_the_near_host_within_the_lease_changes_nothing(fleet, tmp_path):
    fleet.write(renew=FOREVER)
    grow(fleet.near)
    fleet.mirror.kill()
    booted, _ = booted_anew(tmp_path)
    seen = subprocess.run([*booted, *CHAPERONE, "ls"], capture_output=True, text=True, check=True)
    assert "unattended" in seen.stdout
    fleet.mirror.start(booted)
    grow(fleet.near)
    fleet.go.touch()
    assert fleet.copied()["return_code"] == 3


# -- ids


def test_id_that_is_used_again_starts_nothing(fleet, tmp_path):
    """A scheduler that was restored from a backup does not know that it has started this run."""
    where = {"token_file": fleet.agent.token_files["run"], "ca": fleet.agent.ca}
    spec = {"id": "r", "program": sh(f"echo once | tee -a {tmp_path}/starts")}
    spool = chaperone.Spool(fleet.agent.spool_url, **where)
    spool.start(spec)
    first = fleet.copied()
    for again in range(2):
        with pytest.raises(chaperone.RunExistsError) as caught:
            chaperone.Spool(fleet.agent.spool_url, **where).start(spec)
        assert str(caught.value) == "unable to create run 'r': it exists", again
    assert (tmp_path / "starts").read_text() == "once\n"
    assert (final(fleet.near), stdout(fleet.near)) == (first, b"once\n")


# -- the network


@pytest.fixture
def distant(spool, tmp_path, network):
    """A fleet whose agent is on another host, as far as the network goes."""
    with served(tmp_path, host=network.address, before=network.words) as agent:
        fleet = Fleet(agent, spool, tmp_path)
        fleet.mirror.start()
        try:
            yield fleet
        finally:
            fleet.end()


@pytest.fixture
def cable(network):
    """The network, in order at the end."""
    cable = Cable(network)
    yield cable
    cable.heal()


class Cable:
    def __init__(self, network):
        self._network, self._is_cut = network, False

    def cut(self):
        self._network.cut()
        self._is_cut = True

    def heal(self):
        if self._is_cut:
            self._network.heal()
        self._is_cut = False


@pytest.mark.tier("agents")
@pytest.mark.root
def test_silent_network_for_less_than_the_lease_loses_nothing(distant, cable):
    distant.write(renew=FOREVER)
    grow(distant.near)
    cable.cut()
    grow(distant.far)
    assert state(distant.near) == "running"
    cable.heal()
    grow(distant.near)
    distant.go.touch()
    assert distant.copied()["return_code"] == 3


@pytest.mark.tier("agents")
@pytest.mark.root
def test_silent_network_ends_the_run_by_its_lease(distant, cable):
    distant.await_mirror()
    distant.put("r", sh(STUBBORN), **SHORT)
    cable.cut()
    status = distant.ended(distant.far)
    assert (reason(status), distant.programs()) == ("lease", {})
    assert state(distant.near) == "running"  # here it is not known, and nothing is guessed
    cable.heal()
    assert distant.copied() == status


# -- the receiver


@pytest.mark.tier("agents")
def test_receiver_that_is_down_for_a_while_gets_every_byte(agent, spool, tmp_path):
    """`agent` is where the receiver is, and `spool` where the program runs."""
    agent.kill()
    agent.words = ["--receive"]
    agent.start()
    with agent.client() as client:
        where = client.put("/etl/receive/r").json()
    go = tmp_path / "go"
    spec = {
        "id": "r",
        "program": py(WRITER.format(go=str(go))),
        "callback": {**where, "ca": str(agent.ca)},
        "config": {"retry_frequency": 0.05, "output_latency": 0.02},
    }
    (tmp_path / "program.json").write_text(json.dumps(spec))
    with open(tmp_path / "program.json") as stdin:
        poster = subprocess.Popen(
            [*CHAPERONE, "agent"], stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    try:
        until((agent.spool / "r" / "stdout").exists)
        grow(agent.spool)
        agent.kill()
        grow(spool)
        go.touch()
        until((spool / "r" / "status.json").exists)
        assert poster.poll() is None
        agent.start()
        assert poster.communicate(timeout=60) == (None, b"")
        assert poster.returncode == 0
    finally:
        poster.kill()
        poster.communicate()
    assert final(agent.spool)["return_code"] == 3
    assert same(spool, agent.spool, "r") == []


# -- two at a time

DEATHS = {
    "mirror": lambda fleet, cable: fleet.mirror.kill(),
    "agent": lambda fleet, cable: fleet.agent.kill(),
    "chaperone": lambda fleet, cable: os.kill(live(fleet.far)["chaperone_pid"], signal.SIGKILL),
    "network": lambda fleet, cable: cable.cut(),
    "far host": lambda fleet, cable: fleet.end_far_host(),
    "near host": lambda fleet, cable: fleet.mirror.kill(),
}
# A host takes these with it, so they are no second death.
PAIRS = [
    pair
    for pair in itertools.combinations(DEATHS, 2)
    if pair not in (("mirror", "near host"), ("agent", "far host"), ("chaperone", "far host"))
]


@pytest.mark.root
@pytest.mark.tier("agents")
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_deaths_leave_no_program_and_no_lie(distant, cable, tmp_path, pair):
    distant.await_mirror()
    distant.put("r", sh(STUBBORN), **SHORT)
    for victim in pair:
        DEATHS[victim](distant, cable)
    until(lambda: not distant.programs(), 60)
    until(lambda: state(distant.far) in ("lost", "terminated"))
    booted, _ = booted_anew(tmp_path)
    if "agent" in pair or "far host" in pair:
        distant.agent.start(booted if "far host" in pair else ())
    if "mirror" in pair or "near host" in pair:
        distant.mirror.start(booted if "near host" in pair else ())
    cable.heal()
    if "chaperone" in pair:
        distant.reap()
    status = distant.copied()
    if "chaperone" in pair or "far host" in pair:
        assert (status["state"], status["return_code"], status["signal"]) == ("lost", None, None)
    else:
        assert (reason(status), status["signal"]) == ("lease", "SIGKILL")


def test_each_row_of_the_table_is_a_test():
    text = pathlib.Path(ROOT, "docs", "agents.rst").read_text()
    table = text[text.index("\nwhat vanishes ") :].split("\n===")[1]
    width = table.index(" ", table.index("=")) + len("===")
    assert [line[:width].strip() for line in table.splitlines()[1:]] == list(ROWS)
    assert [name for name in ROWS.values() if name not in globals()] == []
