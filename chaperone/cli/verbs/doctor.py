"""
The verb that says what this machine, the spool and a far side have of what chaperone needs: doctor.

Knows: the limits and programs that the others rely on.  Must not know: runs.
A check returns whether it fits (None: only worth knowing), what was found, and how to mend it.
"""

from __future__ import annotations

import fcntl
import os
import resource

from ...errors import SpoolError
from ...program.fds import owned
from ...spool import format
from ..common import SPOOL, Argument, add_site_packages, spool_path, verb
from ..terminal import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..common import Given
    from ..terminal import Terminal

    Answer = tuple[bool | None, str, str | None]

FREE_BYTES = 1 << 30  # below this the next busy run may fill the disk, and lose output
FREE_FILES = 10_000  # a run is 5 files and a directory
OPEN_FILES = 1_024  # a chaperone holds some 20 fds; a follower 3 for each live run
SSH_TIMEOUT_S = 20
TELLS_S = 1  # inotify takes 0.1 ms
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

    def __init__(self, name: str, fits: bool | None, says: str, remedy: str | None = None) -> None:
        self.name = name
        self.fits = fits
        self.says = says
        self.remedy = None if fits else remedy


@verb(
    "say what this machine, the spool or a far side lacks, and a remedy",
    Argument("host", metavar="HOST", nargs="?", help="a far side to look at too, as ssh knows it"),
    SPOOL,
)
def doctor(given: Given, terminal: Terminal) -> int:
    add_site_packages(terminal)
    code = os.EX_OK
    for finding in examined(os.path.abspath(spool_path(given)), given.host):
        mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.fits]
        if finding.fits is False:
            code = os.EX_CONFIG
        if terminal.may_colour() and finding.fits is not None:
            mark = f"\x1b[{32 if finding.fits else 31}m{mark}\x1b[0m"
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        terminal.text(f"{mark}{escaped(f'{finding.name}: {finding.says}{remedy}')}\n")
    return code


def examined(spool_path: str, host: str | None = None) -> Iterator[Finding]:
    """
    Look at everything, one finding after the other, because some take seconds.

    Args:
        spool_path (str): Where there is none yet, the directory that it would be made in is
            examined.
        host (str): A far side to look at too, as ssh knows it; None for none.
    """
    yield (spool := Finding("spool", *_spool(spool_path)))
    if spool.fits is not False:
        place = spool_path if spool.fits else os.path.dirname(spool_path)
        with owned(os.open(place, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            for name, examine in OF_THE_SPOOL.items():
                if (answer := examine(fd)) is not None:
                    yield Finding(name, *answer)
    for name, least, why in INOTIFY_LIMITS:
        yield Finding(name, *_limit(name, least, why))
    for name, look in OF_THE_MACHINE.items():
        yield Finding(name, *look())
    if host is not None:
        yield from _far_side(host)


# -- the spool


def _spool(path: str) -> Answer:
    try:
        os.close(format.open_spool(path))
        return True, "it is ours, and nobody else can write to it", None
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
    return (
        False,
        f"it is {silent}, which other hosts can write to:"
        " inotify may be silent, and a lock may be lost",
        f"{LOCAL}; followers poll on this one, and say so",
    )


def _inotify(fd: int) -> Answer:
    """Whether it works: that a directory is opened is an event, and changes nothing."""
    from inotify_simple import INotify, flags

    try:
        with INotify() as watch:
            watch.add_watch(f"/proc/self/fd/{fd}", flags.OPEN)
            os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd))
            works = bool(watch.read(timeout=1_000 * TELLS_S))
    except OSError as error:
        return (
            False,
            f"unable to watch it: {error.strerror}",
            "end who holds so many, or raise fs.inotify.max_user_instances and max_user_watches",
        )
    if works:
        return True, "it tells what happens in the spool", None
    return (
        False,
        "nothing was told of a change in it: followers would hear of nothing",
        f"{LOCAL}, or have followers poll (poll_s)",
    )


def _locks(fd: int) -> Answer:
    """Whether they work: two opens of one directory exclude each other."""
    here = os.O_RDONLY | os.O_DIRECTORY
    try:
        with owned(os.open(".", here, dir_fd=fd)) as first:
            with owned(os.open(".", here, dir_fd=fd)) as second:
                return _exclude(first, second)
    except OSError as error:
        says = f"unable to open the directory: {error.strerror}"
        return False, says, "ulimit -n: raise the limit of open files"


