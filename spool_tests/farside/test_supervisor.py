"""The far side's text in every /bin/sh there may be, and the parser of what it says."""

import contextlib
import os
import pathlib
import re
import signal

import pytest

from chaperone.farside import payload
from spool_tests.support import supervisors
from spool_tests.support.failures import children
from spool_tests.support.guarded import stat_of
from spool_tests.support.processes import processes_with
from spool_tests.support.supervisors import PROGRAMS, every_sh
from spool_tests.support.waiting import need, until

far = supervisors.far
removed = supervisors.removed


@every_sh
def test_program_gets_its_environment_directory_limits_and_input(shell, far):
    script = (
        'cat; echo err >&2; printf "%s|" "$A" "$CHAPERONE_RUN_ID"; pwd; ulimit -n; umask; exit 7'
    )
    program = {
        "argv": ["/bin/sh", "-c", script],
        "env": {"A": "x'y\n\\z!"},
        "cwd": "/usr",
        "umask": "027",
        "rlimits": {"nofile": 100},
        "stdin": "in\n" * 3,
    }
    run = far(shell, program)
    found = run.outcome()
    run.send("q 5")
    assert run.ended() == 0
    assert run.output == {
        "stdout": b"in\nin\nin\nx'y\n\\z!|r|/usr\n100\n0027\n",
        "stderr": b"err\n",
    }
    assert (found["wait_status"], found["return_code"], found["ambiguous"]) == (7 << 8, 7, False)
    assert set(found["rusage"]) == {
        "utime",
        "stime",
        "maxrss",
        "minflt",
        "majflt",
        "inblock",
        "oublock",
        "nvcsw",
        "nivcsw",
    }
    assert run.wait("left") == ["0"]


@every_sh
@pytest.mark.parametrize("size", [1, 65_535, 65_536, 1_000_001])
def test_input_of_any_size_arrives_whole_and_leaves_the_control_lines_free(shell, size, far):
    run = far(shell, {"argv": ["sh", "-c", "sleep 0.1; wc -c; sleep 100"], "stdin": "x" * size})
    run.wait("start")
    run.send("h 1")
    assert run.wait("beat") == ["1"]
    until(lambda: run.read(0.05) or run.output["stdout"].strip() == str(size).encode())
    run.send("k KILL")
    assert run.outcome()["wait_status"] == 9


