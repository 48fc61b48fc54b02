"""
Killed before and after each system call that changes something: what is on disk is true, nothing
runs on, and nothing runs twice.
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import uuid
import zlib

import pytest

from chaperone.api import Spool
from chaperone.launch import image
from chaperone.model import jsontext
from chaperone.model import spec as specs
from chaperone.model import status as statuses
from chaperone.model.events import Ended, Lost
from chaperone.spool import format, gc, look
from chaperone.spool import reap as reaping
from spool_tests import crash, sshd
from spool_tests.conftest import CHAPERONE, need, processes_with, until

SHARDS = 4  # of the long form, so that the points spread over workers
SHORT_S = 1.2  # what the short form spends on a kind, and two points at least
PROGRAM = "echo x >> {mark}; echo out; echo err >&2; (setsid sleep 600 &) ; exit 3"
HELD = "echo x >> {mark}; echo out; echo err >&2; until [ -e {go} ]; do sleep 0.02; done; exit 3"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An sshd whose sessions carry a mark: `server.mark` (bytes)."""
    need("sshd", "ssh", "ssh-keygen", "pgrep")
    directory = tmp_path_factory.mktemp("sshd")
    mark = f"CRASH_FAR={uuid.uuid4().hex}"
    there = sshd.Sshd(str(directory), more=f"SetEnv {mark}")
    there.mark = mark.encode()
    yield there
    there.close()


# -- what is looked at


def looked(spool, run_id):
    """
    (whether its chaperone lives, its status) as a reader concludes it; None where there is no run.
    """
    spool_fd = format.open_spool(str(spool))
    try:
        if run_id not in format.all_ids(spool_fd):
            return None
        run_fd = format.open_run(spool_fd, run_id)
        try:
            return look.look(run_fd, run_id)
        finally:
            os.close(run_fd)
    finally:
        os.close(spool_fd)


def ends_told(spool):
    """The events by which a follower that begins now tells the ends of runs: [(run id, type)]."""
    told = []
    with Spool(spool).follow() as follower:
        while (event := follower.next(0)) is not None:
            if isinstance(event, (Ended, Lost)):
                told.append((event.run_id, type(event)))
    return told


def locks(spool):
    """Whatever in a spool may be locked."""
    return [
        path
        for pattern in ("*/lock", "*/stdout", "*/stderr", ".connect/*", ".running", ".ended")
        for path in spool.glob(pattern)
    ]


def is_free(path):
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


# -- what is killed


