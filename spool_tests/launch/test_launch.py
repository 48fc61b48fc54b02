"""
Starting chaperones: from every place a scheduler may start one, and the answers.

Knows: what a process can inherit.  Must not know: how a run is held.
"""

import json
import os
import pty
import resource
import signal
import subprocess
import sys

import pytest

from chaperone import errors
from chaperone.hold import begin, inherited
from chaperone.launch import start as starting
from spool_tests.support.calls import replace_call
from spool_tests.support.disk import forked, waited
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.processes import children
from spool_tests.support.waiting import absent, need, until

TRUE = {"program": {"argv": ["true"]}}
LISTING = {
    "program": {
        "command": (
            "readlink /proc/self/fd/0; ls /proc/self/fd | tr '\\n' ' '; umask; "
            "grep -E '^Sig(Blk|Ign)' /proc/self/status; exit 3"
        )
    }
}
# fd 3 of `ls` is its own listing. Signals 32 and 33 belong to libc, whose posix_spawn leaves them
# ignored.
EXPECTED = "/dev/null\n0 1 2 3 {umask}\nSigBlk:\t0000000000000000\nSigIgn:\t0000000180000000\n"


def spec_file(path, spec):
    path.write_text(json.dumps(spec))
    return str(path)


def final(spool, run_id):
    until((spool / ".ended" / run_id).is_symlink, what=f"{run_id} has ended")
    return json.loads((spool / run_id / "status.json").read_text())


def popen(preparation, words, **keywords):
    """
    Run Python `preparation`, then exec chaperone with `words` from there: what it inherits is what
    that left.
    """
    code = f"import os, signal, sys, fcntl\n{preparation}\nos.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-S", "-c", code, *CHAPERONE, *words], **keywords)


# -- what is inherited


@pytest.mark.parametrize(
    "preparation",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        (
            "for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: "
            "signal.signal(number, signal.SIG_IGN)"
        ),
        "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())",
        "os.close(0)",
        "os.close(0); os.close(1)",
        "os.close(0); os.close(1); os.close(2)",
        "[os.set_inheritable(os.dup2(0, number), True) for number in range(3, 40)]",
        "os.setsid()",
        "os.setpgid(0, 0)",
        "os.setpgid(0, 0); signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.close(1)",
    ],
)
def test_run_is_the_same_wherever_it_is_started_from(spool, tmp_path, preparation):
    process = popen(
        f"os.umask(0o027)\n{preparation}",
        ["run", "--id", "r", spec_file(tmp_path / "s", LISTING)],
        stdin=subprocess.PIPE,
    )
    assert process.wait(60) == 0
    process.stdin.close()
    status = final(spool, "r")
    assert (status["state"], status["return_code"]) == ("terminated", 3)
    assert (spool / "r" / "stdout").read_text() == EXPECTED.format(umask="0027")


def test_files_are_ours_alone_whatever_the_umask(spool, tmp_path):
    assert popen("os.umask(0)", ["run", "--id", "r", spec_file(tmp_path / "s", TRUE)]).wait(30) == 0
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (spool / "r").iterdir()}
    assert modes == dict.fromkeys(("spec.json", "status.json", "stdout", "stderr"), "0o600")


def test_full_pipe_that_nobody_reads_stops_no_program(spool, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    process = subprocess.Popen(
        [*CHAPERONE, "run", "--id", "r", spec_file(tmp_path / "s", TRUE)], stdout=writing
    )
    assert process.wait(60) == 0
    assert final(spool, "r")["return_code"] == 0
    os.close(reading)
    os.close(writing)


def test_run_id_is_printed_when_the_run_directory_is_there(spool, tmp_path):
    process = subprocess.Popen(
        [*CHAPERONE, "run", spec_file(tmp_path / "s", {"program": {"argv": ["sleep", "60"]}})],
        stdout=subprocess.PIPE,
    )
    run_id = process.stdout.readline().decode().strip()
    assert (spool / run_id / "running.json").exists()
    assert (
        process.stdout.read() == b""
    )  # its stdout is /dev/null by then: our end closes though it runs on
    process.stdout.close()
    assert process.poll() is None
    (spool / run_id / "control").write_text("kill\n")
    assert process.wait(60) == 0


def test_chaperone_pins_no_mount_and_keeps_no_pipe(spool, tmp_path, held):
    directory = held({"program": {"argv": ["sleep", "60"]}})
    pid = json.loads((directory / "running.json").read_text())["chaperone_pid"]
    until(lambda: os.readlink(f"/proc/{pid}/cwd") == "/")
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}


# -- sessions and terminals


