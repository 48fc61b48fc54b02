"""
A world that is not like the machine of the tests, and the words that lead into it.

Knows: namespaces, mounts, users, limits.  Must not know: what is checked there.
"""

import itertools
import os
import subprocess

import attrs

from spool_tests.support.places import CHAPERONE
from spool_tests.support.processes import SERVERS
from spool_tests.support.waiting import absent, need

AWK = 'BEGIN { exit system("kill -9 $$") != 265 }'  # 256 + 9
_numbers = itertools.count()


@attrs.frozen(kw_only=True)
class World:
    """
    One row of the table.

    Attributes:
        name (str): As in the ids of its tests and in docs/reliability.rst.
        near (str): What `tracking` must be in the status of a run there; None where no chaperone is
            started there.
        far (str): The same for a far side there; None where none is tried.
        needs (tuple): Programs without which it can't be had.
        flags (tuple): Of unshare(1), for namespaces that live as long as the world; () for none.
        entered (tuple): Which of them are entered, by nsenter(1).
        setup (str): sh, as root, in these namespaces; `$0` is a directory of the world's own.
        words (function): From that directory and the user's id, what comes before each argv there.
        limits (tuple): What comes before all that, where a run or a far side is started.
        command (function): From that directory, what starts a chaperone there.
        user (bool): Whether a plain user of its own is there.
        room (str): Where its spools are, below its directory; None for the test's own.
        raiser (str): sh, what there makes another user's process of a command of the plain user.
        fill (str): sh, what a program does there when all its processes are started.
        but (dict): Checks that make no sense there, and why.
        more (tuple): Checks of this world alone.
        also (tuple): Names of tests elsewhere that show more of it.
        short (bool): Whether plain `bin/test` tries it.
    """

    name: str
    near: str | None = "kernel"
    far: str | None = "kernel"
    needs: tuple = ()
    flags: tuple = ()
    entered: tuple = ()
    setup: str = ""
    words: object = lambda place, uid: ()
    limits: tuple = ()
    command: object = lambda place: CHAPERONE
    user: bool = False
    room: str | None = None
    raiser: str = ""
    fill: str = ""
    but: dict = {}
    more: tuple = ()
    also: tuple = ()
    short: bool = False


class Made:
    """
    A world that is there, until it is closed.

    Attributes:
        words (tuple): Before each argv in it.
        run_words (tuple): Before an argv in it that starts a run or a far side.
        command (list): What starts a chaperone in it.
        knows_signals (bool): Whether its awk distinguishes a signal from an exit code, as most do.
        uid (int): Whose its processes are.
        room (str): Where its spools are, as it sees it; None for the test's own.
        seen (str): The same directory, as we see it.
        pid (int): Of the first process of its namespaces; None where it has none.
    """

    def __init__(self, world, place):
        need(*world.needs)
        self.place, self.pid, self._holder, entered = str(place), None, None, ()
        self.uid = 2_000_000_000 + os.getpid() * 16 + next(_numbers) % 16 if world.user else 0
        if world.flags:
            entered = self._enter(world)
        try:
            user = ("setpriv", f"--reuid={self.uid}", "--regid=65534", "--clear-groups")
            self.words = (
                *entered,
                *world.words(self.place, self.uid),
                *(user if world.user else ()),
            )
            self.run_words = (*world.limits, *self.words)
            self.command = list(world.command(self.place))
            self.room = self.seen = None
            if world.room is not None:
                self.room = os.path.join(self.place, world.room)
                self.seen = f"/proc/{self.pid}/root{self.room}" if self.pid else self.room
            self._try(["true"] if world.near is None else [*self.command, "--version"])
            argv = [*self.words, "/bin/sh", "-c", f"awk '{AWK}'"]
            self.knows_signals = subprocess.run(argv, check=False).returncode == 0
        except BaseException:
            self.close()
            raise

    def _enter(self, world):
        """Make its namespaces, and keep them."""
        text = f"set -e; {{ :; {world.setup}\n}} >&2; echo made; exec cat"
        env = {**os.environ, "TEST_TOKEN": "", "CHAPERONE_SPOOL": ""}  # of the test it outlives
        self._holder = subprocess.Popen(
            ["unshare", *world.flags, "/bin/sh", "-c", text, self.place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        SERVERS.add(self._holder.pid)
        if self._holder.stdout.readline() != "made\n":
            self._holder.stdin.close()
            said = self._holder.stderr.read().strip().splitlines()
            self.close()
            absent(f"{world.name}: {said[-1] if said else 'it can not be made'}")
        self.pid = self._holder.pid
        if "--fork" in world.flags:
            with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
                self.pid = int(file.read())
        return ("nsenter", "--target", str(self.pid), *world.entered)

    def _try(self, argv):
        """Whether anything can be started there at all."""
        argv = [*self.run_words, *argv]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            absent(f"{argv} in this world: {done.stderr.strip()}")

    def close(self):
        if self._holder is not None:
            self._holder.stdin.close()
            self._holder.stdout.close()
            self._holder.stderr.close()
            self._holder.wait()
            SERVERS.discard(self._holder.pid)


class Worlds:
    """The worlds of a session, each made when it is first asked for."""

    def __init__(self, directory):
        self._directory, self._made = directory, {}

    def get(self, world):
        """A world; where it can't be had, the same skip each time."""
        found = self._made.get(world.name)
        if found is None:
            place = self._directory / world.name
            place.mkdir()
            open_way(place)
            try:
                found = Made(world, place)
            except BaseException as error:
                self._made[world.name] = error
                raise
            self._made[world.name] = found
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self):
        for made in self._made.values():
            if isinstance(made, Made):
                made.close()


def open_way(path):
    """Let every user pass through a directory and those above it."""
    for each in (path, *path.parents):
        if each.stat().st_uid == os.geteuid() and not each.stat().st_mode & 1:
            each.chmod(each.stat().st_mode | 0o111)
