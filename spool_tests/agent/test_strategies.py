"""
The strategies of docs/agents.rst and their properties: each tick has its test, and the ones that no
other module shows are here.
"""

import pathlib
import re

import pytest

import chaperone
from spool_tests.support.deployed import Far
from spool_tests.support.places import ROOT
from spool_tests.support.receiver_double import ReceiverDouble
from spool_tests.support.waiting import need, until

PATIENCE_S = 60  # for an agent to end, on a busy machine


@pytest.fixture
def far(tmp_path, monkeypatch):
    """Another home directory whose Python has no packages, and one of our own."""
    need("openssl")
    (tmp_path / "host").mkdir()
    there = Far(tmp_path / "host")
    monkeypatch.setenv("HOME", str(there.path / "near"))
    yield there
    there.end()


def test_deployed_agent_reports_events_as_they_happen(far):
    agent = far.deploy()
    spool = chaperone.Spool(f"agent:{agent.path}")
    gate = far.path / "gate"
    script = f"echo first; until [ -e {gate} ]; do sleep 0.02; done; echo second"
    run = spool.start({"id": "r", "program": {"argv": ["/bin/sh", "-c", script]}})
    heard = b""
    for data in run.tail():
        heard += data
        if heard == b"first\n":  # it came while the program runs
            gate.touch()
    assert (heard, run.wait().return_code) == (b"first\nsecond\n", 0)


def test_callback_needs_nothing_installed(far, tmp_path):
    with ReceiverDouble(tmp_path) as receiver:
        agent = far.deploy(single=True)
        callback = receiver.spec(["/bin/true"])["callback"]
        agent.start("r", "/bin/sh", "-c", "echo out; exit 3", callback=callback)
        until(lambda: receiver.final is not None)
        assert bytes(receiver.streams["stdout"]) == b"out\n"
        assert receiver.final["return_code"] == 3
        until(far.is_clean, PATIENCE_S)  # what is acknowledged is collected, and nothing stays


@pytest.mark.once
def test_each_tick_names_a_test():
    text = pathlib.Path(ROOT, "docs/agents.rst").read_text().partition("Five strategies\n")[2]
    tests = {
        name
        for room in ("agent", "farside", "follow")
        for path in pathlib.Path(ROOT, "spool_tests", room).glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    rows = re.findall(r"^([\d, ]+?) {2,}(\S.*?) {2,}``(test_\w+)``$", text, re.M)
    assert len(rows) == 25
    assert [name for _, _, name in rows if name not in tests] == []
    properties = re.findall(r"^([a-z][\w ]+?) {2,}(?:yes|no) ", text, re.M)
    assert len(properties) == 7
    shown = {(number, what) for numbers, what, _ in rows for number in re.findall(r"\d", numbers)}
    ticked = {(str(number), what) for what in properties for number in range(1, 6)}
    assert ticked - shown == {
        ("1", "no ssh required"),
        ("1", "valid TLS certificate"),
        ("5", "no external setup per host"),
        ("5", "no code left behind"),
    }
