"""
Runs of random trees (oracle.py): what is asked of them, what is killed of them, and what must hold
then. A class for each way to hold a run.
"""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess

from chaperone.launch import start as starting
from chaperone.program import processes
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.failures import name_of
from spool_tests.support.far import session_of
from spool_tests.support.guarded import NOBODY
from spool_tests.support.oracle import TAME_LAST, TAME_STEPS, Oracle, Plan, rest, words_that_work
from spool_tests.support.places import CHAPERONE
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import ask, final, live, log, start
from spool_tests.support.surviving import adopt
from spool_tests.support.waiting import until

KILLED = ("terminated", None, "SIGKILL")
STOPPED = {KILLED, ("terminated", None, "SIGTERM")}
LOST = ("lost", None, None)
# What may come of what is asked or killed; where it came too early, also that nothing was started.
ASKED = {
    None: set(),
    "exit": {("terminated", 3, None)},
    "stop": STOPPED,
    "kill": {KILLED},
}
STRUCK = {
    None: set(),
    "chaperone": {LOST},
    "guard": {KILLED},
    "program": {KILLED},
    "launcher": set(),
    "part": {LOST, *STOPPED},
    "client": {LOST, *STOPPED},
    "session": {LOST, *STOPPED},
}
UNSTARTED = ("error", None, None)
LONG_S = 120  # on a machine that is busy with other tests
EARLY_S, BETWEEN_S = 0.15, 0.06
TAME = 0.3  # of the trees with a far side: one part of it may be killed that others can't replace


