"""
Killing a process before and after each system call that changes the disk or a process: the calls
are found by strace, never listed by hand.

Knows: strace.  Must not know: what a chaperone does between two calls.
"""

import collections
import os
import re
import signal
import subprocess
import sys

from spool_tests.support.places import ROOT
from spool_tests.support.waiting import until

# What only looks, or changes nothing but this process's own memory. A call that is not here is a
# crash point.
HARMLESS = set(
    """
    access arch_prctl brk clock_gettime clock_nanosleep close_range epoll_wait exit_group
    faccessat2 fadvise64 fstat futex getcwd getdents64 getegid geteuid getgid getpeername
    getpgid getpgrp getpid getppid getrandom getresgid getresuid getrlimit getsid getsockname
    getsockopt gettid getuid ioctl lseek madvise mmap mprotect mremap munmap newfstatat
    open_by_handle_at poll pread64 prlimit64 readlink readlinkat restart_syscall rseq
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sched_getaffinity
    set_robust_list set_tid_address sigaltstack statfs statx sysinfo uname
    """.split()
)
# `chaperone`, whose guard's child stops as soon as it is forked.
STOPPED = [
    sys.executable,
    "-I",
    "-S",
    "-c",
    f"""if True:
    import os, signal, sys
    sys.path.append({ROOT!r})
    from chaperone.hold import guarding
    fork = guarding.fork

    def fork_and_stop(*arguments, **keywords):
        made = fork(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGSTOP)
        return made

    guarding.fork = fork_and_stop
    from chaperone.cli import main
    os._exit(main.main())""",
]
CALL = re.compile(r"^([a-z_0-9]+)\((.*)")
KILLED = f"+++ killed by {signal.SIGKILL.name} +++"


class Tracer:
    """
    strace of one process, not of its children: it records the calls, or kills as one of them is
    entered.

    Args:
        directory (pathlib.Path): For strace's own file.
        point (tuple): (system call, its number among the calls of that name, from 1); None to
            record.
        options: Of strace, further ones.
    """

    def __init__(self, directory, point=None, options=()):
        self._file = directory / "trace"
        self._options = ["-q", "-y", "-o", str(self._file), *options]
        if point is not None:
            self._options += [
                "-e",
                f"trace={point[0]},poll,restart_syscall",
                "-e",
                f"inject={point[0]}:signal=SIGKILL:when={point[1]}",
            ]

    def run(self, argv, **keywords):
        """Run a command to its end."""
        keywords = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "timeout": 120,
            **keywords,
        }
        return subprocess.run(["strace", *self._options, *argv], check=False, **keywords).returncode

    def run_below_guard(self, words, **keywords):
        """
        Run `chaperone WORDS...` to its end; its chaperone is traced, and not its guard.

        Args:
            keywords: As of subprocess.Popen; `stdin` a file, no pipe.
        Returns:
            int: The guard's exit code.
        """
        null = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        guard = subprocess.Popen([*STOPPED, *words], **{**null, **keywords})
        chaperone = until(lambda: stopped_child(guard.pid))
        strace = self.attach(chaperone)
        os.kill(chaperone, signal.SIGCONT)
        strace.wait(120)
        return guard.wait(120)

    def begin(self, argv, **keywords):
        """Start a command, and return strace's process (subprocess.Popen)."""
        return subprocess.Popen(
            ["strace", *self._options, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **keywords,
        )

    def attach(self, pid):
        """
        Trace a process that runs, from now on; it must be waiting for something that comes later.
        """
        process = self.begin(["-p", str(pid)])
        # Its first line is the call it sits in: from then on nothing goes unseen.
        until(
            lambda: (
                process.poll() is not None
                or (tracer_of(pid) and self._file.exists() and self._file.stat().st_size)
            )
        )
        return process

    def has_killed(self):
        """Whether it came to the point."""
        return self._file.exists() and KILLED in self._file.read_text(errors="replace")

    def points(self, path):
        """
        The crash points of what was recorded: before and after each call that changes something.

        After a call is before whatever comes next: in between a process does nothing that others
            could see.

        Args:
            path (str): What comes before this path is named, or a process is made, is the
                interpreter's own start, and leaves nothing.
        Returns:
            dict: (system call, number) to whether such a call is before or after which call, in the
                order in which they came.
        """
        counts, found, begun, last = collections.Counter(), {}, False, None
        for line in self._file.read_text(errors="replace").splitlines():
            if not (call := CALL.match(line)):
                continue
            name, arguments = call.groups()
            counts[name] += 1
            point = (name, counts[name])
            begun = (
                begun
                or (path in arguments and name != "execve")
                or "clone" in name
                or "fork" in name
            )
            if last is not None:
                found[point] = f"after {last[0]} {last[1]}"
                last = None
            if begun and name not in HARMLESS and not only_looks(name, arguments):
                found[point] = f"before {name} {counts[name]}"
                last = point
        return found


def only_looks(name, arguments):
    """
    Whether this call leaves no trace: opening to read, reading what stays there (not a pipe), a
    look into /proc.
    """
    if name in ("open", "openat"):
        return "O_CREAT" not in arguments
    if name == "close":
        return "</proc/" in arguments
    if name == "fcntl":
        return "F_SETLK" not in arguments and "F_SETPIPE" not in arguments
    return name == "read" and "<pipe:" not in arguments and "<socket:" not in arguments


def stopped_child(pid):
    """The first child of a process, once it is stopped; 0 until then."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    for child in children:
        with open(f"/proc/{child}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] in "Tt":
                return int(child)
    return 0


def tracer_of(pid):
    """The pid of who traces a process; 0 if nobody does, or it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return int(next(line for line in file if line.startswith("TracerPid:")).split()[1])
    except (OSError, StopIteration):
        return 0
