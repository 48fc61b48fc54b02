"""
Random trees of processes that hide, and SIGKILL of what holds them: nothing may be left that could
be killed, and nothing may be said that the process table contradicts.
"""

import collections
import contextlib
import os
import random
import subprocess

import pytest

from spool_tests.support import tortured
from spool_tests.support.guarded import as_nobody
from spool_tests.support.processes import processes_with
from spool_tests.support.waiting import need, until

# How many trees, in the short form and in the long one.
KINDS = {
    "Cold": (4, 250),
    "Warm": (4, 200),
    "Survive": (3, 150),
    "Ssh": (3, 200),
    "Cookie": (2, 50),
    "Sshd": (2, 100),
    "Nobody": (2, 50),
}
SHORT_SEED = "353"
# A client that runs its last word here, as a server does it: in a session of its own, which no
# signal to the client reaches. One host has a startup file that leaves a child.
FAKE_SSH = """#!/bin/sh
for last; do :; done
left=
case "$*" in *startup*) left='setsid sleep 999 </dev/null >/dev/null 2>&1 &' ;; esac
exec 3<&0
setsid sh -c "$left $last" <&3 3<&- &
exec 3<&-
wait $!
"""


class Lab:
    """
    Where trees are tortured.

    Attributes:
        seed (str): With a tree's kind and number it decides all.
        counts (collections.Counter): Of what was done, and of what came of it.
        oracles (list): Of all trees so far: (Oracle, the uid of what had to kill it).
        nobodys (pathlib.Path): A plain user's spool.
        raised (str): A program that makes that user's processes root's.
    """

    def __init__(self, seed, spool, directory):
        self.seed, self.spool, self.directory = seed, spool, directory
        self.counts, self.oracles = collections.Counter(), []
        self.sshd = self.nobodys = self.raised = None


@pytest.fixture
def lab(spool, tmp_path, monkeypatch, pytestconfig, request):
    seed = os.environ.get("CHAPERONE_TORTURE_SEED") or (
        str(random.randrange(1 << 32)) if pytestconfig.option.long else SHORT_SEED
    )
    lab = Lab(seed, spool, tmp_path / "trees")
    lab.directory.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))  # where runs that survive are kept
    client = tmp_path / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(FAKE_SSH)
    client.chmod(0o755)
    if request.node.callspec.params["kind"] == "Sshd":
        lab.sshd = request.getfixturevalue("sshd")
    else:
        monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    if request.node.callspec.params["kind"] == "Nobody":
        need("setpriv")
        raised, lab.nobodys = as_nobody(tmp_path)
        lab.raised = raised.split()[0]
    yield lab
    for oracle, _ in lab.oracles:
        oracle.kill()
    end_launcher(spool)
    for pid, command in processes_with(str(client.parent).encode()).items():
        if command == "sleep 999 ":
            tortured.strike(pid)
        if command == "sleep 60 ":  # the sign of a far side that a run never began there
            tortured.strike(tortured.parent_of(pid))
            tortured.strike(pid)


def end_launcher(spool):
    for pid, command in processes_with(str(spool).encode()).items():
        if " launcher " in command:
            tortured.strike(pid)
            until(lambda pid=pid: not tortured.is_there(pid))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.root if kind == "Nobody" else ()) for kind in KINDS],
)
def test_nothing_is_left_of_a_tree_and_no_verdict_is_false(kind, lab, pytestconfig, told):
    print(f"CHAPERONE_TORTURE_SEED={lab.seed}")
    failures = []
    number = KINDS[kind][pytestconfig.option.long]
    for index in range(number):
        tree = getattr(tortured, kind)(lab, index)
        try:
            tree.torture()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failures.append(f"{error}\n{tree}")
            tree.abandon()
    for oracle, uid in lab.oracles:
        # A far side that has lost its near side may have begun only now, on a busy machine.
        with contextlib.suppress(AssertionError):
            until(lambda oracle=oracle, uid=uid: not oracle.living(uid))
        if left := oracle.living(uid):
            failures.append(f"{oracle.path}: left long after: {left}")
    found = ", ".join(f"{what} {count}" for what, count in sorted(lab.counts.items()))
    told(f"torture: {number} trees {kind}, {len(failures)} failures: {found}")
    assert not failures, "\n".join(failures[:9])
