"""
A run directory in which a file is torn, empty, garbage or something else: readers give a state,
verbs a sentence, and nothing raises.
"""

import json
import os
import signal
import subprocess

import pytest

from chaperone.api import Spool
from chaperone.errors import ChaperoneError, SpecError, SpoolError
from chaperone.farside.connect import slots
from chaperone.follow.batches import Outbox
from chaperone.launch import client
from chaperone.launch import start as starting
from chaperone.model import status as statuses
from chaperone.spool import format, gc
from chaperone.spool import reap as reaping
from spool_tests.support.places import CHAPERONE
from spool_tests.support.users import said
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

GARBAGE = bytes(range(256)) * 4
DAMAGES = {
    "gone": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.old[: len(path.old) // 2]),
    "garbage": lambda path: path.write_bytes(GARBAGE),
    "other-json": lambda path: path.write_text('[1, {"state": []}]'),
    "odd-types": lambda path: path.write_text(
        json.dumps(odd(json.loads(path.old)) if path.old[:1] == b"{" else {"state": 3})
    ),
    "newer": lambda path: path.write_text(
        json.dumps(
            {
                **(json.loads(path.old) if path.old[:1] == b"{" else {}),
                "version": 99,
                "quantum": [1],
            }
        )
    ),
    "deep": lambda path: path.write_text("[" * 100_000),
}
PLANTED = {
    "directory": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "symlink": lambda path: path.symlink_to(
        next(above / "bait" for above in path.parents if (above / "bait").exists())
    ),
    "dangling": lambda path: path.symlink_to("nowhere"),
}
FILES = [
    format.SPEC,
    format.FINAL_STATUS,
    format.LIVE_STATUS,
    format.LOCK,
    "stdout",
    "stderr",
    format.TIMELINE,
    format.LOG,
    format.CONTROL,
    format.RESERVED,
    format.BUILDING,
]


@pytest.fixture(autouse=True)
def bait(tmp_path):
    """What planted links lead to: whoever follows one changes it, the end of a test included."""
    path = tmp_path / "bait"
    path.write_text("bait\n")
    yield
    assert path.read_text() == "bait\n"


def odd(value):
    """Every field of another type than it should be."""
    return {
        name: "x" if not isinstance(field, str) else [field] for name, field in value.items()
    } | {"state": value.get("state")}


def damaged(path, how):
    """Replace a file of a run directory, or make what was not there."""
    kind = type(path)
    old = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)

    class Place(kind):
        pass

    place = Place(path)
    place.old = old
    (DAMAGES | PLANTED)[how](place)


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """
    A spool with an ended run and one with a run whose chaperone was killed, by real ones; to be
    copied.
    """
    place = tmp_path_factory.mktemp("dead")
    for kind, text, output in (
        ("ended", "echo out; echo err >&2; exit 3", {}),
        ("killed", "echo out; echo err >&2; exec sleep 60", {}),
        ("ended-timed", "echo out; echo err >&2; exit 3", {"timeline": True}),
        ("killed-timed", "echo out; echo err >&2; exec sleep 60", {"timeline": True}),
    ):
        path = place / kind
        chaperone = begun(path, text, output=output)
        if text.endswith("sleep 60"):
            until(lambda path=path: (path / "r" / "stderr").read_bytes() == b"err\n")
            status = until(
                lambda path=path: (
                    (found := json.loads((path / "r" / "running.json").read_text()))["state"]
                    == "running"
                    and found
                )
            )
            os.kill(status["chaperone_pid"], signal.SIGKILL)
            until(lambda status=status: not os.path.exists(f"/proc/{status['pid']}"))
        chaperone.wait(60)
    return place


def begun(path, text, **spec):
    """A chaperone (subprocess.Popen) that holds a run `r`, visible by now."""
    command = [*CHAPERONE, "run", "--spool", str(path), "-"]
    chaperone = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    chaperone.stdin.write(json.dumps({"id": "r", "program": {"command": text}, **spec}).encode())
    chaperone.stdin.close()
    assert chaperone.stdout.readline() == b"r\n"
    chaperone.stdout.close()
    return chaperone


@pytest.fixture
def run(spool, dead):
    """An ended run, or one whose chaperone was killed."""

    def make(killed, name=""):
        kind = ("killed" if killed else "ended") + ("-timed" if name == format.TIMELINE else "")
        subprocess.run(["cp", "-a", f"{dead}/{kind}/.", spool], check=True)
        return spool / "r"

    return make


