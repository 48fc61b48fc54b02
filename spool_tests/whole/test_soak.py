"""
No false verdicts: chaperones are paused, killed, starved and adopted, and their wall clock is
stepped by a day, while readers look and follow.

No live run may be called lost, and no dead one alive. It lasts CHAPERONE_SOAK_S seconds; without
that 6, and 3600 with --long.
"""

import collections
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time

import pytest

from chaperone.program import processes
from spool_tests.support import disk, prober
from spool_tests.support.clock import DAY, Clock
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

RUNS = 12  # at once
READERS = 2
PAUSE_S = 0.0002  # of a reader between two looks, which take longer
HARM_S = 0.1  # between two deeds; one in four kills
FALLS_S = 5  # in which the lock of a dead chaperone must be free
PATIENCE_S = 900  # for how much longer it goes on if no run was lost yet: a busy machine starves it
CHECK_S = 10  # how often what the readers said is checked, and the spool cleared
ADOPT = (
    "from chaperone.hold import adopt, inherited; "
    "sys.exit(adopt.hold_left_run(sys.argv[1], sys.argv[2], "
    "inherited.shed_inherited_state(), inherited.print_run_id))"
)
PROBER = "import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Held:
    """
    A chaperone that is our own child, so that we know for certain whether it lives.

    Attributes:
        killed_at (float): Just before it was first sent SIGKILL; None if it never was.
        dead_at (float): When it was known to be dead for good; None until then.
        verdict (str): What we ourselves said of it then.
        dying (bool): Whether the chaperone that holds it now was sent SIGKILL.
    """

    def __init__(self, spool, clock, run_id, seconds, survives):
        self.run_id, self.survives, self.killed_at, self.dead_at, self.verdict = (
            run_id,
            survives,
            None,
            None,
            None,
        )
        program = {"command": f"while :; do echo x; sleep 0.05; done & sleep {seconds:.3f}; exit 3"}
        # A lease is longer than any pause here, also where this test itself is starved: at a load
        # of 40 a paused one waits for minutes. A chaperone killed after its last word to its
        # supervisor leaves it for so long.
        life = (
            {"on_disconnect": "survive", "lease": 3600}
            if survives
            else {"timeouts": {"run": 3600, "idle": 600}}
        )
        self._start(
            [*clock.chaperone, "run", "--spool", str(spool), "-"],
            {"id": run_id, "program": program, "stop": {"grace_period": 0}, **life},
        )

    def _start(self, argv, spec=None):
        # An adopter is sent nothing: it may have closed its stdin before we get so far.
        stdin = subprocess.DEVNULL if spec is None else subprocess.PIPE
        self.process, self.dying = (
            subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE),
            False,
        )
        if spec is not None:
            self.process.stdin.write(json.dumps(spec).encode())
            self.process.stdin.close()
        assert self.process.stdout.readline() == f"{self.run_id}\n".encode()
        self.process.stdout.close()

    def adopt(self, spool, clock):
        """Another chaperone takes it over."""
        self._start([*clock.python(ADOPT), str(spool), self.run_id])

    def lives(self):
        return self.process.poll() is None

    def send(self, number):
        """To the chaperone: to the process that we started, or to the child of that guard."""
        chaperone = self.process.pid
        if not self.survives:
            children = processes.children(chaperone)
            if not children:  # it has just ended
                return
            chaperone = children[0]
        if number == signal.SIGKILL:
            self.killed_at, self.dying = self.killed_at or time.monotonic(), True
        with contextlib.suppress(ProcessLookupError):
            os.kill(chaperone, number)


class Reader:
    """A prober, and what is wrong with what it said."""

    def __init__(self, python, spool, seed, path):
        self.looks, self._said, self._path = 0, [], path
        with open(path, "x") as out:
            argv = [*python, prober.__file__, str(spool), seed, str(PAUSE_S)]
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=out)
        self._lines = open(path)  # noqa: SIM115  closed by `stop`

    def stop(self):
        self.process.stdin.close()
        code = self.process.wait(60)
        self._read()
        self._lines.close()
        return code

    def _read(self):
        self._said += [json.loads(line) for line in self._lines]

    def false_verdicts(self, runs):
        """
        Of what it said of runs that are over (run id to Held): [(what it said, the run)]; the rest
        waits.
        """
        if not self._lines.closed:
            self._read()
        self.looks += sum(said for said in self._said if isinstance(said, int))
        said = [said for said in self._said if not isinstance(said, int)]
        self._said = [words for words in said if words[0] not in runs]
        return [
            (words, vars(runs[words[0]]))
            for words in said
            if words[0] in runs and is_false(runs[words[0]], *words[1:])
        ]


