"""
What is hard to kill, where the kernel does not say, and what is left on purpose.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from chaperone.errors import SpecError, StartError
from chaperone.hold import guarding
from chaperone.launch import start as starting
from chaperone.program import processes
from spool_tests.support import guarded
from spool_tests.support.calls import replace_call
from spool_tests.support.cgroups import EATS, inside, memory_cgroup
from spool_tests.support.guarded import NOBODY, as_nobody, begun_in, is_gone, stat_of, text_of
from spool_tests.support.mounts import WITHOUT_PROC, mounted
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.runs import ask, final, live, log, py, sh, start, stdout
from spool_tests.support.waiting import absent, need, until

tree = guarded.tree


# -- what is hard to kill


def test_killing_goes_on_while_memory_is_freed(spool):
    """A process hands its children over only when its memory is gone."""
    room = next(
        int(line.split()[1])
        for line in text_of("/proc/meminfo").splitlines()
        if "MemAvailable" in line
    )
    size = 1_500_000_000 if room > 4_000_000 else 300_000_000
    text = f"""import os, time
if not os.fork():
    os.setsid()
    room = bytearray({size})
    for place in range(0, len(room), 4096):
        room[place] = 1
    if not os.fork():
        os.setsid()
        os.execlp("sleep", "sleep", "1000")
    os.write(1, b"ready\\n")
