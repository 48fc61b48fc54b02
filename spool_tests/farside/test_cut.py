"""
Connections that are cut, and their parts that are killed.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import time

import pytest

from chaperone.farside.connect.connection import Connection
from chaperone.farside.unsupervised import Plain
from chaperone.model.hops.route import Route
from chaperone.program.loop import Loop
from spool_tests.support import disk, shells, supervisors
from spool_tests.support.far import assert_no_supervisor, session_of
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, running, sh, start, stdout
from spool_tests.support.waiting import until

PROGRAMS = supervisors.PROGRAMS


VICTIMS = ("chaperone", "ssh", "session")
CELLS = [(victim, program) for program in PROGRAMS for victim in VICTIMS]
# Of runs that end by their connection: so long that it is not this that ends them.
LEASE_S = 1000


class Orphans:
    """Runs that are about to lose their connection, and how long something of them lives on."""

    def __init__(self, spool):
        self._spool, self._keys, self._since, self.took = spool, {}, {}, {}

    def start(self, run_id, program, **spec):
        chaperone = start(self._spool, sh(PROGRAMS[program]), run_id, **spec)
        self._keys[run_id] = json.loads((self._spool / run_id / "spec.json").read_text())["key"][
            :16
        ].encode()
        return chaperone

    def cut(self, *run_ids):
        self._since |= dict.fromkeys(run_ids, time.monotonic())

    def are_gone(self):
        """One look: whether nothing is left of all that were cut."""
        alive = {
            run_id
            for run_id, key in self._keys.items()
            if run_id not in self.took
            for command in processes_with(b"CHAPERONE_COOKIE=" + key).values()
            if not command.startswith("grep")  # that is the far side's own search
        }
        for run_id, since in self._since.items():
            if run_id not in alive and run_id not in self.took:
                self.took[run_id] = time.monotonic() - since
        return self._since.keys() <= self.took.keys()

    def slowest(self):
        """The longest time that it took, once all are gone."""
        with contextlib.suppress(AssertionError):  # for the assertion below, which says more
            until(self.are_gone)
        assert self._since.keys() <= self.took.keys(), (
            f"something lives on of {self._since.keys() - self.took.keys()}, others "
            f"were gone after {self.took}"
        )
        return max(self.took.values())


def kill_one(sshd, victim, chaperone, client):
    for pid in {
        "chaperone": [chaperone.pid],
        "ssh": [client],
        "session": session_of(sshd, client) if victim == "session" else [],
    }[victim]:
        with contextlib.suppress(
            ProcessLookupError
        ):  # the one half of a session ends with the other
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("as it is", marks=pytest.mark.user),
        *(pytest.param(shell, marks=pytest.mark.root) for shell in shells.SH),
    ],
)
def test_nothing_is_left_when_something_of_the_connection_is_killed(spool, request, shell):
    """
    Whatever /bin/sh is. In the long form one after the other, each with a clock; in the short one
    at once, a third for each shell and all for two.
    """
    long, as_it_is = request.config.option.long, shell == "as it is"
    there = (
        request.getfixturevalue("sshd") if as_it_is else request.getfixturevalue("sshd_with")(shell)
    )
    cells = (
        CELLS
        if long or as_it_is
        else [
            cell
            for number, cell in enumerate(CELLS)
            if (number + number // 3 + shells.SH.index(shell)) % 3 == 0
        ]
    )
    orphans, runs = Orphans(spool), {}
    for victim, program in cells:
        run_id = f"{victim}-{program.replace(' ', '-')}"
        runs[run_id] = (
            victim,
            orphans.start(
                run_id,
                program,
                remote=there.remote(),
                lease=LEASE_S,
                stop={"grace_period": 0.4},
            ),
        )
    clients = {run_id: running(spool, run_id)["connection"]["pid"] for run_id in runs}
    for run_id in runs:
        until(lambda run_id=run_id: stdout(spool, run_id))
    for run_id, (victim, chaperone) in runs.items():
        kill_one(there, victim, chaperone, clients[run_id])
        orphans.cut(run_id)
        if long:
            orphans.slowest()
    slowest = orphans.slowest()
    print(
        f"/bin/sh {shell}: gone after {slowest:.2f} s at most, "
        + ", ".join(f"{run_id} {took:.2f}" for run_id, took in orphans.took.items())
    )
    for run_id, (victim, chaperone) in runs.items():
        assert chaperone.wait(60) == (-9 if victim == "chaperone" else 0)
        if victim == "chaperone":
            assert disk.seen(spool, run_id)[1]["state"] == "lost"
        else:
            status = final(spool, run_id)
            assert (
                status["state"],
                status["exception"]["stage"],
                status["started"],
                status["complete"],
            ) == ("lost", "connection", True, False)
            assert status["gone_by"] > status["end_time"] and status["return_code"] is None
            assert b"Connection to" not in (spool / run_id / "stderr").read_bytes()
    if not as_it_is:
        assert_no_supervisor(there)


@pytest.mark.root
def test_silent_cut_ends_the_program_by_its_lease(spool, network, request):
    """Whatever /bin/sh is; all runs lose the same cable at once."""
    lease, grace = 8, 0.4  # less may be over before the cut
    orphans, runs = Orphans(spool), {}
    for number, shell in enumerate(shells.SH):
        there = network.sshd_with(shell)
        for turn, program in enumerate(PROGRAMS):
            if request.config.option.long or turn == number % len(PROGRAMS):
                run_id = f"{shell}-{program.replace(' ', '-')}"
                remote = there.remote(options={"ServerAliveInterval": 2, "ServerAliveCountMax": 3})
                runs[run_id] = orphans.start(
                    run_id, program, remote=remote, lease=lease, stop={"grace_period": grace}
                )
    for run_id in runs:
        running(spool, run_id)
        until(lambda run_id=run_id: stdout(spool, run_id))
    network.cut()
    orphans.cut(*runs)
    try:
        slowest = orphans.slowest()
        assert min(orphans.took.values()) > 1.5, f"it did not wait for its lease: {orphans.took}"
        print(
            f"gone after {slowest:.2f} s at most: "
            + ", ".join(f"{run_id} {took:.2f}" for run_id, took in orphans.took.items())
        )
        for chaperone in runs.values():
            assert chaperone.wait(60) == 0
    finally:
        network.heal()
    for run_id in runs:
        status = final(spool, run_id)
        assert (status["state"], status["exception"]["stage"], status["started"]) == (
            "lost",
            "connection",
            True,
        )
        assert "not responding" in status["exception"]["message"], status["exception"]
        assert status["gone_by"] is not None
    for shell in shells.SH:
        assert_no_supervisor(network.sshd_with(shell))


class Ending(Loop):
    """A loop, and a connection's owner, that end when the connection does."""

    def connected(self):
        pass

    def closed(self, code, ready, noise):
        self.end()


def test_connection_that_finds_no_descriptor_leaves_none_open():
    """A run that survives tries again and again."""
    loop, before, limits = (
        Ending(),
        os.listdir("/proc/self/fd"),
        resource.getrlimit(resource.RLIMIT_NOFILE),
    )
    connection, room = None, 4
    route = Route.of([{"exec": {"argv": ["env"]}}])
    while connection is None:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
            connection = Connection(loop, ["/bin/cat"], route, Plain(b""), loop, loop)
        except OSError as error:
            assert error.errno in (
                errno.EMFILE,
                errno.EINVAL,
            )  # the latter for a number that the limit does not reach
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert connection or os.listdir("/proc/self/fd") == before
        room += 1
    assert room > 14
    connection.begin()
    loop.run()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.root
def test_short_cut_is_as_if_nothing_had_been(spool, network):
    process = start(
        spool,
        sh("i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.1; done"),
        remote=network.sshd.remote(),
        lease=20,
    )
    until(lambda: stdout(spool))
    network.cut()
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 1)
    network.heal()
    assert process.wait(60) == 0
    assert (final(spool)["state"], final(spool)["complete"]) == ("terminated", True)
    assert stdout(spool) == b"".join(b"%d\n" % number for number in range(40))
