"""
The row about what a run costs in all: the CPU time of every process that it makes, on both sides,
by the counter of a cgroup.
"""

import contextlib
import os
import tempfile
import time

from chaperone.launch import start as starting

from . import lab as labs
from .table import Row, interleaved

V1 = "/sys/fs/cgroup/cpuacct"
V2 = "/sys/fs/cgroup"
RUNS = 20  # at a time: the counter of one run is too near to its own noise


class Counter:
    """
    A cgroup that counts the CPU time of this process and of all that it starts from now on.

    Raises:
        OSError: If none can be made.
    """

    def __init__(self):
        is_v1 = os.path.exists(f"{V1}/cpuacct.usage")
        top = V1 if is_v1 else V2
        self.path = tempfile.mkdtemp(prefix="chaperone-bench-", dir=top)
        self.file = f"{self.path}/{'cpuacct.usage' if is_v1 else 'cpu.stat'}"
        self._top, self._is_v1 = top, is_v1
        try:
            self._enter(self.path)
            self.seconds()
        except (OSError, StopIteration) as error:
            os.rmdir(self.path)
            raise OSError("no counter of CPU time") from error

    def seconds(self):
        with open(self.file) as file:
            if self._is_v1:
                return int(file.read()) / 1e9
            return next(int(line.split()[1]) / 1e6 for line in file if "usage_usec" in line)

    def close(self):
        self._enter(self._top)
        with contextlib.suppress(OSError, TimeoutError):  # a master may take a moment to end
            labs.until(self._is_removed, timeout=5, pause=0.05)

    def _enter(self, path):
        with open(f"{path}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))

    def _is_removed(self):
        try:
            os.rmdir(self.path)
        except OSError:
            return False
        return True


def cpu(lab, rounds):
    """CPU time of all processes of a run of `true`, from its start to its end."""
    row = Row("cpu", "CPU time of a run of `true`, all processes of it")
    try:
        counter = Counter()
    except OSError:
        row.note("no cgroup counts CPU time here, or it needs root")
        return row
    lab.at_end(counter.close)
    programs = ["/bin/true"]
    cold, warm = lab.new("spool"), lab.new("spool")
    variants = {"chaperone, cold": lambda: run_all(lab, cold, False, programs)}
    os.mkdir(warm, 0o700)
    lab.launcher(warm)
    variants["chaperone, warm"] = lambda: run_all(lab, warm, True, programs)
    if labs.has("conmon"):
        conmon = labs.Conmon(lab)

        def by_conmon():
            for pid, exit_file in [conmon.start(programs) for _ in range(RUNS)]:
                os.waitpid(pid, 0)
                labs.until(lambda exit_file=exit_file: os.path.exists(exit_file))

        variants[conmon.label] = by_conmon
    if labs.has("systemd-run") and os.path.isdir("/run/systemd/system"):
        words = ["systemd-run", "--quiet", "--wait", *programs]
        variants["systemd-run --wait"] = lambda: [lab.ended(words) for _ in range(RUNS)]
    else:
        row.note("systemd does not run here: nothing to compare with systemd-run")
    sshd, user = lab.sshd()
    if sshd is not None:
        argv = [*sshd.argv(user), "true"]
        variants["ssh host true"] = lambda: [lab.ended(argv) for _ in range(RUNS)]
        for name, shared in (("over ssh", False), ("over ssh, shared", True)):
            spool = lab.new("spool")
            lab.launcher(spool)
            remote = {**sshd.remote(user), "share": shared}
            variants[f"chaperone, warm, {name}"] = lambda spool=spool, remote=remote: run_all(
                lab, spool, True, ["true"], remote
            )

    def counted(act):
        def measure():
            before = counter.seconds()
            act()
            time.sleep(0.1)  # what is still being reaped
            return (counter.seconds() - before) / RUNS

        return measure

    measured = {label: counted(act) for label, act in variants.items()}
    row.figures_of(interleaved(rounds or 5, measured), "ms", 1e3)
    return row


def run_all(lab, spool, warm, argv, remote=None):
    """Some runs, one after the other, each to its end."""
    spec = {"program": {"argv": argv, "cwd": "/"}}
    if remote is not None:
        spec["remote"] = remote
    for _ in range(RUNS):
        run_id = starting.start(spool, spec, warm=warm, env=lab.env)
        final = os.path.join(spool, run_id, "status.json")
        labs.until(lambda final=final: os.path.exists(final))
        assert labs.status(spool, run_id)["return_code"] == 0, labs.status(spool, run_id)
