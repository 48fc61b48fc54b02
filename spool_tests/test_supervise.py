"""
A chaperone holds a program on this host: outcomes, stops, limits, requests, and its own death.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from chaperone.model import spec as specs
from spool_tests.conftest import CHAPERONE, absent, until

IGNORED_BY_DEFAULT = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
DEADLY = sorted(
    set(range(1, 65)) - {32, 33} - IGNORED_BY_DEFAULT - STOPPING
)  # 32, 33: libc keeps them for itself


def sh(text, **program):
    return {"argv": ["/bin/sh", "-c", text], **program}


def py(text, **program):
    return {"argv": [sys.executable, "-I", "-S", "-c", text], **program}


def start(spool, program, run_id="r", **spec):
    """Start `chaperone run` as a scheduler does, and wait until the run directory is there."""
    text = json.dumps({"id": run_id, "program": program, **spec})
    chaperone = subprocess.Popen(
        [*CHAPERONE, "run", "--spool", str(spool), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    chaperone.stdin.write(text)
    chaperone.stdin.close()
    assert chaperone.stdout.readline() == f"{run_id}\n"
    chaperone.stdout.close()
    return chaperone


def held(spool, program, run_id="r", **spec):
    """Run to the end: the final status."""
    assert start(spool, program, run_id, **spec).wait(30) == 0
    return final(spool, run_id)


def final(spool, run_id="r"):
    return json.loads((spool / run_id / "status.json").read_text())


def live(spool, run_id="r"):
    return json.loads((spool / run_id / "running.json").read_text())


def running(spool, run_id="r"):
    return until(lambda: (status := live(spool, run_id))["state"] == "running" and status)


def stdout(spool, run_id="r"):
    return (spool / run_id / "stdout").read_bytes()


def log(spool, run_id="r"):
    path = spool / run_id / "log"
    return (
        [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []
    )


def ask(spool, line, run_id="r"):
    fd = os.open(spool / run_id / "control", os.O_WRONLY | os.O_NONBLOCK)
    with open(fd, "w") as control:
        control.write(line + "\n")


# -- outcomes


def test_every_exit_code_and_signal_is_told_apart(spool):
    specs_of = {f"exit-{code}": f"exit {code}" for code in range(256)}
    specs_of |= {f"signal-{number}": f"kill -{number} $$; exec sleep 60" for number in DEADLY}
    paths = []
    for run_id, text in specs_of.items():
        path = spool.parent / f"{run_id}.json"
        path.write_text(json.dumps({"id": run_id, "program": sh(text)}))
        paths.append(str(path))
    for first in range(0, len(paths), 40):
        subprocess.run(
            [*CHAPERONE, "run", "--spool", str(spool), *paths[first : first + 40]],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )
    outcomes = {
        run_id: (status["return_code"], status["signal"])
        for run_id in specs_of
        if (status := final(spool, run_id))["state"] == "terminated"
    }
    expected = {f"exit-{code}": (code, None) for code in range(256)}
    expected |= {f"signal-{number}": (None, specs.signal_name_of(number)) for number in DEADLY}
    assert outcomes == expected
    assert len(set(outcomes.values())) == 256 + len(DEADLY)


def test_final_status_says_what_is_known(spool):
    before = time.time()
    status = held(
        spool,
        sh("echo out; echo error >&2; exit 3", env={"SECRET": "s3cret"}),
        labels={"team": "etl"},
    )
    assert {
        name: status[name]
        for name in (
            "state",
            "return_code",
            "signal",
            "core_dump",
            "status",
            "started",
            "complete",
            "ambiguous",
        )
    } == {
        "state": "terminated",
        "return_code": 3,
        "signal": None,
        "core_dump": False,
        "status": 3 << 8,
        "started": True,
        "complete": True,
        "ambiguous": False,
    }
    assert status["program"]["env"] == ["SECRET"] and status["labels"] == {"team": "etl"}
    assert status["stdout"] == {"bytes": 4, "dropped": 0} and status["stderr"] == {
        "bytes": 6,
        "dropped": 0,
    }
    assert (
        status["chaperone_host"] == socket.gethostname()
        and status["chaperone_pid"] != status["pid"]
    )
    assert before - 1 < time.time() - status["elapsed"] and 0 < status["elapsed"] < 30
    assert status["create_time"] <= status["start_time"] <= status["end_time"]
    assert "s3cret" not in (spool / "r" / "status.json").read_text()


def test_rusage_is_the_programs(spool):
    status = held(
        spool, py("import time\nb = bytearray(100_000_000)\nwhile time.process_time() < 0.3: pass")
    )
    assert 0.25 < status["rusage"]["utime"] + status["rusage"]["stime"] < 3
    assert 90e6 < status["rusage"]["maxrss"] < 200e6


def test_core_dump_is_told(spool):
    program = sh("kill -SEGV $$", cwd=str(spool.parent), rlimits={"core": "unlimited"})
    try:
        told = held(spool, program)
    finally:
        child = subprocess.run(
            ["/bin/sh", "-c", "ulimit -c unlimited; sh -c 'kill -SEGV $$' & wait $!"],
            cwd=spool.parent,
            check=False,
        )
    if told["state"] == "error":
        absent("a hard limit for core files above 0")
    assert child.returncode == 128 + signal.SIGSEGV
    dumped = any(name.name.startswith("core") for name in spool.parent.iterdir())
    assert told["core_dump"] is dumped


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        (
            {"argv": ["no-such-program"]},
            "FileNotFoundError",
            "unable to run 'no-such-program': not found on the program's PATH",
        ),
        (
            {"argv": ["/no/such"]},
            "FileNotFoundError",
            "unable to run '/no/such': No such file or directory",
        ),
        ({"argv": ["/etc"]}, "PermissionError", "unable to run '/etc': Permission denied"),
        (
            {"argv": ["true"], "cwd": "/no/cwd"},
            "FileNotFoundError",
            "unable to change to cwd '/no/cwd': No such file or directory",
        ),
        (
            {"argv": ["true"], "stdin": {"file": "/no/stdin"}},
            "FileNotFoundError",
            "unable to open stdin '/no/stdin': No such file or directory",
        ),
        (
            {"argv": ["true", "x" * 200_000]},
            "OSError",
            "unable to run 'true': Argument list too long",
        ),
        ({"argv": ["{tmp}/noexec"]}, "OSError", "unable to run '{tmp}/noexec': Exec format error"),
        (
            {"argv": ["{tmp}/orphan"]},
            "FileNotFoundError",
            "unable to run '{tmp}/orphan': its interpreter '/no/interpreter' is not there",
        ),
    ],
)
def test_error_names_the_path_that_failed(spool, program, error, message):
    for name, text in (("noexec", "no #! line\n"), ("orphan", "#!/no/interpreter\n")):
        (spool.parent / name).write_text(text)
        (spool.parent / name).chmod(0o700)
    program = json.loads(json.dumps(program).replace("{tmp}", str(spool.parent)))
    status = held(spool, program)
    number = {
        "FileNotFoundError": 2,
        "PermissionError": 13,
        "OSError": {"l": 7, "F": 8}.get(message[-1], 8),
    }[error]
    number = (
        7 if message.endswith("too long") else 8 if message.endswith("format error") else number
    )
    assert (status["state"], status["started"], status["return_code"], status["complete"]) == (
        "error",
        False,
        None,
        True,
    )
    expected = {
        "stage": "spawn",
        "type": error,
        "errno": number,
        "message": message.replace("{tmp}", str(spool.parent)),
    }
    assert status["exception"] == expected


# -- what the program gets


def test_program_gets_what_the_spec_says(spool, monkeypatch):
    monkeypatch.setenv("INHERITED", "yes")
    text = """if True:
        import json, os, resource, signal
        masks = {line.split(':')[0]: line.split()[1] for line in open('/proc/self/status') if line.startswith('Sig')}
        umask = os.umask(0)
        print(json.dumps({"cwd": os.getcwd(), "env": dict(os.environ), "umask": umask, "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "sid": os.getsid(0) == os.getpid(), "fds": sorted(os.listdir('/proc/self/fd'))[:4], "blocked": masks["SigBlk"], "ignored": masks["SigIgn"]}))"""
    program = py(
        text,
        cwd="/tmp",
        env={"K": "v\n'\"", "CHAPERONE_RUN_ID": "mine"},
        umask="027",
        rlimits={"nofile": 100},
    )
    held(spool, {**program, "argv": ["/usr/bin/env", "-u", "LC_ALL", *program["argv"]]})
    got = json.loads(stdout(spool))
    assert (
        got["env"]["K"] == "v\n'\""
        and got["env"]["INHERITED"] == "yes"
        and got["env"]["CHAPERONE_RUN_ID"] == "r"
    )
    assert {name: got[name] for name in ("cwd", "umask", "nofile", "sid", "blocked")} == {
        "cwd": "/tmp",
        "umask": 0o27,
        "nofile": [100, 100],
        "sid": True,
        "blocked": "0" * 16,
    }
    assert got["fds"] == ["0", "1", "2", "3"]  # 3 is listdir's own
    # Python itself ignores PIPE (13) and XFSZ (25); glibc's posix_spawn, by which Python 3.13
    # starts what we are, ignores 32 and 33, its own, and lets nobody change that. Nothing else may
    # be.
    assert int(got["ignored"], 16) & ~(0b11 << 31) == 1 << 12 | 1 << 24


@pytest.mark.parametrize(
    ("inherit", "names"), [(True, {"A", "B"}), (False, set()), (["A", "NOT_THERE"], {"A"})]
)
def test_inherit_env_chooses_what_is_passed_on(spool, monkeypatch, inherit, names):
    monkeypatch.setenv("A", "1")
    monkeypatch.setenv("B", "2")
    held(spool, {"argv": ["/usr/bin/env", "-0"], "inherit_env": inherit, "env": {"C": "3"}})
    env = dict(entry.split("=", 1) for entry in stdout(spool).decode().split("\0") if entry)
    assert {name for name in env if name in ("A", "B")} == names and env["C"] == "3"
    if inherit is False:
        assert set(env) == {"C", "CHAPERONE_RUN_ID"}


@pytest.mark.parametrize("stdin", [None, "", "text ü\n", "x" * 1_000_000])
def test_stdin_is_what_the_spec_says(spool, stdin):
    held(spool, {"argv": ["cat"], "stdin": stdin})
    assert stdout(spool) == (stdin or "").encode()


def test_stdin_file_is_read_from_where_the_chaperone_was_started(spool, monkeypatch):
    (spool.parent / "in").write_bytes(b"\0\xff")
    monkeypatch.chdir(spool.parent)
    held(spool, {"argv": ["cat"], "stdin": {"file": "in"}})
    assert stdout(spool) == b"\0\xff"


AWAITED = ["the program is started when its stdin has a byte, or its end"]


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("text", [b"", b"in\n"])
def test_stdin_that_is_a_fifo_is_waited_for(spool, fifo, text):
    """No program is there yet that could be signalled."""
    chaperone = start(spool, {"argv": ["cat"], "stdin": {"file": str(fifo)}})
    until(lambda: log(spool) == AWAITED)
    chaperone.send_signal(signal.SIGUSR1)
    ask(spool, "signal TERM\nhello")
    until(lambda: "hello" in log(spool)[-1])
    writing = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writing, text)
    os.close(writing)
    assert chaperone.wait(20) == 0
    status = final(spool)
    assert (status["return_code"], status["stop"], stdout(spool)) == (0, None, text)


@pytest.mark.parametrize(
    "request_line", ["stop", "stop 0", "kill", "stop\nstop", "kill\nkill\nhello"]
)
def test_stop_is_heard_while_stdin_is_waited_for(spool, fifo, request_line):
    chaperone = start(spool, {"argv": ["cat"], "stdin": {"file": str(fifo)}})
    until(lambda: log(spool) == AWAITED)
    ask(spool, request_line)
    assert chaperone.wait(20) == 0
    status = final(spool)
    assert (status["state"], status["started"], status["stop"]["reason"]) == (
        "error",
        False,
        "request",
    )
    assert (status["exception"]["stage"], status["exception"]["message"]) == (
        "stopped",
        "stopped before the program was started",
    )


def test_signals_that_come_together_while_stdin_is_waited_for_stop_once(spool, fifo):
    """The first one ends the run; the second finds nothing that it could be about."""
    chaperone = start(spool, {"argv": ["cat"], "stdin": {"file": str(fifo)}})
    until(lambda: log(spool) == AWAITED)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        chaperone.send_signal(number)
    assert chaperone.wait(20) == 0
    assert final(spool)["exception"]["message"] == "stopped before the program was started"


@pytest.mark.parametrize(
    "remote", [{}, {"remote": {"host": "nowhere.invalid"}}], ids=["survive", "remote"]
)
def test_fifo_is_no_stdin_for_a_program_that_is_sent_it(spool, fifo, remote):
    """
    Neither on a far side nor in a run here that may survive; nobody is waited for, and nobody
    asked.
    """
    status = held(
        spool, {"argv": ["cat"], "stdin": {"file": str(fifo)}}, on_disconnect="survive", **remote
    )
    message = f"unable to send stdin {str(fifo)!r}: want a regular file, whose size is known before it is sent"
    assert (status["state"], status["started"], status["exception"]["message"]) == (
        "error",
        False,
        message,
    )


def test_program_that_can_not_be_started_when_its_stdin_has_come_is_an_error(spool, fifo):
    chaperone = start(spool, {"argv": ["/no/such"], "stdin": {"file": str(fifo)}})
    until(lambda: log(spool) == AWAITED)
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    assert chaperone.wait(20) == 0
    assert (final(spool)["state"], final(spool)["exception"]["message"]) == (
        "error",
        "unable to run '/no/such': No such file or directory",
    )


def test_bytes_that_are_no_text_reach_the_program(spool):
    held(spool, {"argv": ["printf", "%s", "\udcff\udc80!"]})
    assert stdout(spool) == b"\xff\x80!"


def test_merged_stderr_keeps_the_order(spool):
    held(
        spool, sh("for i in 1 2 3 4 5 6 7 8 9; do echo o$i; echo e$i >&2; done", merge_stderr=True)
    )
    assert stdout(spool).decode().split() == [f"{c}{i}" for i in range(1, 10) for c in "oe"]


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_writing_to_dev_stderr_loses_nothing(spool, shell):
    held(
        spool,
        {
            "argv": [
                shell,
                "-c",
                "echo one >&2; echo two > /dev/stderr; echo three >&2; echo four > /dev/stderr",
            ]
        },
    )
    assert (spool / "r" / "stderr").read_text().split() == ["one", "two", "three", "four"]


def test_files_on_request_are_the_programs_own(spool):
    status = held(spool, sh("readlink /proc/self/fd/1; echo e >&2"), output={"through": "file"})
    assert (
        stdout(spool).decode() == f"{spool}/r/stdout\n"
        and (spool / "r" / "stderr").read_text() == "e\n"
    )
    assert status["stdout"] == {"bytes": len(stdout(spool)), "dropped": None}


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
    assert chaperone.wait(20) == 0
    status = final(spool)
    assert (
        status["stop"]["reason"] == "request"
        and status["stop"]["by"] == "ops"
        and status["pid"] == pid
    )
    assert status["signal"] in ("SIGTERM", "SIGKILL")
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
    assert chaperone.wait(20) == 0
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
    assert chaperone.wait(20) == 0
    assert (final(spool)["return_code"], final(spool)["stop"]["signal"]) == (9, "SIGUSR2")


def test_a_second_stop_shortens_the_grace(spool):
    chaperone = start(spool, sh(STUBBORN), stop={"grace_period": 3600})
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "stop by=first")
    until(lambda: live(spool)["state"] == "stopping")
    ask(spool, "stop 0 by=second")
    assert chaperone.wait(20) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["by"]) == ("SIGKILL", "first")


