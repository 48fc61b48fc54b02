"""
What the far side knows of a run's processes and how it ends them, in every /bin/sh: by the kernel,
by the cookie, by the group.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from chaperone.farside import payload, records
from spool_tests.support import shells, supervisors
from spool_tests.support.mounts import WITHOUT_PROC
from spool_tests.support.processes import processes_with
from spool_tests.support.runs import final, start
from spool_tests.support.waiting import need, until

far, removed, every_sh = supervisors.far, supervisors.removed, supervisors.every_sh
FOREIGN = b"\x7fELF\2\1\1" + bytes(9) + b"\2\0\xf7\0\1" + bytes(43)  # no machine's: EM_BPF


def without_subreaper(whole):
    """A payload for a host that has neither perl nor python."""
    return whole.replace(b"-x /usr/bin/p", b"-x /no/p")


@pytest.fixture
def applets(tmp_path):
    """The environment of a host where each tool is busybox's."""
    need("busybox")
    directory = tmp_path / "applets"
    directory.mkdir()
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        (directory / name).symlink_to(shells.path_of("busybox"))
    return {"PATH": str(directory), "HOME": "/"}


def token():
    return f"1000.{int.from_bytes(os.urandom(4), 'big')}"


def sleepers(word):
    return [
        pid
        for pid, command in processes_with(word.encode()).items()
        if command.startswith("sleep ")  # by now: before its exec a look may miss it
    ]


@every_sh
@pytest.mark.parametrize("end", ["leftovers", "connection", "kill"])
def test_kernel_finds_what_left_session_group_and_environment(shell, end, far):
    word = token()
    left = f"(env -i setsid sleep {word} &) & (setsid env -i sleep {word} &)"
    text = f"{left}; echo up; " + ("exit 3" if end == "leftovers" else "exec sleep 1000")
    run = far(shell, {"argv": ["sh", "-c", text]}, stop={"grace_period": 0})
    assert run.wait("hello")[1:] == ["setsid=setsid", "tracking=kernel"]
    assert run.wait("start")[1:] == ["kernel"]
    until(lambda: run.read(0.02) or len(sleepers(word)) == 2)
    if end == "leftovers":
        run.outcome()
        run.send("q 0")
        assert run.wait("left") == ["2"]
    elif end == "kill":
        run.send("z")
        assert run.outcome()["wait_status"] == signal.SIGKILL
    else:
        run.close()
    until(lambda: run.read(0.02) or not sleepers(word))


CHAIN = """import os, time
os.setsid() if not os.fork() else os._exit(3)
os.write(1, b"up ")
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.004)
    if os.fork():
        os._exit(0)
"""


@every_sh
def test_kernel_look_misses_none_whose_parent_dies_meanwhile(shell, far):
    """Each generation leaves its child to S and ends, some 200 in a second."""
    for _ in range(6):
        run = far(shell, {"argv": ["/usr/bin/python3", "-I", "-S", "-c", CHAIN]})
        assert run.outcome()["return_code"] == 3
        until(lambda run=run: run.read(0.01) or run.output["stdout"] == b"up ")
        run.send("q 0")
        assert int(*run.wait("left")) >= 1  # on a busy host a look meets several generations
        assert run.ended() == 0
        assert run.alive() == {}


@every_sh
def test_kernel_look_reads_no_stranger(shell, far, tmp_path):
    """So it costs the same, however many processes the host has."""
    need("strace")
    trace = tmp_path / "trace"
    argv = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=openat,open", "-e", "signal=none"]
    argv += ["-o", str(trace), shells.as_sh(shell), *payload.CONSTANT[1:]]
    run = far(shell, {"argv": ["sh", "-c", "setsid sleep 1000 & exit 3"]}, argv=argv)
    run.outcome()
    run.send("q 0")
    assert run.wait("left") == ["1"]
    assert run.ended() == 0
    looked = trace.read_text()
    assert f"/proc/{run.wait('hello')[0]}/task/" in looked
    assert f"/proc/{os.getpid()}/" not in looked and "/proc/1/" not in looked


