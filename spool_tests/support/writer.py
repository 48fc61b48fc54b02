"""
A chaperone without a program: what it writes into a run directory, step by step, as a test says.

As a program, `writer.py SPOOL RUN_ID SEED BYTES`: writes so many random bytes, text and binary, to
both streams, and ends.
"""

import os
import random
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from chaperone.model import spec, transitions
from chaperone.program import processes
from chaperone.spool import run_directory

WORDS = ["line\n", "größer ", "名前", "🦆", "x" * 300, "\n"]


class Writer:
    """
    A run that is held by this process; its lock falls when it is closed, as it does when a
    chaperone is killed.
    """

    def __init__(self, spool, run_id="r", key=None, **asked):
        self.spec = {**spec.checked({"program": {"argv": ["none"]}, "id": run_id}, "/"), **asked}
        self.status = transitions.starting(self.spec, os.getpid(), "here", None, time.time_ns())
        self.run = run_directory.create(
            str(spool), self.spec, self.spec, self.status, key or os.urandom(8).hex()
        )
        self.counts = {"stdout": 0, "stderr": 0}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.die()

    def running(self, **facts):
        self.status = transitions.running(self.status, 1, time.time_ns(), **facts)
        assert self.run.replace_running(self.status) is None
        return self

    def write(self, data, stream="stdout"):
        self.counts[stream] += os.write(self.run.streams[stream], data)
        return self

    def publish(self, code=0):
        facts = {
            **processes.outcome(code << 8),
            **{stream: {"bytes": count, "dropped": 0} for stream, count in self.counts.items()},
        }
        self.status = transitions.terminated(transitions.with_facts(self.status, **facts), True)
        self.run.publish(self.status)
        return self

    def end(self, code=0):
        if self.status["state"] == "starting":
            self.running()
        if self.status["state"] != "terminated":
            self.publish(code)
        self.run.end()
        self.die()

    def die(self):
        self.run.close()
        if self.run.spool_fd >= 0:
            os.close(self.run.spool_fd)
            self.run.spool_fd = -1


def main(path, run_id, seed, size):
    dice = random.Random(f"{seed} {run_id}")
    with Writer(path, run_id) as writer:
        writer.running()
        left = int(size)
        while left > 0:
            text = "".join(dice.choices(WORDS, k=dice.choice([1, 1, 1, 5, 40]))).encode()
            data = text if dice.random() < 0.8 else dice.randbytes(len(text))
            cut = dice.randrange(len(data) + 1)  # a write may end inside a character
            for part in (data[:cut], data[cut:]):
                if part:
                    writer.write(part, dice.choice(["stdout", "stdout", "stderr"]))
            left -= len(data)
            time.sleep(dice.random() * 0.003)
        writer.end(dice.randrange(256))


if __name__ == "__main__":
    main(*sys.argv[1:])