@every_sh
def test_input_is_kept_for_nobody_else_to_read(shell, far, tmp_path):
    run = far(
        shell,
        {"argv": ["sleep", "1000"], "stdin": "s3cr3t"},
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    kept = f"/proc/{run.wait('start')[0]}/fd/0"
    until(lambda: os.readlink(kept).startswith(str(tmp_path)))
    assert (os.stat(kept).st_size, os.stat(kept).st_mode & 0o777, os.stat(kept).st_nlink) == (
        6,
        0o600,
        0,
    )
    assert os.listdir(tmp_path) == []


@every_sh
def test_nothing_runs_of_a_payload_that_was_cut(shell, far, tmp_path):
    program = {"argv": ["touch", str(tmp_path / "ran")], "stdin": "abc"}
    for cut in (1, 200, 2_000, -200, -1):
        run = far(shell, program, alter=lambda whole, cut=cut: whole[:cut])
        run.process.stdin.close()
        assert run.ended() in (0, 97, 2, 1, 127)
        assert not (tmp_path / "ran").exists()


def test_run_takes_at_most_twelve_processes(far, tmp_path):
    need("strace")
    traced = tmp_path / "traced"
    words = ["strace", "-f", "-e", "trace=process", "-o", str(traced)]
    # Not one more for each tick that it takes.
    there = [*words, "/bin/sh", *payload.CONSTANT[1:]]
    run = far(None, {"argv": ["true"]}, argv=there, alter=long_tick)
    run.outcome()
    run.send("q 0")
    assert run.ended() == 0
    pids = {line.split()[0] for line in traced.read_text().splitlines()}
    assert 1 < len(pids) <= 12


@every_sh
def test_exit_codes_and_signals_are_told_apart(shell, far):
    for code in (0, 1, 126, 127, 130, 137, 255):
        run = far(shell, {"argv": ["sh", "-c", f"exit {code}"]})
        assert run.outcome()["wait_status"] == code << 8
    for number in (1, 2, 3, 9, 13, 14, 15, 10, 12):
        run = far(shell, {"argv": ["sh", "-c", f"ulimit -c 0; kill -{number} $$; sleep 5"]})
        assert run.outcome()["wait_status"] & 0x7F == number


@every_sh
@pytest.mark.parametrize(
    "program, why",
    [
        ({"argv": ["true"], "cwd": "/no/such"}, "cwd"),
        ({"argv": ["no-such-program"]}, "notfound"),
        ({"argv": ["/no/such"]}, "notfound"),
        ({"argv": ["/etc/passwd"]}, "permission"),
        ({"argv": ["{tmp}/script"]}, "interpreter"),
        ({"argv": ["true"], "rlimits": {"nofile": [2**40, 2**40]}}, "rlimits.nofile"),
    ],
)
def test_what_can_not_be_started_is_said_and_not_started(shell, program, why, far, tmp_path):
    script = tmp_path / "script"
    script.write_text("#! /no/such/interpreter -x\n")
    script.chmod(0o755)
    run = far(
        shell,
        {**program, "argv": [word.replace("{tmp}", str(tmp_path)) for word in program["argv"]]},
    )
    assert run.wait("fail") == [why]
    assert run.ended() == 0
    assert not any(record[0] == "start" for record in run.records)


@every_sh
@pytest.mark.parametrize("inherit, expected", [(False, {b"A"}), (["KEPT"], {b"A", b"KEPT"})])
def test_environment_is_clean_where_that_is_asked_for(shell, inherit, expected, far):
    env = {"PATH": os.environ["PATH"], "KEPT": "k", "LOST": "a\nKEPT2=b", "HOME": "/"}
    run = far(
        shell, {"argv": ["/usr/bin/env", "-0"], "inherit_env": inherit, "env": {"A": "v"}}, env=env
    )
    run.outcome()
    run.send("q 5")
    run.ended()
    names = {pair.partition(b"=")[0] for pair in bytes(run.output["stdout"]).split(b"\0") if pair}
    assert (
        names
        - {
            b"_",
            b"PWD",
            b"OLDPWD",
            b"SHLVL",
            b"CHAPERONE_RUN_ID",
            b"CHAPERONE_COOKIE",
            b"_AST_FEATURES",
        }
        == expected
    )


@every_sh
def test_names_that_the_text_itself_uses_are_the_program_s_too(shell, far):
    names = set(re.findall(r"\b(\w+)=", payload._FIND.decode())) | {
        "IFS",
        "nonce",
        "cookie",
        "pid",
        "program",
        "grace",
        "dir",
        "l",
        "s",
        "g",
        "nl",
    }
    assert {"c_why", "c_found"} <= names
    env = dict.fromkeys(names, "0123456789 x")
    text = (
        "import os,sys;os.write(1,b'%d ' % os.getpid() + b''.join(n.encode() + b'=' + "
        "os.environb.get(n.encode(), b'-') + b'|' for n in sys.argv[1:]))"
    )
    for argv in (["/usr/bin/python3"], ["python3"]):  # the one is looked for in PATH
        run = far(
            shell,
            {
                "argv": [*argv, "-I", "-S", "-c", text, *sorted(env)],
                "env": {**env, "PATH": "/usr/bin:/bin"},
            },
        )
        pid = run.wait("start")[0]
        run.outcome()
        run.send("q 5")
        run.ended()
        assert run.output["stdout"].decode() == f"{pid} " + "".join(
            f"{name}={env[name]}|" for name in sorted(env)
        )


@every_sh
@pytest.mark.parametrize(
    "merge, expected", [(True, (b"out\nerr\n", b"")), (False, (b"out\n", b"err\n"))]
)
def test_stderr_goes_where_it_should(shell, merge, expected, far):
    run = far(shell, {"argv": ["sh", "-c", "echo out; echo err >&2"], "merge_stderr": merge})
    run.outcome()
    run.send("q 5")
    run.ended()
    assert (run.output["stdout"], run.output["stderr"]) == expected


@every_sh
@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_left_when_the_connection_ends(shell, program, far):
    argv = ["sh", "-c", PROGRAMS[program]]
    # A lease that does not end it in our place.
    run = far(shell, {"argv": argv}, stop={"grace_period": 0.4}, lease=1000)
    run.wait("start")
    until(lambda: run.read(0.05) or run.output["stdout"])
    run.close()
    until(lambda: run.read(0.01) or not run.alive())


@every_sh
def test_supervisor_is_gone_when_its_connection_is(shell, far):
    """
    To the last tick of its lease. A tick takes longer than we wait, once it is waited for: a signal
    just before that is heard late by mksh.
    """
    token = os.urandom(8).hex()
    for turn in range(8):
        is_waiting = turn >= 4
        run = far(
            shell,
            {"argv": ["true" if turn % 2 else "sleep", "1000"]},
            alter=long_tick if is_waiting else None,
            env={**os.environ, "TOKEN": token},
            stop={"grace_period": 0},
        )
        run.wait("start")
        until(lambda: not is_waiting or waits_for_tick(lease_watcher(token)))  # noqa: B023
        if turn % 2:
            run.outcome()
            run.send("q 0")
        else:
            run.close()
        run.ended()
        until(lambda: processes_with(token.encode()) == {})


def long_tick(whole):
    assert b"\ntick='5'\n" in whole
    return whole.replace(b"\ntick='5'\n", b"\ntick='1000'\n")


def waits_for_tick(watcher):
    try:
        return children(watcher) and stat_of(watcher)[0] == "S"
    except (FileNotFoundError, ProcessLookupError, TypeError):  # it has ended, or is not found yet
        return False


def lease_watcher(token):
    """
    The pid of D: it ignores SIGPIPE, as R does, but has no control lines; its sleeper may be such a
    shell too.
    """
    found = {}
    for pid in processes_with(token.encode()):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":", 1)
                for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            if int(fields["SigIgn"], 16) >> (signal.SIGPIPE - 1) & 1 and not os.path.lexists(
                f"/proc/{pid}/fd/3"
            ):
                found[pid] = int(fields["PPid"])
    return next((pid for pid, parent in found.items() if parent not in found), None)


