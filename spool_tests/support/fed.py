"""
Runs of an agent as a sink is given them: specs, statuses, and the run that a sink makes of them.
"""

import time

from chaperone.agent import sink as sinks
from chaperone.model import transitions
from spool_tests.support import disk

KEY = "0123456789abcdef0123456789abcdef"
URL = "https://db3:8470/etl"
ORIGIN = sinks.origin("mirror", URL)


def far_spec(run_id="r", **more):
    return {"version": 1, "key": KEY, **disk.spec(run_id, **more)}


def far_running(run_id="r", **facts):
    status = transitions.starting(disk.spec(run_id), 41, "db3", "boot-of-db3", time.time_ns())
    return transitions.running(status, 4711, time.time_ns(), **facts)


def far_final(stdout=0, stderr=0, run_id="r", **facts):
    sizes = {"stdout": {"bytes": stdout, "dropped": 0}, "stderr": {"bytes": stderr, "dropped": 0}}
    ended = transitions.with_facts(far_running(run_id), return_code=0, **sizes, **facts)
    return transitions.terminated(ended, True)


def fed(sink, run_id="r", **more):
    return sink.run(run_id, KEY, far_spec(run_id), ORIGIN, **more)
