"""
A run that waits in the queue of an engine. The engine is a stand-in with srun's words, so that
a test decides when the queue ends; real engines are in spool_tests/engines/.
"""

import json
import os

import pytest

from spool_tests.support.processes import processes_with
from spool_tests.support.runs import ask, final, live, log, sh, start, stdout
from spool_tests.support.waiting import until

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


def queued(spool, seconds):
    """Start a run and wait until it is in the queue: (chaperone, status)."""
    chaperone = start(
        spool, sh("echo ran"), remote={"hops": [{"srun": {}}]}, timeouts={"connect": seconds}
    )
    status = until(
        lambda: (
            (status := live(spool))["connection"]
            and status["connection"]["state"] == "queued"
            and status
        )
    )
    return chaperone, status


def test_queue_uses_up_no_patience_and_is_seen(spool, queue, chaperone):
    holder, status = queued(spool, 0.4)
    connection = status["connection"]
    assert (status["state"], status["started"]) == ("starting", None)
    assert connection["message"] == QUEUED
    assert "srun" in processes_with(str(queue).encode())[connection["pid"]]
    (spool / "late").touch()
    until(lambda: os.stat(spool / "late").st_mtime + 1 < os.stat(touched(spool)).st_mtime)
    assert live(spool)["connection"]["state"] == "queued"
    queue.touch()
    assert holder.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], stdout(spool)) == ("terminated", 0, b"ran\n")
    assert status["connection"]["state"] == "up" and "message" not in status["connection"]


def touched(spool):
    (spool / "now").touch()
    return spool / "now"


def test_patience_counts_again_from_the_end_of_the_queue(spool, queue):
    holder, _ = queued(spool, 0.4)
    queue.write_text("hang")
    assert holder.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] in ("connect", "far-side")


def test_stop_ends_the_wait(spool, queue):
    holder, status = queued(spool, 30)
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
