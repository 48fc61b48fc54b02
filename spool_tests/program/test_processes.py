"""The processes below one, found by the kernel's own list."""

import os
import signal
import subprocess

import pytest

from chaperone.program import processes
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import until


@pytest.fixture
def family():
    """A shell, its child and its grandchild."""
    shell = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60; true' & wait"], start_new_session=True)
    until(lambda: len(processes.descendants(shell.pid)) == 2)
    yield shell.pid
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()


def test_descendants_are_found_parents_first(family):
    child, grandchild = processes.descendants(family)
    assert processes.children(family) == [child] and processes.children(child) == [grandchild]
    assert processes.descendants(family, but=(child,)) == []


def test_a_process_that_is_gone_has_no_children():
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert processes.children(gone.pid) == [] and processes.group_of(gone.pid) is None
    assert processes.signal_each([gone.pid], signal.SIGTERM) == []


@pytest.mark.parametrize("group", [1, 0, -1])
def test_a_group_that_is_everybody_is_never_signalled(group):
    with pytest.raises(
        ValueError, match=f"^unable to signal process group {group}: want one above 1$"
    ):
        processes.signal_group(group, signal.SIGTERM)


def test_a_subreaper_gets_its_orphans():
    code = """if True:
        import os, sys, subprocess
        sys.path.insert(0, sys.argv[1])
        from chaperone.program import processes
        processes.become_subreaper()
        subprocess.run(["sh", "-c", "setsid sleep 60 & exit 0"])
        [orphan] = processes.children(os.getpid())
        os.kill(orphan, 9)
        os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
        processes.reap_orphans((orphan,))
        assert processes.children(os.getpid()) == [orphan]
        processes.reap_orphans(())
        assert processes.children(os.getpid()) == []"""
    root = ROOT
    assert (
        subprocess.run(
            [os.sys.executable, "-I", "-c", code, root], timeout=60, check=False
        ).returncode
        == 0
    )