@every_sh
@pytest.mark.parametrize("tools", ["these", "busybox"])
def test_cookie_finds_what_left_the_group_where_the_kernel_does_not(shell, tools, far, request):
    env = request.getfixturevalue("applets") if tools == "busybox" else None
    word = token()
    run = far(
        shell,
        {"argv": ["sh", "-c", f"(setsid sleep {word} &); sleep {word} & exit 3"]},
        env=env,
        alter=without_subreaper,
    )
    assert run.wait("hello")[1:] == ["setsid=setsid", "tracking=cookie"]
    assert run.outcome()["return_code"] == 3
    until(lambda: len(sleepers(word)) == 2)
    run.send("q 0")
    assert run.wait("left") == ["2"]
    assert run.ended() == 0
    assert sleepers(word) == []


@every_sh
def test_kernel_tracks_where_all_tools_are_busybox(shell, far, applets):
    word = token()
    run = far(shell, {"argv": ["sh", "-c", f"(env -i setsid sleep {word} &); exit 3"]}, env=applets)
    assert run.wait("start")[1:] == ["kernel"]
    assert run.outcome()["return_code"] == 3
    until(lambda: sleepers(word))
    run.send("q 0")
    assert (run.wait("left"), run.ended(), sleepers(word)) == (["1"], 0, [])


@every_sh
def test_group_is_all_where_no_grep_sees_behind_a_nul(shell, far, tmp_path):
    (tmp_path / "grep").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "grep").chmod(0o755)
    run = far(
        shell,
        {"argv": ["sh", "-c", "sleep 1000 & exit 3"]},
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        alter=without_subreaper,
    )
    assert run.wait("start")[1:] == ["group"]
    run.outcome()
    run.send("q 0")
    assert run.ended() == 0
    until(lambda: not run.alive())


@every_sh
def test_child_that_a_startup_file_left_is_none_of_the_run(shell, far):
    """It is S's child, as an orphan of the run is: then the kernel is not asked."""
    word = token()
    argv = ["sh", "-c", f'setsid sleep {word} >/dev/null 2>&1 & exec "$@"', "sh"]
    argv += [shells.as_sh(shell), *payload.CONSTANT[1:]]
    run = far(shell, {"argv": ["sh", "-c", "exit 3"]}, argv=argv)
    try:
        assert run.wait("start")[1:] == ["cookie"]
        run.outcome()
        run.send("q 0")
        assert (run.wait("left"), run.ended()) == (["0"], 0)
        until(lambda: len(sleepers(word)) == 1)
    finally:
        for pid in sleepers(word):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.root
@every_sh
def test_proc_of_another_pid_namespace_is_not_believed(shell, far):
    need("unshare")
    argv = ["unshare", "--pid", "--fork", shells.as_sh(shell), *payload.CONSTANT[1:]]
    run = far(shell, {"argv": ["sh", "-c", "sleep 1000 & exit 3"]}, argv=argv)
    assert run.wait("hello")[1:] == ["setsid=setsid", "tracking=group"]
    run.outcome()
    run.send("q 0")
    assert run.ended() == 0
    until(lambda: not run.alive())


@every_sh
@pytest.mark.parametrize("how", ["kernel", "cookie"])
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_kill_sends_nothing_before_sigkill(shell, how, end, far):
    text = "trap 'echo TERM' TERM; trap 'echo INT' INT; echo up; while :; do sleep 0.05; done"
    alter = without_subreaper if how == "cookie" else None
    run = far(shell, {"argv": ["sh", "-c", text]}, alter=alter)
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\n")
    if end == "stop":
        run.send("g INT")
        until(lambda: run.read(0.05) or run.output["stdout"] == b"up\nINT\n")
    run.send("z")
    assert run.outcome()["wait_status"] == signal.SIGKILL
    run.send("q 0")
    run.ended()
    assert run.output["stdout"] == (b"up\nINT\n" if end == "stop" else b"up\n")


