"""
A chaperone holds a program on this host: outcomes, stops, limits, requests, and its own death.
"""

import json
import os
import signal
import socket
import subprocess
import time

import pytest

from chaperone.model import spec as specs
from spool_tests.support.failures import children
from spool_tests.support.places import CHAPERONE
from spool_tests.support.processes import has_taken
from spool_tests.support.runs import DEADLY, ask, final, held, log, py, sh, start, stdout
from spool_tests.support.waiting import absent, until

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
    assert before - 1 < time.time() - status["elapsed"] and 0 < status["elapsed"] < 600
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
        lines = [line for line in open('/proc/self/status') if line.startswith('Sig')]
        masks = {line.split(':')[0]: line.split()[1] for line in lines}
        umask = os.umask(0)
        print(json.dumps({"cwd": os.getcwd(), "env": dict(os.environ), "umask": umask,
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "sid": os.getsid(0) == os.getpid(), "fds": sorted(os.listdir('/proc/self/fd'))[:4],
            "blocked": masks["SigBlk"], "ignored": masks["SigIgn"]}))"""
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
    # starts us, ignores 32 and 33, which are its own and can't be changed. No other signal may be
    # ignored.
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


AWAITED = ["the program starts as soon as its stdin has a byte or is closed"]


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
    for pid in (chaperone.pid, *children(chaperone.pid)):  # the guard passes it on
        until(lambda pid=pid: has_taken(pid, signal.SIGUSR1))
    ask(spool, "signal TERM\nhello")
    until(lambda: "hello" in log(spool)[-1])
    writing = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writing, text)
    os.close(writing)
    assert chaperone.wait(60) == 0
    status = final(spool)
    assert (status["return_code"], status["stop"], stdout(spool)) == (0, None, text)


@pytest.mark.parametrize(
    "request_line", ["stop", "stop 0", "kill", "stop\nstop", "kill\nkill\nhello"]
)
def test_stop_is_heard_while_stdin_is_waited_for(spool, fifo, request_line):
    chaperone = start(spool, {"argv": ["cat"], "stdin": {"file": str(fifo)}})
    until(lambda: log(spool) == AWAITED)
    ask(spool, request_line)
    assert chaperone.wait(60) == 0
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
    assert chaperone.wait(60) == 0
    assert final(spool)["exception"]["message"] == "stopped before the program was started"


@pytest.mark.parametrize(
    "remote", [{}, {"remote": {"host": "nowhere.invalid"}}], ids=["survive", "remote"]
)
def test_fifo_is_no_stdin_for_a_program_that_is_sent_it(spool, fifo, remote):
    """
    Neither on a far side nor in a run here that may survive; no writer is waited for, and none is
    asked.
    """
    status = held(
        spool, {"argv": ["cat"], "stdin": {"file": str(fifo)}}, on_disconnect="survive", **remote
    )
    message = (
        f"unable to send stdin {str(fifo)!r}: want a regular file, whose size is known "
        "before it is sent"
    )
    assert (status["state"], status["started"], status["exception"]["message"]) == (
        "error",
        False,
        message,
    )


def test_program_that_can_not_be_started_when_its_stdin_has_come_is_an_error(spool, fifo):
    chaperone = start(spool, {"argv": ["/no/such"], "stdin": {"file": str(fifo)}})
    until(lambda: log(spool) == AWAITED)
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    assert chaperone.wait(60) == 0
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
