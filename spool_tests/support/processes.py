"""
Processes that a test started, found by a token in their environment, and its open fds.
"""

import os

# Children that outlive a test on purpose: the pids of servers which serve many.
SERVERS = set()


def processes_with(token):
    """
    Processes, but not this one, that carry `token` (bytes) in their environment, command or working
    directory: {pid: command}.
    """
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with (
                open(f"/proc/{name}/environ", "rb") as environ,
                open(f"/proc/{name}/cmdline", "rb") as cmdline,
                open(f"/proc/{name}/stat", "rb") as stat,
            ):
                command, state = cmdline.read(), stat.read().rpartition(b")")[2].split()[0]
                if state not in b"ZX" and (token in environ.read() or token in command):
                    found[int(name)] = command.replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone, or not ours to look at
            continue
    return found


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
    """This process's children, ended ones that nobody has waited for among them: {pid: command}."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (
        ChildProcessError
    ):  # the ordinary case, and 1,000 times cheaper than a look at all processes
        return {}
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with (
                open(f"/proc/{name}/stat", "rb") as stat,
                open(f"/proc/{name}/cmdline", "rb") as cmdline,
            ):
                before, _, after = stat.read().rpartition(b") ")
                command = cmdline.read().replace(b"\0", b" ")
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