time.sleep(1000)"""
    process = start(spool, py(text))
    until(lambda: stdout(spool) == b"ready\n")
    status = begun_in(spool)
    below = until(
        lambda: len(found := processes.descendants(status["chaperone_pid"])) == 3 and found
    )
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert all(is_gone(pid) for pid in below) and log(spool) == []


@pytest.mark.root
def test_what_it_may_not_kill_keeps_nobody_waiting_and_is_named(spool, tmp_path):
    need("setpriv")
    raised, place = as_nobody(tmp_path)
    spec = {
        "id": "r",
        "program": sh(f"setsid {raised} sleep 1000 & echo $!; echo ready; exec sleep 1000"),
    }
    process = started_as_nobody(place, spec)
    status = begun_in(place)
    root = until(
        lambda: next(
            (pid for pid in processes.descendants(status["chaperone_pid"]) if uid_of(pid) == 0),
            None,
        )
    )
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    try:
        assert process.wait(60) == -signal.SIGKILL
        assert log(place) == [f"1 process can't be killed: {root} (another user)"]
        assert not is_gone(root) and is_gone(status["pid"])
        reaped = subprocess.run(
            [*NOBODY, *CHAPERONE, "reap", "--spool", place],
            check=True,
            capture_output=True,
            text=True,
        )
        lost = final(place)
        assert lost["state"] == "lost" and lost["gone_by"] is None, reaped
        assert lost["exception"]["message"].endswith(f"; still running: {root}")
    finally:
        os.kill(root, signal.SIGKILL)


@pytest.mark.root
def test_zombie_that_its_parent_keeps_is_not_called_running(spool, tmp_path):
    need("setpriv")
    raised, place = as_nobody(tmp_path)
    text = "import os,time\nif not os.fork(): os.setresuid(65534, 65534, 65534)\n"
    text += "os.write(1, b'up\\n')\ntime.sleep(1000)"
    (tmp_path / "parent.py").write_text(text)
    program = sh(f"setsid {raised} {sys.executable} -I -S {tmp_path}/parent.py & exec sleep 1000")
    process = started_as_nobody(place, {"id": "r", "program": program})
    status = begun_in(place)
    until(lambda: (place / "r" / "stdout").read_bytes() == b"up\nup\n")
    below = processes.descendants(status["chaperone_pid"])
    [root] = [pid for pid in below if uid_of(pid) == 0]
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    try:
        assert process.wait(60) == -signal.SIGKILL
        argv = [*NOBODY, *CHAPERONE, "reap", "--spool", place]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        assert final(place)["exception"]["message"].endswith(f"; still running: {root}")
    finally:
        os.kill(root, signal.SIGKILL)


@pytest.mark.root
@pytest.mark.parametrize("how", ["leftover", "program"])
@pytest.mark.parametrize("proc", ["seen", "hidden"])
def test_chaperone_waits_for_nothing_that_it_may_not_kill(spool, tmp_path, how, proc):
    need("setpriv", "unshare")
    raised, place = as_nobody(tmp_path)
    # A zombie of our own uid below it can't be taken by anybody but it.
    zombie = (
        "import os, time\nif not os.fork(): os.setresuid(65534, 65534, 65534); "
        "os._exit(0)\ntime.sleep(1000)"
    )
    root_program = [*raised.split(), sys.executable, "-I", "-S", "-c", zombie]
    argv = root_program
    if how == "leftover":
        (tmp_path / "zombie.py").write_text(zombie)
        argv = [
            "/bin/sh",
            "-c",
            f"setsid {raised} {sys.executable} -I -S {tmp_path}/zombie.py & "
            f"until [ -e {tmp_path}/go ]; do sleep 0.05; done",
        ]
    process = started_as_nobody(
        place,
        {"id": "r", "program": {"argv": argv}, "stop": {"grace_period": 0.5}},
        prefix=mounted("mount -t proc -o hidepid=2 proc /proc") if proc == "hidden" else (),
    )
    status = begun_in(place)
    root = until(
        lambda: next(
            (
                p
                for p in processes.descendants(status["chaperone_pid"])
                if uid_of(p) == 0 and processes.children(p)
            ),
            None,
        )
    )
    (tmp_path / "go").touch()
    try:
        if how == "program":
            ask(place, "stop 0.2")
        assert process.wait(60) == 0
        ended = final(place)
        sentence = f"process {root} runs as another user and can't be killed"
        assert log(place)[-1] == sentence
        if how == "program":
            assert (ended["state"], ended["gone_by"]) == ("lost", None)
            assert ended["exception"]["message"] == f"unable to stop the program: {sentence}"
        else:
            assert (ended["state"], ended["return_code"], ended["leftovers"]) == (
                "terminated",
                0,
                1,
            )
    finally:
        os.kill(root, signal.SIGKILL)


@pytest.mark.root
def test_program_that_was_killed_beside_what_can_not_be_is_not_lost(spool, tmp_path):
    need("setpriv")
    raised, place = as_nobody(tmp_path)
    program = sh(f"setsid {raised} sleep 1000 & exec sleep 1000")
    process = started_as_nobody(place, {"id": "r", "program": program})
    status = begun_in(place)
    chaperone, pid = status["chaperone_pid"], status["pid"]
    below = until(lambda: len(found := processes.descendants(chaperone)) == 2 and found)
    root = until(lambda: next((one for one in below if uid_of(one) == 0), None))
    os.kill(chaperone, signal.SIGSTOP)  # so that it hears of both at once
    os.kill(pid, signal.SIGKILL)
    until(lambda: stat_of(pid)[0] == "Z")
    ask(place, "kill")
    os.kill(chaperone, signal.SIGCONT)
    try:
        assert process.wait(60) == 0
        ended = final(place)
        assert (ended["state"], ended["signal"], ended["leftovers"]) == ("terminated", "SIGKILL", 1)
    finally:
        os.kill(root, signal.SIGKILL)


def started_as_nobody(place, spec, prefix=()):
    process = subprocess.Popen(
        [*prefix, *NOBODY, *CHAPERONE, "run", "--spool", str(place), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
    )
    process.stdin.write(json.dumps(spec).encode())
    process.stdin.close()
    until(lambda: (place / spec["id"]).exists() or process.poll() is not None)
    assert process.poll() is None
    return process


def uid_of(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        return int(re.search(r"Uid:\s*(\d+)", file.read())[1])


def test_what_a_tracer_holds_keeps_nobody_waiting_and_is_named(spool):
    need("strace")
    process = start(spool, sh("setsid sleep 1000 & echo $!; exec sleep 1000"))
    held = until(lambda: int(stdout(spool) or 0))
    status = begun_in(spool)
    strace = subprocess.Popen(["strace", "-q", "-o", os.devnull, "-p", str(held)])
    until(lambda: f"TracerPid:\t{strace.pid}" in text_of(f"/proc/{held}/status"))
    strace.send_signal(signal.SIGSTOP)
    until(lambda: stat_of(strace.pid)[0] == "T")
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    try:
        assert process.wait(60) == -signal.SIGKILL
        assert log(spool) == [f"1 process can't be killed: {held} (its tracer holds it)"]
    finally:
        strace.kill()
        strace.wait()
    until(lambda: is_gone(held))


@pytest.mark.parametrize("how", ["zombie", "exiting", "leftover"])
def test_chaperone_waits_for_no_tracer(spool, how):
    program = sh("sleep 1000 & echo $!; exec sleep 1000")
    process = start(spool, program, stop={"grace_period": 1})
    status = begun_in(spool)
    pid = status["pid"]
    if how == "leftover":
        pid = until(lambda: int(stdout(spool) or 0))
    # PTRACE_SEIZE; with PTRACE_O_TRACEEXIT a killed process stops before it is a zombie.
    options = 0 if how == "zombie" else 0x40
    text = "import ctypes; call = ctypes.CDLL(None).ptrace; call.argtypes = [ctypes.c_long] * 4; "
    text += f"print(call(0x4206, {pid}, 0, {options}), flush=True); input()"
    tracer = subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        if tracer.stdout.readline() != "0\n":
            absent("the right to trace")
        if how == "leftover":
            os.kill(status["pid"], signal.SIGKILL)
        else:
            ask(spool, "kill")
        assert process.wait(60) == 0
        ended = final(spool)
        if how == "leftover":
            assert (ended["signal"], ended["leftovers"]) == ("SIGKILL", 1)
        else:
            held = f"process {pid} has ended, but its tracer has not released it"
            if how == "exiting":
                held = f"process {pid} runs as another user or is held by a tracer"
                held += " and can't be killed"
            assert (ended["state"], ended["gone_by"]) == ("lost", None)
            assert ended["exception"]["message"] == f"unable to stop the program: {held}"
            assert log(spool)[-1] == held
    finally:
        tracer.kill()
        tracer.communicate()
    until(lambda: is_gone(pid))


# -- where the kernel does not say


def run_in(prefix, spool, program, **spec):
    """A chaperone behind another command: its process."""
    path = spool.parent / "s.json"
    path.write_text(json.dumps({"id": "r", "program": program, **spec}))
    return subprocess.Popen([*prefix, *CHAPERONE, "run", str(path)], stdout=subprocess.DEVNULL)


@pytest.mark.root
@pytest.mark.parametrize("through", ["pipe", "file"])
def test_without_proc_the_group_is_killed(spool, through):
    need("unshare")
    program = sh("sleep 1000 & echo ready; exec sleep 1000")
    outer = run_in(WITHOUT_PROC, spool, program, output={"through": through})
    until(lambda: (spool / "r").exists() and stdout(spool) == b"ready\n")
    status = begun_in(spool)
    assert status["tracking"] == "group"
    below = processes.descendants(status["chaperone_pid"])
    assert len(below) == 2
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    assert outer.wait(60) == -signal.SIGKILL and all(is_gone(pid) for pid in below)


@pytest.mark.root
@pytest.mark.parametrize("through", ["pipe", "file"])
def test_without_proc_what_is_left_is_not_known(spool, through):
    need("unshare")
    program = sh("sleep 1000 & echo $!; exit 3")
    outer = run_in(WITHOUT_PROC, spool, program, output={"through": through})
    assert outer.wait(60) == 0
    status = final(spool)
    assert (status["return_code"], status["leftovers"], status["tracking"]) == (3, None, "group")
    assert is_gone(int(stdout(spool)))


@pytest.mark.root
def test_proc_of_another_pid_namespace_is_not_believed(spool):
    """The numbers in it are other processes: none of them may be signalled."""
    need("unshare")
    innocents = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 1000 & done"
    path = spool.parent / "s.json"
    path.write_text(json.dumps({"id": "r", "program": sh("echo ready; exit 4")}))
    text = (
        f"{innocents}; {' '.join(CHAPERONE)} run {path} >/dev/null; "
        "kill -0 $! && jobs -p | wc -l; kill -9 $(jobs -p)"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "bash", "-c", text],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    status = final(spool)
    assert (status["return_code"], status["leftovers"], status["tracking"]) == (4, None, "group")
    assert done.stdout == "15\n"


def test_kernel_that_lists_no_children_is_not_taken_for_none(monkeypatch):
    listdir = os.listdir

    def empty(path):
        return [] if path.endswith("/task") else listdir(path)

    replace_call(monkeypatch, "listdir", empty)
    with pytest.raises(FileNotFoundError, match="/proc does not list our children"):
        processes.children(os.getpid())
    assert processes.children(1) == []


# -- runs in runs, and what is left on purpose


def test_what_is_left_on_purpose_goes_to_the_next_subreaper(spool, tmp_path):
    code = f"""if True:
        import ctypes, os, subprocess, sys, json
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
        program = {{"command": "setsid sleep 1000 & echo $!"}}
        spec = {{"id": "r", "leftovers": "leave", "program": program}}
        subprocess.run([*{CHAPERONE!r}, "run", "-"], input=json.dumps(spec).encode(), check=True)
        left = int(open({str(spool / "r" / "stdout")!r}).read())
        parent = int(open(f"/proc/{{left}}/stat").read().rpartition(")")[2].split()[1])
        assert parent == os.getpid(), parent
        os.kill(left, 9)
        os.waitpid(left, 0)"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert final(spool)["leftovers"] == 1


