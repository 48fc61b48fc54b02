"""
A reader: rules R1-R5 of docs/spool-format.rst, and the frozen samples.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaperone.errors import NoRunError, SpoolError
from chaperone.model import jsontext, transitions
from chaperone.model import status as statuses
from chaperone.model.hops import remote
from chaperone.model.request import Request
from chaperone.spool import format, look, timeline
from spool_tests.support import disk
from spool_tests.support.calls import replace_call
from spool_tests.support.places import ROOT

pytestmark = pytest.mark.once

# -- R1, R3: lock, then status, then the rest


def test_reader_looks_at_the_lock_first_and_at_the_outcome_next(spool, monkeypatch):
    run = disk.create(spool)
    real, opened = os.open, []

    def recorded(name, *rest, **keywords):
        opened.append(name)
        return real(name, *rest, **keywords)

    replace_call(monkeypatch, "open", recorded)
    look.look(run.fd, "r")
    assert opened == ["lock", "status.json", "running.json"]
    run.close()


@pytest.mark.parametrize("moment", [format.LOCK, format.FINAL_STATUS, format.LIVE_STATUS])
@pytest.mark.parametrize("steps", ["published", "cleared", "ended"])
def test_run_that_ends_while_it_is_looked_at_is_live_or_ended_but_never_lost(
    spool, monkeypatch, moment, steps
):
    """
    Just before the reader opens a file, the chaperone takes its last steps, some of them or all.
    """
    run = disk.create(spool)
    disk.running(run)
    run_fd, real = os.dup(run.fd), os.open

    def ending(name, *rest, **keywords):
        if name == moment:
            replace_call(monkeypatch, "open", real)
            run.publish(disk.terminated(run))
            if steps == "cleared":
                for file in ("control", "running.json", ".running.json", "log"):
                    (spool / "r" / file).unlink(missing_ok=True)
            elif steps == "ended":
                run.end()
        return real(name, *rest, **keywords)

    replace_call(monkeypatch, "open", ending)
    alive, status = look.look(run_fd, "r")
    assert (alive, status["state"]) in ((True, "running"), (False, "terminated")) and status[
        "pid"
    ] == 4711
    os.close(run_fd)
    run.close()


def test_readers_of_many_short_runs_lose_no_last_write(spool):
    """The model of the other order lost 34 of 6,000 runs."""
    rounds = 200

    def write():
        for number in range(rounds):
            run = disk.create(spool, f"r{number}")
            disk.running(run)
            os.write(run.streams["stdout"], b"x" * number)
            disk.end(run)

    writer = disk.forked(write)
    with disk.opened(spool) as spool_fd:
        for number in range(rounds):
            while True:
                try:
                    run_fd = format.open_run(spool_fd, f"r{number}")
                except NoRunError:
                    continue
                alive, status = look.look(run_fd, f"r{number}")
                size = os.stat("stdout", dir_fd=run_fd).st_size
                os.close(run_fd)
                assert status["state"] in ("starting", "running", "terminated") and alive == (
                    status["state"] != "terminated"
                )
                if not alive:
                    assert status["stdout"]["bytes"] == size == number
                    break
    assert disk.waited(writer) == 0


def test_killed_chaperones_run_is_lost_at_once(spool):
    pid = disk.held(
        lambda: disk.running(
            disk.create(spool),
            stop={"signal": "SIGTERM", "reason": "request", "by": "ops", "time": "t"},
        )
    )
    assert disk.seen(spool)[0]
    assert disk.killed(pid) == -signal.SIGKILL
    alive, status = disk.seen(spool)
    assert (alive, status["state"], status["pid"], status["complete"]) == (
        False,
        "lost",
        4711,
        False,
    )
    assert (
        status["exception"]["message"] == "the chaperone died before the program's end was recorded"
        and status["stop"]["by"] == "ops"
    )


def test_final_state_is_believed_only_where_it_is_published(spool):
    run = disk.create(spool)
    run.replace_running(disk.terminated(run))
    assert (disk.seen(spool)[0], disk.seen(spool)[1]["state"]) == (True, "running")
    run.close()
    assert disk.seen(spool)[1]["state"] == "lost"


def test_run_without_its_lock_is_lost(spool):
    run = disk.create(spool)
    run.close()
    (spool / "r" / "lock").unlink()
    assert disk.seen(spool)[1]["state"] == "lost"


# -- R4: probes


def test_probes_disturb_nobody(spool):
    run = disk.create(spool)
    run_fd = os.dup(run.fd)
    assert look.pulse(run_fd) is True
    run.close()
    with open(spool / "r" / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another reader's probe
        assert look.pulse(run_fd) is False
    (spool / "r" / "lock").unlink()
    assert look.pulse(run_fd) is None
    os.close(run_fd)


def test_probe_is_shared_and_cant_write(spool, monkeypatch):
    run = disk.create(spool)
    real, probes = fcntl.flock, []

    def recorded(fd, how):
        probes.append((how, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE))
        return real(fd, how)

    monkeypatch.setattr(fcntl, "flock", recorded)
    look.look(run.fd, "r")
    assert probes == [(fcntl.LOCK_SH | fcntl.LOCK_NB, os.O_RDONLY)]
    run.close()


# -- unattended


def surviving(spool, lease_s, unheard_s, boot=look.boot_id(), clock_s=0.0):  # noqa: B008  the same all the time
    """
    A run that may survive, whose dead chaperone last heard of it some seconds ago; the wall clock
    was stepped since.
    """
    run = disk.create(spool, on_disconnect="survive", lease=lease_s)
    disk.running(run, boot_id=boot)
    since_boot, now = look.stamp()
    os.utime(run.lock_fd, (since_boot - unheard_s, now - unheard_s + clock_s))
    run.close()
    return disk.seen(spool)


@pytest.mark.parametrize("clock_s", [0.0, 86_400.0, -86_400.0])
@pytest.mark.parametrize(
    ("unheard_s", "state"), [(0.0, "unattended"), (99.0, "unattended"), (101.0, "lost")]
)
def test_run_that_may_survive_is_unattended_until_its_lease_is_over(
    spool, clock_s, unheard_s, state
):
    assert surviving(spool, 100, unheard_s, clock_s=clock_s)[1]["state"] == state


@pytest.mark.parametrize(("unheard_s", "state"), [(50.0, "unattended"), (101.0, "lost")])
def test_after_a_boot_the_wall_clock_counts(spool, unheard_s, state):
    assert surviving(spool, 100, unheard_s, boot="another boot")[1]["state"] == state


def test_reader_of_the_lock_file_makes_no_lease_endless(spool):
    """Whoever reads a file may set its atime to the time of day, which is no time since boot."""
    run = disk.create(spool, on_disconnect="survive", lease=100)
    disk.running(run, boot_id=look.boot_id())
    os.utime(run.lock_fd, (time.time(), time.time() - 101))
    run.close()
    assert disk.seen(spool)[1]["state"] == "lost"


def test_heartbeat_renews_the_lease(spool):
    run = disk.create(spool, on_disconnect="survive", lease=100)
    disk.running(run, boot_id=look.boot_id())
    os.utime(run.lock_fd, (0, 0))
    run.touch()
    run.close()
    assert disk.seen(spool)[1]["state"] == "unattended"


# -- R5 and whatever a disk may hold


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "spool"
    path.mkdir(0o700)
    run = disk.create(path)
    disk.running(run)
    yield run, path
    run.close()


FINAL_TEXT = json.dumps(transitions.lost(disk.starting(disk.spec()), "gone")).encode()
contents = st.one_of(
    st.none(),
    st.binary(),
    st.just(b""),
    st.integers(0, len(FINAL_TEXT)).map(lambda size: FINAL_TEXT[:size]),
    st.just(FINAL_TEXT.replace(b"lost", b"newer")),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.dictionaries(st.sampled_from(["spec.json", "running.json", "status.json"]), contents),
    st.booleans(),
)
def test_no_content_of_any_file_makes_a_reader_raise(broken, files, locked):
    run, path = broken
    fcntl.flock(run.lock_fd, fcntl.LOCK_EX if locked else fcntl.LOCK_UN)
    for name in ("spec.json", "running.json", "status.json"):
        (path / "r" / name).unlink(missing_ok=True)
    for name, content in files.items():
        if content is not None:
            (path / "r" / name).write_bytes(content)
    alive, status = disk.seen(path)
    assert status["run_id"] == "r" and alive <= locked
    assert status["state"] in (
        ("starting", "running", "lost", "terminated") if locked else ("lost", "terminated")
    )
    if alive:
        assert status["state"] in ("starting", "running")


def test_huge_file_is_not_read_into_memory(spool):
    run = disk.create(spool)
    os.truncate(spool / "r" / "running.json", jsontext.LIMIT + 1)
    assert disk.seen(spool) == (True, statuses.last_known(None, "r"))
    run.close()


# -- control


def test_request_reaches_the_chaperone(spool):
    run = disk.create(spool)
    look.request(run.fd, "r", Request("stop", 5, by="öps"))
    assert os.read(run.control_fd, 100) == "stop 5.0 by=öps\n".encode()
    run.close()


def test_request_to_nobody_is_told(spool):
    disk.create(spool).close()
    with disk.opened(spool) as spool_fd:
        run_fd = format.open_run(spool_fd, "r")
        for expected in (errno.ENXIO, errno.ENOENT):
            with pytest.raises(NoRunError) as caught:
                look.request(run_fd, "r", Request("stop"))
            assert (str(caught.value), caught.value.errno) == (
                "unable to send a request to run 'r': its chaperone is not running",
                expected,
            )
            (spool / "r" / "control").unlink(missing_ok=True)
        os.close(run_fd)


def test_request_to_a_full_fifo_is_told_and_does_not_block(spool):
    run = disk.create(spool)
    with pytest.raises(SpoolError) as caught:
        for _ in range(100_000):
            look.request(run.fd, "r", Request("signal", signal="USR1"))
    assert (str(caught.value), caught.value.errno) == (
        "unable to send a request to run 'r': Resource temporarily unavailable",
        errno.EAGAIN,
    )
    run.close()


# -- the frozen samples of version 1

DATA = os.path.join(ROOT, "spool_tests", "data", "version-1")
FROZEN = {
    "adoptable": "unattended",
    "cannot-run": "error",
    "connection-lost": "lost",
    "dead": "lost",
    "ended-by-itself": "terminated",
    "ended-by-signal": "terminated",
    "guarded": "terminated",
    "guarded-dead": "lost",
    "just-starting": "lost",
    "leased": "terminated",
    "stopped": "terminated",
    "timed": "terminated",
}


@pytest.fixture
def frozen(tmp_path):
    path = tmp_path / "frozen"
    shutil.copytree(DATA, path, symlinks=True)
    for name in ["", *disk.tree(path)]:
        if not (path / name).is_symlink():
            (path / name).chmod(0o700 if (path / name).is_dir() else 0o600)
    for name in FROZEN:
        if (path / name / "lock").exists():
            os.utime(path / name / "lock")
    return path


def test_frozen_samples_are_read_as_ever(frozen):
    with disk.opened(frozen) as spool_fd:
        assert format.all_ids(spool_fd) == sorted(FROZEN)
        live = ["adoptable", "dead", "guarded-dead", "just-starting"]
        assert format.live_ids(spool_fd) == live and format.ended_ids(spool_fd) == sorted(
            set(FROZEN) - {*live, "stopped"}
        )
    for run_id, state in FROZEN.items():
        alive, status = disk.seen(frozen, run_id)
        assert (alive, status["state"], status["run_id"], status["version"]) == (
            False,
            state,
            run_id,
            1,
        )
        if (frozen / run_id / "status.json").exists():
            written = json.loads((frozen / run_id / "status.json").read_text())
            later = {name: f.unknown for name, f in statuses.FIELDS.items() if name not in written}
            assert status == {**written, **later}


def test_frozen_timeline_is_read_as_ever(frozen):
    reader, offsets, found = timeline.Reader(), dict.fromkeys(format.STREAMS, 0), []
    with open(frozen / "timed" / "timeline", "rb") as file:
        while piece := reader.piece(timeline.File(file.fileno()), offsets, lambda stream: 100):
            offsets[piece[0]] = piece[1]
            found.append((*piece[:2], timeline.timestamp(piece[2])))
    assert found == [
        ("stdout", 4, "2026-11-24T19:54:26.140Z"),
        ("stderr", 4, "2026-11-24T19:54:26.140Z"),
        ("stdout", 9, "2026-11-24T19:54:27.145Z"),
    ]


def test_frozen_samples_were_never_edited():
    listing = subprocess.run(
        (
            "find . -type f | LC_ALL=C sort | xargs sha256sum; "
            "find . -type l | LC_ALL=C sort | xargs readlink"
        ),
        shell=True,
        cwd=DATA,
        capture_output=True,
        check=True,
    )  # noqa: S602
    with open(os.path.join(DATA, "..", "version-1.sums"), "rb") as sums:
        assert listing.stdout == sums.read()


def test_new_files_have_the_fields_of_the_frozen_ones(spool):
    """
    A field of a status stays; a new one is what rule R5 promised to old readers. A new field of a
    spec is a new version, or freezes a sample.
    """
    run = disk.create(spool)
    disk.running(run)
    with open(os.path.join(DATA, "guarded-dead", "running.json")) as file:
        written = set(json.loads((spool / "r" / "running.json").read_text()))
        assert set(json.load(file)) <= written == set(statuses.FIELDS)
    with open(os.path.join(DATA, "leased", "spec.json")) as file:
        assert set(json.load(file)) == set(json.loads((spool / "r" / "spec.json").read_text()))
    disk.end(run)
    with open(os.path.join(DATA, "guarded", "status.json")) as file:
        written = set(json.loads((spool / "r" / "status.json").read_text()))
        assert set(json.load(file)) <= written == set(statuses.FIELDS)
    assert sys.version_info >= (3, 10)


# -- what a person asks: sizes now, the host


def test_present_status_has_the_sizes_of_this_moment(spool):
    run = disk.create(spool)
    disk.running(run)
    os.write(run.streams["stdout"], b"12345")
    spool_fd = format.open_spool(str(spool))
    assert look.present(spool_fd, "r")["stdout"]["bytes"] == 5
    os.unlink(spool / "r" / "stderr")
    os.mkfifo(spool / "r" / "stderr")  # not a file of ours
    assert look.present(spool_fd, "r")["stderr"]["bytes"] == 0
    os.close(spool_fd)
    run.close()


HOPS = remote.hops({"host": "db3", "user": "etl"})


@pytest.mark.parametrize(
    ("facts", "spec", "host"),
    [
        ({"chaperone_host": os.uname().nodename}, {}, "here"),
        ({"chaperone_host": None}, {}, "here"),
        ({"chaperone_host": "db4"}, {}, "db4"),
        ({"connection": {"state": "up"}}, {"remote": {"hops": HOPS}}, "db3"),
        ({"start_time": None}, {"remote": {"hops": HOPS}}, "db3"),
        ({"start_time": None, "chaperone_host": "db4"}, {"remote": None}, "db4"),
        ({"connection": {}}, {"remote": {"hops": [{"teleport": {}}]}}, "-"),
        ({"connection": {}}, {"remote": "db3"}, "-"),
    ],
)
def test_host_is_that_of_the_program(facts, spec, host):
    status = {"connection": None, "start_time": "now", "chaperone_host": "db4", **facts}
    assert look.host(status, lambda: spec) == host