def _exclude(first: int, second: int) -> Answer:
    try:
        fcntl.flock(first, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, "flock excludes; somebody starts runs right now", None
    except OSError as error:
        return False, f"flock does not work: {error.strerror}", LOCAL
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, "flock excludes, as a run's pulse needs it to", None
    return False, "flock does not exclude: a live run would look lost", LOCAL


def _free_room(fd: int) -> Answer:
    found = os.fstatvfs(fd)
    free = found.f_bavail * found.f_frsize
    remedy = (
        "make room, or let chaperone gc do it:"
        " output that finds none is dropped and counted, outcomes are kept"
    )
    return free >= FREE_BYTES, f"{free / 1e9:.1f} GB", remedy


def _free_inodes(fd: int) -> Answer | None:
    found = os.fstatvfs(fd)
    if not found.f_files:  # btrfs has no such number
        return None
    return found.f_favail >= FREE_FILES, f"{found.f_favail:,}", "delete old runs: chaperone gc"


OF_THE_SPOOL = {
    "filesystem": _filesystem,
    "inotify": _inotify,
    "locks": _locks,
    "free room": _free_room,
    "free inodes": _free_inodes,
}


# -- this machine

INOTIFY_LIMITS = (
    ("fs.inotify.max_user_watches", 8_192, "each live run that is followed takes one"),
    ("fs.inotify.max_user_instances", 8, "each follower takes one"),
)


def _limit(name: str, least: int, why: str) -> Answer:
    try:
        with open(f"/proc/sys/{name.replace('.', '/')}", encoding="ascii") as file:
            value = int(file.read())
    except (OSError, ValueError):
        return None, "it is not told here", None
    return value >= least, f"{value:,}: {why}", f"sysctl {name}={8 * least}"


def _open_files() -> Answer:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    says = f"{'unlimited' if unlimited else f'{soft:,}'}: a follower takes 3 for each live run"
    return unlimited or soft >= OPEN_FILES, says, "ulimit -n, or LimitNOFILE= in a unit"


def _guard() -> Answer:
    import shutil

    if not os.access("/bin/sh", os.X_OK):
        says = "there is no /bin/sh, which guards each run"
        return False, says, "install a shell there: dash, say"
    needed = ("cat", "grep", "sed", "sleep")
    missing = [name for name in needed if shutil.which(name, path=os.defpath) is None]
    if not missing:
        return True, "/bin/sh and what its guard needs are there", None
    return (
        False,
        f"{', '.join(missing)} not found in {os.defpath}:"
        " a guard can't sweep up after a chaperone that was killed",
        "install coreutils, grep and sed",
    )


def _ssh_client() -> Answer:
    says = _said_by(["ssh", "-V"])
    if says is None:
        return (
            None,
            "there is none: runs on this host alone",
            "install openssh-client for runs on others",
        )
    return "OpenSSH" in says, says, "its options are OpenSSH's: install that"


def _said_by(argv: list[str]) -> str | None:
    import subprocess

    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=SSH_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stderr.strip()


OF_THE_MACHINE = {"open files": _open_files, "guard": _guard, "ssh client": _ssh_client}


# -- a far side

LOST = "what leaves the program's session can't be found when the run is stopped"
# Of each what tests for it there, what a lack of it means, and the remedy. Nothing of it is needed
# to run: a status only says less.
TOOLS = {
    "setsid": (
        "command -v setsid",
        "there is none: what leaves the program's group is found by ps and by its environment"
        " alone",
        "install util-linux there",
    ),
    "/proc": (
        "[ -r /proc/self/environ ]",
        f"there is no readable /proc: {LOST}",
        "mount it there",
    ),
    "grep": ("command -v grep", f"there is none: {LOST}", "install it there"),
}
AWK = {
    "exact": "it tells signals from exit codes",
    "inexact": "it can't tell a signal from an exit code above 128: such a status says ambiguous",
    "none": "there is none: signals are told as 128+n, ambiguous",
}
PROBE = """\
echo chaperone-doctor
awk 'BEGIN { print "awk " (system("kill -9 $$") == 265 ? "exact" : "inexact") }' 2>/dev/null ||
    echo awk none
sleep 0.1 2>/dev/null && echo sleep fractions || echo sleep seconds
""" + "".join(
    f"{test} >/dev/null 2>&1 && echo {name} yes || echo {name} none\n"
    for name, (test, _, _) in TOOLS.items()
)


def _far_side(host: str) -> Iterator[Finding]:
    reached, noise, has = _probed(host)
    yield Finding("far side", *reached)
    if not reached[0]:
        return
    says = "startup files there print; it goes to a run's log, not to its output"
    remedy = "let them print in interactive shells only, if you mind"
    yield Finding("login noise", None, says if noise else "none", remedy if noise else None)
    awk = has.get("awk", "none")
    yield Finding("awk", awk == "exact", AWK[awk], "install mawk or gawk there")
    for name, (_, lack, remedy) in TOOLS.items():
        there = has.get(name) == "yes"
        yield Finding(name, there, "it is there" if there else lack, remedy)
    whole = "it takes whole seconds: a stop there may take one longer"
    fractions = has.get("sleep") == "fractions"
    yield Finding("sleep", None, "it takes fractions of a second" if fractions else whole)


def _probed(host: str) -> tuple[Answer, bool, dict[str, str]]:
    """Whether a shell runs there, whether a login there prints, and what the probe said."""
    import subprocess

    from ...model import hops

    def lost(says: str, remedy: str) -> tuple[Answer, bool, dict[str, str]]:
        return (False, says, remedy), False, {}

    try:
        way = hops.hops({"host": host, "options": {"ConnectTimeout": 10}})
        argv = hops.route(way).argv(["/bin/sh"])
    except ValueError as error:
        return lost(str(error), "name it as for ssh: a host, or one of ~/.ssh/config")
    try:
        done = subprocess.run(
            argv, input=PROBE.encode(), capture_output=True, timeout=SSH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"no answer within {SSH_TIMEOUT_S} s"
        return lost(f"unable to reach {host!r}: {why}", f"see what ssh -v {host} says")
    except OSError as error:
        return lost(f"unable to reach {host!r}: {error.strerror}", f"see what ssh -v {host} says")
    errors = done.stderr.decode("utf-8", "replace").strip()
    noise, ready, rest = done.stdout.decode("utf-8", "replace").partition("chaperone-doctor\n")
    if not ready:
        last = (errors.splitlines() or ["it said nothing"])[-1]
        says = f"unable to run a shell on {host!r}: {last}"
        return lost(says, "log in there once by ssh, without a password")
    has = dict(line.partition(" ")[::2] for line in rest.splitlines())
    return (True, f"{host!r} can be reached, and has /bin/sh", None), bool(noise or errors), has
