"""
What this machine, a spool and a far side have of what chaperone needs, in plain words.

Knows: the limits and programs that the others rely on.  Must not know: runs.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator

import attrs
from inotify_simple import INotify, flags

from ...errors import SpoolError
from ...follow import descriptors
from ...model import hops as command
from ...spool import format

FREE_BYTES = (
    1 << 30
    # below this the next busy run may fill the disk: told, for the outcome is kept but output is
    # dropped
)
FREE_FILES = 10_000  # a run is 5 files and a directory
OPEN_FILES = 1_024  # a chaperone holds some 20 fds; a follower 3 for each live run
WATCHES_A_RUN = 1
SSH_TIMEOUT_S = 20
TELLS_S = 1  # inotify takes 0.1 ms
PROBE = """\
echo chaperone-doctor
command -v awk >/dev/null 2>&1 && awk 'BEGIN { print "awk " (system("kill -9 $$") == 265 ? "exact" : "inexact") }' || echo awk none
command -v setsid >/dev/null 2>&1 && echo setsid yes || echo setsid none
[ -r /proc/self/environ ] && echo proc yes || echo proc none
sleep 0.1 2>/dev/null && echo sleep fractions || echo sleep seconds
command -v grep >/dev/null 2>&1 && echo grep yes || echo grep none
"""


@attrs.frozen(kw_only=True)
class Finding:
    """
    One thing that was looked at.

    Attributes:
        name (str): What: `spool`, `open files`, `far side` ...
        fits (bool): True if chaperone can rely on it; None if it is only worth knowing.
        says (str): What was found, in one sentence.
        remedy (str): How to mend it; None where nothing is to be mended.
    """

    name: str
    fits: bool | None
    says: str
    remedy: str | None = None


def examined(spool_path: str, host: str | None = None) -> Iterator[Finding]:
    """
    Look at everything, one finding after the other, for some take seconds.

    Args:
        spool_path (str): It need not be there yet; then the directory it would be made in is looked
            at.
        host (str): A far side to look at too, as ssh knows it; None for none.
    """
    yield from _spool(spool_path)
    yield _inotify("max_user_watches", 8_192, "each live run that is followed takes one")
    yield _inotify("max_user_instances", 8, "each follower takes one")
    yield _open_files()
    yield _shell()
    yield _ssh()
    if host is not None:
        yield from _far_side(host)


def _spool(path: str) -> Iterator[Finding]:
    try:
        fd = format.open_spool(path)
    except SpoolError as error:
        if os.path.lexists(path):
            yield Finding(
                name="spool",
                fits=False,
                says=str(error),
                remedy="run as its owner, or make a spool of your own: chmod 700",
            )
            return
        path = os.path.dirname(os.path.abspath(path))
        if not os.access(path, os.W_OK | os.X_OK):
            yield Finding(
                name="spool",
                fits=False,
                says=f"it is not there, and can't be made in {path!r}",
                remedy="name a directory of yours by --spool",
            )
            return
        yield Finding(name="spool", fits=None, says="it is not there yet; the first run makes it")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    else:
        yield Finding(name="spool", fits=True, says="it is ours, and nobody else can write to it")
    try:
        yield _filesystem(fd)
        yield _watched(fd)
        yield _flock(fd)
        yield from _room(fd)
    finally:
        os.close(fd)


def _filesystem(fd: int) -> Finding:
    silent = descriptors.silent_filesystem(fd)
    if silent is None:
        return Finding(
            name="filesystem", fits=True, says="its type is none that other hosts write to"
        )
    return Finding(
        name="filesystem",
        fits=False,
        says=f"it is {silent}, which other hosts can write to: inotify may be silent, and a lock may be lost",
        remedy="put the spool on a local filesystem; followers poll on this one, and say so",
    )


def _watched(fd: int) -> Finding:
    """Whether inotify works: to open a directory is told, and changes nothing."""
    try:
        with INotify() as watch:
            watch.add_watch(f"/proc/self/fd/{fd}", flags.OPEN)
            os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd))
            told = bool(watch.read(timeout=1_000 * TELLS_S))
    except OSError as error:
        says = f"unable to watch it: {error.strerror}"
        return Finding(
            name="inotify",
            fits=False,
            says=says,
            remedy="end who holds so many, or raise fs.inotify.max_user_instances and max_user_watches",
        )
    if told:
        return Finding(name="inotify", fits=True, says="it tells what happens in the spool")
    says = "nothing was told of a change in it: followers would hear of nothing"
    return Finding(
        name="inotify",
        fits=False,
        says=says,
        remedy="put the spool on a local filesystem, or have followers poll (poll_s)",
    )


def _flock(fd: int) -> Finding:
    """Whether locks work: two opens of one file exclude each other."""
    try:
        first, second = (os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd) for _ in range(2))
    except OSError as error:
        return Finding(
            name="locks",
            fits=False,
            says=f"unable to open the directory: {error.strerror}",
            remedy="ulimit -n: raise the limit of open files",
        )
    try:
        fcntl.flock(first, fcntl.LOCK_SH | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding(
                name="locks", fits=True, says="flock excludes, as a run's pulse needs it to"
            )
        return Finding(
            name="locks",
            fits=False,
            says="flock does not exclude: a live run would look lost",
            remedy="put the spool on a local filesystem",
        )
    except BlockingIOError:
        return Finding(
            name="locks", fits=True, says="flock excludes; somebody starts runs right now"
        )
    except OSError as error:
        return Finding(
            name="locks",
            fits=False,
            says=f"flock does not work: {error.strerror}",
            remedy="put the spool on a local filesystem",
        )
    finally:
        os.close(first)
        os.close(second)


def _room(fd: int) -> Iterator[Finding]:
    found = os.fstatvfs(fd)
    free = found.f_bavail * found.f_frsize
    remedy = "make room, or let chaperone gc do it: output that finds none is dropped and counted, outcomes are kept"
    yield Finding(
        name="free room",
        fits=free >= FREE_BYTES,
        says=f"{free / 1e9:.1f} GB",
        remedy=None if free >= FREE_BYTES else remedy,
    )
    if found.f_files:  # btrfs has no such number
        enough = found.f_favail >= FREE_FILES
        yield Finding(
            name="free inodes",
            fits=enough,
            says=f"{found.f_favail:,}",
            remedy=None if enough else "delete old runs: chaperone gc",
        )


def _inotify(name: str, least: int, why: str) -> Finding:
    title = f"fs.inotify.{name}"
    try:
        with open(f"/proc/sys/fs/inotify/{name}", encoding="ascii") as file:
            value = int(file.read())
    except (OSError, ValueError):
        return Finding(name=title, fits=None, says="it is not told here")
    remedy = None if value >= least else f"sysctl {title}={8 * least}"
    return Finding(name=title, fits=value >= least, says=f"{value:,}: {why}", remedy=remedy)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    says = f"{'unlimited' if soft == resource.RLIM_INFINITY else f'{soft:,}'}: a follower takes 3 for each live run"
    return Finding(
        name="open files",
        fits=enough,
        says=says,
        remedy=None if enough else "ulimit -n, or LimitNOFILE= in a unit",
    )


def _shell() -> Finding:
    missing = [
        name
        for name in ("cat", "grep", "sed", "sleep")
        if shutil.which(name, path=os.defpath) is None
    ]
    if not os.access("/bin/sh", os.X_OK):
        return Finding(
            name="guard",
            fits=False,
            says="there is no /bin/sh, which guards each run",
            remedy="install a shell there: dash, say",
        )
    if missing:
        says = f"{', '.join(missing)} not found in {os.defpath}: a guard can't sweep up after a chaperone that was killed"
        return Finding(
            name="guard", fits=False, says=says, remedy="install coreutils, grep and sed"
        )
    return Finding(name="guard", fits=True, says="/bin/sh and what its guard needs are there")


def _ssh() -> Finding:
    try:
        told = subprocess.run(
            ["ssh", "-V"],
            capture_output=True,
            text=True,
            timeout=SSH_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        ).stderr.strip()
    except (OSError, subprocess.TimeoutExpired):
        return Finding(
            name="ssh client",
            fits=None,
            says="there is none: runs on this host alone",
            remedy="install openssh-client for runs on others",
        )
    return Finding(
        name="ssh client",
        fits="OpenSSH" in told,
        says=told,
        remedy=None if "OpenSSH" in told else "its options are OpenSSH's: install that",
    )


# -- the far side


def _far_side(host: str) -> Iterator[Finding]:
    try:
        hops = command.hops({"host": host, "options": {"ConnectTimeout": 10}})
        argv = command.route(hops).argv(["/bin/sh"])
    except ValueError as error:
        yield Finding(
            name="far side",
            fits=False,
            says=str(error),
            remedy="name it as for ssh: a host, or one of ~/.ssh/config",
        )
        return
    try:
        done = subprocess.run(
            argv, input=PROBE.encode(), capture_output=True, timeout=SSH_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = (
            error.strerror if isinstance(error, OSError) else f"no answer within {SSH_TIMEOUT_S} s"
        )
        yield Finding(
            name="far side",
            fits=False,
            says=f"unable to reach {host!r}: {why}",
            remedy=f"see what ssh -v {host} says",
        )
        return
    noise, ready, rest = done.stdout.decode("utf-8", "replace").partition("chaperone-doctor\n")
    if not ready:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[
            -1
        ]
        yield Finding(
            name="far side",
            fits=False,
            says=f"unable to run a shell on {host!r}: {last}",
            remedy="log in there once by ssh, without a password",
        )
        return
    yield Finding(name="far side", fits=True, says=f"{host!r} can be reached, and has /bin/sh")
    quiet = not noise and not done.stderr
    says = (
        "none" if quiet else "startup files there print; it goes to a run's log, not to its output"
    )
    yield Finding(
        name="login noise",
        fits=None,
        says=says,
        remedy=None if quiet else "let them print in interactive shells only, if you mind",
    )
    yield from _tools(dict(line.partition(" ")[::2] for line in rest.splitlines()))


def _tools(has: dict[str, str]) -> Iterator[Finding]:
    """What is missing there makes a status say less; nothing of it is needed to run."""
    awk = {
        "exact": "it tells signals from exit codes",
        "inexact": "it can't tell a signal from an exit code above 128: such a status says ambiguous",
    }
    exact = has.get("awk") == "exact"
    says = awk.get(has.get("awk", ""), "there is none: signals are told as 128+n, ambiguous")
    yield Finding(
        name="awk", fits=exact, says=says, remedy=None if exact else "install mawk or gawk there"
    )
    lost = "what leaves the program's session can't be found when the run is stopped"
    lacks = {
        "setsid": (
            "there is none: what leaves the program's group is found by ps and by its environment alone",
            "install util-linux there",
        ),
        "proc": (f"there is no readable /proc: {lost}", "mount it there"),
        "grep": (f"there is none: {lost}", "install it there"),
    }
    for name, (lack, remedy) in lacks.items():
        there = has.get(name) == "yes"
        yield Finding(
            name=name if name != "proc" else "/proc",
            fits=there,
            says="it is there" if there else lack,
            remedy=None if there else remedy,
        )
    fractions = has.get("sleep") == "fractions"
    yield Finding(
        name="sleep",
        fits=None,
        says="it takes fractions of a second"
        if fractions
        else "it takes whole seconds: a stop there may take one longer",
    )