class Cold:
    """`chaperone run`, killed: the program goes with it."""

    spec = {}
    program = {}
    over_ssh = False
    patient = False
    hidden = {".connect", ".launcher.lock", ".sweep.lock"}
    verb = ("run",)
    states = ("lost", "terminated")

    def __init__(self, directory, server=None):
        self.directory, self.server = directory, server
        self.spool, self.mark, self.far, self.go = (
            directory / name for name in ("spool", "mark", ".chaperone", "go")
        )
        self.env = {**os.environ, "CRASH": str(directory), "HOME": str(directory)}

    def run_spec(self, text=PROGRAM):
        program = {"command": text.format(mark=self.mark, go=self.go), **self.program}
        remote = {"remote": self.server.remote(remote_dir=str(self.far))} if self.over_ssh else {}
        return {"id": "r", "program": program, "stop": {"grace_period": 1}, **remote, **self.spec}

    def spec_file(self):
        path = self.directory / "spec.json"
        path.write_text(json.dumps(self.run_spec()))
        return str(path)

    def words(self, *words):
        return [*words, "--spool", str(self.spool)]

    def command(self, *words):
        return [*CHAPERONE, *self.words(*words)]

    def called(self, *words):
        """The exit code and the stderr of a verb."""
        done = subprocess.run(
            self.command(*words),
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stderr

    def started(self):
        """How often the program was."""
        return len(self.mark.read_text()) // 2 if self.mark.exists() else 0

    def prepare(self):
        """What must be there before."""

    def trace(self, tracer):
        """Do it, traced or killed: the chaperone, not its guard."""
        tracer.run_below_guard(self.words(*self.verb, self.spec_file()), env=self.env)

    def settle(self):
        """Wait until nothing lives of what was killed."""
        marks = [f"CRASH={self.directory}".encode(), *([self.server.mark] if self.over_ssh else [])]
        until(
            lambda: not any(processes_with(mark) for mark in marks),
            20,
            "processes of a killed chaperone's run are gone",
        )
        for path in locks(self.spool):
            until(lambda path=path: is_free(path), what=f"{path} is free")

    def check(self):
        """Everything that must hold, whatever the moment was."""
        self.settle()
        if not self.spool.exists():
            assert not self.started()
            return
        before = self.first_look()
        self.start_again(before)
        self.recover(before)
        self.is_whole()
        self.is_collected()

    def runs(self):
        return {path.name for path in self.spool.iterdir() if path.name[0] != "."}

    def first_look(self):
        """What a reader and a follower say; None where there is no run."""
        found, ran = looked(self.spool, "r"), self.started()
        told = ends_told(self.spool)
        if found is None:
            assert not ran and told == []
            return None
        alive, status = found
        assert not alive and status["state"] in self.states
        self.agree(status, ran)
        assert told == {
            "terminated": [("r", Ended)],
            "lost": [("r", Lost)],
            "error": [("r", Ended)],
        }.get(status["state"], [])
        return status

    def agree(self, status, ran):
        """
        Whether a verdict fits what the program did: it ran at most once, and its outcome is told
        only if it had one.
        """
        assert ran <= 1 and not (status["started"] is False and ran)
        if status["state"] == "terminated":
            assert ran == 1 and (
                status["return_code"],
                status["signal"],
                status["started"],
                status["complete"],
            ) == (3, None, True, True)
            assert (status["stdout"]["bytes"], status["stderr"]["bytes"]) == (4, 4)
        for stream, said in (("stdout", b"out\n"), ("stderr", b"err\n")):
            kept = (self.spool / "r" / stream).read_bytes()
            assert said.startswith(kept) and (status["state"] != "terminated" or kept == said)

    def may_have_started(self, ran):
        """How often it may be by now, when it was `ran` times."""
        return (ran,)

    def start_again(self, before):
        """The same id never runs twice."""
        ran = self.started()
        again = self.called("run", self.spec_file())
        if before is None:
            assert (again, self.started()) == ((0, ""), 1)
        else:
            assert again == (os.EX_CANTCREAT, "chaperone: unable to create run 'r': it exists\n")
            assert self.started() in self.may_have_started(ran)

    def recover(self, before):
        """reap leaves a final status, and changes no verdict."""
        reaping.reap(str(self.spool))
        status = json.loads((self.spool / "r" / "status.json").read_text())
        assert status["state"] == ("terminated" if before is None else before["state"])

    def is_whole(self):
        """The run has ended, and nothing is left but what an ended run leaves."""
        alive, status = looked(self.spool, "r")
        assert not alive and status["state"] in statuses.FINAL
        self.agree(status, self.started())
        assert {path.name for path in self.spool.iterdir()} - self.hidden == {
            ".running",
            ".ended",
            *self.runs(),
        }
        for run_id in self.runs():
            assert {path.name for path in (self.spool / run_id).iterdir()} - {"log"} == {
                "spec.json",
                "status.json",
                "stdout",
                "stderr",
            }
            final = json.loads((self.spool / run_id / "status.json").read_text())
            for stream in ("stdout", "stderr"):
                assert (self.spool / run_id / stream).stat().st_size == final[stream]["bytes"]
        assert (
            not list((self.spool / ".running").iterdir())
            and {path.name for path in (self.spool / ".ended").iterdir()} == self.runs()
        )
        self.forget()
        self.settle()
        until(
            lambda: not self.far.exists() or not list(self.far.iterdir()),
            what="nothing is kept on the far side",
        )

    def forget(self):
        """
        Wait until a far side has forgotten what it keeps on its own; where there is no patience,
        end it.
        """

    def is_collected(self):
        """gc takes all of it."""
        removed = gc.gc(str(self.spool), older_s=-1, uncollected=True).removed
        assert (
            set(removed) >= {"r"}
            and not self.runs()
            and not list((self.spool / ".ended").iterdir())
        )
        assert {path.name for path in self.spool.iterdir()} <= {
            ".connect",
            ".launcher.lock",
            ".sweep.lock",
            ".running",
            ".ended",
        }


class Durable(Cold):
    """The same with all that a spec may ask of the disk and of a fork, and through files."""

    spec = {"durable": True, "output": {"through": "file"}}
    program = {"rlimits": {"nofile": 200}, "stdin": "text"}


class Starter(Cold):
    """Who waits until the run is visible, killed: the run goes on."""

    verb = ("run", "--detach")
    states = ("terminated",)

    def trace(self, tracer):
        tracer.run(self.command(*self.verb, self.spec_file()), env=self.env)


class Guard(Starter):
    """The guard, the process that a scheduler knows, killed: its chaperone ends the program."""

    verb = ("run",)

    def agree(self, status, ran):
        if status["stop"] is None:
            super().agree(status, ran)
            return
        assert (status["stop"]["reason"], status["stop"]["signal"]) == ("guard", "SIGKILL")
        assert (status["state"], status["complete"]) == ("terminated", True) and ran <= 1
        assert status["signal"] == "SIGKILL" or (ran, status["return_code"]) == (1, 3)


class Warm(Cold):
    """The chaperone that a launcher has forked, killed; the launcher is not harmed."""

    def prepare(self):
        self.spool.mkdir(0o700)
        self.launcher = subprocess.Popen(
            self.command("launcher"), env=self.env, stdin=subprocess.DEVNULL
        )
        until((self.spool / ".launcher").exists)

    def trace(self, tracer):
        spec = specs.checked(self.run_spec(), str(self.directory))
        given = {
            "image": image.IMAGE,
            "key": uuid.uuid4().hex,
            "env": self.env,
            "umask": 0o022,
            "spec": spec,
        }
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            fd = format.open_spool(str(self.spool))  # a name that fits into a socket's address
            asking.connect(f"/proc/self/fd/{fd}/{format.LAUNCHER}")
            os.close(fd)
            [guard] = until(lambda: children_of(self.launcher.pid))
            [chaperone] = until(lambda: children_of(guard))  # it waits for what is asked
            strace = tracer.attach(chaperone)
            asking.sendall((jsontext.dumps(given) + "\n").encode())
            asking.settimeout(60)
            try:
                answer = asking.makefile("rb").read()
            except ConnectionResetError:
                answer = b""
            assert answer in (b"", b'{"visible": "r"}\n')
            if answer:
                assert (self.spool / "r").exists()
            strace.wait(60)

    def settle(self):
        """The launcher first: what it started shares its environment."""
        if self.launcher is not None:
            assert self.launcher.poll() is None
            spec = self.directory / "second.json"
            spec.write_text(json.dumps({"id": "second", "program": {"argv": ["true"]}}))
            assert self.called("run", "--warm", str(spec)) == (0, "")
            until(lambda: os.path.lexists(self.spool / ".ended" / "second"))
            self.launcher.kill()
            self.launcher.wait()
            self.launcher = None
            shutil.rmtree(self.spool / "second")
            (self.spool / ".ended" / "second").unlink()
            (self.spool / ".launcher").unlink()
        super().settle()


class Launcher(Cold):
    """
    The launcher, killed: what it has started goes on, who asks it starts cold, and the next
    launcher takes its place.
    """

    states = ("terminated",)

    def trace(self, tracer):
        self.spool.mkdir(0o700)
        strace = tracer.begin(self.command("launcher", "--idle", "0.7"), env=self.env)
        until(lambda: (self.spool / ".launcher").exists() or strace.poll() is not None)
        assert self.called("run", "--warm", self.spec_file()) == (0, "")
        until(lambda: os.path.lexists(self.spool / ".ended" / "r"), what="the run has ended")
        assert strace.wait(60) in (0, -9)

    def settle(self):
        super().settle()
        next_one = subprocess.Popen(
            self.command("launcher", "--idle", "0.05"), env=self.env, stdin=subprocess.DEVNULL
        )
        assert next_one.wait(30) == 0 and not (self.spool / ".launcher.new").exists()


class Ssh(Cold):
    """A chaperone that holds a program over ssh, killed: the program over there goes with it."""

    over_ssh = True

    def trace(self, tracer):
        """It has no guard."""
        tracer.run(self.command(*self.verb, self.spec_file()), env=self.env)


class Survive(Cold):
    """
    A chaperone whose program may outlive it, killed: it is adopted, and ends as if nothing had
    been.
    """

    spec = {"on_disconnect": "survive", "lease": 40}
    states = ("unattended", "terminated", "error")

    def trace(self, tracer):
        """It has no guard."""
        tracer.run(self.command(*self.verb, self.spec_file()), env=self.env)

    def settle(self):
        """What may live on does so; what has ended leaves nothing."""
        if not (self.spool / "r").exists() or self.is_over():
            self.forget()
            super().settle()

    def is_over(self):
        """
        Whether nobody need be over there: a chaperone that was killed after it had published leaves
        the far side to its lease.
        """
        return (self.spool / "r" / "status.json").exists() and not (
            self.spool / "r" / "lock"
        ).exists()

    def forget(self):
        try:
            until(self.is_forgotten, self.spec["lease"] + 20 if self.patient else 2)
        except AssertionError:
            if self.patient:
                raise
            for pid in self.far_processes():
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.far)

    def is_forgotten(self):
        for pid, command in self.far_processes().items():
            if (
                command == "sleep 60 "
            ):  # for a minute the far side keeps the sign that a run never began
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return not self.far.exists() or not list(self.far.iterdir())

    def may_have_started(self, ran):
        """What was on its way to the far side starts there."""
        return (ran, 1)

    def far_processes(self):
        marks = [f"CRASH={self.directory}".encode(), *([self.server.mark] if self.over_ssh else [])]
        return {pid: command for mark in marks for pid, command in processes_with(mark).items()}

    def recover(self, before):
        """reap lets it live, adopt takes it to its end."""
        reaping.reap(str(self.spool))
        if before is not None and before["state"] == "unattended":
            assert looked(self.spool, "r")[1]["state"] == "unattended"
            assert self.called("adopt", "r") == (0, ""), self.said()
        status = json.loads((self.spool / "r" / "status.json").read_text())
        # What ran is told with its outcome, what never began is not.
        assert status["state"] == ("terminated" if self.started() else "lost"), self.said()

    def said(self):
        return {
            name: (self.spool / "r" / name).read_text()
            for name in ("log", "running.json")
            if (self.spool / "r" / name).exists()
        }