def test_job_of_an_interactive_shell_ends_as_its_chaperone_does(spool, tmp_path):
    process = popen(
        "os.setpgid(0, 0)",
        ["run", "--id", "r", spec_file(tmp_path / "s", {"program": {"argv": ["sleep", "60"]}})],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"r\n"
    running = json.loads((spool / "r" / "running.json").read_text())
    assert running["chaperone_pid"] != process.pid
    assert os.getsid(running["chaperone_pid"]) == running["chaperone_pid"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()
    stop = final(spool, "r")["stop"]
    assert (stop["signal"], stop["by"]) == ("SIGTERM", "SIGTERM")


def test_hangup_of_the_terminal_touches_no_run(spool, tmp_path):
    spec = spec_file(
        tmp_path / "s", {"program": {"command": "read line < go; echo $line", "cwd": str(tmp_path)}}
    )
    os.mkfifo(tmp_path / "go")
    pid, terminal = pty.fork()
    if not pid:
        os.setpgid(0, 0) if os.getsid(0) != os.getpid() else None
        os.execv(CHAPERONE[0], [*CHAPERONE, "run", "--id", "r", spec])
    until((spool / "r").exists)
    os.close(terminal)
    (tmp_path / "go").write_text("on\n")
    assert final(spool, "r")["return_code"] == 0
    assert (spool / "r" / "stdout").read_text() == "on\n"
    os.waitpid(pid, 0)


def test_sigkill_of_the_schedulers_group_touches_no_run(spool, tmp_path):
    os.mkfifo(tmp_path / "go")
    spec = spec_file(
        tmp_path / "s", {"program": {"command": "read line < go; echo $line", "cwd": str(tmp_path)}}
    )
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    scheduler = subprocess.Popen(
        [sys.executable, "-c", code, *CHAPERONE, "run", "--id", "r", spec], start_new_session=True
    )
    until((spool / "r").exists)
    os.killpg(scheduler.pid, signal.SIGKILL)
    scheduler.wait()
    (tmp_path / "go").write_text("on\n")
    assert final(spool, "r")["return_code"] == 0


def test_several_specs_have_a_chaperone_each_and_the_first_failure_is_the_exit_code(
    spool, tmp_path
):
    good, bad = (
        spec_file(tmp_path / "good", {"id": "a", **TRUE}),
        spec_file(tmp_path / "bad", {"program": 1}),
    )
    again = spec_file(tmp_path / "again", {"id": "b", **TRUE})
    result = subprocess.run([*CHAPERONE, "run", good, bad, again], capture_output=True, text=True)
    assert (result.returncode, sorted(result.stdout.split())) == (65, ["a", "b"])
    assert (
        result.stderr
        == f"chaperone: unable to read spec {bad!r}: program: want an object, got a number\n"
    )
    result = subprocess.run(
        [*CHAPERONE, "run", "--detach", again, bad], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (73, "")
    assert sorted(os.listdir(spool / ".ended")) == ["a", "b"]


def test_several_specs_are_stopped_together(spool, tmp_path):
    specs = [
        spec_file(tmp_path / name, {"id": name, "program": {"argv": ["sleep", "60"]}})
        for name in ("a", "b", "c")
    ]
    process = subprocess.Popen([*CHAPERONE, "run", *specs], stdout=subprocess.PIPE)
    assert sorted(process.stdout.readline() for _ in specs) == [b"a\n", b"b\n", b"c\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()
    assert {final(spool, name)["signal"] for name in "abc"} == {"SIGTERM"}


def test_detach_tells_of_a_bad_start(spool, tmp_path):
    spec = spec_file(tmp_path / "s", {"id": "a", **TRUE})
    assert (
        subprocess.run([*CHAPERONE, "run", "--detach", spec], capture_output=True).returncode == 0
    )
    result = subprocess.run([*CHAPERONE, "run", "--detach", spec], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (
        73,
        "",
        "chaperone: unable to create run 'a': it exists\n",
    )
    final(spool, "a")


# -- ids


def test_new_ids_sort_by_time_and_differ():
    ids = [begin.new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [run_id[:22] for run_id in ids] == sorted(run_id[:22] for run_id in ids)


# -- from Python


def test_start_returns_the_id_of_a_visible_run_and_leaves_nothing_in_the_scheduler(spool, tmp_path):
    before, born = os.listdir("/proc/self/fd"), children()
    run_id = starting.start(
        str(spool),
        {"program": {"command": 'echo "$COLOUR $PWD"'}},
        env={"COLOUR": "blue"},
        cwd=str(tmp_path),
    )
    assert (spool / run_id).is_dir()
    assert os.listdir("/proc/self/fd") == before
    assert children() == born
    assert final(spool, run_id)["return_code"] == 0
    assert (spool / run_id / "stdout").read_text() == f"blue {tmp_path}\n"


def test_start_tells_each_failure_by_its_own_error(spool, tmp_path):
    with pytest.raises(errors.SpecError, match=r"^unable to start a run: program\.argv: want "):
        starting.start(str(spool), {"program": {"argv": "ls -l"}})
    with pytest.raises(errors.SpecError, match="^unable to start a run: id: want "):
        starting.start(str(spool), {"id": "../x", **TRUE})
    starting.start(str(spool), {"id": "a", **TRUE})
    with pytest.raises(errors.RunExistsError, match="^unable to create run 'a': it exists$"):
        starting.start(str(spool), {"id": "a", **TRUE})
    nowhere = str(tmp_path / "no" / "spool")
    with pytest.raises(
        errors.SpoolError, match=f"^unable to open spool {nowhere!r}: No such file or directory$"
    ) as caught:
        starting.start(nowhere, TRUE)
    assert not isinstance(caught.value, errors.RunExistsError)
    final(spool, "a")


def test_start_passes_any_bytes_on(spool):
    argv = ["printf", "%s", "caf\udce9 \n\t' é"]
    run_id = starting.start(str(spool), {"program": {"argv": argv}})
    assert final(spool, run_id)["return_code"] == 0
    assert (spool / run_id / "stdout").read_bytes() == os.fsencode(argv[2])


@pytest.mark.parametrize(
    "ignoring",
    ["signal.SIG_IGN", "lambda *_: os.waitpid(-1, os.WNOHANG)"],
    ids=["ignored", "reaped-by-handler"],
)
def test_start_works_in_a_host_that_takes_its_childrens_ends_for_itself(spool, ignoring):
    code = f"""
import os, signal, sys
sys.path.append({ROOT!r})
from chaperone import errors
from chaperone.launch import start as starting
signal.signal(signal.SIGCHLD, {ignoring})
print(starting.start(sys.argv[1], {{"id": "a", "program": {{"argv": ["true"]}}}}))
try:
    starting.start(sys.argv[1], {{"id": "a", "program": {{"argv": ["true"]}}}})
except errors.RunExistsError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(spool)], capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("a\nunable to create run 'a': it exists\n", "")
    assert final(spool, "a")["return_code"] == 0


def test_start_works_without_standard_fds(spool):
    code = (
        f"import os, sys; sys.path.append({ROOT!r}); "
        "from chaperone.launch import start as starting; os.closerange(0, 3); "
        f"starting.start(sys.argv[1], {TRUE!r})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(spool)]).returncode == 0
    until(lambda: len(os.listdir(spool / ".ended")) == 1)


def test_limit_of_a_billion_files_takes_no_memory_where_there_is_no_proc(monkeypatch):
    def no_proc(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    def shed():
        replace_call(monkeypatch, "listdir", no_proc)
        replace_call(monkeypatch, "sysconf", lambda name: 1_000_000_000)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a list of them takes 8 GB
        ours = os.dup(0)
        inherited.shed_inherited_state()
        with pytest.raises(OSError):
            os.fstat(ours)

    assert waited(forked(shed)) == 0


def test_start_says_what_is_odd_about_the_interpreter(spool, monkeypatch):
    for path in ("", "/usr/sbin/uwsgi"):
        monkeypatch.setattr(sys, "executable", path)
        with pytest.raises(errors.ChaperoneError) as caught:
            starting.start(str(spool), TRUE)
        assert str(caught.value) == (
            "unable to start a chaperone: want a Python interpreter in "
            f"sys.executable, got {path!r} (if Python is embedded, set it)"
        )
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    with pytest.raises(
        errors.ChaperoneError,
        match="^unable to start a chaperone with the interpreter '/nowhere/python3': "
        "No such file or directory$",
    ):
        starting.start(str(spool), TRUE)


SCHEDULER = """
import sys
sys.path.append(sys.argv[1])
from chaperone import Spool
heap = b"x" * int(sys.argv[3])  # written to, so that there are pages to copy
spool = Spool(sys.argv[2])
program = {"program": {"argv": ["true"]}}
for warm in (False, True, True):
    run = spool.start(program, warm=warm)
    with spool.follow(runs=[run.run_id]) as follower:
        assert list(follower)[-1].status.return_code == 0
assert spool.start(program).wait(60).return_code == 0
"""


@pytest.mark.parametrize("megabytes", [64, pytest.param(1_024, marks=pytest.mark.long)])
def test_scheduler_with_a_big_heap_never_copies_it(spool, tmp_path, megabytes):
    """
    A fork copies page tables, 41 ms for each GB: whatever a scheduler starts is to share its memory
    until it executes.
    """
    need("strace")
    calls = "trace=clone,clone3,?fork,?vfork"
    command = [
        "strace",
        "-qq",
        "-o",
        tmp_path / "trace",
        "-e",
        calls,
        sys.executable,
        "-c",
        SCHEDULER,
        ROOT,
        spool,
        str(megabytes << 20),
    ]
    traced = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    if "ptrace" in traced.stderr:
        absent("strace may not trace here")
    assert (traced.returncode, traced.stderr) == (0, "")
    made = [line for line in (tmp_path / "trace").read_text().splitlines() if "(" in line]
    assert len(made) >= 3, "two cold starts, and a launcher"
    for line in made:
        assert line.startswith("vfork(") or "CLONE_VM" in line and "CLONE_VFORK" in line, line
    os.kill(int((spool / ".launcher.lock").read_text()), signal.SIGTERM)
    until(lambda: not os.listdir(spool / ".running"))


def test_announce_gives_up_on_a_pipe_that_is_gone():
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.close(reading)
        os.dup2(writing, 1)
        inherited.print_run_id("r")
        os._exit(0)
    os.close(writing)
    os.close(reading)
    assert os.waitpid(pid, 0)[1] == 0