def strike(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Cold:
    """
    A run here: its guard is our child.

    Args:
        lab (Lab): Where it is done.
        number (int): Of the tree; with the lab's seed it decides all.
    """

    spec: dict = {}
    victims = (None, None, "chaperone", "chaperone", "guard", "program")
    is_tame = False

    def __init__(self, lab, number):
        self.lab, self.spool, self.run_id = lab, lab.spool, f"{type(self).__name__}-{number}"
        self.rng = rng = random.Random(f"{lab.seed} {self.run_id}")
        self.uid = os.geteuid()
        self.asked = rng.choice(tuple(ASKED))
        self.struck = rng.choice(self.victims)
        if self.asked is None and self.struck in (None, "launcher"):
            self.asked = rng.choice(("exit", "stop", "kill"))
        self.is_early = rng.random() < 0.3
        self.is_left = self.asked == "exit" and self.struck is None and rng.random() < 0.3
        self.directory = lab.directory / self.run_id
        self.directory.mkdir()
        self.oracle, self.go = Oracle(self.directory / "oracle"), self.directory / "go"
        os.mkfifo(self.go)
        self.plan = self.planned()
        self.is_fixed = not self.is_early and self.plan.living is not None
        self.is_left &= self.is_fixed
        self.told, self.process = [], None

    def planned(self):
        words = words_that_work()
        if self.is_tame:
            words = [
                [word for word in found if word in tame]
                for found, tame in zip(words, (TAME_STEPS, TAME_LAST), strict=True)
            ]
        return Plan(self.rng, *words)

    def program(self):
        return {"argv": self.plan.argv(self.oracle, self.go)}

    def __repr__(self):
        """All that a failure needs."""
        when = "early" if self.is_early else "settled"
        told = [" ".join(map(str, line)) for line in self.told]
        return f"{self.run_id}: {self.asked}, {self.struck}, {when}; {told}; {self.plan.node}"

    def tell(self, *words):
        self.told.append(words)

    # -- what is done

    def torture(self):
        """All of one tree's life."""
        grace_s = self.rng.choice((0, 0.1, 0.4))
        spec = {"stop": {"grace_period": grace_s}, "leftovers": "leave" if self.is_left else "stop"}
        self.begin({**self.spec, **spec})
        try:
            if self.is_early:
                rest(self.rng.random() * EARLY_S)
            else:
                self.settle()
            deeds = [(self.ask, self.asked), (self.strike, self.struck)]
            if self.rng.random() < 0.3:
                deeds.reverse()
            for deed, what in deeds:
                if what is not None:
                    deed(what)
                    rest(self.rng.random() * self.rng.choice((0, BETWEEN_S)))
            if self.asked is None and self.told[-1] == ("strikes", self.struck, []):
                self.asked = "stop"  # there was nothing to strike yet
                self.ask("stop")
            self.conclude()
            self.judge()
        finally:
            if self.is_left:
                self.oracle.kill()
        self.end()

    def begin(self, spec):
        self.process = start(self.spool, self.program(), self.run_id, **spec)

    def settle(self):
        """Wait until the tree is as it is to stay, and see what a reader says of it."""
        until(self.oracle.first, LONG_S, self)
        planted = functools.partial(until, lambda: self.oracle.planted() == self.plan.planted)
        if self.plan.living is None:
            # Where something is stopped, others may die: an orphaned process group gets SIGHUP.
            with contextlib.suppress(AssertionError):
                planted(1)
        else:
            planted(LONG_S, self)
        if self.plan.living is not None:
            # One that ends may be there for a moment, and another one not yet.
            until(lambda: len(self.oracle.listed()) == self.plan.listed, LONG_S, self)
            until(lambda: len(self.oracle.living()) == self.plan.living, LONG_S, self)
        alive, status = until(lambda: (found := self.seen())[1]["pid"] and found, LONG_S, self)
        found = alive, status["state"], status["pid"]
        assert found == (True, "running", self.oracle.first()), (found, self.oracle.listed())

    def seen(self):
        """Whether its chaperone lives, and its status, as a reader concludes it."""
        return disk.seen(self.spool, self.run_id)

    def status(self):
        return self.seen()[1]

    def is_live(self):
        return self.seen()[0]

    def ask(self, what):
        """What a scheduler asks: an end, or that the program may come to its own."""
        self.tell("asks", what)
        if what == "exit":
            with contextlib.suppress(AssertionError):  # what ends may wait no more, and still live
                fd = until(lambda: self.opened_go() or (not self.is_live() and -1), LONG_S)
                if fd != -1:
                    os.close(fd)
            return
        line = f"stop {self.rng.choice((0, 0.1, 0.3))}" if what == "stop" else "kill"
        with contextlib.suppress(OSError):  # no process reads it any more
            ask(self.spool, f"{line} by=torture", self.run_id)

    def opened_go(self):
        with contextlib.suppress(OSError):  # ENXIO: it does not wait there yet
            return os.open(self.go, os.O_WRONLY | os.O_NONBLOCK)
        first = self.oracle.first()
        assert not first or is_there(first)

    def strike(self, what):
        pids = getattr(self, f"{what}_pids")()
        self.tell("strikes", what, pids)
        for pid in pids:
            strike(pid)
            self.lab.counts[f"SIGKILL of the {what}"] += 1

    def chaperone_pids(self):
        return [self.status()["chaperone_pid"]]

    def guard_pids(self):
        return [self.status()["guard_pid"]]

    def program_pids(self):
        return [pid for pid in [self.status()["pid"]] if pid and self.oracle.has(pid)]

    # -- how it ends

    def conclude(self):
        """Wait until nobody works at it any more: the moment at which nothing may be left."""
        code = self.process.wait(LONG_S)
        self.await_lock()
        is_killed = code == -signal.SIGKILL and self.struck in ("chaperone", "guard")
        assert code == 0 or is_killed, (self, code)

    def await_lock(self):
        """A child that it was about to make a program of may hold the lock until exec closes it."""
        until(lambda: not self.is_live(), LONG_S, self)

    def judge(self):
        """Compare what is on disk with what the tree wrote of itself, and with /proc."""
        left = self.oracle.living(self.uid)
        status = self.status()
        self.check_left(left, status)
        self.check_verdict(status)
        self.reap()
        reaped = final(self.spool, self.run_id)
        assert outcome(reaped) == outcome(status), (self, brief(status), brief(reaped))
        if reaped["state"] == "lost":
            self.check_loss(reaped)
        self.lab.counts[status["state"]] += 1

    def reap(self):
        reaping.reap(str(self.spool), [self.run_id])

    def check_left(self, left, status):
        """Nothing of it lives, but for what was to be left alone."""
        if self.is_left:
            found = self.oracle.living()
            assert status["leftovers"] == len(found), (seen_of(found), brief(status))
            return
        assert not left, (
            seen_of(left),
            brief(status),
            log(self.spool, self.run_id),
        )

    def check_verdict(self, status):
        possible = ASKED[self.asked] | STRUCK[self.struck]
        if self.is_early and not self.oracle.listed():
            possible = {*possible, UNSTARTED}
        assert outcome(status) in possible, (brief(status), log(self.spool, self.run_id))
        if status["started"] is False:
            assert not self.oracle.listed(), brief(status)
        if self.is_fixed and self.asked == "exit" and self.struck is None:
            # The program waited: all that lived beside it then lived when it had ended.
            assert status["leftovers"] == self.plan.living - 1, brief(status)

    def check_loss(self, status):
        assert status["gone_by"] is not None, brief(status)

    def abandon(self):
        """A failure was found: what lives on must not meet the next tree."""
        with contextlib.suppress(OSError):
            ask(self.spool, "kill by=torture", self.run_id)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid, command in processes_with(str(self.spool).encode()).items():
            if " launcher " not in command:
                strike(pid)
        self.oracle.kill()

    def end(self):
        """What must hold long after."""
        self.lab.oracles.append((self.oracle, self.uid))


def brief(status):
    """What of a status says how a run ended."""
    names = "state started return_code signal stop leftovers tracking complete gone_by exception"
    return {name: status[name] for name in names.split()}


def outcome(status):
    return status["state"], status["return_code"], status["signal"]


class Warm(Cold):
    """The same from a launcher, which is killed too."""

    victims = (None, "chaperone", "chaperone", "guard", "launcher", "launcher", "program")

    def begin(self, spec):
        starting.start(
            str(self.spool), {"id": self.run_id, "program": self.program(), **spec}, warm=True
        )
        self.guard = self.status()["guard_pid"]

    def launcher_pids(self):
        with contextlib.suppress(OSError, ValueError):
            return [int((self.spool / ".launcher.lock").read_text())]
        return []

    def strike(self, what):
        before = self.oracle.living()
        super().strike(what)
        if what == "launcher" and not self.is_early and self.asked is None:
            assert self.oracle.living() == before and self.is_live(), self

    def conclude(self):
        until(lambda: not (self.is_live() or is_there(self.guard)), LONG_S, self)


def is_there(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Ssh(Cold):
    """A far side, by a client that runs it here."""

    spec = {"remote": {"host": "there"}}
    victims = (None, None, "chaperone", "chaperone", "program", "part", "part")

    def planned(self):
        self.is_tame |= self.rng.random() < TAME
        return super().planned()

    def part_pids(self):
        """One process of the supervisor."""
        program = self.status()["pid"]
        if not program or not self.oracle.has(program):
            return []
        above, shell = [], parent_of(program)
        while shell not in (0, 1, self.status()["chaperone_pid"]) and name_of(shell)[:3] != "ssh":
            above.append(shell)
            shell = parent_of(shell)
        if not above:
            return []
        below = processes.descendants(above[-1])
        parts = sorted({*above, *below} - self.oracle.pids())
        if not self.is_tame:  # where the subreaper is killed only a cookie is left
            parts.remove(above[-1])
        if not parts:
            return []
        self.tell([name_of(pid) for pid in reversed(above)], *seen_of((pid, 0) for pid in parts))
        return [self.rng.choice(parts)]

    def conclude(self):
        if self.struck in ("part", "client", "session") and self.asked is None:
            self.asked = "stop"
            with contextlib.suppress(AssertionError):
                until(lambda: not self.is_live(), 0.3)
            self.ask("stop")
        self.process.wait(LONG_S)
        self.await_lock()

    def check_left(self, left, status):
        """A far side that has lost its near side, or a part, ends the tree by itself."""
        is_at_once = status["complete"] and status["leftovers"] is not None
        if not is_at_once and not self.is_left:
            until(
                lambda: not self.oracle.living(self.uid),
                LONG_S,
                (seen_of(left), brief(status)),
            )
            return
        super().check_left(left, status)


class Cookie(Ssh):
    """A far side that finds by the cookie: a startup file has left a child there."""

    spec = {"remote": {"host": "startup"}}
    is_tame = True


class Sshd(Ssh):
    """A far side behind a real sshd."""

    victims = (*Ssh.victims, "client", "session")

    def begin(self, spec):
        super().begin({**spec, "remote": self.lab.sshd.remote()})

    def client_pids(self):
        pid = (self.status()["connection"] or {}).get("pid")
        return [pid] if pid else []

    def session_pids(self):
        with contextlib.suppress(StopIteration):  # the connection is gone
            return [self.rng.choice(session_of(self.lab.sshd, pid)) for pid in self.client_pids()]
        return []


class Survive(Ssh):
    """A run here that survives its chaperone, and is adopted."""

    spec = {"on_disconnect": "survive", "lease": 12}

    def conclude(self):
        if self.struck == "chaperone":
            self.process.wait(LONG_S)
            self.await_lock()
            state = self.status()["state"]
            assert state in ("unattended", "terminated", "error"), self
            if state == "unattended":
                if self.asked is None and not self.is_early:
                    assert is_there(self.oracle.first()), self
                self.tell("adopts")
                self.process = adopt(self.spool, self.run_id)
                self.asked = self.asked or "stop"
                self.ask(self.asked)
        super().conclude()

    def check_verdict(self, status):
        if self.struck == "chaperone" and not self.oracle.listed():
            # What was on its way is known not to have begun, or was killed before it wrote a line.
            assert status["state"] in ("lost", "error") or status["signal"], brief(status)
            return
        super().check_verdict(status)

    def check_loss(self, status):
        pass


class Nobody(Cold):
    """A plain user's, with a part of the tree that is root's."""

    def __init__(self, lab, number):
        super().__init__(lab, number)
        self.is_early = False  # what may not be killed may start what may, later
        self.uid = 65_534
        self.spool = lab.nobodys
        for path in (self.directory, self.oracle.path, self.go):
            os.chown(path, self.uid, self.uid)

    def planned(self):
        steps, last = words_that_work()
        return Plan(self.rng, [step for step in steps if step != "nobody"], [*last, "raised"])

    def program(self):
        return {"argv": self.plan.argv(self.oracle, self.go, self.lab.raised)}

    def begin(self, spec):
        self.process = subprocess.Popen(
            [*NOBODY, *CHAPERONE, "run", "--spool", str(self.spool), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )
        text = json.dumps({"id": self.run_id, "program": self.program(), **spec})
        self.process.stdin.write(text.encode())
        self.process.stdin.close()
        assert self.process.stdout.readline() == f"{self.run_id}\n".encode()
        self.process.stdout.close()

    def seen(self):
        """Root may not use the spool of another user."""
        with contextlib.suppress(FileNotFoundError):
            return False, final(self.spool, self.run_id)
        with contextlib.suppress(FileNotFoundError):
            status = live(self.spool, self.run_id)
            return is_there(status["chaperone_pid"]), status
        return False, final(self.spool, self.run_id)

    def reap(self):
        argv = [*NOBODY, *CHAPERONE, "reap", self.run_id, "--spool", str(self.spool)]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def judge(self):
        if not self.is_live() and self.struck == "chaperone":
            assert not self.oracle.living(self.uid), self
            self.reap()
        super().judge()

    def check_loss(self, status):
        left = sorted(str(pid) for pid, _ in self.oracle.living())
        named = status["exception"]["message"].partition("; still running: ")[2]
        found = seen_of(self.oracle.living()), brief(status)
        assert (sorted(named.replace(",", "").split()), status["gone_by"] is None) == (
            left,
            bool(left),
        ), found

    def end(self):
        """What root alone may kill."""
        self.lab.counts["may not be killed"] += len(self.oracle.living())
        self.oracle.kill()
        super().end()


def seen_of(found):
    """What living processes look like: their name and state."""
    lines = []
    for pid, _ in found:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            lines.append(file.read().split(" ")[:6])
    return lines


def parent_of(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
    return 0