@every_sh
def test_program_is_ended_whatever_becomes_of_who_watches_the_lease(shell, far):
    token = os.urandom(8).hex()
    run = far(
        shell,
        {"argv": ["sleep", "1000"]},
        env={**os.environ, "TOKEN": token},
        stop={"grace_period": 0},
    )
    run.wait("start")
    watcher = until(lambda: lease_watcher(token))
    os.kill(watcher, signal.SIGSTOP)
    run.close()
    try:
        until(lambda: run.read(0.01) or not run.alive())
    finally:
        with contextlib.suppress(ProcessLookupError):  # ksh93 lets go on what it signals
            os.kill(watcher, signal.SIGCONT)
    run.ended()
    until(lambda: processes_with(token.encode()) == {})


def test_no_trap_of_the_far_side_waits():
    """
    zsh, asked to wait in a trap while it waits already, may hear of no end any more: one time in
    7,000.
    """
    assert re.findall(r"trap '[^']*\bwait\b", payload.SUPERVISOR) == []


@every_sh
def test_lease_ends_what_is_not_asked_for_any_more(shell, far):
    run = far(
        shell, {"argv": ["sh", "-c", PROGRAMS["setsid child"]]}, stop={"grace_period": 0.2}, lease=1
    )
    run.wait("start")
    assert run.wait("lost", 60) == ["1"]
    until(lambda: run.read(0.01) or not run.alive())


