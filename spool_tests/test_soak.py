"""No false verdicts: readers probe while chaperones are paused, killed and starved; no live run is called lost, no dead one alive."""

import json
import os
import random
import select
import signal
import subprocess
import time

import pytest

from chaperone import spool as spools
from spool_tests.conftest import CHAPERONE

RUNS = 12


class Held:
    """A chaperone that is our own child, so that we know for certain whether it lives."""

    def __init__(self, spool, run_id, seconds):
        self.run_id = run_id
        spec = {"id": run_id, "program": {"command": f"while :; do echo x; sleep 0.05; done & sleep {seconds:.3f}; exit 3"}, "stop": {"grace_period": 0}}
        self.process = subprocess.Popen([*CHAPERONE, "run", "--spool", str(spool), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process.stdin.write(json.dumps(spec).encode())
        self.process.stdin.close()
        assert self.process.stdout.readline() == f"{run_id}\n".encode()
        self.process.stdout.close()

    def lives(self):
        return self.process.poll() is None


@pytest.fixture
def load(spool):
    """Processes that want all of the machine's time, and its disk."""
    texts = ("while :; do :; done", "while :; do dd if=/dev/zero of=load bs=1M count=20 2>&-; done")
    loads = [subprocess.Popen(["sh", "-c", text], cwd=spool.parent) for text in texts]
    yield
    for process in loads:
        process.kill()
        process.wait()


def seconds(config):
    return float(os.environ.get("CHAPERONE_SOAK_S", 3600 if config.option.long else 6))


def test_no_verdict_is_false(spool, load, pytestconfig):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    spool_fd = spools.open_spool(str(spool))
    end, number, probes, verdicts = time.monotonic() + seconds(pytestconfig), 0, 0, {"live": 0, "lost": 0, "ended": 0}
    runs = []
    try:
        while time.monotonic() < end or runs:
            while len(runs) < RUNS and time.monotonic() < end:
                runs.append(Held(spool, f"r{number}", rng.uniform(0.05, 4)))
                number += 1
            held = rng.choice(runs)
            if held.lives() and rng.random() < 0.02:
                held.process.send_signal(rng.choice([signal.SIGSTOP, signal.SIGCONT, signal.SIGCONT, signal.SIGKILL]))
            if time.monotonic() >= end and held.lives():
                held.process.send_signal(signal.SIGCONT)
            dead_before = not held.lives()
            run_fd = spools.open_run(spool_fd, held.run_id)
            try:
                alive, status = spools.look(run_fd, held.run_id)
            finally:
                os.close(run_fd)
            lives_after = held.lives()
            probes += 1
            if lives_after and not dead_before and not alive:
                # It may be in its last steps: the outcome is published, the process is not gone. But lost is a lie.
                assert status["state"] == "terminated", f"{held.run_id} lives and was called {status['state']}, seed {seed}"
            if dead_before:
                assert not alive, f"{held.run_id} is dead and was called alive, seed {seed}"
                code = held.process.returncode
                assert (status["state"], code) in (("terminated", 0), ("lost", -signal.SIGKILL), ("terminated", -signal.SIGKILL)), (status, seed)
                assert status["state"] == "lost" or status["return_code"] == 3
                verdicts["lost" if status["state"] == "lost" else "ended"] += 1
                runs.remove(held)
            else:
                verdicts["live"] += 1
            select.select([], [], [], rng.random() / 1000)  # about 1 kHz, and no rhythm
    finally:
        for held in runs:
            held.process.send_signal(signal.SIGCONT)
            held.process.kill()
            held.process.wait()
        os.close(spool_fd)
    print(f"{probes} probes of {number} runs, {verdicts}, 0 false")
    assert verdicts["lost"] and verdicts["ended"]