def test_child_of_the_shell_that_became_chaperone_is_none_of_the_runs(spool):
    text = f'sleep 1000 & echo $! > {spool.parent}/other; exec "$0" "$@"'
    process = run_in(["sh", "-c", text], spool, sh("setsid sleep 1000 & exec sleep 1000"))
    until((spool / "r").exists)
    status = begun_in(spool)
    other = int((spool.parent / "other").read_text())
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not is_gone(other) and is_gone(status["pid"])
    os.kill(other, signal.SIGKILL)


def test_run_that_is_started_in_a_run_dies_with_it(spool, tmp_path):
    inner = tmp_path / "inner.json"
    inner.write_text(json.dumps({"id": "inner", "program": sh("exec sleep 1000")}))
    process = start(spool, sh(f"{' '.join(CHAPERONE)} run --detach {inner} && exec sleep 1000"))
    until((spool / "inner").exists)
    status = begun_in(spool, "inner")
    os.kill(begun_in(spool)["chaperone_pid"], signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert all(is_gone(status[name]) for name in ("pid", "chaperone_pid", "guard_pid"))


def test_launcher_is_not_started_inside_of_a_run(spool, monkeypatch):
    monkeypatch.setenv("CHAPERONE_RUN_ID", "outer")
    starting.start(str(spool), {"id": "r", "program": {"argv": ["true"]}}, warm=True)
    until((spool / "r" / "status.json").exists)
    assert not (spool / ".launcher").exists() and not (spool / ".launcher.lock").exists()


def test_death_of_a_launcher_touches_no_run(spool):
    starting.start(str(spool), {"id": "r", "program": sh("exec sleep 1000")}, warm=True)
    status = begun_in(spool)
    launcher = int((spool / ".launcher.lock").read_text())
    os.kill(launcher, signal.SIGKILL)
    until(lambda: is_gone(launcher))
    assert not any(is_gone(status[name]) for name in ("pid", "chaperone_pid", "guard_pid"))
    ask(spool, "stop")
    until((spool / "r" / "status.json").exists)
    assert final(spool)["signal"] == "SIGTERM"


def test_sigkill_of_an_exec_leaves_nothing(spool, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"program": sh("setsid sleep 1000 & echo $$ $!; exec sleep 1000")}))
    for victim in ("chaperone", "guard"):
        process = subprocess.Popen([*CHAPERONE, "exec", path], stdout=subprocess.PIPE)
        pids = [int(word) for word in process.stdout.readline().split()]
        [chaperone] = processes.children(process.pid)
        os.kill(chaperone if victim == "chaperone" else process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        until(lambda pids=pids: all(is_gone(pid) for pid in pids))
        process.stdout.close()


def test_guard_that_can_not_be_forked_is_an_error_in_a_sentence(spool, monkeypatch, tmp_path):
    replace_call(monkeypatch, "fork", refused)
    with pytest.raises(StartError, match="^unable to start a chaperone: Resource temp"):
        guarding.fork(leave_session=False)
    code = "import ctypes; ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)"
    exec(code)  # noqa: S102  the suite is no subreaper


def refused():
    raise BlockingIOError(11, os.strerror(11))


# -- what an outcome says


def test_memory_of_the_chaperone_is_not_taken_for_the_programs(spool):
    start(spool, {"argv": ["true"]}).wait(60)
    rusage = final(spool)["rusage"]
    assert rusage["maxrss"] is None and rusage["minflt"] > 0


def test_no_oom_is_said_where_there_was_no_sigkill(spool):
    start(spool, sh("exit 137"), "a").wait(60)
    start(spool, sh("kill -TERM $$"), "b").wait(60)
    assert (final(spool, "a")["oom"], final(spool, "b")["oom"]) == (False, False)


def test_sigkill_that_nobody_asked_for_is_no_oom_where_the_kernel_counted_none(spool):
    start(spool, sh("kill -KILL $$")).wait(60)
    assert final(spool)["oom"] in (False, None)  # None: no cgroup here counts


@pytest.mark.root
@pytest.mark.parametrize("asked", [False, True], ids=["by-the-kernel", "asked-for"])
def test_oom_kill_in_the_programs_cgroup_is_said(spool, asked):
    group = memory_cgroup(spool.parent.name)
    try:
        text = "print(flush=True)\n" + ("import time; time.sleep(1000)" if asked else EATS)
        prefix = inside(group)
        process = run_in(prefix, spool, py(text))
        until((spool / "r").exists)
        if asked:  # the neighbour, in the same cgroup, is killed in the program's place
            until(lambda: stdout(spool))
            subprocess.run([*prefix, sys.executable, "-c", EATS], check=False)
            ask(spool, "kill")
        assert process.wait(60) == 0
        status = final(spool)
        assert (status["signal"], status["oom"]) == ("SIGKILL", None if asked else True)
    finally:
        until(lambda: not text_of(f"{group}/cgroup.procs"))
        os.rmdir(group)


# -- what a spawn and a start refuse


def test_child_without_memory_is_no_second_chaperone(spool):
    env = {f"X{number}": "x" * 100_000 for number in range(10)}
    process = start(spool, {"argv": ["true"], "rlimits": {"as": 10_000_000}, "env": env})
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["started"], status["exception"]["stage"]) == (
        "error",
        False,
        "spawn",
    )
    assert status["exception"]["errno"] in (7, 12), status["exception"]


