"""
Rows about programs over ssh, on loopback; the same client, the same server, the same keys on both
sides of a ratio.
"""

import json
import os
import time

from . import lab as labs
from . import machine
from .starting import STATUS_WAIT_S
from .table import Row, interleaved

SIZE = 400_000_000


def remote_run(lab, remote, spool, argv, entry=(*labs.BARE, labs.MAIN), **fields):
    """A chaperone for a program over ssh; returns (pid, run id)."""
    name = os.path.basename(lab.new("remote"))
    spec = lab.file(
        "spec.json",
        json.dumps({"id": name, "program": {"argv": argv, "cwd": "/"}, "remote": remote, **fields}),
    )
    return lab.spawn([*entry, "run", "--spool", spool, spec]), name


def capture(lab, rounds):
    """
    400 MB of a remote program's output: `ssh host prog > file`, and through the far side's
    supervisor into the spool.
    """
    row = Row("ssh-capture", "ssh capture, 400 MB")
    sshd, user = lab.sshd()
    if sshd is None:
        row.note("no sshd could be started")
        return row
    spool = lab.new("spool")
    program = ["head", "-c", str(SIZE), "/dev/zero"]

    def by_ssh():
        fd = os.open(lab.new("file"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        seconds = lab.ended([*sshd.argv(user), " ".join(program)], stdout=fd)
        assert os.fstat(fd).st_size == SIZE
        os.ftruncate(fd, 0)
        os.close(fd)
        return SIZE / 1e6 / seconds

    def by_chaperone():
        begun = time.perf_counter()
        pid, run_id = remote_run(lab, sshd.remote(user), spool, program, labs.without_fsync())
        os.waitpid(pid, 0)
        seconds = time.perf_counter() - begun
        path = os.path.join(spool, run_id, "stdout")
        assert os.path.getsize(path) == SIZE, labs.status(spool, run_id)
        os.truncate(path, 0)
        return SIZE / 1e6 / seconds

    middle = row.figures_of(
        interleaved(
            min(rounds or 5, 10), {"ssh host prog > file": by_ssh, "chaperone": by_chaperone}
        ),
        "MB/s",
    )
    row.claim("chaperone / ssh", middle["chaperone"] / middle["ssh host prog > file"], ">=", 0.9)
    row.note(
        "from the start of the client, or of the chaperone, to its end; "
        "without the fsync there, which has a row of its own"
    )
    return row


def cost(lab, rounds):
    """
    What the supervisor adds to a remote run of nothing: the whole run, less the same run here, less
    `ssh host true`.
    """
    row = Row("ssh-cost", "cost of the supervisor a run")
    sshd, user = lab.sshd()
    if sshd is None:
        row.note("no sshd could be started")
        return row
    spool = lab.new("spool")
    here = lab.spec(["true"])
    variants = {
        "ssh host true": lambda: lab.ended([*sshd.argv(user), "true"]),
        "chaperone, here": lambda: lab.ended([*labs.RUN, "--spool", spool, here]),
        "chaperone, over ssh": lambda: ended_well(
            lab, spool, *remote_run(lab, sshd.remote(user), spool, ["true"])
        ),
    }
    middle = row.figures_of(interleaved(rounds or 30, variants), "ms", 1e3)
    added = middle["chaperone, over ssh"] - middle["ssh host true"] - middle["chaperone, here"]
    row.claim("added by the supervisor, ms", added * 1e3, "<=", 25)
    return row


def ended_well(lab, spool, pid, run_id):
    begun = time.perf_counter()
    os.waitpid(pid, 0)
    seconds = time.perf_counter() - begun
    status = labs.status(spool, run_id)
    assert status["return_code"] == 0, status
    return seconds


def starts(lab, rounds):
    """
    100 remote runs at once to one host with sshd's default MaxStartups, against 100 of `ssh host
    true` with 8 at a time.
    """
    row = Row("ssh-starts", "100 starts to one host at once")
    sshd, user = lab.sshd()
    if sshd is None:
        row.note("no sshd could be started")
        return row
    count, refused = 100, 0
    spool = lab.directory("spool")
    times = {"ssh host true, 8 at a time": [], "chaperones, all at once": []}
    cpu = {f"{label}: CPU of the machine": [] for label in times}
    for _ in range(min(rounds or 1, 3)):
        begun, busy = time.perf_counter(), [machine.cpu_seconds()]
        running, left = set(), count
        while running or left:
            while left and len(running) < 8:
                running.add(lab.spawn([*sshd.argv(user), "true"]))
                left -= 1
            running.discard(os.waitpid(-1, 0)[0])  # a child of an earlier row may end only now
        times["ssh host true, 8 at a time"].append(time.perf_counter() - begun)
        busy.append(machine.cpu_seconds())
        begun = time.perf_counter()
        runs = [
            remote_run(lab, sshd.remote(user), spool, ["true"], timeouts={"connect": STATUS_WAIT_S})
            for _ in range(count)
        ]
        for pid, _ in runs:
            os.waitpid(pid, 0)
        times["chaperones, all at once"].append(time.perf_counter() - begun)
        busy.append(machine.cpu_seconds())
        for series, before, after in zip(cpu.values(), busy, busy[1:], strict=False):
            series.append(after - before)
        refused += sum(labs.status(spool, run_id).get("return_code") != 0 for _, run_id in runs)
    middle = row.figures_of({**times, **cpu}, "s")
    row.claim("runs that failed", refused, "<=", 0)
    row.claim(
        "chaperones / 8 at a time",
        middle["chaperones, all at once"] / middle["ssh host true, 8 at a time"],
        "<=",
        1.2,
    )
    return row
