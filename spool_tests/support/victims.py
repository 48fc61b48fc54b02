"""
What is killed at each call that changes something, and what is looked at afterwards.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import uuid

import pytest

from chaperone.api import Spool
from chaperone.launch import image
from chaperone.model import jsontext
from chaperone.model import spec as specs
from chaperone.model import status as statuses
from chaperone.model.events import Ended, Lost
from chaperone.spool import format, gc, look
from chaperone.spool import reap as reaping
from spool_tests.support import sshd, timelines
from spool_tests.support.places import CHAPERONE
from spool_tests.support.processes import processes_with
from spool_tests.support.waiting import need, until

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

    spec = {"output": {"timeline": True}}
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
        remote = (
            {"remote": self.server.remote(remote_dir=str(self.far), share=False)}
            if self.over_ssh
            else {}
        )
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
            timeout=300,
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
            what="processes of a killed chaperone's run are gone",
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
        Whether a verdict fits what the program did: it ran at most once, and an outcome is
        reported only if it had one.
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
            if self.has_timeline():
                timed = timelines.timed(self.spool / "r", stream)
                assert status["state"] != "terminated" or timed == len(kept)

    def has_timeline(self):
        return self.spec.get("output", {}).get("timeline", False)

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
                *(["timeline"] if self.has_timeline() else []),
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
            # Those of the next request are there before it comes.
            [guard] = until(lambda: children_of(self.launcher.pid))
            [chaperone] = until(lambda: children_of(guard))
            asking.connect(f"/proc/self/fd/{fd}/{format.LAUNCHER}")
            os.close(fd)
            strace = tracer.attach(chaperone)
            asking.settimeout(60)
            try:
                asking.sendall((jsontext.dumps(given) + "\n").encode())
                answer = asking.makefile("rb").read()
            except (BrokenPipeError, ConnectionResetError):  # it was killed before it read that
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
        assert next_one.wait(60) == 0 and not (self.spool / ".launcher.new").exists()


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
