"""
The machine that it is measured on: what it is, how busy it is with other things, and a filesystem
with a journal.

Knows: /proc, mkfs, mount.  Must not know: what is measured.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time

LOOK_S = 0.5  # how long it is watched before a row
BUSY_PERCENT = 10  # of all cores: more than this spoils a figure
IMAGE_BYTES = 24 << 30  # sparse: it takes what is written


def described():
    """What it is, in one line."""
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")),
            platform.machine(),
        )
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python "
        f"{platform.python_version()}"
    )


def cpu_seconds():
    """What the whole machine has spent at work, its own and its guests' time apart."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq = (
            int(word) for word in file.readline().split()[1:8]
        )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def busy_percent():
    """How busy all cores are while the bench does nothing."""
    before, begun = cpu_seconds(), time.monotonic()
    time.sleep(LOOK_S)
    took = time.monotonic() - begun
    return 100 * (cpu_seconds() - before) / took / os.cpu_count()


@contextlib.contextmanager
def journaled(parent):
    """
    A directory on an ext4 with a journal, made for this run of the bench where we may mount one;
    otherwise the parent directory.

    The mount is seen by this process and its children alone, and goes with them.

    Yields:
        tuple: (path of the directory, what it is, for people).
    """
    tools = shutil.which("mkfs.ext4") and shutil.which("mount") and shutil.which("unshare")
    if os.geteuid() != 0 or not tools:
        yield parent, f"{parent}, {kind_of(parent)}: an ext4 of its own needs root and mkfs.ext4"
        return
    holder = tempfile.mkdtemp(prefix="chaperone-bench-disk-", dir=parent)
    image, point = os.path.join(holder, "image"), os.path.join(holder, "mounted")
    os.mkdir(point)
    mounted = False
    try:
        with open(image, "wb") as file:
            file.truncate(IMAGE_BYTES)
        done = [
            subprocess.run(words, capture_output=True, text=True).returncode == 0
            for words in (
                ["mkfs.ext4", "-q", "-F", "-O", "has_journal", "-E", "lazy_itable_init=0", image],
                ["mount", "-o", "loop", image, point],
            )
        ]
        mounted = all(done)
        if mounted:
            os.chmod(holder, 0o711)  # a remote row logs in as a plain user
            yield point, "an ext4 with a journal, made for this run"
        else:
            yield parent, f"{parent}, {kind_of(parent)}: no image could be mounted"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", point], check=False)
        shutil.rmtree(holder, ignore_errors=True)


def in_own_mounts():
    """
    Run this program again in mounts of its own, so that its filesystem goes with it; returns where
    that is so, or can't be.
    """
    if os.geteuid() != 0 or not shutil.which("unshare") or "CHAPERONE_BENCH_MOUNTS" in os.environ:
        return
    words = ["unshare", "--mount", "--propagation", "private"]
    if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
        os.environ["CHAPERONE_BENCH_MOUNTS"] = "own"
        again = [sys.executable, "-m", "spool_tests.bench", *sys.argv[1:]]
        os.execvp(words[0], [*words, *again])


def kind_of(path):
    """The kind of the filesystem that has a path: `ext4`, `tmpfs`."""
    with open("/proc/self/mounts") as file:
        mounts = [line.split()[1:3] for line in file]
    here = os.path.realpath(path)
    fitting = [
        (len(point), kind)
        for point, kind in mounts
        if here == point or here.startswith(point.rstrip("/") + "/")
    ]
    return max(fitting)[1] if fitting else "unknown"
