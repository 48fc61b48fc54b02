"""
Killed before and after each system call that changes something: what is on disk is true, nothing
runs on, and nothing runs twice.
"""

import os
import random
import shutil
import time
import uuid
import zlib

import pytest

from spool_tests.support import crash, victims
from spool_tests.support.far_victims import KINDS
from spool_tests.support.waiting import need

pytestmark = pytest.mark.once

server = victims.server

SHARDS = 4  # of the long form, so that the points spread over workers
SHORT_S = 1.2  # what the short form spends on a kind, and two points at least


# -- all of it

POINTS = {}


def points(kind, place, server, traces=1):
    """
    The crash points of a kind, found once in each worker; no two runs over ssh take the same way.
    The runs that find them are checked as well.
    """
    if kind not in POINTS:
        found = {}
        for _ in range(traces):
            directory = place / "points"
            directory.mkdir()
            traced, tracer = KINDS[kind](directory, server), crash.Tracer(directory)
            traced.prepare()
            traced.trace(tracer)
            found.update(tracer.points(str(traced.spool)))
            traced.check()
            shutil.rmtree(directory)
        POINTS[kind] = found
    return POINTS[kind]


def came_to_kill(kind, place, server, point, words, patient=False):
    """Kill at a point and check; whether it came to that."""
    directory = place / words.replace(" ", "-")
    directory.mkdir()
    try:
        killed, tracer = KINDS[kind](directory, server), crash.Tracer(directory, point)
        killed.patient = patient
        killed.prepare()
        killed.trace(tracer)
        reached = tracer.has_killed()
        killed.check()
    except BaseException as error:
        raise AssertionError(f"{kind}, killed {words}") from error
    shutil.rmtree(directory)
    return reached


@pytest.fixture
def far(request, kind):
    """The sshd, for a kind that needs one."""
    return request.getfixturevalue("server") if KINDS[kind].over_ssh else None


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_some_calls_it_leaves_a_true_spool(spool, tmp_path, far, kind, told):
    """As many points as fit into a moment, others each time; CRASH_SEED repeats a choice."""
    need("strace")
    seed = os.environ.get("CRASH_SEED", uuid.uuid4().hex[:8])
    found = points(kind, tmp_path, far)
    chosen = list(found.items())
    random.Random(f"{seed} {kind}").shuffle(chosen)
    began, tried = time.monotonic(), 0
    for point, words in chosen:
        came_to_kill(kind, tmp_path, far, point, words)
        tried += 1
        if tried >= 2 and time.monotonic() - began > SHORT_S:
            break
    told(f"{kind}: {tried} of {len(found)} crash points, CRASH_SEED={seed}")


@pytest.mark.long
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_call_it_leaves_a_true_spool(spool, tmp_path, far, kind, shard, told):
    need("strace")
    found = {
        point: words
        for point, words in points(kind, tmp_path, far, 3).items()
        if zlib.crc32(repr(point).encode()) % SHARDS == shard
    }
    missed = [
        words
        for point, words in found.items()
        if not any(came_to_kill(kind, tmp_path, far, point, words, True) for _ in range(3))
    ]
    told(
        f"{kind}, part {shard + 1} of {SHARDS}: killed at {len(found) - len(missed)} "
        f"of {len(found)} crash points; not come to: {missed}"
    )
    # How a connection's bytes come, and how many processes there are to look at, is another number
    # of calls each time.
    assert len(missed) <= len(found) / 2


def test_points_are_what_changes_something(spool, tmp_path):
    """The list is not kept by hand; but what must be in it is known."""
    need("strace")
    found = points("Cold", tmp_path, None)
    names = {name for name, _ in found}
    assert {
        "mkdirat",
        "symlinkat",
        "renameat",
        "pwrite64",
        "fsync",
        "unlinkat",
        "flock",
        "readv",
        "close",
    } <= names
    assert names & {"clone", "clone3", "vfork", "fork"} and len(found) > 120


def test_call_that_is_new_on_the_path_is_a_new_point_by_itself(tmp_path):
    """
    One that no list of ours has a word for, too; what only looks is none, nor what comes before the
    spool is named.
    """
    lines = [
        'openat(3, "x.pyc", O_RDONLY|O_CLOEXEC) = 4',
        'unlink("before") = 0',
        'mkdirat(AT_FDCWD, "/spool", 0700) = 0',
        "fstat(4, {}) = 0",
    ]
    (tmp_path / "trace").write_text("\n".join(lines) + "\n")
    tracer = crash.Tracer(tmp_path)
    assert tracer.points("/spool") == {
        ("mkdirat", 1): "before mkdirat 1",
        ("fstat", 1): "after mkdirat 1",
    }
    lines[3:3] = ['futurecallat(4, "y") = 0', 'unlink("z") = 0']
    (tmp_path / "trace").write_text("\n".join(lines) + "\n")
    assert list(tracer.points("/spool").items()) == [
        (("mkdirat", 1), "before mkdirat 1"),
        (("futurecallat", 1), "before futurecallat 1"),
        (("unlink", 2), "before unlink 2"),
        (("fstat", 1), "after unlink 2"),
    ]


@pytest.mark.parametrize("kind", ["SurviveSsh"])
def test_run_that_never_began_is_told_where_there_was_no_run_before(spool, tmp_path, far, kind):
    """
    Its directory's parent is not there: the far side has to make it, or could not say that it knows
    nothing.
    """
    need("strace")
    assert came_to_kill(kind, tmp_path, far, ("dup2", 2), "before it connects")


@pytest.mark.parametrize("kind", ["Survive", "SurviveSsh"])
def test_far_side_forgets_no_outcome_that_is_not_published(spool, tmp_path, far, kind):
    """Killed when all was copied, in the moment before it publishes."""
    need("strace")
    assert came_to_kill(kind, tmp_path, far, ("ftruncate", 1), "before it publishes")


@pytest.mark.parametrize("kind", ["AdoptSsh"])
def test_adopter_that_dies_at_once_leaves_no_connection_open(spool, tmp_path, far, kind):
    """
    Its far side ends in the middle of its own start, with children that have not yet become what
    they are to be.
    """
    need("strace")
    assert came_to_kill(kind, tmp_path, far, ("utimensat", 1), "at its first record")
