"""
The verb that says what this machine, the spool and a far side have of what chaperone needs: doctor.

Knows: the limits and programs that the others rely on.  Must not know: runs.
A check returns whether it fits (None: only worth knowing), what was found, and how to mend it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource

from ...errors import SpoolError
from ...program.fds import owned
from ...spool import format
from ..common import add_site_packages
from ..terminal import escaped
from ..verb import SPOOL, Argument, spool_path, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from ..terminal import Terminal
    from ..verb import Given

    Answer = tuple[bool | None, str, str | None]

FREE_BYTES = 1 << 30  # below this the next busy run may fill the disk, and lose output
FREE_FILES = 10_000  # a run is 5 files and a directory
OPEN_FILES = 1_024  # a chaperone holds some 20 fds; a follower 3 for each live run
SSH_TIMEOUT_S = 20
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
    yield (spool := Finding("spool", _spool(spool_path)))
    if spool.fits is not False:
        place = spool_path if spool.fits else os.path.dirname(spool_path)
        with owned(os.open(place, DIRECTORY)) as fd:
            for name, check in OF_THE_SPOOL.items():
                if (answer := check(fd)) is not None:
                    yield Finding(name, answer)
    for name, check_here in OF_THIS_MACHINE.items():
        yield Finding(name, check_here())
    if host is not None:
        for name, answer in _far_side(host):
            yield Finding(name, answer)


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
                return True, "it tells what happens in the spool", None
    except OSError as error:
        if error.errno == errno.ENOENT:
            says = "there is no /proc/self/fd to name it by: followers poll"
            return False, says, "mount a /proc of this pid namespace"
        limits = "fs.inotify.max_user_instances and max_user_watches"
        remedy = f"end who holds so many, or raise {limits}"
        return False, f"unable to watch it: {error.strerror}", remedy
    says = "nothing was told of a change in it: followers would hear of nothing"
    return False, says, f"{LOCAL}, or have followers poll (poll_s)"


def _locks(fd: int) -> Answer:
    """Whether they work: two opens of one directory exclude each other."""
    try:
        first, second = (os.open(".", DIRECTORY, dir_fd=fd) for _ in range(2))
    except OSError as error:
        says = f"unable to open the directory: {error.strerror}"
        return False, says, "ulimit -n: raise the limit of open files"
    excludes = "flock excludes; somebody starts runs right now"
    with owned(first), owned(second):
        try:
            fcntl.flock(first, fcntl.LOCK_SH | fcntl.LOCK_NB)
            excludes = "flock excludes, as a run's pulse needs it to"
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, excludes, None
        except OSError as error:
            return False, f"flock does not work: {error.strerror}", LOCAL
    return False, "flock does not exclude: a live run would look lost", LOCAL


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


OF_THE_SPOOL = {
    "filesystem": _filesystem,
    "inotify": _inotify,
    "locks": _locks,
    "free room": _free_room,
    "free inodes": _free_inodes,
}


# -- this machine


def _limit(name: str, least: int, why: str) -> tuple[str, Callable[[], Answer]]:
    def check() -> Answer:
        try:
            with open(f"/proc/sys/{name.replace('.', '/')}", encoding="ascii") as file:
                value = int(file.read())
        except (OSError, ValueError):
            return None, "it is not told here", None
        return value >= least, f"{value:,}: {why}", f"sysctl {name}={8 * least}"

    return name, check


def _open_files() -> Answer:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    says = f"{'unlimited' if unlimited else f'{soft:,}'}: a follower takes 3 for each live run"
    return unlimited or soft >= OPEN_FILES, says, "ulimit -n, or LimitNOFILE= in a unit"


def _guard() -> Answer:
    from ...program import processes

    children_fd = processes.open_children()
    if children_fd < 0:
        says = (
            "/proc does not list a process's children: what leaves the program's group is not found"
        )
        return False, says, "mount a /proc of this pid namespace"
    os.close(children_fd)
    return True, "the kernel hands what a killed chaperone leaves to its guard", None


def _ssh_client() -> Answer:
    done = _ran(["ssh", "-V"])
    if isinstance(done, str):
        says = "there is none: runs on this host alone"
        return None, says, "install openssh-client for runs on others"
    says = done.stderr.decode("utf-8", "replace").strip()
    return "OpenSSH" in says, says, "its options are OpenSSH's: install that"


def _ran(argv: list[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes] | str:
    """What a program printed; a text that says why, where it did not run to its end."""
    import subprocess

    try:
        return subprocess.run(
            argv, input=stdin, capture_output=True, timeout=SSH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {SSH_TIMEOUT_S} s"
    except OSError as error:
        return str(error.strerror)


OF_THIS_MACHINE = dict(
    (
        _limit("fs.inotify.max_user_watches", 8_192, "each live run that is followed takes one"),
        _limit("fs.inotify.max_user_instances", 8, "each follower takes one"),
        ("open files", _open_files),
        ("guard", _guard),
        ("ssh client", _ssh_client),
    )
)


# -- a far side

LOST = "what leaves the program's session can't be found when the run is stopped"
BY_PS = "what leaves the program's group is found by ps and by its environment alone"
# What the probe says there of each, whether it fits, what that means, and the remedy. Nothing of it
# is needed to run: a status only says less.
TOOLS: dict[tuple[str, str], Answer] = {
    ("awk", "exact"): (True, "it tells signals from exit codes", None),
    ("awk", "inexact"): (
        False,
        "it can't tell a signal from an exit code above 128: such a status says ambiguous",
        "install mawk or gawk there",
    ),
    ("awk", "none"): (
        False,
        "there is none: signals are told as 128+n, ambiguous",
        "install mawk or gawk there",
    ),
    ("setsid", "yes"): (True, "it is there", None),
    ("setsid", "none"): (False, f"there is none: {BY_PS}", "install util-linux there"),
    ("/proc", "yes"): (True, "it is there", None),
    ("/proc", "none"): (False, f"there is no readable /proc: {LOST}", "mount it there"),
    ("grep", "yes"): (True, "it is there", None),
    ("grep", "none"): (False, f"there is none: {LOST}", "install it there"),
    ("sleep", "fractions"): (None, "it takes fractions of a second", None),
    ("sleep", "seconds"): (
        None,
        "it takes whole seconds: a stop there may take one longer",
        None,
    ),
}
PROBE = b"""\
echo chaperone-doctor
is() { name=$1; shift; "$@" >/dev/null 2>&1 && echo "$name yes" || echo "$name none"; }
awk 'BEGIN { print "awk " (system("kill -9 $$") == 265 ? "exact" : "inexact") }' 2>/dev/null ||
    echo awk none
