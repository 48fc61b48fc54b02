"""
Processes that a test started, found by a token in their environment, and its open fds.
"""

import contextlib
import os
import time

# Children that outlive a test on purpose: the pids of servers which serve many.
SERVERS = set()


def processes_with(*tokens):
    """
    Processes, but not this one, that carry one of `tokens` (bytes) in their environment or command:
    {pid: command}.
    """
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            command, environment = _command_and_environment(name)
            carried = environment + b"\0\0" + command
            if any(token in carried for token in tokens) and not _has_ended(name):
                found[int(name)] = command.replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone, or not ours to look at
            continue
    return found


def _command_and_environment(pid):
    """
    Those of a process (bytes). In the middle of an exec both are empty: it is looked at until they
    are not, or it would be missed.
    """
    for look in range(10_000):
        command, environment = _content(f"/proc/{pid}/cmdline"), _content(f"/proc/{pid}/environ")
        # An exec fills the environment last. One that stays empty is real.
        if environment or command and look:
            break
        # OSError: what is about to end and the kernel's own have no program and stay empty.
        os.readlink(f"/proc/{pid}/exe")
        time.sleep(0.001)
    return command, environment


def _content(path):
    """A file of /proc as bytes; tests look at each process so often that a file object costs."""
    fd = os.open(path, os.O_RDONLY)
    try:
        content = b""
        while piece := os.read(fd, 65_536):
            content += piece
        return content
    finally:
        os.close(fd)


def _has_ended(pid):
    return _content(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0] in b"ZX"


def has_taken(pid, number):
    """Whether a process has taken a signal that was sent to it, and done what it does then."""
    lines = _content(f"/proc/{pid}/status").decode().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines)
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    # Its state is read after the signals: a process that sleeps then has nothing left to do.
    state = _content(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0]
    return not pending & 1 << number - 1 and state == b"S"


def ssh_masters(token):
    """Of these, the connections of ssh that several runs share."""
    return {
        pid: command
        for pid, command in processes_with(token).items()
        if " ControlMaster=yes " in command and " -N -f " in command
    }


def open_fds(path):
    """
    This process's fds that lie in `path`, and those that belong to no path at all: ["3 -> ..."].
    """
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith((path, "anon_inode:")):
            found.append(f"{fd} -> {target}")
    return sorted(found)


def instances():
    """The inotify instances of this process: for each the watches that the kernel has of it."""
    found = []
    for line in open_fds("anon_inode:"):
        number, _, name = line.partition(" -> ")
        if name == "anon_inode:inotify":
            with open(f"/proc/self/fdinfo/{number}") as file:
                found.append(file.read().count("inotify wd:"))
    return found


def children():
    """This process's children, ended ones that were not waited for among them: {pid: command}."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there are none
        return {}
    names = []
    with contextlib.suppress(FileNotFoundError):  # a kernel without these files
        for thread in os.listdir("/proc/self/task"):
            names += _content(f"/proc/self/task/{thread}/children").decode().split()
    found = {}
    for name in names or filter(str.isdigit, os.listdir("/proc")):
        try:
            before, _, after = _content(f"/proc/{name}/stat").rpartition(b") ")
            command = _content(f"/proc/{name}/cmdline").replace(b"\0", b" ")
        except OSError:  # gone
            continue
        if int(after.split()[1]) == os.getpid():
            found[int(name)] = (command or before.partition(b"(")[2]).decode(errors="replace")
    return found


def reap_children():
    """
    Take up the children that a test did not wait for (a chaperone started in the background, say).
    """
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def threads_of_user():
    """How many threads this user has, as RLIMIT_NPROC counts them."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count
