"""
What tests share: waiting for a condition, a spool that must be left clean, and chaperones run the
way a scheduler runs them.

Knows: processes that this test started (by a token in their environment).  Must not know: how
chaperone works inside.
"""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import uuid

import hypothesis
import pytest

from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.processes import (
    SERVERS,
    children,
    open_fds,
    processes_with,
    reap_children,
    ssh_masters,
)
from spool_tests.support.rows import rows

# Fixtures of the whole session. Here alone: a module that named them would get servers of its own,
# whose users and networks have the same names.
from spool_tests.support.sshd import network, sshd, sshd_with  # noqa: F401

# What only `bin/test --long TIER` runs, because it needs more than the other tests.
TIERS = ("worlds", "engines", "agents", "page", "airflow")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms too")
    parser.addoption(
        "--tier", action="append", default=[], choices=[*TIERS, "all"], help="run its tests alone"
    )


def pytest_configure():
    """
    As a terminal does it: in the background of a script SIGINT and SIGQUIT are ignored, by nohup
    SIGHUP, and so they would be in programs of tests.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # How long an example takes says how busy the machine is, and nothing of the code.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any load", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("any load")


def pytest_collection_modifyitems(config, items):
    """
    Leave out, before it starts, what can't be shown by this user; each such test is shown by the
    other run of bin/test.
    """
    root = os.geteuid() == 0
    again = bool(os.environ.get("TESTS_RAN_AS_ROOT"))
    out = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        assert not {"user", "once"} <= marks, f"{item.nodeid}: it would be in neither run"
        if (
            ("root" in marks and not root)
            or ("user" in marks and root)
            or ("once" in marks and again)
            or ("long" in marks and not config.option.long)
            or not in_tier(item, config.option.tier)
        ):
            out.append(item)
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def in_tier(item, asked):
    """Whether a test is in a tier that was asked for; without one, whether it is in none."""
    marker = item.get_closest_marker("tier")
    if marker is None:
        return not asked or "all" in asked
    assert marker.args[0] in TIERS, f"{item.nodeid}: no such tier: {marker.args[0]!r}"
    return marker.args[0] in asked or "all" in asked


def to_act_on(stats, words):
    """At most ten lines: what passed, how to run again what failed, what was missing."""
    count = {kind: len(stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    lines = [", ".join(f"{number} {kind}" for kind, number in count.items())]
    user = "root" if os.geteuid() == 0 else "user"
    for report in [*stats.get("failed", []), *stats.get("error", [])][:5]:
        lines.append(f"again: bin/test --as {user} {words} '{report.nodeid}'")
    reasons = [report.longrepr[2] for report in stats.get("skipped", [])]
    for reason in sorted(set(reasons), key=reasons.count, reverse=True)[:4]:
        lines.append(f"{reasons.count(reason)} skipped: {reason.removeprefix('Skipped: ')}")
    return lines


@pytest.fixture
def told(record_property):
    """Say a line (str) in the summary of the whole run, of what passed too."""
    return lambda line: record_property("told", line)


def pytest_terminal_summary(terminalreporter, config):
    if config.option.tier:
        words = " ".join(f"--long {name}" for name in config.option.tier)
        terminalreporter.section("what to do")
        for line in (*rows(terminalreporter.stats), *to_act_on(terminalreporter.stats, words)):
            terminalreporter.write_line(line)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, line in (
                getattr(report, "user_properties", ())
                if getattr(report, "when", None) == "call"
                else ()
            ):
                if name == "told":
                    terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """Modules are compiled once, before the first start that would do without its .pyc."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def undisturbed():
    """
    What `bin/test &` and nohup leave ignored, every process of every test would ignore as well.
    """
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture
def spool(tmp_path, monkeypatch):
    """
    The path (pathlib.Path) of an empty spool, 0700, in `CHAPERONE_SPOOL` too.

    At the end of the test what still runs in it is asked to end through its control FIFO. Then
    nothing may be left: a process that lives on, or an fd of ours, fails the test (after SIGKILL,
    by pid, to what carries this test's token).
    """
    token = f"TEST_TOKEN={uuid.uuid4().hex}"
    monkeypatch.setenv("TEST_TOKEN", token.partition("=")[2])
    path = tmp_path / "spool"
    path.mkdir(0o700)
    monkeypatch.setenv("CHAPERONE_SPOOL", str(path))
    before = open_fds(str(tmp_path))
    yield path
    for control in path.glob("*/control"):
        try:
            fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:  # its chaperone is gone
            continue
        with open(fd, "wb", buffering=0) as fifo:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):  # a test may have planted anything there
                fifo.write(b"kill by=teardown\n")
    deadline = time.monotonic() + 120
    while (
        left := processes_with(token.encode(), os.fsencode(tmp_path))
    ) and time.monotonic() < deadline:
        for pid in ssh_masters(token.encode()):  # each ends when it was idle for a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        reap_children()
        time.sleep(0.005)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert not left, f"left running: {left}"
    reap_children()
    assert open_fds(str(tmp_path)) == before, "left open"


@pytest.fixture(autouse=True)
def leaves_no_child():
    """
    What a test has started it has waited for: an ended child left behind would answer the next
    test's `waitpid(-1)`.
    """
    before = children()
    yield
    left = {
        pid: command
        for pid, command in children().items()
        if pid not in before and pid not in SERVERS
    }
    assert not left, f"left unreaped: {left}"


@pytest.fixture
def chaperone(spool):
    """
    Run `chaperone ARGUMENTS...` to its end and return the subprocess.CompletedProcess, its streams
    as text.

    `spec` (dict) goes to standard input as JSON, for a SPEC of `-`; other keywords are those of
    subprocess.run.
    """

    def run(*arguments, spec=None, timeout=300, **keywords):
        keywords.setdefault("stdin", subprocess.DEVNULL)
        if spec is not None:
            del keywords["stdin"]
            keywords["input"] = json.dumps(spec)
        if not {"stdout", "stderr"} & set(keywords):
            keywords["capture_output"] = True
        return subprocess.run(
            [*CHAPERONE, *map(str, arguments)], timeout=timeout, text=True, **keywords
        )

    return run


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """A directory, with `chaperone` and the `python3` that runs it on PATH."""
    (tmp_path / "bin").mkdir()
    os.symlink(f"{ROOT}/bin/chaperone", tmp_path / "bin/chaperone")
    # Not a link: that would not find what is installed beside the interpreter.
    python = tmp_path / "bin/python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    return tmp_path


@pytest.fixture
def held(spool, chaperone):
    """
    Start a run that goes on in the background (`chaperone run --detach`), and return its run
    directory (pathlib.Path), visible by then.
    """

    def start(spec, *arguments, **keywords):
        # Its streams are not ours to hold: a pipe would stay open for as long as the chaperone
        # lives, if it kept them.
        result = chaperone("run", "--detach", *arguments, "-", spec=spec, **keywords)
        assert result.returncode == 0, result.stderr
        return spool / result.stdout.strip()

    return start