@pytest.fixture
def setuid_python(tmp_path_factory):
    """A python that makes itself root, for whoever runs it."""
    directory = tmp_path_factory.mktemp("setuid")
    for path in (directory, *directory.parents):
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o711)
    python = directory / "python"
    shutil.copy(os.path.realpath("/usr/bin/python3"), python)
    python.chmod(0o4755)
    return str(python)


@pytest.mark.root
@every_sh
@pytest.mark.parametrize("proc", ["proc", "no proc"])
def test_program_of_another_uid_is_alive(shell, proc, far, setuid_python):
    need("setpriv", "unshare")
    argv = ["setpriv", "--reuid=65534", "--clear-groups", shells.as_sh(shell)]
    if proc == "no proc":
        argv = [*WITHOUT_PROC, *argv]
    text = "import os,time;os.setresuid(0,0,0);os.write(1,b'up\\n');time.sleep(1000)"
    run = far(
        shell,
        {"argv": [setuid_python, "-I", "-S", "-c", text]},
        argv=[*argv, *payload.CONSTANT[1:]],
        env={**os.environ, "TMPDIR": "/tmp"},
        stop={"grace_period": 0},
    )
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\n")
    pid = int(run.wait("start")[0])
    run.send("h 1")
    assert run.wait("beat") == ["1"]
    assert not any(record[0] == "dead" for record in run.records)
    os.kill(pid, signal.SIGKILL)
    assert run.outcome()["wait_status"] == signal.SIGKILL
    run.send("h 2")
    until(lambda: run.read(0.05) or ["dead"] in run.records)


# Gives the pid of the program, once that is free, to a process of its own, and says how this ended.
REUSES = """import os, signal, sys, time
signal.alarm(60)
os.chdir(sys.argv[1])
while not os.path.exists("ended"): time.sleep(0.01)
pid = int(open("ended").read())
while os.path.exists(f"/proc/{pid}"): time.sleep(0.01)
child = 0
while child != pid:
    open("/proc/sys/kernel/ns_last_pid", "w").write(str(pid - 1))
    if not (child := os.fork()):
        while not os.path.exists("left"): time.sleep(0.01)
        os._exit(7)
    if child != pid: os.kill(child, 9)
open("reused", "w").close()
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
open("code.new", "w").write(str(code))
os.rename("code.new", "code")
"""


@pytest.mark.root
@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_process_that_has_the_programs_pid_by_now_is_none_of_the_run(shell, far, tmp_path):
    need("unshare")
    (tmp_path / "reuses.py").write_text(REUSES)
    text = f'python3 {tmp_path}/reuses.py {tmp_path} </dev/null >/dev/null 2>&1 & "$@"; wait'
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", text, "sh"]
    leaves = "setsid sh -c 'trap \"\" TERM; echo up; sleep 1000; sleep 1000' & read -r line; exit 3"
    run = far(
        shell,
        {"argv": ["sh", "-c", f"{{ {leaves}; }} </dev/null"]},
        argv=[*namespace, shells.as_sh(shell), *payload.CONSTANT[1:]],
    )
    (tmp_path / "pid").write_text(run.wait("start")[0])
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\n")
    run.outcome()
    os.rename(tmp_path / "pid", tmp_path / "ended")
    until((tmp_path / "reused").exists)
    run.send("k USR1")
    run.send("q 2")
    assert int(run.wait("left")[0]) > 0
    (tmp_path / "left").touch()
    until((tmp_path / "code").exists)
    assert (tmp_path / "code").read_text() == "7"