def is_false(run, verdict, how, first, last):
    """
    Whether a reader's verdict contradicts what is known: only where its whole look, begin to end,
    lies where it can't be true.
    """
    if verdict == "alive":
        return last[0] > run.dead_at
    if verdict == "unattended":
        return not run.survives or run.killed_at is None or first[1] < run.killed_at
    if verdict == "lost" and (run.survives or run.killed_at is None or first[1] < run.killed_at):
        return True
    return verdict != run.verdict


@pytest.fixture
def load(spool):
    """Processes that want all of the machine's time, and its disk."""
    texts = (
        "while :; do :; done",
        "while :; do dd if=/dev/zero of=load bs=1M count=20 conv=fsync 2>&-; done",
    )
    loads = [subprocess.Popen(["sh", "-c", text], cwd=spool.parent) for text in texts]
    yield
    for process in loads:
        process.kill()
        process.wait()


def seconds(config):
    return float(os.environ.get("CHAPERONE_SOAK_S", 3600 if config.option.long else 6))


class Soak:
    """The runs, what is done to them, and what is known of them."""

    def __init__(self, spool, seed):
        self.spool, self.rng, self.clock = spool, random.Random(seed), Clock(spool.parent)
        self.runs, self.over, self.reaped, self.wrong, self.number = [], {}, [], [], 0
        self.looks, self.counts, self.falls, self.harmed = 0, collections.Counter(), [], 0.0

    def start(self):
        self.runs.append(
            Held(
                self.spool,
                self.clock,
                f"r{self.number}",
                self.rng.uniform(0.05, 4),
                self.number % 4 == 3,
            )
        )
        self.number += 1

    def harm(self):
        """Now and then one of them is paused, goes on or dies, or the clock is stepped."""
        if time.monotonic() < self.harmed + HARM_S:
            return
        self.harmed = time.monotonic()
        run = self.rng.choice(self.runs)
        if self.rng.random() < 0.05:
            self.clock.step(self.rng.choice([-DAY, 0, DAY, 400 * DAY]))
        elif run.lives():
            number = self.rng.choice(
                [signal.SIGSTOP, signal.SIGCONT, signal.SIGCONT, signal.SIGKILL]
            )
            # What is killed before its program is there may never have one: that is another test's.
            if (
                number != signal.SIGKILL
                or not run.survives
                or disk.seen(self.spool, run.run_id)[1]["state"] == "running"
            ):
                run.send(number)
                self.counts[signal.Signals(number).name] += 1

    def look(self):
        """Our own look, with certain knowledge from before and after it."""
        run = self.rng.choice(self.runs)
        dead_before = not run.lives()
        alive, status = disk.seen(self.spool, run.run_id)
        self.looks += 1
        if dead_before and alive:
            # A child that it was about to make a program of holds the lock until exec closes it,
            # however starved that child is.
            begin = time.monotonic()
            alive, status = until(
                lambda: not (seen := disk.seen(self.spool, run.run_id))[0] and seen,
                FALLS_S,
                f"the lock of {run.run_id}, who is dead, falls",
            )
            self.falls.append(time.monotonic() - begin)
        if (
            run.lives() and not run.dying
            # the kernel closes its files, and its lock with them, before there is a zombie to wait
            # for
        ):
            # It may be in its last steps: the outcome is published, the process is not gone. But
            # lost is a lie.
            if not alive and status["state"] != "terminated":
                self.wrong.append(f"{run.run_id} lives and was called {status['state']}")
        if dead_before:
            self._judge(run, status)

    def _judge(self, run, status):
        """What must be said of one whose chaperone is dead."""
        code, state = run.process.returncode, status["state"]
        if state == "unattended" and run.survives and code == -signal.SIGKILL:
            run.adopt(self.spool, self.clock)
            self.counts["adopted"] += 1
            return
        if (state, code) not in (
            ("terminated", 0),
            ("terminated", -signal.SIGKILL),
            ("lost", -signal.SIGKILL),
        ) or (state == "lost" and run.survives):
            self._wrong(run, status)
        if state == "terminated" and status["return_code"] != 3:
            # Pids come round within a minute of this: whoever on this host signals one too late,
            # may hit a program. Ours would be in `stop`.
            self.counts[f"signalled by others: {status['signal']}"] += 1
            if status["signal"] is None or status["stop"] is not None or not status["complete"]:
                self._wrong(run, status)
        run.dead_at, run.verdict = time.monotonic(), state
        self.counts[state] += 1
        self.runs.remove(run)
        self.over[run.run_id] = run

    def end(self):
        """
        Of a soak that was broken off: those that survived their chaperone get one again, which the
        spool then asks to end them.
        """
        if self.runs:
            subprocess.run(
                [*CHAPERONE, "adopt", "--detach", "--spool", str(self.spool)],
                stdout=subprocess.DEVNULL,
                check=False,
                timeout=60,
            )
        for run in self.runs:
            run.send(signal.SIGCONT)
            if not run.survives:
                run.process.kill()
                run.process.wait()
        self.forget()

    def forget(self):
        """
        Supervisors whose chaperone was killed when all was said, but before they knew, wait for
        their lease: they need not.
        """
        for control in self.spool.parent.glob(".chaperone/*/control"):
            if control.parent.name.rpartition(".")[0] not in {run.run_id for run in self.runs}:
                with contextlib.suppress(OSError):
                    fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK)
                    os.write(fd, b"c\n")
                    os.close(fd)

    def _wrong(self, run, status):
        log = self.spool / run.run_id / "log"
        told = log.read_text() if log.exists() else ""
        self.wrong.append(
            f"{run.run_id}, whose chaperone ended with {run.process.returncode}: "
            f"{json.dumps(status)} {told}"
        )

    def clear(self):
        """
        What is lost is published, what is old goes: beside all the rest, and so that an hour fills
        no disk.
        """
        for argv in (
            [*self.clock.chaperone, "reap"],
            [*CHAPERONE, "gc", "--older", "10m", "--uncollected"],
        ):
            begin = time.monotonic()
            subprocess.run(
                [*argv, "--spool", str(self.spool)],
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=120,
            )
            self.reaped += [(begin, time.monotonic())] if "reap" in argv else []

    def false_verdicts(self, reader):
        """
        Those of a reader, but for "alive" of what reap was publishing the loss of: it holds the
        lock, as a chaperone does, for that moment.
        """
        false = []
        for words, facts in reader.false_verdicts(self.over):
            if (
                words[1] == "alive"
                and facts["verdict"] == "lost"
                and any(begin < words[4][1] and words[4][0] < end for begin, end in self.reaped)
            ):
                self.counts["alive while reap held the lock"] += 1
            else:
                false.append((words, facts))
        return false


