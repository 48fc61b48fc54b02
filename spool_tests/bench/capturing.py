"""Rows about output on its way into the spool."""
import json
import os
import resource
import time

from . import lab as labs
from .table import Row, interleaved

GIB = 1 << 30


def capture(lab, rounds):
    """How fast a program that only writes gets rid of its bytes: into a file, or through a chaperone into the spool."""
    row = Row("capture", "local capture")
    rounds = min(rounds or 5, 10)
    for name, block, size, bound in (("64 KiB writes", 65_536, 2 * GIB, 0.7), ("4 KiB writes", 4_096, GIB, 1.0)):
        writer = ["/bin/dd", "if=/dev/zero", f"bs={block}", f"count={size // block}", "status=none"]
        variants = {f"{name}: prog > file": to_file(lab, writer, size, 0), f"{name}: prog >> file": to_file(lab, writer, size, os.O_APPEND)}
        variants[f"{name}: chaperone, pipe"] = captured(lab, writer, size, "pipe")[0]
        if block == 65_536:
            direct, cpu = captured(lab, writer, size, "file")
            variants[f"{name}: chaperone, through file"] = direct
            if labs.has("conmon"):
                variants[f"{name}: conmon"] = by_conmon(lab, writer[:2] + [f"bs={block}", f"count={size // 8 // block}", "status=none"], size // 8)
        middle = row.figures_of(interleaved(rounds, variants), "GB/s")
        floor = middle[f"{name}: prog >> file"]
        row.claim(f"{name}: pipe / prog >> file", middle[f"{name}: chaperone, pipe"] / floor, ">=", bound)
        if block == 65_536:
            if labs.has("conmon"):
                row.claim(f"{name}: pipe / conmon", middle[f"{name}: chaperone, pipe"] / middle[f"{name}: conmon"], ">=", 4)
            row.claim(f"{name}: through file / prog >> file", middle[f"{name}: chaperone, through file"] / floor, ">=", 0.95)
            row.figure("chaperone's own CPU, 2 GiB through file, beyond that of a run of nothing", cpu, "ms", 1e3)
            row.claim("through file: chaperone CPU for 2 GiB, ms", 1e3 * sorted(cpu)[len(cpu) // 2], "<=", 10)
    row.note("the spool's files are append-only, so the floor is a file opened for appending")
    return row


def to_file(lab, writer, size, flags):
    """GB/s of the program alone, over its life."""
    path = lab.new("file")

    def measure():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600)
        seconds = lab.ended(writer, stdout=fd)
        os.ftruncate(fd, 0)  # nothing of it is to be written back while the next one is measured
        os.close(fd)
        return size / 1e9 / seconds

    return measure


def captured(lab, writer, size, through):
    """
    GB/s over the program's life, as the status tells it.

    Returns:
        tuple: The function that measures, and a list to which it appends the chaperone's own CPU seconds.
    """
    spool, cpu = lab.new("spool"), []

    def held(argv):
        spec = lab.spec(argv, output={"through": through})
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        pid = lab.spawn([*labs.RUN, "--spool", spool, spec])
        run_id = labs.until(lambda: os.listdir(spool) and [name for name in os.listdir(spool) if name[0] != "."])[0]
        stdout = os.path.join(spool, run_id, "stdout")
        return pid, run_id, stdout, before

    def measure():
        pid, run_id, stdout, before = held(writer)
        final = ended_without_writeback(lab, spool, run_id, pid, stdout)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cpu.append(max(0.0, used - final["rusage"]["utime"] - final["rusage"]["stime"] - idle))
        os.rename(os.path.join(spool, run_id), lab.new("done"))
        return size / 1e9 / final["elapsed"]

    idle = 0.0
    idle = own_cpu(lab, spool, through)
    return measure, cpu


def own_cpu(lab, spool, through):
    """CPU seconds of a chaperone whose program does nothing: its start, the same for every run."""
    spec = lab.spec(["/bin/true"], id="nothing", output={"through": through})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.waitpid(lab.spawn([*labs.RUN, "--spool", spool, spec]), 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.rename(os.path.join(spool, "nothing"), lab.new("done"))
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ended_without_writeback(lab, spool, run_id, pid, stdout):
    """Wait for the chaperone; the file goes when it has ended, before the next one is measured."""
    os.waitpid(pid, 0)
    with open(os.path.join(spool, run_id, "status.json")) as file:
        final = json.load(file)
    os.truncate(stdout, 0)
    return final


def by_conmon(lab, writer, size):
    conmon = labs.Conmon(lab)

    def measure():
        begun = time.perf_counter()
        pid, exit_file = conmon.start(writer)
        labs.until(lambda: os.path.exists(exit_file))
        seconds = time.perf_counter() - begun
        os.waitpid(pid, 0)
        return size / 1e9 / seconds

    return measure