class SurviveSsh(Survive):
    """The same over ssh."""

    over_ssh = True


class Adopt(Survive):
    """A chaperone that adopts, killed: another one adopts."""

    def prepare(self):
        spec = self.directory / "held.json"
        spec.write_text(json.dumps(self.run_spec(HELD)))
        first = subprocess.Popen(
            self.command("run", str(spec)),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            until(
                lambda: (
                    (self.spool / "r" / "stderr").exists()
                    and (self.spool / "r" / "stderr").stat().st_size
                )
            )
        finally:
            first.kill()
            first.wait()
        self.go.touch()

    def trace(self, tracer):
        tracer.run(self.command("adopt", "r"), env=self.env)


class AdoptSsh(Adopt):
    """The same over ssh."""

    over_ssh = True


class Reap(Cold):
    """`chaperone reap`, killed: it is done by the next one."""

    verb = ("reap",)
    hidden = {".sweep.lock", ".gone.0123456789abcdef.gone"}  # the directory is gc's to sweep
    wanted = {
        "r": ("lost", False),
        "half": ("terminated", True),
        "over": ("lost", False),
        "r0": ("terminated", True),
    }

    def prepare(self):
        """A spool with all that reap may find; made once, by real deaths, and copied."""
        template = self.directory.parent / "dead"
        if not template.exists():
            make_dead_spool(template, self)
        subprocess.run(["cp", "-a", template, self.spool], check=True)

    def trace(self, tracer):
        tracer.run(self.command(*self.verb), env=self.env)

    def check(self):
        self.settle()
        for run_id, (state, _) in self.wanted.items():
            alive, status = looked(self.spool, run_id)
            assert not alive and status["state"] == state
        kinds = {"lost": Lost, "terminated": Ended}
        assert sorted(ends_told(self.spool)) == sorted(
            (run_id, kinds[state]) for run_id, (state, _) in self.wanted.items()
        )
        assert {reaped.done for reaped in reaping.reap(str(self.spool))} <= {
            "lost",
            "finished",
            "swept",
        }
        assert reaping.reap(str(self.spool)) == []
        self.is_whole()
        assert self.runs() == set(self.wanted)
        for run_id, (state, _) in self.wanted.items():
            assert json.loads((self.spool / run_id / "status.json").read_text())["state"] == state
        self.is_collected()

    def agree(self, status, ran):
        pass


class Gc(Reap):
    """`chaperone gc`, killed: each run is there whole or not at all, and the next one goes on."""

    verb = ("gc", "--older", "0s", "--max-bytes", "0B", "--uncollected")

    def check(self):
        self.settle()
        left = self.runs()
        assert {"r", "over"} <= left
        for run_id in left:
            alive, status = looked(self.spool, run_id)
            assert not alive and status["state"] == self.wanted[run_id][0]
        ends_told(self.spool)
        summary = gc.gc(str(self.spool), older_s=-1, uncollected=True)
        assert (
            set(summary.removed) == left - {"r", "over"}
            and summary.live == 2
            and not summary.failed
        )
        assert not [path for path in self.spool.iterdir() if path.name.endswith(".gone")]
        assert {looked(self.spool, run_id)[1]["state"] for run_id in ("r", "over")} == {"lost"}
        reaping.reap(str(self.spool))
        self.is_whole()
        # An id that is free again is a new run's.
        spec = self.directory / "new.json"
        spec.write_text(json.dumps({"id": "half", "program": {"argv": ["true"]}}))
        assert (
            self.called("run", str(spec)) == (0, "")
            and looked(self.spool, "half")[1]["return_code"] == 0
        )
        self.is_collected()


KINDS = {
    kind.__name__: kind
    for kind in (
        Cold,
        Durable,
        Starter,
        Guard,
        Warm,
        Launcher,
        Ssh,
        Survive,
        SurviveSsh,
        Adopt,
        AdoptSsh,
        Reap,
        Gc,
    )
}


def make_dead_spool(path, kind):
    """
    A spool of deaths: a lost run, one whose lease is over, endings and a start half done, a
        deletion too.

    Args:
        kind (Cold): For its directory and its environment.
    """
    place = kind.directory / "dead"
    place.mkdir()
    maker = Cold(place)

    def killed(run_id, point, **spec):
        text = json.dumps({**maker.run_spec(), "id": run_id, **spec})
        (place / "spec.json").write_text(text)
        tracer = crash.Tracer(place, point)
        tracer.run_below_guard(maker.words("run", str(place / "spec.json")), env=maker.env)
        assert tracer.has_killed() == (point is not None)

    killed("r0", None)
    killed("half", ("unlinkat", 1))
    killed("unborn", ("renameat", 2))
    killed("gone", None)
    os.rename(maker.spool / "gone", maker.spool / ".gone.0123456789abcdef.gone")
    (maker.spool / ".ended" / "gone").unlink()
    for run_id, spec in (("r", {}), ("over", {"on_disconnect": "survive", "lease": 1})):
        spec_file = place / "held.json"
        spec_file.write_text(json.dumps({**maker.run_spec(HELD), "id": run_id, **spec}))
        held = subprocess.Popen(
            maker.command("run", str(spec_file)),
            env=maker.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        until(
            lambda run_id=run_id: (
                (maker.spool / run_id / "stderr").exists()
                and (maker.spool / run_id / "stderr").stat().st_size
            )
        )
        os.kill(looked(maker.spool, run_id)[1]["chaperone_pid"], signal.SIGKILL)
        held.wait()
    maker.go.touch()
    maker.settle()
    until(lambda: looked(maker.spool, "over")[1]["state"] == "lost")
    os.rename(maker.spool, path)


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


# -- all of it

POINTS = {}


def points(kind, place, server, traces=1):
    """
    The crash points of a kind, found once in each worker; no two runs over ssh take the same way.
    The runs that find them are checked as well.
    """
    if kind not in POINTS:
        found = {}
        for _ in range(traces):
            directory = place / "points"
            directory.mkdir()
            traced, tracer = KINDS[kind](directory, server), crash.Tracer(directory)
            traced.prepare()
            traced.trace(tracer)
            found.update(tracer.points(str(traced.spool)))
            traced.check()
            shutil.rmtree(directory)
        POINTS[kind] = found
    return POINTS[kind]


def came_to_kill(kind, place, server, point, words, patient=False):
    """Kill at a point and check; whether it came to that."""
    directory = place / words.replace(" ", "-")
    directory.mkdir()
    try:
        killed, tracer = KINDS[kind](directory, server), crash.Tracer(directory, point)
        killed.patient = patient
        killed.prepare()
        killed.trace(tracer)
        reached = tracer.has_killed()
        killed.check()
    except BaseException as error:
        raise AssertionError(f"{kind}, killed {words}") from error
    shutil.rmtree(directory)
    return reached


@pytest.fixture
def far(request, kind):
    """The sshd, for a kind that needs one."""
    return request.getfixturevalue("server") if KINDS[kind].over_ssh else None


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_some_calls_it_leaves_a_true_spool(spool, tmp_path, far, kind, told):
    """As many points as fit into a moment, others each time; CRASH_SEED repeats a choice."""
    need("strace")
    seed = os.environ.get("CRASH_SEED", uuid.uuid4().hex[:8])
    found = points(kind, tmp_path, far)
    chosen = list(found.items())
    random.Random(f"{seed} {kind}").shuffle(chosen)
    began, tried = time.monotonic(), 0
    for point, words in chosen:
        came_to_kill(kind, tmp_path, far, point, words)
        tried += 1
        if tried >= 2 and time.monotonic() - began > SHORT_S:
            break
    told(f"{kind}: {tried} of {len(found)} crash points, CRASH_SEED={seed}")


@pytest.mark.long
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_call_it_leaves_a_true_spool(spool, tmp_path, far, kind, shard, told):
    need("strace")
    found = {
        point: words
        for point, words in points(kind, tmp_path, far, 3).items()
        if zlib.crc32(repr(point).encode()) % SHARDS == shard
    }
    missed = [
        words
        for point, words in found.items()
        if not any(came_to_kill(kind, tmp_path, far, point, words, True) for _ in range(3))
    ]
    told(
        f"{kind}, part {shard + 1} of {SHARDS}: killed at {len(found) - len(missed)} of {len(found)} crash points; not come to: {missed}"
    )
    # How a connection's bytes come, and how many processes there are to look at, is another number
    # of calls each time.
    assert len(missed) <= len(found) / 2


def test_points_are_what_changes_something(spool, tmp_path):
    """The list is not kept by hand; but what must be in it is known."""
    need("strace")
    found = points("Cold", tmp_path, None)
    names = {name for name, _ in found}
    assert {
        "mkdirat",
        "symlinkat",
        "renameat",
        "pwrite64",
        "fsync",
        "unlinkat",
        "flock",
        "readv",
        "close",
    } <= names
    assert names & {"clone", "clone3", "vfork", "fork"} and len(found) > 120


def test_call_that_is_new_on_the_path_is_a_new_point_by_itself(tmp_path):
    """
    One that no list of ours has a word for, too; what only looks is none, nor what comes before the
    spool is named.
    """
    lines = [
        'openat(3, "x.pyc", O_RDONLY|O_CLOEXEC) = 4',
        'unlink("before") = 0',
        'mkdirat(AT_FDCWD, "/spool", 0700) = 0',
        "fstat(4, {}) = 0",
    ]
    (tmp_path / "trace").write_text("\n".join(lines) + "\n")
    tracer = crash.Tracer(tmp_path)
    assert tracer.points("/spool") == {
        ("mkdirat", 1): "before mkdirat 1",
        ("fstat", 1): "after mkdirat 1",
    }
    lines[3:3] = ['futurecallat(4, "y") = 0', 'unlink("z") = 0']
    (tmp_path / "trace").write_text("\n".join(lines) + "\n")
    assert list(tracer.points("/spool").items()) == [
        (("mkdirat", 1), "before mkdirat 1"),
        (("futurecallat", 1), "before futurecallat 1"),
        (("unlink", 2), "before unlink 2"),
        (("fstat", 1), "after unlink 2"),
    ]


@pytest.mark.parametrize("kind", ["SurviveSsh"])
def test_run_that_never_began_is_told_where_there_was_no_run_before(spool, tmp_path, far, kind):
    """
    Its directory's parent is not there: the far side has to make it, or could not say that it knows
    nothing.
    """
    need("strace")
    assert came_to_kill(kind, tmp_path, far, ("dup2", 2), "before it connects")


@pytest.mark.parametrize("kind", ["Survive", "SurviveSsh"])
def test_far_side_forgets_no_outcome_that_is_not_published(spool, tmp_path, far, kind):
    """Killed when all was copied, in the moment before it publishes."""
    need("strace")
    assert came_to_kill(kind, tmp_path, far, ("ftruncate", 1), "before it publishes")


@pytest.mark.parametrize("kind", ["AdoptSsh"])
def test_adopter_that_dies_at_once_leaves_no_connection_open(spool, tmp_path, far, kind):
    """
    Its far side ends in the middle of its own start, with children that have not yet become what
    they are to be.
    """
    need("strace")
    assert came_to_kill(kind, tmp_path, far, ("utimensat", 1), "at its first record")
