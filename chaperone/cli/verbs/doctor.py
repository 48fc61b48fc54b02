"""
The verb that tries what chaperone needs of this machine, the spool and a far side: doctor.

Knows: limits, and what a run shows of a host.  Must not know: how a run is held.
A check returns whether it fits (None: only worth knowing), what was found, and how to mend it.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import time

from ...cpython import signal
from ...errors import ChaperoneError, SpoolError
from ...program.fds import owned
from ...spool import format
from ..command import place as host_place
from ..common import add_site_packages
from ..terminal import escaped
from ..verb import SPOOL, Argument, UsageError, read_spec, spool_path, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ...api import Run, Spool
    from ...model.status import Status
    from ..terminal import Terminal
    from ..verb import Given

    SpecDict = dict[str, Any]
    Answer = tuple[bool | None, str, str | None]

FREE_BYTES = 1 << 30  # below this the next busy run may fill the disk, and lose output
FREE_FILES = 10_000  # a run is 5 files and a directory
OPEN_FILES = 1_024  # a chaperone holds some 20 fds; a follower 3 for each live run
PATIENCE_S = 60  # for a run to end: longer than a far side is tried to be reached
GUARD_S = 5  # it takes 20 ms
LOOK_AGAIN_S = 0.01
TELLS_S = 1  # inotify takes 0.1 ms
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
LOCAL = "put the spool on a local filesystem"


class Finding:
    """
    One thing that was looked at.

    Attributes:
        name (str): What: `spool`, `open files`, `far side` ...
        fits (bool): True if chaperone can rely on it; None if it is only worth knowing.
        says (str): What was found, in one sentence.
        remedy (str): How to mend it; None where nothing is to be mended.
    """

    def __init__(self, name: str, answer: Answer) -> None:
        self.name = name
        self.fits, self.says, self.remedy = answer
        if self.fits:
            self.remedy = None


@verb(
    "try what runs need, here and on a far side, and say each remedy",
    Argument(
        "host",
        metavar="[USER@]HOST[:PORT]",
        nargs="?",
        help="a far side to try too, as ssh knows it",
    ),
    Argument("--spec", metavar="SPEC", help="try the far side of this spec, by its hops"),
    SPOOL,
)
def doctor(given: Given, terminal: Terminal) -> int:
    if given.host is not None and given.spec is not None:
        wrong = "it takes HOST or --spec SPEC, not both"
        raise UsageError(f"unable to understand 'chaperone doctor': {wrong}")
    add_site_packages(terminal)
    code = os.EX_OK
    for finding in examined(os.path.abspath(spool_path(given)), _far_spec(given)):
        mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.fits]
        if finding.fits is False:
            code = os.EX_CONFIG
        if terminal.may_colour() and finding.fits is not None:
            mark = f"\x1b[{32 if finding.fits else 31}m{mark}\x1b[0m"
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        terminal.text(f"{mark}{escaped(f'{finding.name}: {finding.says}{remedy}')}\n")
    return code


def _far_spec(given: Given) -> SpecDict | None:
    """What a spec says of its far side; None where none is meant."""
    if given.host is not None:
        return {"remote": {**host_place(given.host, "HOST"), "options": {"ConnectTimeout": 10}}}
    if given.spec is None:
        return None
    from ...hold import begin

    spec = begin.canonical_spec(given.spec, read_spec(given.spec), os.getcwd())
    if spec["remote"] is None and spec["on_disconnect"] == "kill":
        raise UsageError(f"unable to try the far side of {given.spec!r}: it has no 'remote'")
    names = ("remote", "on_disconnect", "lease", "timeouts")
    far = {name: spec[name] for name in names}
    if spec["remote"] is not None:  # no shared connection is to stay behind
        far["remote"] = {**spec["remote"], "share": False}
    return far


def examined(spool_path: str, far: SpecDict | None = None) -> Iterator[Finding]:
    """
    Try everything, one finding after the other, because some take seconds.

    Args:
        spool_path (str): Where there is none yet, the directory that it would be made in is
            examined.
        far (dict): Of a spec, what leads to a far side to try too; None for none.
    """
    yield (spool := Finding("spool", _spool(spool_path)))
    place = spool_path if spool.fits else os.path.dirname(spool_path)
    if spool.fits is not False:
        with owned(os.open(place, DIRECTORY)) as fd:
            for name, check in OF_THE_SPOOL.items():
                if (answer := check(fd)) is not None:
                    yield Finding(name, answer)
    for name, check_here in OF_THIS_MACHINE.items():
        yield Finding(name, check_here())
    if spool.fits is not False:
        for name, answer in _tried(place, far):
            yield Finding(name, answer)


# -- the spool


def _spool(path: str) -> Answer:
    try:
        os.close(format.open_spool(path))
        return True, "it is ours, and no other user can write to it", None
    except SpoolError as error:
        if os.path.lexists(path):
            return False, str(error), "run as its owner, or make a spool of your own: chmod 700"
    parent = os.path.dirname(path)
    if os.access(parent, os.W_OK | os.X_OK):
        return None, "it is not there yet; the first run makes it", None
    says = f"it is not there, and can't be made in {parent!r}"
    return False, says, "name a directory of yours by --spool"


def _filesystem(fd: int) -> Answer:
    from ...follow import descriptors

    silent = descriptors.silent_filesystem(fd)
    if silent is None:
        return True, "its type is none that other hosts write to", None
    risk = "inotify may be silent, and a lock may be lost"
    says = f"it is {silent}, which other hosts can write to: {risk}"
    return False, says, f"{LOCAL}; followers poll on this one, and say so"


def _inotify(fd: int) -> Answer:
    """Whether it works: that a directory is opened is an event, and changes nothing."""
    from inotify_simple import INotify, flags

    try:
        with INotify() as watch:
            watch.add_watch(f"/proc/self/fd/{fd}", flags.OPEN)
            os.close(os.open(".", DIRECTORY, dir_fd=fd))
            if watch.read(timeout=1_000 * TELLS_S):
                return True, "it reports what happens in the spool", None
    except OSError as error:
        if error.errno == errno.ENOENT:
            says = "there is no /proc/self/fd to name it by: followers poll"
            return False, says, "mount a /proc of this pid namespace"
        limits = "fs.inotify.max_user_instances and max_user_watches"
        remedy = f"end processes that use many, or raise {limits}"
        return False, f"unable to watch the spool: {error.strerror}", remedy
    says = "it did not report a change in the spool: followers would miss all changes"
    return False, says, f"{LOCAL}, or have followers poll (poll_s)"


def _free_room(fd: int) -> Answer:
    found = os.fstatvfs(fd)
    free = found.f_bavail * found.f_frsize
    lost = "output that finds none is dropped and counted, outcomes are kept"
    remedy = f"make room, or let chaperone gc do it: {lost}"
    return free >= FREE_BYTES, f"{free / 1e9:.1f} GB", remedy


def _free_inodes(fd: int) -> Answer | None:
    found = os.fstatvfs(fd)
    if not found.f_files:  # btrfs has no such number
        return None
    return found.f_favail >= FREE_FILES, f"{found.f_favail:,}", "delete old runs: chaperone gc"


def _shared_connections(fd: int) -> Answer | None:
    from ...farside.connect import masters

    found = masters.listening(fd)
    up = [name for name, listens in found.items() if listens]
    dead = f"; {len(found) - len(up)} of an ended one" if len(up) < len(found) else ""
    return (None, f"up in .connect: {', '.join(up) or 'none'}{dead}", None) if found else None


OF_THE_SPOOL = {
    "filesystem": _filesystem,
    "inotify": _inotify,
    "free room": _free_room,
    "free inodes": _free_inodes,
    "shared connections": _shared_connections,
}


# -- this machine


def _limit(name: str, least: int, why: str) -> tuple[str, Callable[[], Answer]]:
    def check() -> Answer:
        try:
            with open(f"/proc/sys/{name.replace('.', '/')}", encoding="ascii") as file:
                value = int(file.read())
        except (OSError, ValueError):
            return None, "it can't be read here", None
        return value >= least, f"{value:,}: {why}", f"sysctl {name}={8 * least}"

    return name, check


def _open_files() -> Answer:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    says = f"{'unlimited' if unlimited else f'{soft:,}'}: a follower takes 3 for each live run"
    return unlimited or soft >= OPEN_FILES, says, "ulimit -n, or LimitNOFILE= in a unit"


OF_THIS_MACHINE = dict(
    (
        _limit("fs.inotify.max_user_watches", 8_192, "each live run that is followed takes one"),
        _limit("fs.inotify.max_user_instances", 8, "each follower takes one"),
        ("open files", _open_files),
    )
)


# -- runs that are tried, in a spool of their own


def _tried(place: str, far: SpecDict | None) -> Iterator[tuple[str, Answer]]:
    import tempfile

    from ...api import Spool

    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as path:
        for name, trial in (("run", _stopped), ("guard", _guarded)):
            try:
                yield name, trial(Spool(path))
            except ChaperoneError as error:
                yield name, (False, str(error), LOCAL)
        try:
            if far is not None:
                yield from _far_side(Spool(path), far)
        except ChaperoneError as error:
            yield "far side", (False, str(error), REMEDIES["name"])


def _until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> bool:
    """
    Wait until it is true; whether it came to be. By looking: whether the kernel wakes a follower
    is another finding.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