@every_sh
def test_heartbeats_keep_the_lease(shell, far):
    for _ in range(30):
        run = far(shell, {"argv": ["sleep", "1000"]}, lease=2)
        if (silent_s := supervisors.longest_silence(run)) < 2:
            break
        run.close()  # the machine was too busy to show anything
    assert silent_s < 2
    assert not any(record[0] == "lost" for record in run.records)
    assert run.alive()


@every_sh
def test_signals_go_to_the_program_or_to_all_of_it(shell, far):
    script = (
        "(trap 'echo child; exit' USR1; echo up; while :; do sleep 0.02; "
        "done) & trap 'echo program' USR1; echo up; while :; do sleep 0.02; done"
    )
    run = far(shell, {"argv": ["sh", "-c", script]})
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\nup\n")
    run.send("k USR1")
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\nup\nprogram\n")
    run.send("g USR1")
    until(
        lambda: (
            run.read(0.05)
            or run.output["stdout"].count(b"child\n") == 1
            and run.output["stdout"].count(b"program\n") == 2
        )
    )
    run.send("k INT")
    assert run.outcome()["wait_status"] == signal.SIGINT


@every_sh
def test_each_process_gets_a_signal_once(shell, far):
    """
    A process of the group carries the cookie too; a real-time signal is queued as often as it is
    sent.
    """
    text = (
        "import os,signal as s\nb={34,s.SIGUSR1}\ns.pthread_sigmask(s.SIG_BLOCK,b)\n"
        "os.write(1,b'up ')\ns.sigwait({s.SIGUSR1})\nn=0\n"
    )
    text += "while s.sigtimedwait({34},0): n+=1\nos.write(1,b'%d' % n)"
    run = far(shell, {"argv": ["/usr/bin/python3", "-I", "-S", "-c", text]})
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up ")
    run.send("g 34")
    run.send("k USR1")
    assert run.outcome()["return_code"] == 0
    run.send("q 0")
    run.ended()
    assert run.output["stdout"] == b"up 1"


@every_sh
@pytest.mark.parametrize("end", ["connection", "lease", "leftovers"])
def test_what_is_ended_has_its_grace(shell, end, far, tmp_path):
    """To clean up on TERM, before KILL comes; what left its group has it too."""
    (tmp_path / "clean").write_text(
        "trap 'sleep 0.3; : > cleaned; exit' TERM; echo up; while :; do sleep 0.02; done\n"
    )
    text = "setsid sh clean & "
    text += "while [ ! -e go ]; do sleep 0.02; done" if end == "leftovers" else "exec sleep 1000"
    run = far(
        shell,
        {"argv": ["sh", "-c", text], "cwd": str(tmp_path)},
        alter=supervisors.lease_after(f"{tmp_path}/lease"),
        stop={"grace_period": 20},
        lease=1 if end == "lease" else 60,
    )
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\n")
    (tmp_path / "lease").touch()
    if end == "connection":
        run.close()
    elif end == "leftovers":
        (tmp_path / "go").touch()
        run.outcome()
        run.send("q 100")
    until(lambda: run.read(0.05) or (tmp_path / "cleaned").exists())
    until(lambda: run.read(0.05) or not run.alive())


@every_sh
def test_leftovers_are_counted_and_ended_or_left(shell, far):
    for line, left in (("q 5", False), ("q leave", True)):
        run = far(shell, {"argv": ["sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 3"]})
        assert run.outcome()["wait_status"] == 3 << 8
        run.send(line)
        assert run.wait("left") == ["2"]
        if left:
            until(lambda run=run: len(run.alive()) == 2)
        else:
            until(lambda run=run: not run.alive())


@every_sh
def test_lease_ends_what_fills_a_pipe_that_nobody_reads(shell, far, tmp_path):
    run = far(
        shell,
        {"argv": ["sh", "-c", "trap '' TERM; exec yes >&2"]},
        alter=supervisors.lease_after(f"{tmp_path}/lease"),
        stop={"grace_period": 0.2},
        lease=1,
    )
    run.wait("start")
    until(run.alive)
    (tmp_path / "lease").touch()
    until(lambda: not run.alive())
    run.close()
    run.ended()
    assert ["lost", "1"] in run.records
