"""
Which single run may be deleted, and what is said of the others.
"""

import errno
import os

import pytest

from chaperone.errors import NoRunError, SpoolError
from chaperone.spool import gc, locks
from spool_tests.support import disk

pytestmark = pytest.mark.once


def ids(spool):
    return sorted(name for name in os.listdir(spool) if not name.startswith("."))


@pytest.mark.parametrize("collected", [False, True])
def test_one_run_may_be_deleted_collected_or_not(spool, collected):
    for run_id in ("one", "two"):
        run = disk.create(spool, run_id)
        os.write(run.streams["stdout"], bytes(10_000))
        disk.end(run)
    if collected:
        os.unlink(spool / ".ended" / "one")
    assert gc.delete(str(spool), "one") >= 10_000
    assert ids(spool) == os.listdir(spool / ".ended") == ["two"]
    with pytest.raises(NoRunError):
        gc.delete(str(spool), "one")


def test_one_run_is_deleted_while_its_chaperone_is_about_to_exit(spool, monkeypatch):
    ending = disk.create(spool, "ending")
    ending.publish(disk.terminated(ending))
    real = locks.try_share
    probes = []

    def probed(fd):
        probes.append(real(fd))
        if len(probes) == 2:
            ending.close()
        return probes[-1]

    monkeypatch.setattr(locks, "try_share", probed)
    assert gc.delete(str(spool), "ending") > 0
    assert probes == [False, False, True] and ids(spool) == []


def test_one_run_that_has_not_ended_is_refused_with_what_comes_first(spool, monkeypatch):
    monkeypatch.setattr(gc, "LEAVING_S", 0)
    live, ending = disk.not_ended(spool)
    before = disk.tree(spool)
    refused = {
        "live": "it is starting; stop it first",
        "dead": "it is lost; reap it first",
        "adoptable": "it is unattended; adopt it first",
        "ending": "it is terminated; wait for it first",
    }
    for run_id, reason in refused.items():
        with pytest.raises(SpoolError) as caught:
            gc.delete(str(spool), run_id)
        assert str(caught.value) == f"unable to delete run {run_id!r}: {reason}"
        assert caught.value.errno == errno.EBUSY
    assert disk.tree(spool) == before
    live.close(), ending.close()