def readers(path):
    """All that look, from Python: a state, or one sentence; then all that change."""
    with Spool(path).follow() as follower:
        while follower.next(0) is not None:
            pass
    with Outbox(path) as outbox:
        outbox.batch(0)
    reads = (
        lambda run: run.read(),
        lambda run: run.read("stderr", 2),
        lambda run: run.wait(0),
        lambda run: run.spec(),
    )
    for read in reads:
        try:
            read(Spool(path)["r"])
        except ChaperoneError as error:
            assert "\n" not in str(error)
    assert (
        gc.gc(
            str(path), older_s=-1, keep_failed_s=9, max_bytes=0, dry_run=True, uncollected=True
        ).failed
        is not None
    )


def verbs(path):
    """All the verbs that only look; each exits, none with a traceback or a bug's exit code."""
    looks = (
        ["ls", "--all"],
        ["ls", "--json"],
        ["status", "r"],
        ["tail", "r"],
        ["tail", "--timestamps", "r"],
        ["wait", "r"],
    )
    asked = [[*words, "--spool", path] for words in looks]
    for words, (code, text) in zip(asked, said(path.parent, *asked), strict=True):
        assert "Traceback" not in text and code != os.EX_SOFTWARE, (words, code, text)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dead_run", [False, True], ids=["ended", "killed"])
def test_damage_is_told_and_never_raised(run, dead_run, name, how):
    path = run(dead_run, name)
    damaged(path / name, how)
    seen = Spool(path.parent)["r"].status()
    assert seen.state in statuses.STATES
    if name not in (format.FINAL_STATUS, format.LOCK, format.LIVE_STATUS) and not dead_run:
        assert (seen.state, seen.return_code) == ("terminated", 3)
    if dead_run and name not in (format.FINAL_STATUS, format.LOCK):
        assert seen.state == "lost"
    readers(path.parent)
    if how == "torn":
        verbs(path.parent)
    reaping.reap(str(path.parent))
    assert Spool(path.parent)["r"].status().state in statuses.STATES
    gc.gc(str(path.parent), older_s=-1, uncollected=True)


@pytest.mark.parametrize("how", PLANTED)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_ours_is_refused_in_a_sentence(run, name, how):
    """Also for `ls` of the whole spool: the runs beside it are listed."""
    path = run(True, name)
    damaged(path / name, how)
    try:
        assert Spool(path.parent)["r"].status().state in statuses.STATES
    except SpoolError as error:
        assert str(error).startswith(f"unable to open '{name}': ") and "\n" not in str(error)
    verbs(path.parent)
    reaping.reap(str(path.parent))
    if how in ("symlink", "dangling"):
        assert not os.path.lexists(path / name) or os.path.islink(path / name)
    assert not (path / "nowhere").exists()


# -- under a chaperone that lives


# Not its lock and its FIFO, nor the final status, which only it writes: a planted one is what
# readers believe until then.
LIVE_FILES = [
    name for name in FILES if name not in (format.LOCK, format.CONTROL, format.FINAL_STATUS)
]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("survives", [False, True], ids=["kill", "survive"])
def test_damage_under_a_live_chaperone_harms_no_run(spool, survives, how):
    """
    All of its files at once: it holds the streams and its reserved room open, and asks the disk for
    nothing else.
    """
    go = spool.parent / "go"
    chaperone = begun(
        spool,
        f"echo out; until [ -e {go} ]; do sleep 0.01; done; exit 3",
        output={"timeline": True},
        **({"on_disconnect": "survive"} if survives else {}),
    )
    until(lambda: (spool / "r" / "stdout").read_bytes() == b"out\n")
    until(lambda: json.loads((spool / "r" / "running.json").read_text())["state"] == "running")
    for name in LIVE_FILES:
        damaged(spool / "r" / name, how)
    assert Spool(spool)["r"].status().state in statuses.LIVE
    readers(spool)
    go.touch()
    assert chaperone.wait(60) == os.EX_OK
    final = json.loads((spool / "r" / "status.json").read_text())
    assert (final["state"], final["return_code"], final["stdout"]["bytes"]) == ("terminated", 3, 4)
    assert sorted(os.listdir(spool / ".ended")) == ["r"] and not os.listdir(spool / ".running")


# -- other files of a spool


