"""
Killing a chaperone before each system call that changes the disk or a process: the calls are found by strace, never listed by hand.

Knows: strace.  Must not know: what a chaperone does between two calls.
"""

import collections
import os
import re
import subprocess

# What only looks, or changes nothing but this process's own memory. A call that is not here is a crash point.
HARMLESS = set(
    """access arch_prctl brk clock_gettime clock_nanosleep close_range epoll_wait exit_group faccessat2 fadvise64 fcntl fstat futex getcwd getdents64
    getegid geteuid getgid getpgid getpgrp getpid getppid getrandom getresgid getresuid getrlimit getsid gettid getuid ioctl lseek madvise mmap
    mprotect mremap munmap newfstatat open_by_handle_at poll pread64 prlimit64 readlink readlinkat restart_syscall rseq rt_sigaction rt_sigprocmask
    rt_sigreturn sched_getaffinity set_robust_list set_tid_address sigaltstack statfs statx sysinfo uname""".split()
)
CALL = re.compile(r"^(?:\d+ +)?([a-z_0-9]+)\((.*)")
# The chaperone's first lasting act: everything before is the interpreter's own start, and leaves nothing.
FIRST = ("mkdir", "mkdirat")


def points(command, cwd, **keywords):
    """
    The crash points of a command that runs to its end.

    Returns:
        list: (system call, its number among the calls of that name, from 1), in the order in which they came.
    """
    trace = os.path.join(cwd, "trace")
    subprocess.run(["strace", "-qq", "-o", trace, *command], cwd=cwd, check=True, timeout=60, stdout=subprocess.DEVNULL, **keywords)
    counts, found, begun = collections.Counter(), [], False
    with open(trace) as file:
        for line in file:
            if not (call := CALL.match(line)):
                continue
            name, arguments = call.groups()
            counts[name] += 1
            begun = begun or name in FIRST
            if begun and name not in HARMLESS and not reads_only(name, arguments):
                found.append((name, counts[name]))
    os.unlink(trace)
    return found


def reads_only(name, arguments):
    """Whether this call leaves no trace: opening to read, reading a regular file (but not emptying a pipe)."""
    if name in ("open", "openat"):
        return "O_CREAT" not in arguments
    return name == "read" or (name == "flock" and "LOCK_UN" in arguments)


def killed_at(point, command, cwd, **keywords):
    """Run a command and SIGKILL it as it enters a system call; whether it came to that."""
    name, number = point
    inject = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={number}"]
    code = subprocess.run([*inject, *command], cwd=cwd, check=False, timeout=60, stdout=subprocess.DEVNULL, **keywords).returncode
    return code in (-9, 137)
