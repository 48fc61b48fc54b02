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

JOBS = {
    "ok": {"program": {"command": "echo out; echo err >&2"}},
    "fails": {"program": {"command": "printf 'no newline'; exit 3"}},
    "dies": {"program": {"command": "kill -KILL $$"}},
    "is-none": {"program": {"argv": ["/no/such/program"]}},
}


@pytest.mark.parametrize("where", ["path", "url"])
def test_scheduler_of_the_examples_runs_on_a_path_and_on_a_url(spool, tmp_path, where):
    (tmp_path / "jobs.json").write_text(json.dumps(JOBS))
    environ = {**os.environ, "PYTHONPATH": ROOT}
    with contextlib.ExitStack() as stack:
        named = path = spool
        if where == "url":
            agent = stack.enter_context(served(tmp_path))
            named, path = agent.spool_url, agent.spool
            environ["CHAPERONE_TOKEN_FILE"] = str(agent.token_files["run"])
            environ["CHAPERONE_CA"] = str(agent.ca)
        database = tmp_path / "database"
        command = [sys.executable, f"{ROOT}/docs/examples/scheduler.py", tmp_path / "jobs.json"]
        for _ in range(2):  # the second time there is nothing to do
            done = subprocess.run(
                [*command, named, database], env=environ, capture_output=True, text=True, timeout=60
            )
            assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(path / ".ended") == []
    with sqlite3.connect(database) as db:
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
