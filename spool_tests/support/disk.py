"""
Run directories made and broken by hand, without a chaperone: for the tests of what is on disk.

Knows: `chaperone.spool` and what it does to files.  Must not know: programs.
"""

import contextlib
import fcntl
import itertools
import os
import signal
import time
import traceback

from chaperone.model import spec as specs
from chaperone.model import status as statuses
from chaperone.model import transitions
from chaperone.program import processes
from chaperone.spool import format, look, run_directory
from spool_tests.support.calls import HOMES

# What changes the disk or a lock: every step between two of these is one that a crash may end at.
CHANGING = (
    "mkdir",
    "open",
    "mkfifo",
    "symlink",
    "rename",
    "unlink",
    "rmdir",
    "write",
    "pwrite",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "utime",
    "close",
)
_keys = itertools.count()


def spec(run_id="r", **more):
    """A canonical spec; `more` are its top fields, unchecked."""
    return {
        **specs.checked(
            {
                "id": run_id,
                "program": {"argv": ["true"], "env": {"TOKEN": "hunter2"}},
                "labels": {"team": "etl"},
            },
            "/",
        ),
        **more,
    }


def starting(wanted):
    return transitions.starting(wanted, os.getpid(), os.uname().nodename, None, time.time_ns())


def create(spool, run_id="r", **more):
    """A run directory as its chaperone holds it: visible, locked, `starting`."""
    wanted = spec(run_id, **more)
    return run_directory.create(
        str(spool), wanted, wanted, starting(wanted), f"{os.getpid()}{next(_keys)}"
    )


def running(run, **facts):
    """Its program is started."""
    status = transitions.running(starting(spec(run.run_id)), 4711, time.time_ns(), **facts)
    assert run.replace_running(status) is None
    return status


def leave_word(run, *pids):
    """What the guard of a dead chaperone says: the pids of what it could not kill."""
    os.write(run.lock_fd, b"left%b\n" % b"".join(b" %d" % pid for pid in pids))


def terminated(run, code=0):
    """Its final status, with the sizes as they are."""
    sizes = {name: {"bytes": run.size_of(name), "dropped": 0} for name in run.streams}
    status = transitions.running(starting(spec(run.run_id)), 4711, time.time_ns(), **sizes)
    return transitions.terminated(
        transitions.with_facts(
            status,
            **processes.outcome(code << 8),
            end_time=statuses.timestamp(time.time_ns()),
            elapsed=0.5,
        ),
        True,
    )


def not_ended(spool):
    """
    Runs of each kind that has not ended: `live`, `dead`, `adoptable` and `ending`. Returns the
    first and the last, which are locked.
    """
    live = create(spool, "live")
    create(spool, "dead").close()
    create(spool, "adoptable", on_disconnect="survive", lease=1000).close()
    ending = create(spool, "ending")
    ending.publish(terminated(ending))
    return live, ending


def end(run, code=0, durable=False):
    """Publish and end."""
    run.publish(terminated(run, code), durable)
    run.end(durable)


def seen(spool, run_id="r"):
    """(alive, status), as a reader sees it."""
    with opened(spool) as spool_fd:
        run_fd = format.open_run(spool_fd, run_id)
        try:
            return look.look(run_fd, run_id)
        finally:
            os.close(run_fd)


@contextlib.contextmanager
def opened(spool):
    """An fd of the spool."""
    fd = format.open_spool(str(spool))
    try:
        yield fd
    finally:
        os.close(fd)


def forked(function):
    """
    Call a function in a child of ours; its pid. It exits 0, or 1 after printing what was raised.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
        os._exit(0)
    except BaseException:  # noqa: BLE001  the child must not go on as a second pytest
        traceback.print_exc()
        os._exit(1)


def waited(pid):
    """How a child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(pid):
    """End one of our children at once."""
    os.kill(pid, signal.SIGKILL)
    return waited(pid)


def held(function):
    """
    Call a function in a child, which then stays until it is killed: its pid, when the function is
    done.
    """
    read, write = os.pipe()

    def stay():
        os.close(read)
        function()
        os.write(write, b".")
        signal.pause()

    pid = forked(stay)
    os.close(write)
    told = os.read(read, 1)
    os.close(read)
    assert told == b".", "the child failed"
    return pid


class Calls:
    """
    The changing system calls of a piece of code, by their names in `os` and `fcntl`; recorded, or
    ended by SIGKILL at one of them.

    Args:
        monkeypatch: Undoes it; in a child that is going to die it may be None.
        kill_at (int): Before which call, from 1 on.
    """

    def __init__(self, monkeypatch=None, kill_at=None, names=CHANGING):
        self.made = []
        self._count, self._kill_at = 0, kill_at
        by_name = [(module, name) for module in HOMES for name in names]
        for module, name in [*by_name, (fcntl, "flock")]:
            replacement = self._recording(name, getattr(module, name))
            monkeypatch.setattr(module, name, replacement) if monkeypatch else setattr(
                module, name, replacement
            )

    def _recording(self, name, function):
        def call(*arguments, **keywords):
            if name != "open" or arguments[1] & os.O_CREAT:
                self._count += 1
                if self._count == self._kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.made.append((name, *arguments))
            return function(*arguments, **keywords)

        return call

    def named(self, *names):
        """The calls of these names, as (name, first argument)."""
        return [call[:2] for call in self.made if call[0] in names]


def crash_points(function):
    """
    Call a function in children that are killed before each of its changing calls in turn; yields
    the number, last one alive.
    """
    for number in itertools.count(1):

        def doomed(number=number):
            Calls(kill_at=number)
            function()

        code = waited(forked(doomed))
        assert code in (0, -signal.SIGKILL), "the child failed by itself"
        yield number
        if code == 0:
            return


def tree(directory):
    """All names below a directory, relative to it, but for the lock that each sweep makes."""
    found = {
        os.path.relpath(os.path.join(parent, name), directory)
        for parent, folders, files in os.walk(directory)
        for name in (*folders, *files)
    }
    return sorted(found - {format.SWEEP_LOCK})
