"""Rows about hearing of runs: output, endings, deaths, a scheduler that comes back."""

import asyncio
import contextlib
import json
import os
import resource
import select
import signal
import statistics
import subprocess
import time

from inotify_simple import INotify, flags

import chaperone
from chaperone.model import jsontext, transitions
from chaperone.model import spec as specs
from chaperone.model.events import Ended, Lost, Output

from . import lab as labs
from .starting import spool_starter
from .table import Row, interleaved

LINES_S = 100  # lines a second into one file: a program that talks
SCALE_RUNS, SCALE_LINES_S = 1_000, 5_000
SETTLED_S = 0.02  # after a start: the launcher forks the next chaperone, which rehearses
GC = ("--older", "7d", "--uncollected")  # no scheduler has collected what the bench makes


@contextlib.contextmanager
def feeder(lab, spool, runs, lines_s, seconds, first=0):
    """
    A process that holds so many runs and writes lines with the time on the monotonic clock, spread
    over them evenly; ready when it says so. It is of this checkout, whichever version is measured.
    """
    argv = [
        labs.PYTHON,
        "-m",
        "spool_tests.bench.feeder",
        spool,
        str(runs),
        str(lines_s),
        str(seconds),
        str(first),
    ]
    process = subprocess.Popen(
        argv, cwd=labs.CHECKOUT, env=lab.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def delays(data, now):
    """Seconds from the writing of each line to `now`."""
    return [now - float(line) for line in data.split()]


def append(lab, rounds):
    """
    From the write of a line to the moment when a subscriber holds it, at 100 lines a second:
    asyncio, against `tail -F` in a pipe, and against an asyncio callback that reads one file.

    The scheduler places the processes of each turn again, and a turn in which two of them share a
    core has half of the time: so there are many short turns.
    """
    row = Row("append", "append to subscriber, 100 lines/s")
    listeners = {
        "tail -F, piped": by_tail,
        "chaperone, asyncio": by_asyncio,
        "asyncio and inotify alone": by_callback,
    }
    found = {label: [] for label in listeners}
    middles = {label: [] for label in listeners}
    for _ in range(min(rounds or 12, 60)):
        for label, listen in listeners.items():
            spool = lab.directory("spool")
            with feeder(lab, spool, 1, LINES_S, 1) as process:
                heard = listen(lab, spool, process, LINES_S)
            found[label] += heard
            middles[label].append(statistics.median(heard) * 1e6)
    row.figures_of(found, "µs", 1e6)
    (_, _, _, tail_middle, tail_worst), (_, _, _, middle, worst), _ = row.figures
    row.claim("p50 / tail -F", middle / tail_middle, "<=", 1.4)
    row.claim("p99 / tail -F", worst / tail_worst, "<=", 1.1)
    for label, values in middles.items():
        row.note(f"{label}: medians of the turns {min(values):.0f} to {max(values):.0f} µs")
    return row


def by_tail(lab, spool, process, count):
    heard = []
    path = os.path.join(spool, "run-0", "stdout")
    with subprocess.Popen(
        ["tail", "-F", "-n", "+1", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tail:
        time.sleep(0.3)  # until it watches: nothing reports that
        process.stdin.write(b"go\n")
        process.stdin.flush()
        while len(heard) < count:
            data = os.read(tail.stdout.fileno(), 1 << 16)
            heard += delays(data, time.monotonic())
        tail.kill()
    return heard


def by_callback(lab, spool, process, count):
    heard = []

    async def listen():
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        offset = 0

        def read():
            nonlocal offset
            os.read(inotify.fileno(), 1 << 16)
            data = os.pread(fd, 1 << 12, offset)
            offset += len(data)
            heard.extend(delays(data, time.monotonic()))
            if len(heard) >= count:
                over.set()

        loop.add_reader(inotify.fileno(), read)
        process.stdin.write(b"go\n")
        process.stdin.flush()
        await over.wait()
        loop.remove_reader(inotify.fileno())

    fd = os.open(os.path.join(spool, "run-0", "stdout"), os.O_RDONLY)
    with contextlib.closing(INotify(nonblocking=True)) as inotify:
        inotify.add_watch(os.path.join(spool, "run-0"), flags.MODIFY)
        asyncio.run(listen())
    os.close(fd)
    return heard


def by_asyncio(lab, spool, process, count, begins=lambda: None):
    """
    Seconds from each line's writing; `begins` is called when the reader has seen all runs and the
    lines begin.
    """
    heard = []

    async def listen():
        with chaperone.Spool(spool).follow() as follower:
            while follower.next(0.1) is not None:
                pass
            begins()
            process.stdin.write(b"go\n")
            process.stdin.flush()
            async for event in follower:
                if isinstance(event, Output):
                    heard.extend(delays(event.data, time.monotonic()))
                if len(heard) >= count:
                    return

    asyncio.run(listen())
    return heard


def scale(lab, rounds):
    """
    1,000 live runs that write 5,000 lines a second in all, one reader on one loop: how late, and
    for how much of a core.
    """
    row = Row("scale", f"{SCALE_RUNS:,} runs, {SCALE_LINES_S:,} lines/s, one loop")
    seconds = min(rounds or 5, 30)
    spool = lab.directory("spool")
    with feeder(lab, spool, SCALE_RUNS, SCALE_LINES_S, seconds) as process:
        used = []
        heard = by_asyncio(
            lab, spool, process, SCALE_LINES_S * seconds, lambda: used.append(cpu_and_wall())
        )
        used.append(cpu_and_wall())
    row.figure("line written to line held", heard, "ms", 1e3)
    (cpu, wall), (cpu_after, wall_after) = used
    share = (cpu_after - cpu) / (wall_after - wall)
    row.claim("p99, ms", row.figures[0][4], "<=", 3)
    row.claim("of a core, %", 100 * share, "<=", 20)
    row.claim("lines lost", SCALE_LINES_S * seconds - len(heard), "<=", 0)
    return row


def cpu_and_wall():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter()


def death(lab, rounds):
    """
    From the SIGKILL of a chaperone to the event that reports the loss; and, for other chaperones,
    to their end as the kernel reports it, which is a part of that time.
    """
    row = Row("death", "SIGKILL of a chaperone to Lost")
    spool = lab.new("spool")
    started = spool_starter(lab, spool)
    listeners = {"SIGKILL to Lost": loss_told, "SIGKILL to its end (pidfd)": end_told}
    heard = {label: [] for label in listeners}
    for _ in range(min(rounds or 100, 1_000)):
        for label, listening in listeners.items():
            run_id = started({"program": {"argv": ["/bin/sleep", "1000"]}})
            running = labs.until(
                lambda run_id=run_id: (found := labs.status(spool, run_id)).get("pid") and found
            )
            with listening(spool, run_id, running["chaperone_pid"]) as hear:
                time.sleep(SETTLED_S)
                begun = time.perf_counter()
                os.kill(running["chaperone_pid"], signal.SIGKILL)
                hear()
                heard[label].append(time.perf_counter() - begun)
            os.rename(os.path.join(spool, run_id), lab.new("lost"))
            os.unlink(os.path.join(spool, ".running", run_id))
    row.figures_of(heard, "ms", 1e3)
    row.claim("p50, ms", row.figures[0][3], "<=", 1)
    row.claim("p99, ms", row.figures[0][4], "<=", 2)
    return row


@contextlib.contextmanager
def loss_told(spool, run_id, pid):
    """A function that returns when a follower hears of a run's loss."""
    with chaperone.Spool(spool).follow(runs=[run_id]) as follower:
        while follower.next(0) is not None:
            pass
        yield lambda: next(
            event for event in iter(lambda: follower.next(5), None) if isinstance(event, Lost)
        )


@contextlib.contextmanager
def end_told(spool, run_id, pid):
    """A function that returns when a process has ended."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        yield lambda: poll.poll(5_000)
    finally:
        os.close(pidfd)


def end(lab, rounds):
    """
    From the moment when a program is asked to end to the moment when a scheduler knows how it
    ended: against conmon's exit file.
    """
    row = Row("end", "program's end to Ended")
    if not labs.has("conmon"):
        row.note("conmon is not installed: nothing to compare with")
        return row
    conmon = labs.Conmon(lab)
    spool = lab.new("spool")
    started = spool_starter(lab, spool)

    def gated(start):
        gate = lab.new("gate")
        os.mkfifo(gate)
        handle = start(["/bin/sh", "-c", f"read go <{gate}"])
        return handle, os.open(gate, os.O_WRONLY)

    def by_chaperone():
        run_id, gate = gated(lambda argv: started({"program": {"argv": argv}}))
        with chaperone.Spool(spool).follow(runs=[run_id]) as follower:
            while follower.next(0.02) is not None:
                pass
            begun = time.perf_counter()
            os.write(gate, b"\n")
            while not isinstance(follower.next(5), Ended):
                pass
            seconds = time.perf_counter() - begun
        os.close(gate)
        return seconds

    def by_conmon():
        (pid, exit_file), gate = gated(conmon.start)
        with contextlib.closing(INotify()) as inotify:
            inotify.add_watch(conmon.exits, flags.MOVED_TO | flags.CLOSE_WRITE)
            begun = time.perf_counter()
            os.write(gate, b"\n")
            while not os.path.exists(exit_file):
                inotify.read(timeout=5_000)
            with open(exit_file) as file:
                file.read()
            seconds = time.perf_counter() - begun
        os.waitpid(pid, 0)
        os.close(gate)
        return seconds

    middle = row.figures_of(
        interleaved(rounds or 60, {"conmon's exit file": by_conmon, "chaperone": by_chaperone}),
        "ms",
        1e3,
    )
    row.claim("chaperone / conmon", middle["chaperone"] / middle["conmon's exit file"], "<=", 2.5)
    row.note("the chaperone fsyncs the status before it appears; conmon's exit file is not synced")
    return row


def reconnect(lab, rounds):
    """
    A scheduler comes back to 1,000 live runs: to its first event, beside 10,000 ended and collected
    runs, and beside 100,000.
    """
    row = Row("reconnect", f"reconnect to {SCALE_RUNS:,} live runs, to the first event")
    spool = lab.directory("spool")
    with feeder(lab, spool, SCALE_RUNS, 0, 0):
        cursor = {"runs": {f"run-{number}": {} for number in range(SCALE_RUNS)}}
        made = 0
        middle = {}
        for history in (10_000, 100_000):
            make_history(lab, spool, made, history)
            made = history
            label = f"beside {history:,} ended"
            middle[label] = row.figure(
                label,
                [first_event(spool, cursor) for _ in range(min(rounds or 10, 50) + 1)][1:],
                "ms",
                1e3,
            )
    few, many = middle.values()
    row.claim("beside 10,000 ended, ms", few * 1e3, "<=", 60)
    row.claim("beside 100,000 / beside 10,000", many / few, "<=", 1.2)
    return row


def first_event(spool, cursor):
    begun = time.perf_counter()
    with chaperone.Spool(spool).follow(json.loads(json.dumps(cursor))) as follower:
        assert follower.next(5) is not None
        return time.perf_counter() - begun


def make_history(lab, spool, made, wanted):
    """Ended and collected runs: a directory and its status each."""
    status = lab.file(
        "status.json", json.dumps({"version": 1, "state": "terminated", "return_code": 0})
    )
    for number in range(made, wanted):
        directory = os.path.join(spool, f"ended-{number}")
        os.mkdir(directory, 0o700)
        if number % 10_000 == 0:  # a file has at most 65,000 names
            status = lab.file(
                "status.json", json.dumps({"version": 1, "state": "terminated", "return_code": 0})
            )
        os.link(status, os.path.join(directory, "status.json"))


def gc(lab, rounds):
    """
    10,000 run directories, 1,000 of them live: `gc` deletes the rest, against `rm -rf` of as many
    without a look at their states.
    """
    row = Row("gc", "gc of 10,000 runs, 1,000 of them live")
    found = {"rm -rf": [], "gc --older 7d --uncollected": []}
    for _ in range(min(rounds or 3, 10)):
        spool, plain = lab.directory("spool"), lab.directory("plain")
        with feeder(lab, spool, SCALE_RUNS, 0, 0):
            make_ended(spool, 9_000)
            make_ended(plain, 9_000)
            found["rm -rf"].append(lab.ended(["rm", "-rf", plain]))
            found["gc --older 7d --uncollected"].append(
                lab.ended([*labs.with_fsync(), "gc", "--spool", spool, *GC])
            )
            left = [name for name in os.listdir(spool) if not name.startswith(".")]
            assert len(left) == SCALE_RUNS, len(left)
    middle = row.figures_of(found, "s", 1)
    row.claim("gc, s", middle["gc --older 7d --uncollected"], "<=", 5)
    return row


def make_ended(spool, runs):
    """Runs that ended in 1970, with all of their files and all that these say."""
    os.makedirs(os.path.join(spool, ".ended"), 0o700, exist_ok=True)
    spec = specs.checked({"program": {"argv": ["/bin/true"]}}, "/")
    for number in range(runs):
        directory = os.path.join(spool, f"ended-{number}")
        os.mkdir(directory, 0o700)
        spec.update(id=f"ended-{number}", key=f"{number:032x}")
        status = transitions.starting(spec, 2, "there", "a boot", 10**9)
        status = transitions.running(status, 3, 10**9, return_code=0, status=0, leftovers=0)
        status = transitions.terminated({**status, "end_time": status["start_time"]}, True)
        content = {"spec.json": jsontext.dumps(spec), "status.json": jsontext.dumps(status)}
        for name in ("lock", "spec.json", "stdout", "stderr", "status.json"):
            fd = os.open(os.path.join(directory, name), os.O_CREAT | os.O_WRONLY, 0o600)
            with open(fd, "w") as file:
                file.write(content.get(name, ""))
        os.utime(os.path.join(directory, "status.json"), (1, 1))
        os.symlink(f"../ended-{number}", os.path.join(spool, ".ended", f"ended-{number}"))


def fsync(lab, rounds):
    """
    What it costs that a status is on the disk before it is visible: whole runs of a program that
    writes a line, started cold.
    """
    row = Row("fsync", "fsync of the final status; durable runs")
    spool = lab.new("spool")

    def whole(entry, **fields):
        spec = lab.spec(["/bin/echo", "a line"], **fields)
        return lambda: lab.ended([*entry, "run", "--spool", spool, spec])

    variants = {
        "no fsync": whole(labs.without_fsync()),
        "as it is": whole(labs.with_fsync()),
        "durable": whole(labs.with_fsync(), durable=True),
    }
    middle = row.figures_of(interleaved(rounds or 60, variants), "ms", 1e3)
    row.claim("as it is / no fsync", middle["as it is"] / middle["no fsync"], "<=", 1.15)
    row.claim("durable / no fsync", middle["durable"] / middle["no fsync"], "<=", 1.5)
    return row


def heap(lab, rounds):
    """
    A start from a scheduler with a heap of 1 GiB, against one without: what a fork of it would cost
    is shown beside them.
    """
    row = Row("heap", "a start from a scheduler with a big heap")
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from chaperone.launch import start as starting; heap = b'x' * int(sys.argv[3])\n"
        "spec = {'program': {'argv': ['true']}}; starting.start(sys.argv[2], spec, env={})\n"
        "begun = time.perf_counter()\n"
        "if sys.argv[4] == 'fork':\n    pid = os.fork()\n    pid or os._exit(0)\n"
        "else:\n    starting.start(sys.argv[2], spec, env={})\n"
        "print(time.perf_counter() - begun)\n"
    )
    spool = lab.new("spool")

    def measure(size, how):
        argv = [labs.PYTHON, "-c", code, labs.ROOT, spool, str(size), how]
        return lambda: float(
            subprocess.run(argv, capture_output=True, check=True, env=lab.env).stdout
        )

    variants = {
        "no heap": measure(0, "start"),
        "heap of 1 GiB": measure(1 << 30, "start"),
        "a fork of that heap": measure(1 << 30, "fork"),
    }
    middle = row.figures_of(interleaved(rounds or 10, variants), "ms", 1e3)
    row.claim("heap of 1 GiB / no heap", middle["heap of 1 GiB"] / middle["no heap"], "<=", 1.1)
    return row
