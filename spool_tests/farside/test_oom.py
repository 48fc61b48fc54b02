"""`oom` on a far side: what the kernel counted in the program's cgroup, and who sent a SIGKILL."""

import os
import shlex
import subprocess
import sys

import pytest

from spool_tests.support import shells, supervisors
from spool_tests.support.cgroups import EATS, FAKES, fake, inside, memory_cgroup
from spool_tests.support.guarded import text_of
from spool_tests.support.runs import ask, final, py, sh, start, stdout
from spool_tests.support.waiting import until

far, removed = supervisors.far, supervisors.removed

SHELLS = {kind: shells.SH if "in part" in kind or "without" in kind else ["dash"] for kind in FAKES}


@pytest.mark.parametrize(("kind", "shell"), [(kind, sh) for kind in FAKES for sh in SHELLS[kind]])
def test_far_side_says_by_how_much_the_count_moved(shell, kind, far, tmp_path):
    places, file = fake(tmp_path, kind)

    def alter(whole):
        for real, other in places.items():
            whole = whole.replace(real.encode(), other.encode())
        return whole

    text = f"echo oom_kill 5 >{shlex.quote(str(file))}; exit 3" if file else "exit 3"
    run = far(shell, {"argv": ["sh", "-c", text]}, alter=alter)
    said = [word for word in run.wait("end") if word.startswith("oom=")]
    assert said == (["oom=2"] if file else [])
    assert run.outcome()["return_code"] == 3


@pytest.mark.root
@pytest.mark.parametrize("asked", [False, True], ids=["by-the-kernel", "asked-for"])
@pytest.mark.parametrize("life", ["kill", "survive"])
def test_oom_kill_in_the_far_programs_cgroup_is_said(spool, tmp_path, life, asked):
    group = memory_cgroup(spool.parent.name)
    try:
        words = inside(group)
        remote = {"hops": [{"exec": {"argv": words}}], "remote_dir": str(tmp_path / "far")}
        program = py("print(flush=True)\n" + ("import time; time.sleep(1000)" if asked else EATS))
        run = start(spool, program, remote=remote, on_disconnect=life)
        until(lambda: stdout(spool))
        if asked:  # the neighbour, in the same cgroup, is killed in the program's place
            subprocess.run([*words, sys.executable, "-c", EATS], check=False)
            ask(spool, "kill")
        assert run.wait(60) == 0
        status = final(spool)
        assert (status["signal"], status["oom"]) == ("SIGKILL", None if asked else True)
    finally:
        until(lambda: not text_of(f"{group}/cgroup.procs"))
        os.rmdir(group)


@pytest.mark.parametrize("life", ["kill", "survive"])
def test_no_oom_is_said_where_the_kernel_counted_none(spool, tmp_path, life):
    remote = {"hops": [{"exec": {"argv": ["env"]}}], "remote_dir": str(tmp_path / "far")}
    for name, text in (("a", "exit 137"), ("b", "kill -TERM $$"), ("c", "kill -KILL $$")):
        start(spool, sh(text), name, remote=remote, on_disconnect=life).wait(60)
    assert [final(spool, name)["oom"] for name in "ab"] == [False, False]
    assert final(spool, "c")["oom"] in (False, None)  # None: no cgroup here counts
