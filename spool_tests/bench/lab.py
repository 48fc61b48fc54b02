"""
Where it is measured: a place on disk, programs whose exec is seen, chaperones and peers started the
way a scheduler starts them.

Knows: processes, the peers' command lines.  Must not know: what is measured.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from inotify_simple import INotify, flags

from spool_tests.support.sshd import Sshd

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKOUT = os.path.dirname(os.path.dirname(HERE))
# Where the chaperone is that is measured: this checkout, or the older one of --against.
ROOT = os.environ.get("CHAPERONE_BENCH_ROOT") or CHECKOUT
PYTHON = sys.executable
BARE = [PYTHON, "-I", "-S"]
MAIN = os.path.join(ROOT, "chaperone", "__main__.py")
RUN = [*BARE, MAIN, "run"]
TIMEOUT_S = 20
PAGE = os.sysconf("SC_PAGESIZE")


def with_fsync(before="pass"):
    """
    The command `chaperone` as a text for the interpreter, so that something can be done before.
    """
    return [
        *BARE,
        "-c",
        (
            f"import os, sys; sys.path.append({ROOT!r}); {before}; "
            "from chaperone.cli import main; os._exit(main.main())"
        ),
    ]


def without_fsync():
    return with_fsync("import posix; posix.fsync = lambda fd: None")


class Lab:
    """
    A directory of its own, and everything that was started in it.

    Attributes:
        path (str): On a disk, not in memory: /var/tmp by default.
        env (dict): What programs are started with: as little as a daemon's.
    """

    def __init__(self, parent="/var/tmp"):
        self.path = tempfile.mkdtemp(prefix="chaperone-bench-", dir=parent)
        self.env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        self.null = os.open(os.devnull, os.O_RDWR)
        self._names = 0
        self._closing = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.close()
        os.close(self.null)
        shutil.rmtree(self.path, ignore_errors=True)

    def new(self, name):
        """A path that nobody has used."""
        self._names += 1
        return os.path.join(self.path, f"{self._names}-{name}")

    def directory(self, name):
        path = self.new(name)
        os.mkdir(path, 0o700)
        return path

    def file(self, name, text):
        path = self.new(name)
        with open(path, "w") as file:
            file.write(text)
        return path

    def spec(self, argv, **fields):
        """A file with a spec."""
        return self.file("spec.json", json.dumps({"program": {"argv": argv}, **fields}))

    def spawn(self, argv, stdout=None, env=None):
        """Start, and do not wait; returns the pid."""
        moves = [
            (os.POSIX_SPAWN_DUP2, self.null, 0),
            (os.POSIX_SPAWN_DUP2, self.null if stdout is None else stdout, 1),
            (os.POSIX_SPAWN_DUP2, self.null, 2),
        ]
        return os.posix_spawnp(argv[0], argv, self.env if env is None else env, file_actions=moves)

    def ended(self, argv, **keywords):
        """Seconds from the start of a program to its end."""
        begun = time.perf_counter()
        pid = self.spawn(argv, **keywords)
        os.waitpid(pid, 0)
        return time.perf_counter() - begun

    def sshd(self):
        """
        An sshd of our own on loopback, until the lab closes.

        Returns:
            tuple: (server, the user to log in as). That is a plain user without startup files,
                where we may make one: root's own may cost more than the run. (None, None) where
                there can't be a server.
        """
        if not has("ssh", "ssh-keygen", "sshd"):
            return None, None
        server = Sshd(self.directory("sshd"))
        self._closing.callback(server.close)
        if os.geteuid() != 0:
            return server, None
        os.chmod(self.path, 0o711)  # sshd reads the keys as that user
        return server, server.user("dash")

    def at_end(self, act):
        """Call a function when the lab closes, the last one first."""
        self._closing.callback(act)

    def programs(self, count=1):
        return self._closing.enter_context(Programs(self, count))

    def launcher(self, spool):
        """A launcher for a spool, until the lab closes."""
        begun = subprocess.Popen(
            [*BARE, MAIN, "launcher", "--spool", spool],
            stdin=self.null,
            stdout=self.null,
            stderr=self.null,
            env=self.env,
        )

        def end():
            begun.kill()
            begun.wait()

        self._closing.callback(end)
        until(lambda: os.path.exists(os.path.join(spool, ".launcher")))
        return begun.pid


class Programs:
    """
    Programs that end at once, and are seen by the kernel when they are executed: nothing of them
    has to run for that.

    Attributes:
        paths (list): Names of one and the same program.
    """

    def __init__(self, lab, count):
        self.directory = lab.directory("programs")
        self.paths = [os.path.join(self.directory, f"program-{number}") for number in range(count)]
        shutil.copy("/bin/true", self.paths[0])
        for path in self.paths[1:]:
            os.link(self.paths[0], path)
        self._inotify = INotify()

    def __enter__(self):
        for path in self.paths[:1]:
            subprocess.run([path], check=True)
        self._inotify.add_watch(self.directory, flags.OPEN | flags.ACCESS)
        return self

    def __exit__(self, *_):
        self._inotify.close()

    def forget(self):
        self._inotify.read(timeout=0)

    def executed(self, begun):
        """Seconds from `begun` until the first of them was executed."""
        return self.all_executed(begun, 1)[0]

    def all_executed(self, begun, count):
        """Seconds from `begun` at which each of so many of them was executed."""
        seen = {}
        while len(seen) < count:
            events = self._inotify.read(timeout=TIMEOUT_S * 1000)
            now = time.perf_counter() - begun
            if not events:
                raise TimeoutError(
                    f"{count - len(seen)} of {count} programs were not executed "
                    f"within {TIMEOUT_S} s"
                )
            for event in events:
                if event.name:
                    seen.setdefault(event.name, now)
        return sorted(seen.values())


def until(condition, timeout=TIMEOUT_S, pause=0.001):
    """Wait until it is true; returns what it returned."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {condition}")
        time.sleep(pause)
    return value


