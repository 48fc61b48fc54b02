"""Rows about output on its way into the spool."""

import fcntl
import json
import os
import time

from . import lab as labs
from .table import Row, interleaved, median

GIB = 1 << 30
LINES = 50_000_000  # bytes, of writes that are as small as a line
BLOCKS = (
    ("64 KiB writes", 65_536, 0.7),
    ("4 KiB writes", 4_096, 1.0),
    ("100-byte writes", 100, 1.0),
)


def capture(lab, rounds):
    """
    How fast a program that only writes gets rid of its bytes: into a file, or through a chaperone
    into the spool.
    """
    row = Row("capture", "local capture")
    rounds = min(rounds or 9, 20)
    for name, block, bound in BLOCKS:
        # More, and a guest whose hypervisor takes free memory back is measured in two speeds.
        size = GIB // 2 if block > 100 else LINES
        writer = ["/bin/dd", "if=/dev/zero", f"bs={block}", f"count={size // block}", "status=none"]
        variants = {f"{name}: prog > file": to_file(lab, writer, lab.new("file"), size, 0)}
        variants[f"{name}: prog >> file"] = to_file(lab, writer, lab.new("file"), size, os.O_APPEND)
        variants[f"{name}: chaperone, pipe"], piped_cpu = captured(lab, writer, size)
        piped = ["/bin/sh", "-c", '"$@" | cat', "sh", *writer]
        variants[f"{name}: prog | cat >> file"] = to_file(
            lab, piped, lab.new("file"), size, os.O_APPEND
        )
        variants[f"{name}: prog | a reader that drops it"] = dropped(lab, writer, size)
        if block == 65_536:
            direct, cpu = captured(lab, writer, size, through="file")
            variants[f"{name}: chaperone, through file"] = direct
            if labs.has("conmon"):
                variants[f"{name}: conmon"] = by_conmon(
                    lab,
                    writer[:2] + [f"bs={block}", f"count={size // 8 // block}", "status=none"],
                    size // 8,
                )
        middle = row.figures_of(interleaved(rounds, variants), "GB/s")
        row.figure(f"{name}: chaperone's CPU a GiB", [each / size * GIB for each in piped_cpu], "s")
        floor = middle[f"{name}: prog >> file"]
        row.claim(
            f"{name}: pipe / prog >> file", middle[f"{name}: chaperone, pipe"] / floor, ">=", bound
        )
        if block == 65_536:
            if labs.has("conmon"):
                row.claim(
                    f"{name}: pipe / conmon",
                    middle[f"{name}: chaperone, pipe"] / middle[f"{name}: conmon"],
                    ">=",
                    4,
                )
            row.claim(
                f"{name}: through file / prog >> file",
                middle[f"{name}: chaperone, through file"] / floor,
                ">=",
                0.95,
            )
            row.figure("chaperone's CPU while that goes through file", cpu, "ms", 1e3)
            row.claim(
                "through file: chaperone CPU for 2 GiB, ms",
                2 * GIB / size * 1e3 * median(cpu),
                "<=",
                10,
            )
    row.note(
        "the spool's files are append-only, so the floor is a file opened for "
        "appending; the fsync at a run's end is not in it"
    )
    return row


def to_file(lab, writer, path, size, flags):
    """GB/s of the program alone, over its life."""

    def measure():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600)
        seconds = lab.ended(["/bin/sh", "-c", '"$@"; :', "sh", *writer], stdout=fd)
        os.ftruncate(fd, 0)  # nothing of it is to be written back while the next one is measured
        os.close(fd)
        return size / 1e9 / seconds

    return measure


def dropped(lab, writer, size):
    """
    GB/s into the widest pipe that a user may have, of which somebody reads and does nothing else:
    no capture through a pipe can be faster.
    """

    def measure():
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
        buffer = bytearray(1 << 18)
        begun = time.perf_counter()
        pid = lab.spawn(writer, stdout=writing)
        os.close(writing)
        while os.readv(reading, [buffer]):
            pass
        seconds = time.perf_counter() - begun
        os.waitpid(pid, 0)
        os.close(reading)
        return size / 1e9 / seconds

    return measure


def timeline(lab, rounds):
    """What the times cost a program that writes 100 bytes at a time, in speed and on disk."""
    row = Row("timeline", "capture of 100-byte writes, with their times and without")
    size = 50_000_000
    writer = ["/bin/dd", "if=/dev/zero", "bs=100", f"count={size // 100}", "status=none"]
    disk = []
    variants = {
        "without": captured(lab, writer, size)[0],
        "with a timeline": captured(lab, writer, size, disk, timeline=True)[0],
    }
    middle = row.figures_of(interleaved(min(rounds or 15, 30), variants), "MB/s", 1e3)
    row.figure("the timeline's part of the bytes on disk", disk, "%", 100)
    slower = 100 * (1 - middle["with a timeline"] / middle["without"])
    row.claim("slower with a timeline, %", slower, "<=", 5)
    row.claim("on disk, % of the stream", 100 * median(disk), "<=", 5)
    row.note(
        "a line is for all that came within a millisecond: below 6 such writes a millisecond it"
        " is more than 5 % of them"
    )
    return row


def captured(lab, writer, size, disk=None, **output):
    """
    GB/s over the program's life, as the status has it.

    Args:
        disk (list): Takes the size of the timeline as a part of the stream's.
        output: Of the spec.
    Returns:
        tuple: The function that measures, and a list to which it appends the seconds of CPU that
            the chaperone used meanwhile.
    """
    spool, cpu = lab.new("spool"), []

    def measure():
        directory = lab.directory("gate")
        for name in ("begin", "end"):
            os.mkfifo(f"{directory}/{name}")
        # Held at both ends, so that the chaperone is looked at when its start is over and before
        # its fsync begins.
        script = 'read go < begin; "$@"; read go < end'
        spec = lab.spec(["/bin/sh", "-c", script, "sh", *writer], output=output, id="writer")
        with open(spec) as file:
            value = json.load(file)
        value["program"]["cwd"] = directory
        with open(spec, "w") as file:
            json.dump(value, file)
        pid = lab.spawn([*labs.RUN, "--spool", spool, spec])
        gate = os.open(f"{directory}/begin", os.O_WRONLY)  # opens when the program does
        holder = labs.until(lambda: labs.status(spool, "writer").get("chaperone_pid"))
        before, begun = labs.cpu_seconds(holder), time.perf_counter()
        os.write(gate, b"\n")
        os.close(gate)
        gate = os.open(f"{directory}/end", os.O_WRONLY)
        seconds = time.perf_counter() - begun
        cpu.append(labs.cpu_seconds(holder) - before)
        os.write(gate, b"\n")
        os.close(gate)
        os.waitpid(pid, 0)
        assert os.path.getsize(f"{spool}/writer/stdout") == size
        if disk is not None:
            disk.append(os.path.getsize(f"{spool}/writer/timeline") / size)
        os.truncate(
            f"{spool}/writer/stdout", 0
        )  # nothing of it is to be written back while the next one is measured
        os.rename(f"{spool}/writer", lab.new("done"))
        return size / 1e9 / seconds

    return measure, cpu


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
