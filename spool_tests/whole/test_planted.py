"""
Planted things: what another user, or a mistake, puts in place of a file of the spool.
"""

import json
import os
import shutil
import stat

import pytest

from spool_tests.support import disk
from spool_tests.support.processes import open_fds, processes_with
from spool_tests.support.users import VERBS, said
from spool_tests.support.waiting import until

# -- planted things

PLANTS = {
    "symlink": lambda path, outside: path.symlink_to(outside / "file"),
    "symlink-to-directory": lambda path, outside: path.symlink_to(outside),
    "dangling": lambda path, outside: path.symlink_to(outside / "nowhere"),
    # By another user, who can only do so where the directory lets others write.
    "hard-link": lambda path, outside: (
        os.link(outside / "file", path),
        path.parent.chmod(0o777),
    ),
    "fifo": lambda path, outside: os.mkfifo(path),
    "directory": lambda path, outside: path.mkdir(),
    "socket": lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o600),
}
RUN_FILES = [
    "spec.json",
    "lock",
    "control",
    "running.json",
    ".running.json",
    ".status",
    "status.json",
    "stdout",
    "stderr",
    "timeline",
    "log",
]
SPOOL_FILES = [
    ".running",
    ".ended",
    ".launcher",
    ".launcher.lock",
    ".launcher.new",
    ".sweep.lock",
    "r",
]


@pytest.fixture
def outside(tmp_path):
    """A directory with a file that no verb may touch; at the end it is as it was."""
    directory = tmp_path / "outside"
    directory.mkdir()
    # What a reader would believe, if it were read: an outcome, a spec, bytes.
    (directory / "file").write_text(
        json.dumps(
            {
                "version": 1,
                "run_id": "r",
                "state": "terminated",
                "return_code": 0,
                "labels": {"stolen": "yes"},
            }
        )
    )
    (directory / "file").chmod(0o640)

    def seen():
        return (
            disk.tree(directory),
            (directory / "file").read_bytes(),
            (directory / "file").stat().st_mode,
        )

    before = seen()
    yield directory
    assert seen() == before, "something outside was changed"


def replaced(path, plant, outside):
    """Put a planted thing in a file's place."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.parent.parent / f"was-{path.name}")
    path.unlink(missing_ok=True)
    PLANTS[plant](path, outside)


def checked(results):
    """
    Each a state, or one sentence a line; nothing from outside is believed or repeated, and nothing
    is our bug.
    """
    for words, (code, text) in results:
        assert code != os.EX_SOFTWARE and "Traceback" not in text and "stolen" not in text, (
            words,
            code,
            text,
        )


def make(spool, state):
    """A run that lives, that died or that has ended; a function to let go of it."""
    run = disk.create(spool)
    disk.running(run)
    if state == "ended":
        disk.end(run)
    elif state == "dead":
        run.close()
    return run.close if state == "live" else lambda: None


# A dead run is looked into by the most verbs; the others differ in which of them wait. Whose file
# it is matters only for links.
LINKS = ("symlink", "hard-link")
CASES = [
    pytest.param(
        state,
        plant,
        marks=() if plant in LINKS else pytest.mark.once if state == "dead" else pytest.mark.long,
        id=f"{state}-{plant}",
    )
    for state in ("live", "dead", "ended")
    for plant in PLANTS
]


@pytest.mark.parametrize(("state", "plant"), CASES)
def test_planted_file_in_a_run_is_followed_by_no_verb(spool, tmp_path, outside, state, plant):
    for name in RUN_FILES:
        let_go = make(spool, state)
        replaced(spool / "r" / name, plant, outside)
        waits = [] if state == "live" else [["wait", "r"], ["tail", "-f", "r"]]
        words = [
            words
            for words in VERBS
            if words[0] not in ("follow", "wait", "launcher") and "-f" not in words
        ] + waits
        checked(zip(words, said(tmp_path, *words), strict=True))
        let_go()
        assert open_fds(str(spool)) == []
        for path in spool.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.once
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", SPOOL_FILES)
def test_planted_file_in_a_spool_is_followed_by_no_verb(spool, tmp_path, outside, name, plant):
    disk.end(disk.create(spool))
    replaced(spool / name, plant, outside)
    (tmp_path / "spec").write_text('{"program": {"argv": ["true"]}}')
    words = [words for words in VERBS if words != ["follow"]]
    words += [
        ["run", "--id", f"r{number}", *options, tmp_path / "spec"]
        for number, options in enumerate(([], ["--detach"], ["--warm"]))
    ]
    words += [["run", "--id", "r", tmp_path / "spec"]]
    checked(zip(words, said(tmp_path, *words), strict=True))
    until(lambda: not processes_with(os.fsencode(spool)))


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_sweep_lock_stops_a_sweep_and_harms_nothing(spool, chaperone, outside, plant):
    disk.end(disk.create(spool))
    PLANTS[plant](spool / ".sweep.lock", outside)
    before = (spool / ".sweep.lock").lstat()
    opened = "open '.sweep.lock':"
    reasons = {
        "symlink": f"{opened} Too many levels of symbolic links",
        "symlink-to-directory": f"{opened} Too many levels of symbolic links",
        "dangling": f"{opened} Too many levels of symbolic links",
        "hard-link": f"use spool {str(spool)!r}: want it writable only by its owner, got mode 0777",
        "fifo": f"{opened} want a file of this user without other hard links",
        "directory": f"{opened} Is a directory",
        "socket": f"{opened} No such device or address",
    }
    for words in (["reap"], ["gc", "--older", "0s"]):
        result = chaperone(*words)
        assert (result.returncode, result.stdout, result.stderr) == (
            os.EX_IOERR,
            "",
            f"chaperone: unable to {reasons[plant]}\n",
        )
    after = (spool / ".sweep.lock").lstat()
    assert os.path.samestat(before, after) and after.st_mode == before.st_mode
    assert (spool / "r" / "status.json").exists()