@pytest.mark.root
@every_sh
@pytest.mark.parametrize("what", ["foreign", "busy", "loader", "many"])
def test_exec_that_fails_is_said_and_not_started(shell, what, far, tmp_path):
    if what == "foreign" and shell in ("busybox", "ksh93", "zsh"):
        pytest.skip("it is run as a text, as the docs say")
    if what == "many" and shell in ("ksh93", "zsh"):
        pytest.skip("too many for the perl that would report it, as the docs say")
    path = tmp_path / what
    held = contextlib.nullcontext()
    if what == "foreign":
        path.write_bytes(FOREIGN)
    elif what == "loader":
        with open("/bin/true", "rb") as file:
            path.write_bytes(file.read().replace(b"/ld-linux", b"/no-linux"))
    else:
        shutil.copy("/bin/true", path)
    path.chmod(0o755)
    argv = [str(path)]
    if what == "busy":
        held = open(path, "ab")  # noqa: SIM115
    if what == "many":
        argv += ["x" * 100_000] * 3
    # Of all there is, since some shells' way to say it is a perl that has to be started.
    limits = {"stack": [1_000_000, 1_000_000]} if what == "many" else {}
    there = [*shells.in_place_of_sh(shell, str(tmp_path)), "/bin/sh", *payload.CONSTANT[1:]]
    with held:
        run = far(shell, {"argv": argv, "rlimits": limits}, argv=there)
        assert run.wait("fail") == ["exec"]
    assert run.ended() == 0
    assert not any(record[0] == "start" for record in run.records)


def cpu_s(word):
    """CPU of the processes that carry this word in their environment, in seconds."""
    ticks = 0
    for pid in processes_with(word.encode()):
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@every_sh
@pytest.mark.parametrize("host", ["perl", "neither"])
def test_nothing_spins_where_a_startup_file_ignores_signals(shell, host, far):
    ignoring = 'trap "" USR1 TERM HUP INT; exec "$@"'
    argv = ["sh", "-c", ignoring, "sh", shells.as_sh(shell), *payload.CONSTANT[1:]]
    for turn in range(30):
        word = os.urandom(8).hex()
        run = far(
            shell,
            {"argv": ["sleep", "1000"]},
            argv=argv,
            env={**os.environ, "TOKEN": word},
            alter=None if host == "perl" else without_subreaper,
            lease=2,
            stop={"grace_period": 0},
        )
        before = cpu_s(word)
        if supervisors.longest_silence(run) < 2:
            break
        run.close()  # the machine was too busy to show anything
        assert turn < 29
    assert cpu_s(word) - before < 0.8
    assert not any(record[0] == "lost" for record in run.records)
    run.send("k TERM" if host == "perl" else "k KILL")
    expected = signal.SIGTERM if host == "perl" else signal.SIGKILL
    assert run.outcome()["wait_status"] == expected
    run.send("q 0")
    assert run.ended() == 0
    until(lambda: processes_with(word.encode()) == {})


@every_sh
def test_tool_that_is_missing_is_named(shell, far, tmp_path):
    if shell == "ksh93":
        pytest.skip("its sleep is its own")
    run = far(shell, {"argv": ["/bin/true"]}, env={"PATH": str(tmp_path)})
    assert run.wait("fail") == ["no.sleep"]
    assert records.failure("no.sleep", run.spec["program"]) == (
        "far-side",
        "unable to prepare the program on the far side: its PATH has no 'sleep'",
    )


@pytest.mark.parametrize(
    "program, what",
    [
        ({"argv": ["/bin/true", "x", "é" * 70_000]}, "program.argv[2]"),
        ({"argv": ["/bin/true"], "env": {"BIG": "x" * 131_072}}, "program.env['BIG']"),
    ],
)
def test_words_that_no_shell_can_pass_on_are_refused_before_anything_is_sent(
    spool, program, what, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert start(spool, program, on_disconnect="survive").wait(60) == 0
    status = final(spool)
    size = 140_001 if "argv" in what else 131_077
    assert (status["state"], status["started"], status["exception"]["stage"]) == (
        "error",
        False,
        "spawn",
    )
    assert status["exception"]["message"] == (
        f"unable to run '/bin/true': {what} takes {size} bytes,"
        " and a shell can pass on no more than 131072"
    )
    assert not (tmp_path / "home").exists()
