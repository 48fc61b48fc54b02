"""
A run that waits in the queue of an engine. The engine is a stand-in with srun's words, so that
a test decides when the queue ends; real engines are in spool_tests/engines/.
"""

import contextlib
import json
import os
import time

import pytest

from spool_tests.support.processes import processes_with
from spool_tests.support.runs import ask, final, live, log, sh, start, stdout
from spool_tests.support.waiting import patiently, until

QUEUED = "srun: job 5 queued and waiting for resources"
SRUN = f"""#!/bin/sh
echo "{QUEUED}" >&2
until [ -e "$QUEUE_ENDS" ]; do sleep 0.02; done
echo "srun: job 5 has been allocated resources" >&2
[ ! -s "$QUEUE_ENDS" ] || exec sleep 60
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The file that ends the queue."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "srun").write_text(SRUN)
    (directory / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE_ENDS", str(tmp_path / "ends"))
    return tmp_path / "ends"


def queued(spool, seconds, run_id="r"):
    """
    Start a run and wait until it is in the queue: (chaperone, status); no status where it was given
    up before, on a busy machine.
    """
    there = {"remote": {"hops": [{"srun": {}}]}, "timeouts": {"connect": seconds}}
    chaperone = start(spool, sh("echo ran"), run_id, **there)

    found = [{}]

    def is_queued():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            status = live(spool, run_id)
            if (status["connection"] or {}).get("state") == "queued":
                found.append(status)
        return len(found) > 1

    until(lambda: is_queued() or chaperone.poll() is not None)
    return chaperone, found[-1]


def test_queue_uses_up_no_patience_and_is_seen(spool, queue, chaperone):
    def attempt(number, time_s):
        run_id = f"r{number}"
        holder, status = queued(spool, time_s, run_id)
        if not status:
            return False
        connection = status["connection"]
        assert (status["state"], status["started"]) == ("starting", None)
        assert connection["message"] == QUEUED
        assert "srun" in processes_with(str(queue).encode())[connection["pid"]]
        late = time.monotonic() + 2 * time_s
        until(lambda: time.monotonic() > late)
        assert live(spool, run_id)["connection"]["state"] == "queued"
        queue.touch()
        assert holder.wait(60) == 0
        queue.unlink()
        status = final(spool, run_id)
        if not status["started"]:  # it had no more than that time to begin
            return False
        ended = (status["state"], status["return_code"], stdout(spool, run_id))
        assert ended == ("terminated", 0, b"ran\n")
        assert status["connection"]["state"] == "up" and "message" not in status["connection"]
        return True

    patiently(attempt, 0.5, 3, 15)


def test_patience_counts_again_from_the_end_of_the_queue(spool, queue):
    def attempt(number, time_s):
        holder, status = queued(spool, time_s, f"r{number}")
        queue.write_text("hang")
        assert holder.wait(60) == 0
        queue.unlink()
        ended = final(spool, f"r{number}")
        assert (ended["state"], ended["started"]) == ("error", False)
        assert ended["exception"]["stage"] in ("connect", "far-side")
        return bool(status)

    patiently(attempt, 0.4, 3, 15)


def test_stop_ends_the_wait(spool, queue):
    holder, status = queued(spool, 300)
    ask(spool, "stop by=night")
    assert holder.wait(60) == 0
    ended = final(spool)
    assert (ended["state"], ended["started"], ended["exception"]["stage"]) == (
        "error",
        False,
        "stopped",
    )
    assert ended["stop"]["by"] == "night"
    until(lambda: not processes_with(str(queue).encode()))
    assert stdout(spool) == b"" and "queued and waiting" in json.dumps(log(spool))
