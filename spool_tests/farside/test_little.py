"""
A far host with little: no awk, no setsid, no fractions in sleep, no /proc; real chaperones over a
real sshd.
"""

import os
import shutil
import signal
import tempfile

import pytest

from spool_tests.support import shells, supervisors
from spool_tests.support import sshd as server
from spool_tests.support.far import assert_no_supervisor, far_processes, held, log
from spool_tests.support.runs import final, running, sh, start, stdout
from spool_tests.support.surviving import adopt, connected
from spool_tests.support.waiting import need, until

pytestmark = pytest.mark.root

# ps alone still sees processes, as it does on hosts that never had a /proc.
WITHOUT_PROC = 'mount --rbind /proc "$0" && mount -t tmpfs none /proc && exec "$@"'
PS = """#!/bin/sh
mounted='/bin/mount --rbind "$0" /proc && exec /bin/ps "$@"'
exec /usr/bin/unshare --mount /bin/sh -c "$mounted" {proc} "$@"
"""


@pytest.fixture(scope="module")
def little():
    """Servers, one for each /bin/sh, on whose host the far side finds only what POSIX sh needs."""
    need("sshd", "ssh", "ssh-keygen", "pgrep", "unshare")
    directory = tempfile.mkdtemp(prefix="chaperone-little-")
    proc, path = (os.path.join(directory, name) for name in ("proc", "path"))
    for made in (directory, proc, path):
        os.makedirs(made, exist_ok=True)
        os.chmod(made, 0o755)
    supervisors.only_what_sh_needs(path)
    os.unlink(os.path.join(path, "ps"))
    with open(os.open(os.path.join(path, "ps"), os.O_CREAT | os.O_WRONLY, 0o755), "w") as ps:
        ps.write(PS.format(proc=proc))
    servers = server.Servers(
        prefix=("unshare", "--mount", "/bin/sh", "-c", WITHOUT_PROC, proc),
        more=f"SetEnv PATH={path}:/no/such",
    )
    try:
        yield servers.get
    finally:
        servers.close()
        shutil.rmtree(directory)


SLOW_CAT = """#!/bin/sh
sleep 0.2
exec /bin/cat "$@"
"""


@pytest.mark.parametrize("shell", shells.SH)
def test_sizes_are_those_of_whole_streams(spool, shell, tmp_path):
    """ksh93 waits for the last part of a pipeline alone, and the file was still to be written."""
    need("sshd", "ssh", "ssh-keygen", "pgrep", "unshare")
    path = tmp_path / "path"
    path.mkdir()
    (path / "cat").write_text(SLOW_CAT)
    for made in (tmp_path, path, path / "cat"):
        made.chmod(0o755)
    servers = server.Servers(more=f"SetEnv PATH={path}:/usr/bin:/bin")
    try:
        there = servers.get(shell).remote(remote_dir=str(tmp_path / "far"))
        process = start(spool, sh("echo out; exit 3"), remote=there, on_disconnect="survive")
        assert process.wait(60) == 0
    finally:
        servers.close()
    assert (final(spool)["return_code"], final(spool)["complete"]) == (3, True), log(spool)
    assert stdout(spool) == b"out\n"


@pytest.mark.parametrize("life", ["kill", "survive"])
@pytest.mark.parametrize("shell", shells.SH)
def test_status_and_log_say_what_can_not_be_known(spool, little, shell, life, tmp_path):
    there = {
        "remote": little(shell).remote(remote_dir=str(tmp_path / "far")),
        "on_disconnect": life,
    }
    status = held(
        spool,
        None,
        sh("echo out; cat; echo err >&2; exit 3", stdin="in\n" * 50_000),
        "code",
        **there,
    )
    assert (status["state"], status["return_code"], status["ambiguous"], status["complete"]) == (
        "terminated",
        3,
        False,
        True,
    ), log(spool, "code")
    assert (stdout(spool, "code"), (spool / "code" / "stderr").read_bytes()) == (
        b"out\n" + b"in\n" * 50_000,
        b"err\n",
    )
    assert (
        "the far side has no setsid: the program has no group of its own, and is "
        "stopped process by process"
    ) in log(spool, "code")
    assert (
        "the far side has no /proc that its grep can search: processes that leave "
        "the program's group are not found"
    ) in log(spool, "code")
    assert (status["leftovers"], status["tracking"]) == (None, "group")
    status = held(spool, None, sh("kill -INT $$; sleep 10"), "signal", **there)
    told = (status["return_code"], status["signal"], status["ambiguous"], status["status"])
    assert told == ((None, "SIGINT", False, 2) if shell == "ksh93" else (130, None, True, None)), (
        log(spool, "signal")
    )


@pytest.mark.parametrize("shell", shells.SH)
def test_stop_signal_and_cut_reach_the_program(spool, little, shell, chaperone):
    script = "trap 'echo usr1' USR1; trap '' TERM; sleep 1000 & echo up; while :; do sleep 1; done"
    runs = {
        run_id: start(
            spool, sh(script), run_id, remote=little(shell).remote(), stop={"grace_period": 0.4}
        )
        for run_id in ("stop", "cut")
    }
    for run_id in runs:
        until(lambda run_id=run_id: stdout(spool, run_id) == b"up\n")
    assert chaperone("signal", "stop", "USR1").returncode == 0
    until(lambda: stdout(spool, "stop") == b"up\nusr1\n")
    assert chaperone("stop", "stop").returncode == 0
    os.kill(running(spool, "cut")["connection"]["pid"], signal.SIGKILL)
    until(lambda: not far_processes(spool, "cut"))
    assert [process.wait(60) for process in runs.values()] == [0, 0]
    assert final(spool, "stop")["stop"]["reason"] == "request" and not far_processes(spool, "stop")
    assert final(spool, "cut")["state"] == "lost" and final(spool, "cut")["gone_by"]


@pytest.mark.parametrize("shell", shells.SH)
def test_run_survives_cuts_and_its_chaperone(spool, little, shell, tmp_path):
    there = {
        "remote": little(shell).remote(remote_dir=str(tmp_path / "far")),
        "on_disconnect": "survive",
        "lease": 60,
    }
    process = start(
        spool,
        sh("echo one; while [ ! -e go ]; do sleep 1; done; echo two; exit 5", cwd=str(tmp_path)),
        **there,
    )
    until(lambda: stdout(spool) == b"one\n")
    os.kill(connected(spool)["connection"]["pid"], signal.SIGKILL)
    until(lambda: connected(spool)["connection"]["drops"] == 1)
    process.kill()
    process.wait()
    process = adopt(spool)
    until(lambda: connected(spool)["connection"]["drops"] == 2)
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    assert (final(spool)["state"], final(spool)["return_code"], final(spool)["complete"]) == (
        "terminated",
        5,
        True,
    ), log(spool)
    assert stdout(spool) == b"one\ntwo\n"
    until(lambda: list((tmp_path / "far").iterdir()) == [])
    assert_no_supervisor(little(shell))