def has(*programs):
    return all(shutil.which(program) for program in programs)


def status(spool, run_id):
    """The status of a run as its files tell it."""
    for name in ("status.json", "running.json"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(os.path.join(spool, run_id, name)) as file,
        ):
            return json.load(file)
    return {}


def live(spool):
    """The statuses of the live runs."""
    return [status(spool, name) for name in os.listdir(os.path.join(spool, ".running"))]


def ended(spool):
    return os.listdir(os.path.join(spool, ".ended"))


def ask(spool, run_id, line):
    """Write a line to a run's control FIFO, if somebody is there to read it."""
    with contextlib.suppress(OSError):
        fd = os.open(os.path.join(spool, run_id, "control"), os.O_WRONLY | os.O_NONBLOCK)
        with open(fd, "w") as control:
            control.write(f"{line}\n")


def memory(pid):
    """Unique set size in KiB: what would come free if only this process went."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(
            int(line.split()[1])
            for line in file
            if line.startswith(("Private_Clean", "Private_Dirty"))
        )


def share_of_memory(pid):
    """Proportional set size in KiB: its own pages, and its part of those that it shares."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def copied_in_vain(pid):
    """
    KiB of a forked process's own pages that hold what its parent's hold: a count of references,
    say, went up there and down again. Needs root.
    """
    with open(f"/proc/{pid}/stat") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
    with open(f"/proc/{pid}/maps") as file:
        maps = [line.split() for line in file]
    found = 0
    with contextlib.ExitStack() as stack:
        (frames, bytes_), (parents_frames, parents_bytes) = (
            [
                stack.enter_context(open(f"/proc/{number}/{name}", "rb", buffering=0))
                for name in ("pagemap", "mem")
            ]
            for number in (pid, parent)
        )
        for place, mode, *_, name in maps:
            if "w" not in mode or name.startswith("[v"):
                continue
            begin, end = (int(word, 16) for word in place.split("-"))
            for page in range(begin, end, PAGE):
                frame, parents_frame = frame_of(frames, page), frame_of(parents_frames, page)
                if frame and parents_frame and frame != parents_frame:
                    found += os.pread(bytes_.fileno(), PAGE, page) == os.pread(
                        parents_bytes.fileno(), PAGE, page
                    )
    return found * PAGE // 1024


def frame_of(pagemap, page):
    """Where a page is in memory, 0 where it is not."""
    entry = int.from_bytes(os.pread(pagemap.fileno(), 8, page // PAGE * 8), "little")
    return entry & (1 << 55) - 1 if entry >> 63 else 0


def cpu_seconds(pid):
    """What a process, without its children, has used."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Conmon:
    """
    conmon with a runtime that starts a program and nothing else: what it costs to have a process
        watched by conmon.

    The runtime is in C where there is a compiler, and otherwise in sh, which costs conmon
    1 ms more.
    """

    def __init__(self, lab):
        self.lab = lab
        self.exits = lab.directory("exits")
        self.runtime = lab.new("runtime")
        self.compiled = (
            has("cc")
            and not subprocess.run(
                ["cc", "-O2", "-o", self.runtime, os.path.join(HERE, "runtime.c")]
            ).returncode
        )
        if not self.compiled:
            shutil.copy(os.path.join(HERE, "runtime.sh"), self.runtime)
            os.chmod(self.runtime, 0o755)
        self.label = f"conmon, runtime in {'C' if self.compiled else 'sh'}"

    def start(self, argv):
        """Returns conmon's pid and the path of its exit file."""
        bundle = self.lab.directory("container")
        name = os.path.basename(bundle)
        words = [
            "conmon",
            "--sync",
            "--full-attach",
            "--cid",
            name,
            "--cuuid",
            name,
            "--name",
            name,
            "--runtime",
            self.runtime,
            "--bundle",
            bundle,
        ]
        words += [
            "--container-pidfile",
            f"{bundle}/pid",
            "--log-path",
            f"k8s-file:{bundle}/log",
            "--exit-dir",
            self.exits,
        ]
        pid = self.lab.spawn(words, env={**self.lab.env, "RUNTIME_ARGV": "\x1f".join(argv)})
        return pid, os.path.join(self.exits, name)
