"""
Memory cgroups: real ones with a limit, and trees of files that look like others.

Knows: cgroups(7).  Must not know: chaperone.
"""

import contextlib
import os

from spool_tests.support.guarded import text_of
from spool_tests.support.waiting import absent

# Of a process: its /proc/self/cgroup, its mountinfo, and the file that counts its OOM kills, below
# /sys/fs/cgroup; None where no file does.
V1_FILE, V2_FILE = "memory/job/1/memory.oom_control", "job/1/memory.events"
FAKES = {
    "v1": ("3:cpu:/x\n4:memory:/job/1\n0::/\n", "", V1_FILE),
    "v1 with others": ("4:cpu,memory,io:/job/1\n", "", V1_FILE),
    "v1 shown in part": (
        "4:memory:/top/memory/job/1\n",
        "35 31 0:32 /top/memory {root}/memory rw - cgroup cgroup rw\n",
        V1_FILE,
    ),
    "v2": ("0::/job/1\n", "", V2_FILE),
    "v2 without the controller": ("0::/job/1/inner/most\n", "", V2_FILE),
    "v2 shown in part": (
        "0::/top/job/1\n",
        "40 31 0:38 / /elsewhere rw - cgroup2 cgroup2 rw\n"
        "41 31 0:38 /top {root} rw - cgroup2 cgroup2 rw\n",
        V2_FILE,
    ),
    "v2 shown elsewhere": ("0::/top/job/1\n", "41 31 0:38 /other {root} rw - cgroup2 x rw\n", None),
    "v2 of another namespace": ("0::/../job/1\n", "", None),
    "none": ("", "", None),
}


def fake(directory, kind):
    """
    Make the files of a kind of FAKES.

    Returns:
        tuple: Which path replaces which, {path: path}; the file that counts, or None.
    """
    root = directory / "cgroup"
    processes_cgroup, mounts, name = FAKES[kind]
    (directory / "self").write_text(processes_cgroup)
    (directory / "mountinfo").write_text(mounts.format(root=root))
    (root / "memory/job/1").mkdir(parents=True)
    (root / "job/1/inner/most").mkdir(parents=True)
    for other in ("memory.events", "memory/memory.oom_control", "memory/job/memory.oom_control"):
        (root / other).write_text("oom_kill 7\n")
    if name is not None:
        (root / name).write_text("low 0\noom 3\noom_kill_disable 0\noom_kill 3\n")
    places = {
        "/proc/self/cgroup": str(directory / "self"),
        "/proc/self/mountinfo": str(directory / "mountinfo"),
        "/sys/fs/cgroup": str(root),
    }
    return places, root / name if name is not None else None


# Python that the kernel kills in such a cgroup, and before anything else there.
EATS = """with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
room = []
while True:
    room.append(bytearray(1 << 20))
"""


def inside(group):
    """
    The words before an argv that is to run in a cgroup, as root.

    The kernel spares what they start, but for `EATS`: while a killed process is slow to give back
    its memory, on a busy machine, the next one would be killed too.
    """
    text = 'echo -1000 >/proc/self/oom_score_adj; echo $$ >"$0/cgroup.procs"; exec "$@"'
    return ["sh", "-c", text, group]


def memory_cgroup(name):
    """A cgroup of 60 MB below our own, v1 or v2."""
    lines = [line.split(":", 2) for line in text_of("/proc/self/cgroup").splitlines()]
    v1 = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    own = next(path for number, _, path in lines if number == "0" or v1) if v1 is None else v1
    top = "/sys/fs/cgroup" if v1 is None else "/sys/fs/cgroup/memory"
    group = f"{top}{own.rstrip('/')}/chaperone-{os.getpid()}-{name}"
    limits = ["memory.max", "memory.swap.max"] if v1 is None else ["memory.limit_in_bytes"]
    try:
        os.mkdir(group)
        for limit in limits:
            with open(f"{group}/{limit}", "w") as file:
                file.write("60000000")
    except OSError:
        with contextlib.suppress(OSError):
            os.rmdir(group)
        absent("a memory cgroup of our own")
    return group
