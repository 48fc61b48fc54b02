"""
The checks that each world is put to: what must be true of a run wherever it is.

Knows: a world's words, the command line, what is on disk.  Must not know: how a world is made.
What lives is known by a FIFO that each process of a program holds open: no /proc is asked.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess

from chaperone.program import processes
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until
from spool_tests.support.world import open_way

WORDS = "\u00e9\u20ac"  # 2 and 3 bytes in UTF-8, one of them in Latin-1
SECONDS = 30  # until something must have happened, on a loaded machine
HOLD = "sh -c 'echo up; exec sleep 1000' >{alive}"
# What each way to know a run's processes finds, and the ways before it find not.
TREE = {
    "group": "{hold} & ",
    "cookie": "(setsid {hold} &); ",
    "kernel": '(env -i "PATH=$PATH" setsid {hold} &); ',
}
WAYS = list(TREE)


class Battery:
    """
    A world with a spool, for one check.

    Args:
        world (World): The row.
        made (Made): The world itself.
        spool (pathlib.Path): The test's own, for a chaperone here with its far side there.
        far (bool): Whether the program is on the far side.
    """

    def __init__(self, world, made, spool, far):
        self.world, self.made, self.far = world, made, far
        self.directory = spool.parent
        self.tracking = world.far if far else world.near
        self.spool = self.seen = spool
        self.home = self.seen_home = self.directory / "home"
        if made.room is not None:
            at, seen = (type(spool)(room, spool.parent.name) for room in (made.room, made.seen))
            seen.mkdir(0o755)
            self.home, self.seen_home = at / "home", seen / "home"
            if not far:
                self.spool, self.seen = at / "spool", seen / "spool"
                self.seen.mkdir(0o700)
        open_way(self.directory)
        self.seen_home.mkdir(0o700)
        for path in (self.seen_home, *(() if far else (self.seen,))):
            os.chown(path, made.uid, -1)
        self.env = {**os.environ, "HOME": str(self.home)}
        self.alive, self.go = (self.directory / name for name in ("alive", "go"))
        for fifo in (self.alive, self.go):
            os.mkfifo(fifo)
            fifo.chmod(0o666)
        self._alive = os.open(self.alive, os.O_RDONLY | os.O_NONBLOCK)
        self._ups, self._started = 0, []

    # -- what a program does

    def tree(self, before="", after=None):
        """A program that leaves all that its run must find, and goes on until it is killed."""
        hold = HOLD.format(alive=self.alive)
        ways = WAYS[: WAYS.index(self.tracking) + 1]
        self._ups += len(ways) + (after is None)
        text = before + "".join(TREE[way].format(hold=hold) for way in ways)
        text += self.world.fill.format(alive=self.alive)
        text += f"exec {hold}" if after is None else after
        return {"argv": ["/bin/sh", "-c", text, WORDS], "env": {"WORD": WORDS}}

    def counts(self, leftovers):
        """Whether a status counts what `tree` left when the program itself has ended."""
        least = {"kernel": 3, "cookie": 2, "group": None}[self.tracking]
        if least is None or leftovers is None or not self.world.fill:
            return leftovers == least
        return leftovers > least

    def wait_up(self):
        """Wait until each process of the tree has said so."""
        said = b""

        def are_up():
            nonlocal said
            try:
                said += os.read(self._alive, 4096)
            except BlockingIOError:
                pass
            return said.count(b"up\n") == self._ups

        until(are_up, SECONDS, f"{self._ups} processes are up: {said!r}, {self.log()}")

    def wait_gone(self):
        """Wait until no process of the tree lives, and none that they started."""

        def are_gone():
            try:
                while os.read(self._alive, 4096):
                    pass
                return True
            except BlockingIOError:
                return False

        until(are_gone, SECONDS, f"all are gone: {self.log()}")

    def let_go(self):
        """Let a program go on that reads from `go`."""

        def is_open():
            try:
                return os.open(self.go, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return None

        fd = until(is_open, SECONDS)
        os.write(fd, b"\n")
        os.close(fd)

    # -- what chaperone does

    def argv(self, *words, starts=False):
        there = self.made.run_words if starts else self.made.words
        if self.far:
            return [*CHAPERONE, *map(str, words)]
        return [*there, *self.made.command, *map(str, words)]

    def start(self, program, run_id="r", **spec):
        """Start a run, and wait until it runs: its status."""
        if self.far:
            spec["remote"] = self.remote()
            if spec.get("on_disconnect") == "survive":
                spec["remote"]["remote_dir"] = f"{self.home}/.chaperone"
        spec = {"id": run_id, "program": program, **spec}
        process = self.popen("run", "-", starts=True)
        process.stdin.write(json.dumps(spec).encode())
        process.stdin.close()
        assert process.stdout.readline() == f"{run_id}\n".encode(), process.stderr.read()
        self._started.append(process)
        return until(lambda: self.running(run_id) or self.ended(run_id), SECONDS, self.log)

    def remote(self):
        """A spec's `remote` that leads into this world."""
        return {"hops": [{"exec": {"argv": [*(self.made.run_words or ("env",))]}}]}

    def popen(self, *words, starts=False):
        return subprocess.Popen(
            self.argv(*words, starts=starts),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.env, "CHAPERONE_SPOOL": str(self.spool)},
        )

    def call(self, *words, code=0, **keywords):
        """What a verb prints in this world."""
        keywords.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run(
            self.argv(*words),
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
            check=False,
            env={**self.env, "CHAPERONE_SPOOL": str(self.spool)},
            **keywords,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert code in (None, done.returncode), (done, self.log())
        return done

    def read(self, name, run_id="r"):
        try:
            return (self.seen / run_id / name).read_bytes()
        except FileNotFoundError:
            return b""

    def log(self, run_id="r"):
        return self.read("log", run_id).decode()

    def running(self, run_id="r"):
        status = json.loads(self.read("running.json", run_id) or b"{}")
        return status if status.get("state") == "running" else None

    def ended(self, run_id="r"):
        return json.loads(self.read("status.json", run_id) or b"null")

    def wait_end(self, run_id="r"):
        until(lambda: self.ended(run_id), SECONDS, f"{run_id} has ended: {self.log(run_id)}")
        return self.ended(run_id)

    def kill_chaperone(self, run_id="r"):
        """SIGKILL, by its pid here: in a pid namespace it has another one there."""
        process = self._started[-1]
        wanted = self.running(run_id)["chaperone_pid"]
        here = [process.pid, *processes.descendants(process.pid)]
        [pid] = [pid for pid in here if innermost(pid) == wanted]
        os.kill(pid, signal.SIGKILL)

    def remount(self, option):
        """Change how the world's filesystem may be used."""
        enter = ["nsenter", "--target", str(self.made.pid), "--mount"]
        argv = [*enter, "mount", "-o", f"remount,{option}", self.made.room]
        subprocess.run(argv, check=True)

    def close(self):
        """End what a check that failed has left."""
        for process in self._started:
            for pid in [process.pid, *processes.descendants(process.pid)][::-1]:
                with contextlib.suppress(ProcessLookupError):
                    if process.poll() is None:
                        os.kill(pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            process.stderr.close()
        os.close(self._alive)


def innermost(pid):
    """The pid of a process in its own pid namespace; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[-1]) for line in file if line.startswith("NSpid:"))
    except (FileNotFoundError, ProcessLookupError):
        return None


# -- the checks


def run(here):
    """A run writes, leaves something, ends; the status says so, and a follower hears of it."""
    before = 'printf "%s %s\\n" "$0" "$WORD"; echo err >&2; '
    with here.popen("follow") as follower:
        here.start(here.tree(before, f"read go <{here.go}; exit 3"), stop={"grace_period": 2})
        here.wait_up()
        here.let_go()
        status = here.wait_end()
        heard = {}
        while heard.get("event") != "ended":
            line = follower.stdout.readline()
            assert line, follower.stderr.read()
            heard = json.loads(line)
        follower.kill()
    here.wait_gone()
    assert (here.read("stdout").decode(), here.read("stderr")) == (f"{WORDS} {WORDS}\n", b"err\n")
    names = ("state", "return_code", "signal", "complete", "tracking")
    expected = ["terminated", 3, None, True, here.tracking]
    assert [status[name] for name in names] == expected, (status, here.log())
    assert here.counts(status["leftovers"]), (status, here.log())
    assert (heard["run_id"], heard["status"]["return_code"]) == ("r", 3)
    assert json.loads(here.call("ls", "--all", "--json").stdout)["return_code"] == 3


def stop(here):
    """A stop sends a signal, which is ignored, and SIGKILL after the grace."""
    here.start(here.tree("trap '' TERM; "))
    here.wait_up()
    here.call("stop", "--grace", "0.2", "r")
    here.wait_gone()
    status = here.ended()
    found = [status[name] for name in ("state", "signal", "return_code", "tracking")]
    knows = not here.far or here.made.knows_signals
    ended = ("SIGKILL", None) if knows else (None, 137)
    assert found == ["terminated", *ended, here.tracking], (status, here.log())
    assert status["stop"]["reason"] == "request"


def killed(here):
    """SIGKILL of the chaperone leaves nothing, and the run is lost."""
    here.start(here.tree(), stop={"grace_period": 0.2})
    here.wait_up()
    here.kill_chaperone()
    here.wait_gone()
    until(lambda: json.loads(here.call("status", "r").stdout)["state"] == "lost", SECONDS)
    here.call("reap", code=None)
    assert here.wait_end()["state"] == "lost"


def survive(here):
    """A run outlives its chaperone, is adopted, and no byte and no exit code is lost."""
    text = f"echo one; read go <{here.go}; echo two; exit 5"
    here.start({"argv": ["/bin/sh", "-c", text]}, on_disconnect="survive", lease=60)
    until(lambda: here.read("stdout") == b"one\n", SECONDS, here.log)
    here.kill_chaperone()
    until(lambda: json.loads(here.call("status", "r").stdout)["state"] == "unattended", SECONDS)
    here.call("adopt", "--detach", "r")
    here.let_go()
    status = here.wait_end()
    found = status["state"], status["return_code"], status["complete"]
    assert found == ("terminated", 5, True), (status, here.log())
    assert here.read("stdout") == b"one\ntwo\n"
    until(lambda: list((here.seen_home / ".chaperone").glob("*")) == [], SECONDS)


def full(here):
    """Where the disk fills up, bytes are dropped and counted, and the outcome is kept."""
    size = 5_000_000
    text = f"echo up >{here.alive}; read go <{here.go}; head -c {size} /dev/zero; exit 3"
    here.start({"argv": ["/bin/sh", "-c", text]})
    with filled(here.seen.parent / "filler"):
        here.let_go()
        status = here.wait_end()
        kept = len(here.read("stdout"))
        assert kept < size
        assert status["stdout"] == {"bytes": kept, "dropped": size - kept}, here.log()
        assert (status["state"], status["return_code"], status["complete"]) == (
            "terminated",
            3,
            True,
        ), (status, here.log())
        refused(here, errno.ENOSPC)
    here.start({"argv": ["/bin/sh", "-c", "exit 4"]}, "again")
    assert here.wait_end("again")["return_code"] == 4


@contextlib.contextmanager
def filled(path):
    """A filesystem without room for a byte more."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    if size == 1:
                        os.fsync(file.fileno())
    yield
    path.unlink()


def refused(here, code):
    """A start is refused, in one sentence, and nothing is left of it."""
    spec = json.dumps({"id": "refused", "program": {"argv": ["/bin/true"]}})
    done = here.call("run", "-", code=None, input=spec, stdin=None)
    assert done.returncode in (os.EX_CANTCREAT, os.EX_IOERR), done
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("chaperone: unable to ")
    assert sentence.endswith(f": {os.strerror(code)}"), sentence
    assert here.read("spec.json", "refused") == b""


def read_only(here):
    """What ended can be read, and what would write says in one sentence why it can't."""
    here.start({"argv": ["/bin/sh", "-c", "echo out; exit 3"]})
    here.wait_end()
    here._started[-1].wait(SECONDS)  # until then it may have a file open for writing
    here.remount("ro")
    try:
        refused(here, errno.EROFS)
        assert json.loads(here.call("status", "r").stdout)["return_code"] == 3
        assert here.call("tail", "r").stdout == "out\n"
        assert json.loads(here.call("ls", "--all", "--json").stdout)["run_id"] == "r"
        for words in (("gc", "--older", "0s"), ("rm", "r")):
            done = here.call(*words, code=None)
            assert done.returncode != os.EX_OK and len(done.stderr.splitlines()) == 1, done
    finally:
        here.remount("rw")
    here.start({"argv": ["/bin/sh", "-c", "exit 4"]}, "again")
    assert here.wait_end("again")["return_code"] == 4


def raised(here):
    """Nothing waits for another user's process; it is named, and not called gone while it lives."""
    raiser = here.world.raiser.format(place=here.made.place)
    text = f"{raiser} sh -c 'echo up; sleep 2.5; exit 7' >{here.alive}"
    here.start({"argv": ["/bin/sh", "-c", f"exec {text}"]}, "alone", lease=2)
    assert here.wait_end("alone")["return_code"] == 7, here.log("alone")
    other = f"{raiser} sh -c 'echo $$ >{here.directory}/other; echo up; exec sleep 1000'"
    here.start(here.tree(f"{other} >{here.alive} & "), stop={"grace_period": 0.2})
    here._ups += 2
    here.wait_up()
    pid = int((here.directory / "other").read_text())
    try:
        if here.far:
            here.call("stop", "r")
            assert here.ended()["state"] == "terminated"
        else:
            here.kill_chaperone()
            here._started[-1].wait(SECONDS)
            assert f"{pid} (another user)" in here.log()
            here.call("reap")
            lost = here.ended()
            assert (lost["state"], lost["gone_by"]) == ("lost", None)
            assert f"{pid}" in lost["exception"]["message"].partition("; still running: ")[2]
    finally:
        with contextlib.suppress(ProcessLookupError):  # sudo and doas pass a stop's signal on
            os.kill(pid, signal.SIGKILL)
    here.wait_gone()


def doctor(here):
    """It tries a run here, or a far side, says what `tracking` would be, and has no traceback."""
    words = ["doctor"]
    if here.far:
        path = here.directory / "spec.json"
        path.write_text(json.dumps({"program": {"argv": ["true"]}, "remote": here.remote()}))
        words += ["--spec", path]
    done = here.call(*words, code=None)
    lines = done.stdout.splitlines()
    assert done.returncode in (os.EX_OK, os.EX_CONFIG) and done.stderr == "", done
    assert all(line[:4] in ("ok  ", "BAD ", "    ") for line in lines)
    name = "tracking" if here.far else "guard"
    mark = "ok  " if here.tracking == "kernel" else "BAD "
    assert [line[:4] for line in lines if line[4:].startswith(f"{name}:")] == [mark], done


EACH = (run, stop, killed, survive, doctor)
CHECKS = {check.__name__: check for check in (*EACH, full, read_only, raised)}
NEAR = tuple(check.__name__ for check in EACH)
FAR = NEAR
ALSO_FAR = ("raised",)  # of what some worlds have more
