"""The scheduler of the examples, unchanged, with a path and with a URL."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from spool_tests.support.agents import served
from spool_tests.support.places import ROOT
from spool_tests.support.writer import Writer

JOBS = {
    "ok": {"program": {"command": "echo out; echo err >&2"}},
    "fails": {"program": {"command": "printf 'no newline'; exit 3"}},
    "dies": {"program": {"command": "kill -KILL $$"}},
    "is-none": {"program": {"argv": ["/no/such/program"]}},
}


@contextlib.contextmanager
def scheduled(where, spool, tmp_path, jobs):
    """The command of the scheduler, its environment, and the spool's directory."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environ = {**os.environ, "PYTHONPATH": ROOT}
    with contextlib.ExitStack() as stack:
        named = path = spool
        if where == "url":
            agent = stack.enter_context(served(tmp_path))
            named, path = agent.spool_url, agent.spool
            environ["CHAPERONE_TOKEN_FILE"] = str(agent.token_files["run"])
            environ["CHAPERONE_CA"] = str(agent.ca)
        script = f"{ROOT}/docs/examples/scheduler.py"
        yield (
            [sys.executable, script, tmp_path / "jobs.json", named, tmp_path / "db"],
            environ,
            path,
        )


@pytest.mark.parametrize("where", ["path", "url"])
def test_ending_whose_entry_comes_after_a_restart_is_collected(spool, tmp_path, where):
    jobs = {run_id: {"program": {"argv": ["true"]}} for run_id in ("first", "last")}
    with (
        scheduled(where, spool, tmp_path, jobs) as (command, environ, path),
        Writer(path, "first", "1" * 32) as first,
        Writer(path, "last", "2" * 32) as last,
    ):
        said = {"stdout": subprocess.PIPE, "env": environ, "text": True}
        with subprocess.Popen(command, **said) as scheduler:
            first.running().publish()
            while not scheduler.stdout.readline().startswith("terminated"):
                pass
            scheduler.kill()
        with subprocess.Popen(command, **said) as scheduler:
            assert scheduler.stdout.readline() == "is there  last\n"
            first.end()
            last.end()
            assert scheduler.stdout.read() == "terminated last 0\n"
        assert scheduler.returncode == 0 and "first" not in os.listdir(path / ".ended")


@pytest.mark.parametrize("where", ["path", "url"])
def test_scheduler_of_the_examples_runs_on_a_path_and_on_a_url(spool, tmp_path, where):
    with scheduled(where, spool, tmp_path, JOBS) as (command, environ, path):
        for _ in range(2):  # the second time there is nothing to do
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(path / ".ended") == []
    with sqlite3.connect(tmp_path / "db") as db:
        rows = db.execute("select run_id, stream, data from output order by 1, 2").fetchall()
        ends = db.execute("select * from ended order by 1").fetchall()
    db.close()
    assert rows == [
        ("fails", "stdout", b"no newline"),
        ("ok", "stderr", b"err\n"),
        ("ok", "stdout", b"out\n"),
    ]
    assert ends == [
        ("dies", "terminated", None, "SIGKILL"),
        ("fails", "terminated", 3, None),
        ("is-none", "error", None, None),
        ("ok", "terminated", 0, None),
    ]