@pytest.mark.once
def test_no_verdict_is_false(spool, load, tmp_path, pytestconfig, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where runs that survive keep themselves
    seed = os.environ.get("CHAPERONE_SOAK_SEED") or str(random.randrange(1 << 32))
    print(f"CHAPERONE_SOAK_SEED={seed}")
    soak = Soak(spool, seed)
    by_steps, by_machine = soak.clock.python(PROBER, "-I"), [sys.executable, "-I"]
    readers = [
        Reader(
            (by_steps, by_machine)[number % 2],
            spool,
            f"{seed} {number}",
            tmp_path / f"reader-{number}",
        )
        for number in range(READERS)
    ]
    false = []
    begin = checked = time.monotonic()
    end = begin + seconds(pytestconfig)
    try:
        while True:
            now = time.monotonic()
            harms = now < end or (not soak.counts["lost"] and now < end + PATIENCE_S)
            if not harms and not soak.runs:
                break
            while len(soak.runs) < RUNS and harms:
                soak.start()
            if harms:
                soak.harm()
            else:
                for run in soak.runs:
                    run.send(signal.SIGCONT)
            soak.look()
            if now > checked + CHECK_S:
                checked = now
                soak.clear()
                false += [words for reader in readers for words in soak.false_verdicts(reader)]
            select.select([], [], [], soak.rng.random() * 2 * PAUSE_S)
    finally:
        codes = []
        soak.end()
        for reader in readers:
            codes.append(reader.stop())
    lasted = time.monotonic() - begin
    false += [words for reader in readers for words in soak.false_verdicts(reader)]
    looks = [reader.looks for reader in readers]
    latest_ms = max(soak.falls, default=0) * 1000
    print(
        f"{lasted:.0f} s, {soak.number} runs, {soak.looks} looks of our own and {looks} of readers"
        f" ({min(looks) / lasted:.0f}/s and more), {soak.clock.steps} steps of the clock,"
        f" {dict(soak.counts)}, {len(soak.falls)} locks fell after their chaperone was reaped,"
        f" the last one {latest_ms:.0f} ms, {len(false) + len(soak.wrong)} false verdicts"
    )
    assert not soak.wrong
    assert codes == [0] * READERS and not false and all(looks)
    assert soak.counts["lost"] and soak.counts["terminated"]
