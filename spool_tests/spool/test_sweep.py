"""What a sweep, and the look for a prefix, cost beside the history: nothing for a collected run."""

import collections
import os
import time

import pytest

from chaperone.cli import common
from chaperone.errors import NoRunError
from chaperone.spool import format, look
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.calls import replace_call

pytestmark = pytest.mark.once


@pytest.fixture
def calls(monkeypatch):
    """Count the calls that look at a file or list a directory: calls(function) -> Counter."""
    counted = collections.Counter()

    def counting(name, real):
        def call(*arguments, **named):
            counted[name] += 1
            return real(*arguments, **named)

        return call

    for name in ("open", "stat", "fstat", "access", "listdir", "scandir", "unlink"):
        replace_call(monkeypatch, name, counting(name, getattr(os, name)))

    def called(function):
        counted.clear()
        function()
        return dict(counted)

    return called


def collected(spool, count):
    """Runs of the history: a directory, and no entry."""
    for number in range(count):
        (spool / f"old-{number}").mkdir(0o700)
        (spool / f"old-{number}" / "status.json").touch()


def uncollected(spool, run_id):
    (spool / run_id).mkdir(0o700)
    (spool / run_id / "status.json").touch()
    (spool / ".ended" / run_id).symlink_to(f"../{run_id}")


@pytest.fixture
def spool(spool):
    """A spool that was swept before."""
    reap(spool)
    return spool


def long_ago(spool):
    """The directories changed so long before that a further change has another time."""
    for directory in (spool, spool / ".ended"):
        os.utime(directory, (time.time() - 100,) * 2)


def reap(spool):
    return [(found.run_id, found.done) for found in reaping.reap(str(spool))]


def dead(spool, run_id="r"):
    run = disk.create(spool, run_id)
    disk.leave_word(run)
    disk.running(run, boot_id=look.boot_id())
    run.close()


def test_sweep_asks_no_collected_run_for_its_lock(spool, calls):
    dead(spool, "first")
    beside_none = calls(lambda: reap(spool))
    (spool / ".ended" / "first").unlink()
    collected(spool, 50)
    dead(spool, "second")
    assert calls(lambda: reap(spool)) == beside_none


def test_sweep_lists_a_spool_only_if_it_has_changed(spool, calls):
    long_ago(spool)
    after_a_change = calls(lambda: reap(spool))
    after_none = calls(lambda: reap(spool))
    assert after_none["listdir"] < after_a_change["listdir"]


def test_sweep_that_knows_the_spool_still_finds_what_came_since(spool):
    long_ago(spool), reap(spool)
    dead(spool)
    assert reap(spool) == [("r", "lost")]
    long_ago(spool), reap(spool)
    (spool / ".x.1.new").mkdir()
    assert reap(spool) == [(".x.1.new", "swept")]
    long_ago(spool), reap(spool)
    run = disk.create(spool, "half")
    run.publish(disk.terminated(run))
    run.close()
    os.rename(spool / ".running" / "half", spool / ".ended" / "half")
    assert reap(spool) == [("half", "finished")]


def test_change_within_one_tick_of_the_clock_is_found(spool):
    before = os.stat(spool)
    (spool / ".x.1.new").mkdir()
    os.utime(spool, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert reap(spool) == [(".x.1.new", "swept")]


def test_first_sweep_of_a_boot_looks_at_each_run(spool, monkeypatch):
    """A power cut may have taken an entry."""
    long_ago(spool), reap(spool)
    dead(spool)
    (spool / ".running" / "r").unlink()
    assert reap(spool) == [], "in one boot no entry goes by itself"
    monkeypatch.setattr(look, "boot_id", lambda: "00000000-1111-2222-3333-444444444444")
    assert reap(spool) == [("r", "lost")]


def test_what_is_left_as_it_is_is_said_again(spool):
    (spool / ".x.1.new").touch()
    reap(spool), long_ago(spool)
    for _ in range(3):
        assert reap(spool) == [(".x.1.new", "failed")]


def test_prefix_of_a_live_run_needs_no_look_at_the_history(spool, calls):
    def found():
        with format.owned(format.open_spool(str(spool))) as spool_fd:
            assert common.ids_meant(spool_fd, ["r"]) == ["run"]

    uncollected(spool, "run")
    beside_none = calls(found)
    collected(spool, 50)
    assert calls(found) == beside_none


def test_names_are_listed_once_for_all_prefixes(spool, calls):
    def listings(words, meant):
        def found():
            with format.owned(format.open_spool(str(spool))) as spool_fd:
                assert common.ids_meant(spool_fd, words) == meant

        return calls(found).get("listdir", 0)

    collected(spool, 12)
    (spool / "old-1").rename(spool / "older"), (spool / "old-2").rename(spool / "new")
    for run_id in ("a-run", "b-run", "c-run"):
        uncollected(spool, run_id)
    assert listings(["a-run", "new"], ["a-run", "new"]) == 0, "these are no prefixes"
    one = listings(["c"], ["c-run"])
    assert listings(["c", "b-", "a", "new"], ["c-run", "b-run", "a-run", "new"]) == one > 0
    one = listings(["olde"], ["older"])
    assert listings(["olde", "ne", "b"], ["older", "new", "b-run"]) == one


def test_prefix_fits_a_collected_run_only_where_it_fits_no_other(spool):
    collected(spool, 12)
    uncollected(spool, "old-10x")
    (spool / ".running" / "old-3x").symlink_to("../old-3x")  # a start that died
    with format.owned(format.open_spool(str(spool))) as spool_fd:
        assert common.ids_meant(spool_fd, ["old-1"]) == ["old-1"], "an exact id comes first"
        assert common.ids_meant(spool_fd, ["old-10"]) == ["old-10"]
        assert common.ids_meant(spool_fd, ["ol"]) == ["old-10x"]
        words = ["old-11", "ol", "old-10x", "old-11"]
        assert common.ids_meant(spool_fd, words) == ["old-11", "old-10x"]
        (spool / ".ended" / "old-10x").unlink()
        with pytest.raises(NoRunError) as caught:
            common.ids_meant(spool_fd, ["ol"])
    some = "old-0, old-1, old-10, ..."
    assert str(caught.value) == f"unable to find run 'ol': it is ambiguous; it matches: {some}"
