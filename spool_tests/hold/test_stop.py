"""
Stops, signals, limits, and the chaperone's own death.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from chaperone.model import spec as specs
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import ask, final, held, live, log, py, running, sh, start, stdout
from spool_tests.support.waiting import patiently, until

# -- stops, leftovers, signals, requests


STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    "text",
    [
        STUBBORN,
        f'setsid sh -c "{STUBBORN}" & exec sleep 60',
        f'(setsid sh -c "{STUBBORN}" &) & exec sleep 60',
        f'env -i setsid sh -c "{STUBBORN}" & exec sleep 60',
    ],
    ids=["ignores-term", "setsid", "double-fork", "setsid-env-cleared"],
)
def test_stop_ends_the_whole_tree(spool, text):
    chaperone = start(spool, sh(text))
    until(lambda: stdout(spool) == b"ready\n")
    pid = live(spool)["pid"]
    below = until(lambda: descendants(live(spool)["chaperone_pid"]))
    ask(spool, "stop 0.2 by=ops")
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (
        status["stop"]["reason"] == "request"
        and status["stop"]["by"] == "ops"
        and status["pid"] == pid
    )
    assert status["signal"] in ("SIGTERM", "SIGKILL")
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in below))


PARENT = """trap 'echo asked; kill -0 $child && echo child lives; exit 7' TERM
(trap 'echo wrong' TERM; echo ready; while :; do sleep 0.05; done) & child=$!
while :; do wait; done"""


@pytest.mark.parametrize("survives", [False, True], ids=["child", "survive"])
def test_stop_asks_the_program_alone_and_ends_all_after_it(spool, survives):
    asked = {"on_disconnect": "survive", "lease": 20} if survives else {}
    stop = {"to": "program", "grace_period": 20}
    chaperone = start(spool, sh(PARENT), stop=stop, **asked)
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "stop by=ops")
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (status["return_code"], status["stop"]["signal"]) == (7, "SIGTERM")
    assert status["leftovers"] >= 1
    assert stdout(spool).split(b"\n")[:3] == [b"ready", b"asked", b"child lives"]


def test_program_that_ignores_a_stop_to_it_alone_is_killed_with_all_it_started(spool):
    stop = {"to": "program", "grace_period": 0.2}
    text = f"trap '' TERM; sh -c \"{STUBBORN}\" & wait; while :; do sleep 0.05; done"
    chaperone = start(spool, sh(text), stop=stop)
    until(lambda: stdout(spool) == b"ready\n")
    below = until(lambda: descendants(live(spool)["chaperone_pid"]))
    ask(spool, "stop")
    assert chaperone.wait(60) == 0
    assert final(spool)["signal"] == "SIGKILL"
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in below))


def descendants(pid):
    from chaperone.program import processes

    return processes.descendants(pid)


def test_stop_waits_out_its_grace_and_tells_the_signal(spool):
    chaperone = start(
        spool,
        sh("trap 'sleep 0.2; exit 7' TERM; echo ready; while :; do sleep 0.01; done"),
        stop={"grace_period": 20},
    )
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "stop")
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (status["return_code"], status["stop"]["signal"], status["stop"]["by"]) == (
        7,
        "SIGTERM",
        None,
    )


def test_the_stop_signal_is_the_specs(spool):
    chaperone = start(
        spool,
        sh("trap 'exit 9' USR2; echo ready; while :; do sleep 0.01; done"),
        stop={"signal": "USR2"},
    )
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "stop")
    assert chaperone.wait(60) == 0
    assert (final(spool)["return_code"], final(spool)["stop"]["signal"]) == (9, "SIGUSR2")


def test_a_second_stop_shortens_the_grace(spool):
    chaperone = start(spool, sh(STUBBORN), stop={"grace_period": 3600})
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "stop by=first")
    until(lambda: live(spool)["state"] == "stopping")
    ask(spool, "stop 0 by=second")
    assert chaperone.wait(60) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["by"]) == ("SIGKILL", "first")


def test_kill_needs_no_grace(spool):
    chaperone = start(spool, sh(STUBBORN))
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "kill by=me")
    assert chaperone.wait(60) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["signal"]) == ("SIGKILL", "SIGKILL")


@pytest.mark.parametrize("name", ["USR1", "SIGQUIT", "12"])
def test_signal_reaches_the_program_alone(spool, name):
    text = (
        f"trap 'echo got' {specs.signal_name(name)[3:]}; (trap '' INT; "
        "sleep 60) & echo ready; while :; do sleep 0.01; done"
    )
    chaperone = start(spool, sh(text))
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, f"signal {name}")
    until(lambda: stdout(spool) == b"ready\ngot\n")
    ask(spool, "kill")
    assert chaperone.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGCONT])
def test_signals_to_the_chaperone_are_forwarded(spool, number):
    name = signal.Signals(number).name[3:]
    chaperone = start(
        spool, sh(f"trap 'echo got' {name}; echo ready; while :; do sleep 0.01; done")
    )
    until(lambda: stdout(spool) == b"ready\n")
    os.kill(live(spool)["chaperone_pid"], number)
    until(lambda: stdout(spool) == b"ready\ngot\n")
    os.kill(live(spool)["chaperone_pid"], signal.SIGTERM)
    assert chaperone.wait(60) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["by"]) == ("SIGTERM", "SIGTERM")


def test_hangup_of_the_chaperone_changes_nothing(spool):
    chaperone = start(spool, sh("trap 'exit 4' USR1; echo ready; while :; do sleep 0.01; done"))
    until(lambda: stdout(spool) == b"ready\n")
    os.kill(live(spool)["chaperone_pid"], signal.SIGHUP)
    ask(spool, "signal USR1")
    assert chaperone.wait(60) == 0
    assert (final(spool)["return_code"], final(spool)["stop"]) == (4, None)


def test_requests_that_make_no_sense_are_logged(spool):
    chaperone = start(spool, sh("echo ready; exec sleep 60"))
    until(lambda: stdout(spool) == b"ready\n")
    for line in ("hello", "stop soon", "signal NONE", "kill 9", "\x1b[31mred"):
        ask(spool, line)
    fd = os.open(spool / "r" / "control", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, b"x" * 5000)
    until(lambda: len(log(spool)) == 6)
    os.write(fd, b"\nkill\n")
    os.close(fd)
    assert chaperone.wait(60) == 0
    want = "want stop [SECONDS], signal NAME, kill or renew"
    assert log(spool) == [
        f"unable to take the request 'hello': {want}",
        f"unable to take the request 'stop soon': {want}",
        f"unable to take the request 'signal NONE': {want}",
        f"unable to take the request 'kill 9': {want}",
        f"unable to take the request '\\x1b[31mred': {want}",
        "unable to take a request: it has more than 4096 bytes, and is ignored",
    ]


def test_leftovers_are_stopped_and_counted(spool):
    status = held(spool, sh("sleep 60 & setsid sleep 60 & exit 5"))
    assert (status["return_code"], status["leftovers"]) == (5, 2)
    assert len(log(spool)) == 1 and log(spool)[0].startswith(
        "the program left 2 processes running: ["
    )


def test_leftovers_may_be_left(spool):
    status = held(spool, sh("sleep 60 </dev/null & echo $!; exit 5"), leftovers="leave")
    pid = int(stdout(spool))
    os.kill(pid, signal.SIGKILL)
    assert (status["return_code"], status["leftovers"]) == (5, 1)


def test_a_leftover_that_writes_for_ever_does_not_hold_the_run(spool):
    status = held(spool, sh("yes & echo $!; exit 5"), leftovers="leave")
    assert status["return_code"] == 5 and status["stdout"]["bytes"] == len(stdout(spool))


def test_last_words_of_a_leftover_are_kept(spool):
    leftover = "trap 'echo last words; exit' TERM; echo ready; while :; do sleep 0.01; done"
    status = held(
        spool,
        sh(
            f'sh -c "{leftover}" > out & until [ -s out ]; do sleep 0.01; done; cat out; exit 0',
            cwd=str(spool.parent),
        ),
    )
    assert (
        status["return_code"] == 0 and status["leftovers"] in (1, 2) and stdout(spool) == b"ready\n"
    )  # its sleep may be one of them
    assert (spool.parent / "out").read_text() == "ready\nlast words\n"


# -- deadlines and limits


def test_run_timeout_stops_the_program(spool):
    status = held(spool, {"argv": ["sleep", "1000"]}, timeouts={"run": 0.2})
    assert (status["signal"], status["stop"]["reason"], status["stop"]["by"]) == (
        "SIGTERM",
        "timeout",
        "timeouts.run 0.2",
    )
    assert 0.2 <= status["elapsed"]


def test_idle_timeout_counts_from_the_last_byte(spool):
    text = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.25; done; exec sleep 1000"

    def attempt(number, idle_s):
        run_id = f"r{number}"
        status = held(spool, sh(text), run_id, timeouts={"idle": idle_s})
        stop = (status["stop"]["reason"], status["stop"]["by"])
        assert stop == ("idle", f"timeouts.idle {idle_s}")
        if len(stdout(spool, run_id).split()) < 6:  # a pause took longer than that
            return False
        assert stdout(spool, run_id).split() == [b"1", b"2", b"3", b"4", b"5", b"6"]
        assert 1.25 + idle_s <= status["elapsed"]
        return True

    patiently(attempt, 1, 4, 16)


def test_idle_timeout_survives_a_paused_chaperone(spool):
    chaperone = start(spool, sh("while :; do echo x; sleep 0.02; done"), timeouts={"idle": 4})
    pid = running(spool)["chaperone_pid"]
    until(lambda: stdout(spool))
    os.kill(pid, signal.SIGSTOP)
    paused = time.monotonic()
    until(lambda: time.monotonic() > paused + 4.5)
    size = len(stdout(spool))
    os.kill(pid, signal.SIGCONT)
    until(lambda: len(stdout(spool)) > size + 20)
    assert live(spool)["state"] == "running"
    ask(spool, "kill")
    assert chaperone.wait(60) == 0


def test_limit_keeps_the_head_and_counts_the_rest(spool):
    status = held(
        spool,
        py("import os\nfor i in range(1000): os.write(1, b'%09d\\n' % i)\nos.write(2, b'e' * 7)"),
        output={"max_bytes": 105},
    )
    assert stdout(spool) == b"".join(b"%09d\n" % i for i in range(10)) + b"00000"
    assert status["stdout"] == {"bytes": 105, "dropped": 9895} and status["stderr"] == {
        "bytes": 7,
        "dropped": 0,
    }
    assert log(spool) == [
        "stdout: bytes are dropped from offset 105 on: its limit of 105 bytes is reached"
    ]


def test_limit_may_stop_the_program(spool):
    status = held(spool, {"argv": ["yes"]}, output={"max_bytes": 100, "on_full": "stop"})
    assert (status["stop"]["reason"], status["signal"], status["stdout"]["bytes"]) == (
        "output",
        "SIGTERM",
        100,
    )
    assert status["stdout"]["dropped"] > 0


# -- the chaperone's own death, and its scheduler's


def lock_is_free(spool, run_id="r"):
    import fcntl

    with open(spool / run_id / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize(
    "text",
    ["exec sleep 60", "trap '' TERM; setsid sleep 60 & (setsid sleep 60 &) ; sleep 60"],
    ids=["one", "tree"],
)
def test_sigkill_of_the_chaperone_leaves_no_process(spool, text):
    chaperone = start(spool, sh(f"echo ready; {text}"))
    until(lambda: stdout(spool) == b"ready\n")
    below = descendants(live(spool)["chaperone_pid"])
    os.kill(live(spool)["chaperone_pid"], signal.SIGKILL)
    chaperone.wait(60)
    assert lock_is_free(spool)
    assert not (spool / "r" / "status.json").exists()
    assert not [pid for pid in below if os.path.exists(f"/proc/{pid}/exe")]


def test_guard_saves_what_the_pipes_still_held(spool):
    text = (
        "import os, time\nos.write(1, b'ready\\n')\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
    )
    text += "os.write(1, b'x' * 50_000)\nos.write(2, b'y' * 40_000)\ntime.sleep(60)"
    chaperone = start(spool, py(text, cwd=str(spool.parent)))
    until(lambda: stdout(spool) == b"ready\n")
    status = running(spool)
    os.kill(status["chaperone_pid"], signal.SIGSTOP)
    (spool.parent / "go").touch()
    until(lambda: written_by(status["pid"]) >= 90_006)
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    chaperone.wait(60)
    until(
        lambda: len(stdout(spool)) == 50_006 and (spool / "r" / "stderr").stat().st_size == 40_000
    )


def written_by(pid):
    with open(f"/proc/{pid}/io") as file:
        return int(file.read().split("wchar:")[1].split()[0])


def test_the_schedulers_death_does_not_touch_the_run(spool):
    text = json.dumps(
        {
            "id": "r",
            "program": sh(
                "echo ready; while [ ! -e go ]; do sleep 0.01; done; echo done; exit 6",
                cwd=str(spool.parent),
            ),
        }
    )
    code = (
        "import subprocess, sys\nsubprocess.Popen(sys.argv[2:], "
        "stdin=subprocess.PIPE).communicate(sys.argv[1].encode())"
    )
    command = [sys.executable, "-c", code, text, *CHAPERONE, "run", "--spool", str(spool), "-"]
    scheduler = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
    until(lambda: (spool / "r").exists() and stdout(spool) == b"ready\n")
    os.killpg(scheduler.pid, signal.SIGKILL)
    scheduler.wait()
    scheduler.stdout.close()
    (spool.parent / "go").touch()
    until(lambda: (spool / "r" / "status.json").exists())
    assert (final(spool)["return_code"], stdout(spool)) == (6, b"ready\ndone\n")
    until(lambda: not (spool / "r" / "lock").exists())


def test_a_second_start_of_a_used_id_is_refused(spool):
    held(spool, sh("echo once"))
    spec = json.dumps({"id": "r", "program": sh("echo twice")})
    again = subprocess.run(
        [*CHAPERONE, "run", "--spool", str(spool), "-"],
        input=spec,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (again.returncode, again.stdout, again.stderr) == (
        os.EX_CANTCREAT,
        "",
        "chaperone: unable to create run 'r': it exists\n",
    )
    assert stdout(spool) == b"once\n"


def test_files_of_an_ended_run_are_the_ones_that_stay(spool):
    held(spool, {"argv": ["true"]})
    assert sorted(path.name for path in (spool / "r").iterdir()) == [
        "spec.json",
        "status.json",
        "stderr",
        "stdout",
    ]
    assert os.readlink(spool / ".ended" / "r") == "../r" and not list(
        (spool / ".running").iterdir()
    )


def test_a_removed_run_directory_does_not_take_the_program_down(spool):
    import shutil

    mark = spool.parent / "mark"
    chaperone = start(
        spool,
        sh(f"echo ready; while [ ! -e {mark}.go ]; do sleep 0.01; done; echo out; touch {mark}"),
    )
    until(lambda: stdout(spool) == b"ready\n")
    shutil.rmtree(spool / "r")
    (spool.parent / "mark.go").touch()
    assert chaperone.wait(60) == os.EX_IOERR
    assert mark.exists()
