"""The processes below one: found by the kernel's own list, or by /proc's where it has none."""

import os
import signal
import subprocess

import pytest

from chaperone import tree
from spool_tests.conftest import until


@pytest.fixture
def family():
    """A shell, its child and its grandchild."""
    shell = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60; true' & wait"], start_new_session=True)
    until(lambda: len(tree.descendants(shell.pid)) == 2)
    yield shell.pid
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()


def test_descendants_are_found_parents_first(family):
    child, grandchild = tree.descendants(family)
    assert tree.children(family) == [child] and tree.children(child) == [grandchild]
    assert tree.descendants(family, but=(child,)) == []


def test_both_ways_to_find_children_agree(family):
    assert tree._children_by_stat(family) == tree.children(family)


def test_a_process_that_is_gone_has_no_children():
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert tree.children(gone.pid) == [] and tree.group_of(gone.pid) is None
    assert tree.signal_each([gone.pid], signal.SIGTERM) == 0


@pytest.mark.parametrize("group", [1, 0, -1])
def test_a_group_that_is_everybody_is_never_signalled(group):
    with pytest.raises(ValueError, match=f"^unable to signal process group {group}: want one above 1$"):
        tree.signal_group(group, signal.SIGTERM)


def test_a_subreaper_gets_its_orphans():
    code = """if True:
        import os, sys, subprocess
        sys.path.insert(0, sys.argv[1])
        from chaperone import tree
        tree.become_subreaper()
        subprocess.run(["sh", "-c", "setsid sleep 60 & exit 0"])
        [orphan] = tree.children(os.getpid())
        os.kill(orphan, 9)
        os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
        tree.reap_orphans((orphan,))
        assert tree.children(os.getpid()) == [orphan]
        tree.reap_orphans(())
        assert tree.children(os.getpid()) == []"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(tree.__file__)))
    assert subprocess.run([os.sys.executable, "-I", "-c", code, root], timeout=20, check=False).returncode == 0
