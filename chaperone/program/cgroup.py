"""
How many processes the kernel's OOM killer has killed in the cgroup of this process.

Knows: /proc/self/cgroup, the files of cgroup v1 and v2.  Must not know: runs, programs.
"""

from __future__ import annotations

from .fds import contents, exists

ROOT = "/sys/fs/cgroup"


def counter() -> str | None:
    """
    The file that counts the OOM kills of our memory cgroup; None if there is none.

    In v2 it belongs to the nearest cgroup above us that has the memory controller. A container may
    show a cgroup as the root of its mount; then /proc/self/mountinfo says where it is.
    Source: cgroups(7), proc(5).
    """
    try:
        lines = _lines("/proc/self/cgroup")
    except OSError:
        return None
    found = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    v1 = next((path for _, kinds, path in found if "memory" in kinds.split(",")), None)
    if v1 is not None:
        return _first(f"{ROOT}/memory", v1, "memory.oom_control", False)
    v2 = next((path for number, _, path in found if number == "0"), None)
    return None if v2 is None else _first(ROOT, v2, "memory.events", True)


def _first(mount: str, path: str, name: str, climb: bool) -> str | None:
    if ".." in path.split("/"):  # another namespace's
        return None
    if not exists(mount + path):
        path = _path_below(mount, path) or path
        if not exists(mount + path):
            return None
    path = path.rstrip("/")
    while not exists(f"{mount}{path}/{name}"):
        if not climb or not path:
            return None
        path = path.rpartition("/")[0]
    return f"{mount}{path}/{name}"


def _path_below(mount: str, path: str) -> str | None:
    """The path of a cgroup below a mount that shows only a part of the hierarchy."""
    try:
        mounts = [line.split(" ") for line in _lines("/proc/self/mountinfo")]
    except OSError:
        return None
    for fields in mounts:
        if len(fields) > 4 and fields[4] == mount and f"{path}/".startswith(f"{fields[3]}/"):
            return path[len(fields[3]) :] or "/"
    return None


def oom_kills(path: str | None) -> int | None:
    """How many OOM kills the file counts; None if it can't be read."""
    try:
        lines = _lines(path or "")
    except OSError:
        return None
    counts = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(counts[0]) if counts and counts[0].isdigit() else None


def _lines(path: str) -> list[str]:
    return contents(path).decode("utf-8", "surrogateescape").splitlines()