is setsid command -v setsid
is /proc test -r /proc/self/environ
is grep command -v grep
sleep 0.1 2>/dev/null && echo sleep fractions || echo sleep seconds
"""


def _far_side(host: str) -> Iterator[tuple[str, Answer]]:
    from ...model.hops import remote
    from ...model.hops.route import Route

    try:
        way = remote.hops({"host": host, "options": {"ConnectTimeout": 10}})
        route = Route.of(way)
    except ValueError as error:
        remedy = "name it as for ssh: a host, or one of ~/.ssh/config"
        yield "far side", (False, str(error), remedy)
        return
    done = _ran(route.argv(["/bin/sh"]), PROBE)
    if not isinstance(done, str) and route.is_too_new(done.stderr.decode("utf-8", "replace")):
        done = _ran(route.older().argv(["/bin/sh"]), PROBE)
    if isinstance(done, str):
        says = f"unable to reach {host!r}: {done}"
        yield "far side", (False, says, f"see what ssh -v {host} says")
        return
    errors = done.stderr.decode("utf-8", "replace").strip()
    noise, ready, rest = done.stdout.decode("utf-8", "replace").partition("chaperone-doctor\n")
    if not ready:
        says = (errors.splitlines() or ["it said nothing"])[-1]
        remedy = "log in there once by ssh, without a password"
        yield "far side", (False, f"unable to run a shell on {host!r}: {says}", remedy)
        return
    yield "far side", (True, f"{host!r} can be reached, and has /bin/sh", None)
    says = "startup files there print; it goes to a run's log, not to its output"
    remedy = "let them print in interactive shells only, if you mind"
    quiet: Answer = (None, "none", None)
    yield "login noise", (None, says, remedy) if noise or errors else quiet
    for name, _, found in (line.partition(" ") for line in rest.splitlines()):
        if (answer := TOOLS.get((name, found))) is not None:
            yield name, answer
