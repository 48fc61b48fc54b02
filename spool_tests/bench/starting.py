"""Rows about starting: cold, warm, memory."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from chaperone.launch import start as starting

from . import lab as labs
from .table import Row, interleaved

STATUS_WAIT_S = 120
IDLE = ["/bin/sleep", "1000"]


def cold(lab, rounds):
    """
    From a scheduler's posix_spawn of `chaperone run` to the exec of the program, against an
    interpreter that does nothing.
    """
    row = Row("cold", "cold start to the program's exec")
    programs = lab.programs()
    spool = lab.new("spool")
    spec = lab.spec([programs.paths[0]])

    def executed(argv, pause=0.0):
        def measure():
            programs.forget()
            begun = time.perf_counter()
            pid = lab.spawn(argv)
            seconds = programs.executed(begun)
            os.waitpid(pid, 0)
            time.sleep(pause)  # a peer's server still has something to do
            return seconds

        return measure

    variants = {
        "bare interpreter, ended": lambda: lab.ended([*labs.BARE, "-c", "pass"]),
        "chaperone": executed([*labs.RUN, "--spool", spool, spec]),
    }
    if labs.has("nq"):
        lab.env["NQDIR"] = lab.directory("nq")
        variants["nq"] = executed(["nq", "-q", programs.paths[0]], 0.01)
    if labs.has("conmon"):
        conmon = labs.Conmon(lab)
        variants[conmon.label] = conmon_executed(conmon, programs)
    found = interleaved(rounds or 100, variants)
    middle = row.figures_of(found, "ms", 1e3)
    ratio = middle["chaperone"] / middle["bare interpreter, ended"]
    row.claim("cold start / bare interpreter", ratio, "<=", 1.9)
    return row


def conmon_executed(conmon, programs):
    def measure():
        programs.forget()
        begun = time.perf_counter()
        pid, exit_file = conmon.start([programs.paths[0]])
        seconds = programs.executed(begun)
        os.waitpid(pid, 0)
        labs.until(lambda: os.path.exists(exit_file))
        return seconds

    return measure


def warm(lab, rounds):
    """
    From the scheduler's call to the exec of the program, by a launcher that is there; one after the
    other, and in a burst.
    """
    row = Row("warm", "warm start to the program's exec, and starts a second in a burst")
    if not labs.has("conmon"):
        row.note("conmon is not installed: nothing to compare with")
        return row
    programs, conmon = lab.programs(), labs.Conmon(lab)
    spool = lab.new("spool")
    started = spool_starter(lab, spool)
    spec = {"program": {"argv": [programs.paths[0]]}}

    def executed():
        programs.forget()
        begun = time.perf_counter()
        run_id = started(spec)
        seconds = programs.executed(begun)
        labs.until(lambda: os.path.exists(os.path.join(spool, run_id, "status.json")))
        return seconds

    variants = {conmon.label: conmon_executed(conmon, programs), "chaperone, warm": executed}
    spooled = task_spooler(lab) if labs.has("tsp") else None
    if spooled:

        def spooled_executed():
            programs.forget()
            begun = time.perf_counter()
            pid = spooled(programs.paths[0])
            seconds = programs.executed(begun)
            os.waitpid(pid, 0)
            time.sleep(0.01)  # its server still has something to do
            return seconds

        variants["task-spooler"] = spooled_executed
    middle = row.figures_of(interleaved(rounds or 100, variants), "ms", 1e3)
    row.claim("warm start / conmon", middle["chaperone, warm"] / middle[conmon.label], "<=", 0.8)
    burst(lab, row, conmon, spool, spooled)
    return row


def task_spooler(lab):
    """
    A function that queues a program with a task-spooler of our own, whose server is there already;
    returns the client's pid.
    """
    lab.env["TS_SOCKET"] = lab.new("tsp")
    lab.env["TMPDIR"] = lab.directory("tsp-output")
    for words in (["-S", "1000"], ["true"]):
        os.waitpid(lab.spawn(["tsp", *words]), 0)
    lab.at_end(lambda: os.waitpid(lab.spawn(["tsp", "-K"]), 0))
    return lambda path: lab.spawn(["tsp", path])


def spool_starter(lab, spool):
    """A function that starts a spec by a launcher that is there already; returns the run id."""
    os.mkdir(spool, 0o700)
    lab.launcher(spool)
    return lambda spec: starting.start(spool, spec, warm=True, env=lab.env)


def burst(lab, row, conmon, spool, spooled, count=300, rounds=5):
    """
    So many starts as fast as they can be asked for; the rate at which their programs were executed.

    A start by the launcher returns when the run is on disk, so 4 threads ask; the peers' starts
    wait for nothing.
    """
    programs = lab.programs(count)

    def rate(start, threads=1):
        def measure():
            programs.forget()
            with ThreadPoolExecutor(threads) as pool:
                begun = time.perf_counter()
                ends = pool.map(start, programs.paths)
                moments = programs.all_executed(begun, count)
                for end in ends:
                    end()
            return count / moments[-1]

        return measure

    def chaperone(path):
        run_id = starting.start(spool, {"program": {"argv": [path]}}, warm=True, env=lab.env)
        return lambda: labs.until(
            lambda: os.path.exists(os.path.join(spool, run_id, "status.json"))
        )

    def peer(path):
        pid, exit_file = conmon.start([path])
        return lambda: (os.waitpid(pid, 0), labs.until(lambda: os.path.exists(exit_file)))

    variants = {
        f"{conmon.label}, burst": rate(peer),
        "chaperone, warm, burst": rate(chaperone, threads=4),
    }
    if labs.has("nq"):
        lab.env["NQDIR"] = lab.directory("nq")
        variants["nq, burst"] = rate(
            lambda path: (lambda pid: lambda: os.waitpid(pid, 0))(lab.spawn(["nq", "-q", path]))
        )
    if spooled:
        variants["task-spooler, burst"] = rate(
            lambda path: (lambda pid: lambda: os.waitpid(pid, 0))(spooled(path))
        )
    middle = row.figures_of(interleaved(rounds, variants), "/s")
    row.claim(
        "warm starts a second / conmon",
        middle["chaperone, warm, burst"] / middle[f"{conmon.label}, burst"],
        ">=",
        1,
    )


def memory(lab, rounds):
    """
    What an idle run holds for itself (USS): the chaperone and its guard, without the program;
    against an idle ssh client.
    """
    row = Row("memory", "idle memory of a run (USS)")
    ssh = ssh_client(lab)
    if ssh:
        row.figure("idle ssh client", ssh, "KiB")
    cold, warm = lab.new("spool"), lab.new("spool")
    started = spool_starter(lab, warm)
    for _ in range(min(rounds or 20, 20)):
        starting.start(cold, {"program": {"argv": IDLE}}, env=lab.env)
    for _ in range(5 * min(rounds or 20, 20)):
        started({"program": {"argv": IDLE}})
    middle = {}
    for label, spool in (("chaperone, warm", warm), ("chaperone, cold", cold)):
        labs.until(lambda spool=spool: all(status.get("pid") for status in labs.live(spool)))
        runs = [holding(status) for status in labs.live(spool)]
        middle[label] = row.figure(label, [chaperone + guard for chaperone, guard in runs], "KiB")
        row.figure(f"{label}: its guard", [guard for _, guard in runs], "KiB")
        if spool == warm and os.geteuid() == 0:
            row.figure(
                f"{label}: as in its launcher",
                [labs.copied_in_vain(status["chaperone_pid"]) for status in labs.live(spool)[:5]],
                "KiB",
            )
    if labs.has("conmon"):
        conmon = labs.Conmon(lab)
        watching = [conmon.start(IDLE)[0] for _ in range(10)]
        time.sleep(0.5)
        grown = [child for pid in watching for child in (labs.children(pid) or [pid])]
        row.figure(conmon.label, [labs.memory(pid) for pid in watching], "KiB")
        labs.kill([*grown, *watching])
    for spool in (cold, warm):
        for status in labs.live(spool):
            labs.ask(spool, status["run_id"], "kill")
    labs.until(lambda: not labs.live(cold) and not labs.live(warm))
    if ssh:
        client = row.figures[0][3]
        # 3.12 keeps no count of references to what is immortal.
        bound = 1.4 if sys.version_info < (3, 12) else 1.2
        row.claim("warm / idle ssh client", middle["chaperone, warm"] / client, "<=", bound)
        row.claim("cold / idle ssh client", middle["chaperone, cold"] / client, "<=", 3.6)
    else:
        row.note("no sshd could be started: nothing to compare with")
    return row


def holding(status):
    """KiB of a run's chaperone and of its guard."""
    return labs.memory(status["chaperone_pid"]), labs.memory(status["guard_pid"])


def ssh_client(lab, count=5):
    """KiB of ssh clients whose program is idle; nothing where there is no sshd."""
    sshd, user = lab.sshd()
    if sshd is None:
        return []
    outs = [os.open(lab.new("ready"), os.O_RDWR | os.O_CREAT, 0o600) for _ in range(count)]
    pids = [
        lab.spawn([*sshd.argv(user), "echo ready; exec sleep 1000"], stdout=out) for out in outs
    ]
    labs.until(lambda: all(os.fstat(out).st_size for out in outs))
    found = [labs.memory(pid) for pid in pids]
    labs.kill(pids)
    for pid in pids:
        os.waitpid(pid, 0)
    return found