def test_words_are_utf8_whatever_the_locale(spool, tmp_path):
    """By a Latin-1 of our own making: localedef is not everywhere."""
    program = sh('printf \'%s %s\' "$0" "$X"', env={"X": "\u20ac"})
    program["argv"].append("\u00e9\u20ac")
    spec = tmp_path / "s.json"
    spec.write_text(json.dumps({"id": "r", "program": program}))
    code = (
        f"import sys; sys.path.append({ROOT!r}); sys.argv[1:] = ['run', {str(spec)!r}]; "
        "import chaperone.__main__"
    )
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": latin1(tmp_path)}
    env["LOCPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=env, stdout=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0
    assert stdout(spool).decode() == "\u00e9\u20ac \u20ac", final(spool)["exception"]


def latin1(directory):
    need("localedef")
    made = subprocess.run(
        ["localedef", "-f", "ISO-8859-1", "-i", "en_US", str(directory / "en_US.ISO-8859-1")],
        capture_output=True,
        check=False,
    )
    if made.returncode > 1:
        absent("a locale that is not UTF-8")
    return "en_US.ISO-8859-1"


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"A=B": "x"}, "env[\"A=B\"]: want a non-empty name without '=', got 'A=B'"),
        ({"": "x"}, "env[\"\"]: want a non-empty name without '=', got ''"),
        ({"A": "\0"}, "env.A: want a string without NUL bytes, got one at character 0"),
        ({"A": 5}, "env.A: want a string, got 5"),
    ],
)
def test_environment_that_can_not_be_passed_on_is_refused(spool, env, sentence, warm):
    with pytest.raises(SpecError) as caught:
        starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=warm, env=env)
    assert str(caught.value) == f"unable to start a run: {sentence}"
    assert not list(spool.iterdir())


def test_chaperone_is_killed_again_and_again_and_nothing_is_left(spool, tree):
    """Not at one moment: at many, from the start on."""
    program, _ = tree
    for number in range(10):
        run_id = f"r{number}"
        process = start(spool, program, run_id)
        time.sleep(0.02 * number)
        os.kill(live(spool, run_id)["chaperone_pid"], signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        said = re.findall(rb"^(\d+) (\d+)$", stdout(spool, run_id), re.M)
        assert all(is_gone(int(pid), int(started)) for pid, started in said)