def _ended(run: Run) -> Status:
    """How a run ended; one that does not end is killed."""
    if not _until(lambda: run.status().is_final()):
        run.kill(wait=False, by="doctor")
        _until(lambda: run.status().is_final())
    return run.status()


def _stopped(spool: Spool) -> Answer:
    run = spool.start({"program": {"argv": ["sleep", "1000"]}})
    if run.status().state == "lost":
        return False, "flock does not exclude: a live run looks lost", LOCAL
    run.stop(wait=False, by="doctor")
    status = _ended(run)
    if status.signal == "SIGTERM":
        return True, "one was started and stopped", None
    how = f"exit code {status.return_code}" if status.signal is None else status.signal
    why = status.exception["message"] if status.exception else f"want SIGTERM, got {how}"
    return False, f"unable to stop a run: {why}", "see the message"


LEAVES = """import os, time
if os.fork(): time.sleep(1000)
os.setsid()
os.write(1, b"%d\\n" % os.getpid())
time.sleep(1000)"""


def _guarded(spool: Spool) -> Answer:
    """What a killed chaperone leaves outside of its program's group."""
    run = spool.start({"program": {"argv": [sys.executable, "-I", "-S", "-c", LEAVES]}})
    if not _until(lambda: run.read() or run.status().is_final()) or not run.read():
        return False, f"a program that was started wrote nothing: {_ended(run).state}", LOCAL
    left = int(run.read())
    os.kill(run.status().chaperone_pid or left, signal.SIGKILL)
    if not _until(lambda: not _lives(left), GUARD_S):
        os.kill(left, signal.SIGKILL)
        says = "a chaperone was killed, and what had left its program's process group ran on"
        return False, says, "mount a /proc of this pid namespace, which lists the children"
    return True, "a chaperone was killed, and nothing was left of its run", None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- a far side