@pytest.mark.parametrize("how", [*DAMAGES, *PLANTED])
@pytest.mark.parametrize("name", [format.LAUNCHER, format.LAUNCHER_LOCK, f"{format.LAUNCHER}.new"])
def test_damage_where_the_launcher_is_costs_a_cold_start_and_nothing_else(
    spool, monkeypatch, name, how
):
    monkeypatch.setattr(client, "ON_DEMAND_IDLE_S", 0.05)
    damaged(spool / name, how)
    starting.start(str(spool), {"id": "r", "program": {"argv": ["true"]}}, warm=True)
    assert Spool(spool)["r"].wait(60).return_code == 0
    done = subprocess.run(
        [*CHAPERONE, "launcher", "--idle", "0.01", "--spool", str(spool)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "") or (
        done.returncode == os.EX_IOERR and done.stderr.startswith("chaperone: unable to ")
    )


@pytest.mark.parametrize("how", [*DAMAGES, *PLANTED])
@pytest.mark.parametrize(
    "name", [format.CONNECT, f"{format.CONNECT}/{slots.slot_names('127.0.0.1,1')[0]}"]
)
def test_damage_where_slots_are_keeps_nobody_from_connecting(spool, name, how):
    if name != ".connect":
        (spool / ".connect").mkdir(0o700)
    damaged(spool / name, how)
    chaperone = begun(
        spool,
        "true",
        remote={"host": "127.0.0.1", "port": 1, "options": {"UserKnownHostsFile": "/dev/null"}},
        timeouts={"connect": 0.1},
    )
    assert chaperone.wait(60) == os.EX_OK
    used = set(os.listdir(spool / ".connect")) if (spool / ".connect").is_dir() else set()
    assert used <= set(slots.slot_names("127.0.0.1,1")), "another name was damaged than is used"
    status = Spool(spool)["r"].status()
    assert (status.state, status.started) == ("error", False) and status.exception["stage"] in (
        "connect",
        "far-side",
    )


@pytest.mark.parametrize("how", [*DAMAGES, *PLANTED])
@pytest.mark.parametrize(
    "name",
    [
        ".running/r",
        ".ended/r",
        ".running",
        ".ended",
        ".running/other",
        ".other.0123.new",
        ".other.0123.gone",
    ],
)
def test_damage_where_entries_are_is_no_run_and_no_fault(run, name, how):
    """A sentence at most; and the run that is there is told as it is."""
    path = run(False)
    place = path.parent / name
    if place.is_dir() and not place.is_symlink():
        subprocess.run(["rm", "-r", place], check=True)
    damaged(place, how)
    assert Spool(path.parent)["r"].status().return_code == 3
    for act in (
        lambda: readers(path.parent),
        lambda: reaping.reap(str(path.parent)),
        lambda: Spool(path.parent).collect("r"),
    ):
        try:
            act()
        except SpoolError as error:
            assert str(error).startswith("unable to ") and "\n" not in str(error)
    verbs(path.parent)
    assert Spool(path.parent)["r"].status().return_code == 3


@pytest.mark.parametrize("how", [*DAMAGES, *PLANTED])
def test_damaged_cursor_file_is_refused_in_a_sentence(run, how):
    path = run(False)
    cursor = path.parent.parent / "cursor"
    with Outbox(path.parent, str(cursor)) as outbox:
        assert outbox.batch(5)
    damaged(cursor, how)
    try:
        with Outbox(path.parent, str(cursor)) as outbox:
            outbox.batch(0)
    except (SpecError, SpoolError) as error:
        assert str(error).startswith("unable to ") and "\n" not in str(error)
    else:
        assert how in ("gone", "newer", "dangling")  # begun again, or with a field that is ignored


# -- what a far side keeps of a run that survives


@pytest.mark.parametrize("how", ["gone", "empty", "torn", "garbage"])
@pytest.mark.parametrize("name", ["reader", "attached"])
def test_damage_on_the_far_side_costs_no_outcome(spool, monkeypatch, name, how):
    """
    In the files that say which processes work on the far side; what is lost of the streams and of
    the records is lost.
    """
    monkeypatch.setenv("HOME", str(spool.parent))
    go = spool.parent / "go"
    spec = {"on_disconnect": "survive", "lease": 20, "stop": {"grace_period": 0.2}}
    chaperone = begun(
        spool, f"echo out; echo err >&2; until [ -e {go} ]; do sleep 0.01; done; exit 3", **spec
    )
    until(lambda: (spool / "r" / "stderr").read_bytes() == b"err\n")
    until(lambda: json.loads((spool / "r" / "running.json").read_text())["state"] == "running")
    chaperone.kill()
    chaperone.wait()
    (place,) = (spool.parent / ".chaperone").iterdir()
    overwritten(place / name, how)
    go.touch()
    with subprocess.Popen(
        [*CHAPERONE, "adopt", "r", "--spool", str(spool)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as adopter:
        assert adopter.wait(60) == os.EX_OK
    status = Spool(spool)["r"].status()
    assert (status.state, status.return_code) == ("terminated", 3)


def overwritten(path, how):
    """Damage a file in its place: who holds it open has the damage, too."""
    if how == "gone" or path.is_fifo():
        path.unlink()
        if how != "gone":
            path.write_bytes(GARBAGE)
    else:
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "torn": data[: len(data) // 2], "garbage": GARBAGE}[how])
