"""
A far spool, its agent, a mirror of it, and the programs of a test: what may vanish.

Knows: how each is started and killed.  Must not know: what a test expects of it.
"""

import contextlib
import os
import signal
import subprocess
import uuid

import chaperone
from spool_tests.support.mirrors import Mirrored, same
from spool_tests.support.places import CHAPERONE
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, live, py, sh
from spool_tests.support.waiting import until

# Writes numbered lines to both streams until a file is there.
WRITER = (
    "import os, time\n"
    "n = 0\n"
    "while not os.path.exists({go!r}):\n"
    "    os.write(1, b'out %d\\n' % n); os.write(2, b'err %d\\n' % n); n += 1\n"
    "    time.sleep(0.002)\n"
    "raise SystemExit(3)"
)


class Fleet:
    """
    An agent, a mirror of it, and the runs that the test starts there.

    Attributes:
        agent (Served): Killed, and started again, by the test.
        mirror (Mirrored): The same.
        near, far (Path): The spools.
        go (Path): When it exists, a writer exits with code 3.
    """

    def __init__(self, agent, near, place):
        self.agent, self.near, self.far = agent, near, agent.spool
        self.mirror = Mirrored(agent, near)
        self.go = place / "go"
        self._mark = f"VANISH={uuid.uuid4().hex}"

    def await_mirror(self):
        """Wait until the mirror copies: only then does it renew."""
        self.put("first", sh("true"))
        self.copied("first")
        chaperone.Spool(self.near).collect("first")

    def put(self, run_id, program, **spec):
        """Start a run at the agent; it is mirrored."""
        name, _, value = self._mark.partition("=")
        program = {**program, "env": {name: value}}
        with self.agent.client() as client:
            answer = self.agent.put(client, run_id, program, **spec)
        assert answer.status_code == 201, answer.text
        if self.mirror.is_alive():
            until(lambda: state(self.near, run_id) not in (None, "starting"))

    def write(self, run_id="r", **spec):
        """Start a writer."""
        self.put(run_id, py(WRITER.format(go=str(self.go))), **spec)
        grow(self.far, run_id)

    def programs(self):
        """All processes of programs: {pid: command}."""
        return processes_with(self._mark.encode())

    def ended(self, spool, run_id="r"):
        """The final status, when the ending is complete."""
        until((spool / run_id / "status.json").exists, 60, f"{run_id} has ended in {spool}")
        until(lambda: not (spool / run_id / "lock").exists())
        return final(spool, run_id)

    def copied(self, run_id="r"):
        """The final status here, which is that of the agent, with all bytes."""
        status = self.ended(self.near, run_id)
        assert same(self.far, self.near, run_id) == []
        entry = self.far / ".ended" / run_id
        until(lambda: not os.path.lexists(entry), 30, "the ending is collected at the agent")
        assert (self.near / ".ended" / run_id).is_symlink()
        return status

    def reap(self):
        """Record the losses at the agent, as it does itself once a minute."""
        done = subprocess.run(
            [*CHAPERONE, "reap", "--spool", self.far], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""

    def end_far_host(self, run_id="r"):
        """Kill the agent and a run at once, as by the end of power: nothing sees another die."""
        status = live(self.far, run_id)
        pids = [status["guard_pid"], status["chaperone_pid"], self.agent.process.pid]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in [*pids, *self.programs()]:
                with contextlib.suppress(ProcessLookupError):  # a short `sleep`
                    os.kill(pid, number)
        self.agent.process.wait()

    def end(self):
        """Kill what still runs."""
        if self.mirror.is_alive():
            self.mirror.kill()
        for pid in self.programs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.programs())


def state(spool, run_id="r"):
    try:
        return chaperone.Spool(spool)[run_id].status().state
    except chaperone.SpoolError:
        return None


def grow(spool, run_id="r"):
    """Wait until more of both streams is in a spool."""
    for name in ("stdout", "stderr"):
        path = spool / run_id / name
        size = path.stat().st_size
        until(lambda path=path, size=size: path.stat().st_size > size)


def reason(status):
    return (status["stop"] or {}).get("reason")
