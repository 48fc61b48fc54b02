"""The timeline of a program behind hops: when its bytes came here."""

import os
import signal
import time

from spool_tests.support import surviving
from spool_tests.support.runs import final, sh, start, stdout
from spool_tests.support.surviving import adopt, connected
from spool_tests.support.timelines import lines, timed
from spool_tests.support.waiting import until

remote = surviving.remote
TIMES = {"timeline": True}
WAITS = """echo before; until [ -e go ]; do sleep 0.01; done
    echo while; touch done; until [ -e end ]; do sleep 0.01; done"""


def now_ms():
    return time.time_ns() // 1_000_000


def test_every_byte_over_ssh_has_a_time(spool, sshd, tmp_path):
    begun = now_ms()
    text = "echo out; echo err >&2; until [ -e go ]; do sleep 0.01; done; echo more"
    process = start(spool, sh(text, cwd=str(tmp_path)), remote=sshd.remote(), output=TIMES)
    until(lambda: (timed(spool / "r", "stdout"), timed(spool / "r", "stderr")) == (4, 4))
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["complete"], stdout(spool)) == (True, b"out\nmore\n")
    assert (timed(spool / "r", "stdout"), timed(spool / "r", "stderr")) == (9, 4)
    times = [line[0] for line in lines(spool / "r")]
    assert times == sorted(times) and begun <= times[0] and times[-1] <= now_ms()
    assert len(times) >= 3


def test_bytes_that_waited_for_an_adopter_have_the_time_of_their_arrival(spool, remote, tmp_path):
    program = sh(WAITS, cwd=str(tmp_path))
    process = start(spool, program, remote=remote, on_disconnect="survive", output=TIMES)
    until(lambda: timed(spool / "r", "stdout") == 7)
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    until((tmp_path / "done").exists)
    adopted = now_ms()
    process = adopt(spool)
    (tmp_path / "end").touch()
    assert process.wait(60) == 0
    first, second = lines(spool / "r")
    assert (first[1:], second[1:]) == (("stdout", 0, 7), ("stdout", 7, 6))
    assert first[0] < adopted <= second[0]


def test_cut_connection_leaves_no_gap(spool, sshd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    process = start(
        spool,
        sh(WAITS, cwd=str(tmp_path)),
        remote=sshd.remote(remote_dir=str(tmp_path / ".chaperone")),
        on_disconnect="survive",
        output=TIMES,
    )
    until(lambda: timed(spool / "r", "stdout") == 7)
    os.kill(connected(spool)["connection"]["pid"], signal.SIGKILL)
    (tmp_path / "go").touch()
    (tmp_path / "end").touch()
    assert process.wait(60) == 0
    assert stdout(spool) == b"before\nwhile\n" and timed(spool / "r", "stdout") == 13