# What a log, or an error, says of a far side, and the remedy.
REMEDIES = {
    "name": "name it as for ssh: a host, or one of ~/.ssh/config",
    "connect": "see what ssh -v says, with the same options",
    "auth": "log in there once by the same hops, without a password",
    "host-key": "log in there once by ssh, and accept its key",
    "usage": "see remote.options in the spec, and your ssh configuration",
    "far-side": "let startup files there neither read nor wait, and see that there is a /bin/sh",
    "spawn": "install what is missing, here or there",
}
TRACKING: dict[str | None, Answer] = {
    "kernel": (True, "the kernel hands what leaves the program's group to the far side", None),
    "cookie": (
        False,
        "what leaves the program's group is found by its environment alone",
        "install perl or python3 there, in /usr/bin; let startup files leave no process",
    ),
    "group": (
        False,
        "what leaves the program's group is not found",
        "mount a /proc there, and install perl or python3 in /usr/bin",
    ),
}
NOISE, LACKS = "said before the program's own output: ", "the far side has no "


def _far_side(spool: Spool, spec: SpecDict) -> Iterator[tuple[str, Answer]]:
    """By a program that kills itself there: its status shows whether that differs from an exit."""
    program = {"argv": ["/bin/sh", "-c", "kill -KILL $$"]}
    run = spool.start({**spec, "program": program})
    status = _ended(run)
    if status.exception is not None:
        remedy = REMEDIES.get(str(status.exception["stage"]), "see the message")
        yield "far side", (False, str(status.exception["message"]), remedy)
        return
    yield "far side", (True, "a run was started there, and its end was reported", None)
    for logged in run.read("log").decode("utf-8", "replace").splitlines():
        line = logged.partition(" ")[2]
        if line.startswith(NOISE):
            says = "startup files there print; it goes to a run's log, not to its output"
            yield "login noise", (None, says, "let them print in interactive shells only")
        elif line.startswith(LACKS + "setsid"):
            yield "setsid", (False, line, "install util-linux there")
    if status.tracking not in TRACKING:  # nothing of ours runs there
        return
    if status.signal != "SIGKILL":
        says = f"a killed program is reported as one that exited with {status.return_code}"
        yield "awk", (False, says, "install mawk or gawk there")
    yield "tracking", TRACKING[status.tracking]
