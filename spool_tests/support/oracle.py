"""
What a tree of processes (tree.py) wrote of itself, compared with /proc; and plans of such trees.

Knows: /proc, the words of tree.py.  Must not know: chaperone.
"""

import contextlib
import os
import select
import shutil
import signal
import sys

from spool_tests.support import tree
from spool_tests.support.waiting import until

STEPS = ["agent", "answer", "dumpable", "group", "ignore", "name", "session", "subreaper", "title"]
LAST = ["agent", "bare", "closed", "end", "hand on", "perl", "shell", "sleep", "stop", "thread"]
# A cookie does not find what has no environment that the far side may read, and a look that takes
# its time not what hands on meanwhile (docs/far-side.rst).
TAME_STEPS = [step for step in STEPS if step not in ("agent", "dumpable", "title")]
TAME_LAST = [word for word in LAST if word not in ("agent", "bare", "hand on", "perl", "thread")]
FEW = 12  # processes of a plan, at most


class Plan:
    """
    A tree at random.

    Args:
        rng (random.Random): It decides.
        steps, last (list): Which words there may be.

    Attributes:
        node (list): As tree.py has it.
        planted (int): How many of it will say so.
        listed (int): How many there have been then.
        living (int): How many of these live; None where that is not fixed.
    """

    def __init__(self, rng, steps=STEPS, last=LAST):
        self._rng, self._steps, self._last = rng, steps, last
        self.planted, self.listed, self.living = 0, 0, 0
        size = rng.randint(1, FEW)
        self.node = self._node(size, is_first=True)

    def _node(self, size, is_first=False):
        rng = self._rng
        steps = rng.sample(self._steps, rng.choice((0, 0, 1, 1, 2, 3)))
        if not is_first and rng.random() < 0.3:
            steps.append("again")
        last = "sleep" if is_first else rng.choice(self._last)
        size -= 1
        children = []
        while size > 0:
            share = rng.randint(1, size)
            size -= share
            children.append(self._node(share))
        self.planted += 1 + (2 if last == "raised" else 0)
        more = {"shell": 1, "raised": 1}.get(last, 0) + ("agent" in steps)
        self.listed += 1 + more + ("again" in steps)
        if last in ("hand on", "stop") or self.living is None:
            # What is stopped may get SIGHUP and SIGCONT when its parent's session is no more.
            self.living = None
        else:
            self.living += 1 + more - (last == "end")
        return [steps, last, children]

    def argv(self, oracle, go, raised=""):
        """The program's argv."""
        files = [oracle.path, go, raised]
        return [sys.executable, "-I", "-S", tree.__file__, *map(str, files), repr(self.node)]


class Oracle:
    """
    The processes that a tree wrote down.

    Args:
        path (pathlib.Path): Of the file, made here.
    """

    def __init__(self, path):
        self.path = path
        path.touch()
        path.parent.chmod(0o777)  # what drops to another user makes its sockets there

    def _lines(self):
        return self.path.read_bytes().split(b"\n")[:-1]

    def listed(self):
        """All there ever were: a set of (pid, start time)."""
        return {tuple(map(int, line.split())) for line in self._lines() if line != b"planted"}

    def first(self):
        """The program's own pid; 0 until it has written it down."""
        return int(self._lines()[0].split()[0]) if self._lines() else 0

    def pids(self):
        return {pid for pid, _ in self.listed()}

    def has(self, pid):
        """Whether a process is one of them now: its number may be another's."""
        return any(pid == one[0] and is_living(*one) for one in self.listed())

    def planted(self):
        """How many processes are as they are to stay."""
        return self._lines().count(b"planted")

    def living(self, uid=0):
        """
        Those that /proc shows, and that are not dead.

        Args:
            uid (int): Only those that a process of this user may kill.
        Returns:
            set: Of (pid, start time).
        """
        return {one for one in self.listed() if is_living(*one) and may_kill(uid, one[0])}

    def kill(self):
        """End what lives on."""
        until(lambda: not self._struck() and not rest(0.01) and not self._struck())

    def _struck(self):
        found = self.living()
        for pid, _ in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found


def rest(seconds):
    """What is forked in this moment writes itself down."""
    select.select([], [], [], seconds)


def is_living(pid, started):
    """Whether a process is there and not dead, by its first thread or another one."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[19]) == started and (fields[0] not in b"ZX" or int(fields[17]) > 1)


def may_kill(uid, pid):
    """Whether a process of a user may be killed by another user's. Source: kill(2)."""
    if uid == 0:
        return True
    try:
        with open(f"/proc/{pid}/status") as file:
            words = next(line for line in file if line.startswith("Uid:")).split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return str(uid) in (words[1], words[3])  # real, saved


def words_that_work():
    """The steps and last words that this host has the programs for."""
    missing = {
        word
        for word, program in (("agent", "ssh-agent"), ("perl", "perl"))
        if not shutil.which(program)
    }
    nobody = ["nobody"] if os.geteuid() == 0 else []
    return (
        [step for step in STEPS + nobody if step not in missing],
        [word for word in LAST if word not in missing],
    )