def test_kill_needs_no_grace(spool):
    chaperone = start(spool, sh(STUBBORN))
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, "kill by=me")
    assert chaperone.wait(20) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["signal"]) == ("SIGKILL", "SIGKILL")


@pytest.mark.parametrize("name", ["USR1", "SIGQUIT", "12"])
def test_signal_reaches_the_program_alone(spool, name):
    text = f"trap 'echo got' {specs.signal_name(name)[3:]}; (trap '' INT; sleep 60) & echo ready; while :; do sleep 0.01; done"
    chaperone = start(spool, sh(text))
    until(lambda: stdout(spool) == b"ready\n")
    ask(spool, f"signal {name}")
    until(lambda: stdout(spool) == b"ready\ngot\n")
    ask(spool, "kill")
    assert chaperone.wait(20) == 0


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
    assert chaperone.wait(20) == 0
    assert (final(spool)["signal"], final(spool)["stop"]["by"]) == ("SIGTERM", "SIGTERM")


def test_hangup_of_the_chaperone_changes_nothing(spool):
    chaperone = start(spool, sh("trap 'exit 4' USR1; echo ready; while :; do sleep 0.01; done"))
    until(lambda: stdout(spool) == b"ready\n")
    os.kill(live(spool)["chaperone_pid"], signal.SIGHUP)
    ask(spool, "signal USR1")
    assert chaperone.wait(20) == 0
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
    assert chaperone.wait(20) == 0
    want = "want stop [SECONDS], signal NAME or kill"
    assert log(spool) == [
        f"unable to take the request 'hello': {want}",
        f"unable to take the request 'stop soon': {want}",
        f"unable to take the request 'signal NONE': {want}",
        f"unable to take the request 'kill 9': {want}",
        f"unable to take the request '\\x1b[31mred': {want}",
        "unable to take a request of more than 4096 bytes: it is passed over to its end",
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
    status = held(spool, {"argv": ["sleep", "60"]}, timeouts={"run": 0.2})
    assert (status["signal"], status["stop"]["reason"], status["stop"]["by"]) == (
        "SIGTERM",
        "timeout",
        "timeouts.run 0.2",
    )
    assert 0.2 <= status["elapsed"] < 10


def test_idle_timeout_counts_from_the_last_byte(spool):
    status = held(
        spool,
        sh("for i in 1 2 3 4 5 6; do echo $i; sleep 0.25; done; exec sleep 60"),
        timeouts={"idle": 1},
    )
    assert (status["stop"]["reason"], status["stop"]["by"]) == ("idle", "timeouts.idle 1")
    assert (
        stdout(spool).split() == [b"1", b"2", b"3", b"4", b"5", b"6"]
        and 2.25 <= status["elapsed"] < 20
    )


def test_idle_timeout_survives_a_paused_chaperone(spool):
    chaperone = start(spool, sh("while :; do echo x; sleep 0.02; done"), timeouts={"idle": 1})
    pid = running(spool)["chaperone_pid"]
    until(lambda: stdout(spool))
    os.kill(pid, signal.SIGSTOP)
    paused = time.monotonic()
    until(lambda: time.monotonic() > paused + 1.5)
    size = len(stdout(spool))
    os.kill(pid, signal.SIGCONT)
    until(lambda: len(stdout(spool)) > size + 20)
    assert live(spool)["state"] == "running"
    ask(spool, "kill")
    assert chaperone.wait(20) == 0


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
    chaperone.wait(20)
    assert lock_is_free(spool)
    assert not (spool / "r" / "status.json").exists()
    assert not [pid for pid in below if os.path.exists(f"/proc/{pid}/exe")]


def test_guard_saves_what_the_pipes_still_held(spool):
    text = "import os, time\nos.write(1, b'ready\\n')\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    text += "os.write(1, b'x' * 50_000)\nos.write(2, b'y' * 40_000)\ntime.sleep(60)"
    chaperone = start(spool, py(text, cwd=str(spool.parent)))
    until(lambda: stdout(spool) == b"ready\n")
    status = running(spool)
    os.kill(status["chaperone_pid"], signal.SIGSTOP)
    (spool.parent / "go").touch()
    until(lambda: written_by(status["pid"]) >= 90_006)
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    chaperone.wait(20)
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
    code = "import subprocess, sys\nsubprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE).communicate(sys.argv[1].encode())"
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
        timeout=20,
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
    assert chaperone.wait(20) == os.EX_IOERR
    assert mark.exists()
