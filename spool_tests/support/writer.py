"""
A chaperone without a program: what it writes into a run directory, step by step, as a test says.

As a program, `writer.py SPOOL RUN_ID SEED BYTES`: writes so many random bytes, text and binary, to
both streams, and ends.
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
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


class Crowd:
    """
    Many runs that are running, each as a reader needs it: a Writer's has eight fds and syncs, one
    of these has its lock. `ids` are their ids.
    """

    def __init__(self, spool, count):
        self.spool = os.fspath(spool)
        self.ids = [f"r{number:04}" for number in range(count)]
        with Writer(spool, "model") as model:
            self.status = model.running().status
        for folder in (".ended/model", ".running/model"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.spool}/{folder}")
        shutil.rmtree(f"{self.spool}/model")
        self.locks = {run_id: self._begin(run_id) for run_id in self.ids}

    def _begin(self, run_id):
        building = f"{self.spool}/.{run_id}.new"
        os.mkdir(building, 0o700)
        key = json.dumps({"version": 1, "key": os.urandom(8).hex()})
        files = {"spec.json": key, "running.json": self._text(run_id), "stdout": "", "stderr": ""}
        for name, text in files.items():
            put(f"{building}/{name}", text)
        lock = os.open(f"{building}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.symlink(f"../{run_id}", f"{self.spool}/.running/{run_id}")
        os.rename(building, f"{self.spool}/{run_id}")
        return lock

    def _text(self, run_id, **facts):
        return json.dumps({**self.status, "run_id": run_id, **facts})

    def write(self, run_id, data):
        with open(f"{self.spool}/{run_id}/stdout", "ab") as file:
            file.write(data)

    def end(self, run_id, code=0):
        facts = {"state": "terminated", "return_code": code, "status": code << 8, "complete": True}
        size = os.path.getsize(f"{self.spool}/{run_id}/stdout")
        facts["stdout"] = {"bytes": size, "dropped": 0}
        directory = f"{self.spool}/{run_id}"
        put(f"{directory}/.status", self._text(run_id, **facts))
        os.rename(f"{directory}/.status", f"{directory}/status.json")
        os.rename(f"{self.spool}/.running/{run_id}", f"{self.spool}/.ended/{run_id}")
        os.unlink(f"{directory}/lock")
        os.close(self.locks.pop(run_id))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        while self.locks:
            os.close(self.locks.popitem()[1])


def put(path, text):
    """Make a file, in a tenth of the time of `open`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(fd, text.encode())
    os.close(fd)


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
