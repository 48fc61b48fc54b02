"""
The public names as a caller sees them: which spool `chaperone.Spool` is, and what type checkers
know of it.
"""

import pickle
import subprocess
import sys

import pytest

import chaperone
from chaperone import api
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import absent


def test_spool_of_a_path_is_one_on_this_host(spool):
    for place in (str(spool), spool):
        found = chaperone.Spool(place)
        assert isinstance(found, chaperone.Spool) and isinstance(found, api.Spool)
        assert isinstance(found, chaperone.SpoolLike)
        assert (found.path, repr(found)) == (str(spool), f"Spool({str(spool)!r})")
    assert chaperone.Spool(path="https:").path.endswith("/https:")
    assert not isinstance(str(spool), chaperone.SpoolLike)


def test_spool_can_be_sent_to_another_process(spool):
    sent = pickle.loads(pickle.dumps(chaperone.Spool(spool)))
    assert isinstance(sent, chaperone.Spool) and sent.path == str(spool)


def test_spool_can_be_derived_from(spool):
    class Mine(chaperone.Spool):
        def __init__(self, path, name):
            super().__init__(path)
            self.name = name

    assert (Mine(spool, "etl").path, Mine(spool, "etl").name) == (str(spool), "etl")


@pytest.mark.parametrize("url", ["https://db3:8470/etl", "http://db3/etl"])
def test_spool_of_a_url_is_refused_as_long_as_there_are_no_agents(url):
    with pytest.raises(chaperone.SpecError) as caught:
        chaperone.Spool(url)
    why = "a URL is an agent's, and this version has none"
    assert str(caught.value) == f"unable to open spool {url!r}: {why}"


CONSUMER = """
from datetime import datetime
import chaperone

def count(spool: chaperone.SpoolLike) -> int:
    run = spool.start({"program": {"argv": ["true"]}})
    with spool.follow(spool.cursor(), runs=[run.run_id]) as events:
        for event in events:
            if isinstance(event, chaperone.Ended):
                events.collect(event.run_id)
    return len(spool.all())

def show(status: chaperone.Status) -> tuple[int | None, datetime | None, int | None]:
    return status.pid, status.start_time, status.stdout.bytes

spool = chaperone.Spool("spool")
here: chaperone.Run = spool["r"]
anywhere: chaperone.RunLike = here
count(spool)
show(here.status())
spool.gc(older_s=60)
here.status().pid = 5
"""


@pytest.mark.once
def test_strict_type_checker_takes_a_caller_and_its_mistake(tmp_path):
    try:
        import mypy  # noqa: F401
    except ImportError:
        absent("no mypy: bin/venv installs it")
    (tmp_path / "caller.py").write_text(CONSUMER)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "caller.py"],
        cwd=tmp_path,
        env={"MYPYPATH": ROOT, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = CONSUMER[: CONSUMER.index("here.status().pid = 5")].count("\n") + 1
    mistake = f'caller.py:{line}: error: Property "pid" defined in "Status" is read-only  [misc]'
    mine = [line for line in checked.stdout.splitlines() if line.startswith("caller.py")]
    assert mine == [mistake], checked.stdout + checked.stderr
