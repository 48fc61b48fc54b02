"""
The guard stands above the chaperone: what a killed chaperone leaves comes to it, and ends. A test
for each thing that it must do.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess

import pytest

from chaperone.api import Spool
from chaperone.launch import start as starting
from chaperone.program import processes
from spool_tests.support import guarded
from spool_tests.support.guarded import begun_in, is_gone, stat_of, text_of
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.processes import has_taken, threads_of_user
from spool_tests.support.runs import ask, final, live, log, py, running, sh, start, stdout
from spool_tests.support.waiting import need, patiently, until

tree = guarded.tree

PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE = 36, 4


def left_by(spool, count):
    """The tree's own list, once it is whole: [(pid, start time)]."""
    lines = until(
        lambda: len(found := re.findall(rb"^(\d+) (\d+)$", stdout(spool), re.M)) == count and found
    )
    return [(int(pid), int(started)) for pid, started in lines]


@pytest.fixture(params=["cold", "warm"])
def begun(request, spool):
    """Start a run, cold or warm, and return its status once it runs."""

    def begin(program, **spec):
        spec = {"id": "r", "program": program, **spec}
        if request.param == "cold":
            started.append(start(spool, spec.pop("program"), spec.pop("id"), **spec))
        else:
            starting.start(str(spool), spec, warm=True)
        return begun_in(spool)

    started = []
    yield begin
    for process in started:
        process.wait(60)
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        launcher = int((spool / ".launcher.lock").read_text())
        os.kill(launcher, signal.SIGTERM)
        until(lambda: is_gone(launcher))


def test_pid_that_the_scheduler_forked_is_the_guard(spool):
    process = start(spool, sh("exec sleep 1000"))
    status = begun_in(spool)
    assert status["guard_pid"] == process.pid != status["chaperone_pid"]
    assert stat_of(status["chaperone_pid"])[1] == process.pid
    inode = (spool / "r" / "lock").stat().st_ino
    holders = [
        line.split()[4] for line in text_of("/proc/locks").splitlines() if f":{inode} " in line
    ]
    assert holders == [str(status["chaperone_pid"])] and status["tracking"] == "kernel"
    ask(spool, "kill")
    assert process.wait(60) == 0


def test_guard_whose_own_side_is_not_there_ends_the_run(spool, tmp_path):
    """It imports that behind the fork, beside the chaperone, and the package may go just then."""
    package = shutil.copytree(pathlib.Path(ROOT, "chaperone"), tmp_path / "chaperone")
    for file in package.rglob("watch.*"):
        file.unlink()
    command = [*CHAPERONE[:-1], package / "__main__.py", "run", "--id", "r", "--"]
    done = subprocess.run([*command, "sleep", "1000"], stdout=subprocess.DEVNULL, timeout=300)
    assert done.returncode == os.EX_SOFTWARE
    until((spool / "r" / "status.json").exists)
    status = final(spool)
    assert (status["state"], status["signal"]) == ("terminated", "SIGKILL")
    assert status["stop"]["reason"] == "guard"


@pytest.mark.parametrize("on_disconnect", ["survive"])
def test_run_that_survives_has_no_guard(spool, on_disconnect):
    process = start(spool, sh("exec sleep 1000"), on_disconnect=on_disconnect)
    status = begun_in(spool)
    assert (status["guard_pid"], status["chaperone_pid"]) == (None, process.pid)
    ask(spool, "kill")
    assert process.wait(60) == 0


def test_nothing_is_left_of_a_killed_chaperones_run(spool, begun, tree):
    program, count = tree
    status = begun(program)
    left = left_by(spool, count)
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    until(lambda: all(is_gone(*process) for process in left))
    until(lambda: is_gone(status["guard_pid"]))
    assert log(spool) == []
    assert Spool(spool)["r"].status().state == "lost"


def test_agent_and_a_daemon_with_a_title_of_its_own_are_gone(spool, begun):
    need("ssh-agent", "perl")
    text = (
        "ssh-agent -D >/dev/null & echo $!; "
        'perl -e \'$0 = "x" x 500; use POSIX; exit if fork; POSIX::setsid(); print "$$\\n"; '
        "close STDOUT; sleep 1000'; "
        "echo ready; exec sleep 1000"
    )
    status = begun(sh(text))
    pids = until(
        lambda: (
            len(found := [int(line) for line in stdout(spool).split() if line.isdigit()]) == 2
            and found
        )
    )
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    until(lambda: all(is_gone(pid) for pid in [*pids, status["pid"], status["guard_pid"]]))


def test_guard_needs_no_process_more(spool):
    """At RLIMIT_NPROC, full of children that left the group."""
    text = """import os, time
try:
    for _ in range(150):
        if not os.fork():
            os.setsid()
            time.sleep(1000)
            os._exit(0)
except OSError:
    pass
os.write(1, b"ready\\n")
time.sleep(1000)"""

    def attempt(number, more):
        # The limit counts what other tests run as this user, too, and they may start as many.
        run_id = f"r{number}"
        process = start(spool, py(text, rlimits={"nproc": threads_of_user() + more}), run_id)
        until(lambda: stdout(spool, run_id) == b"ready\n")
        status = live(spool, run_id)
        below = processes.descendants(status["chaperone_pid"])
        os.kill(status["chaperone_pid"], signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        until(lambda: all(is_gone(pid) for pid in below))
        return len(below) > 1

    patiently(attempt, 100, 200, 400)


# -- signals, codes, ends


def test_signals_pass_through_it(spool):
    text = (
        "trap 'echo usr1' USR1; trap 'echo term; exit 7' TERM; echo ready; while :; "
        "do sleep 0.02; done"
    )
    process = start(spool, sh(text))
    until(lambda: stdout(spool) == b"ready\n")
    process.send_signal(signal.SIGUSR1)
    until(lambda: stdout(spool) == b"ready\nusr1\n")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    status = final(spool)
    assert stdout(spool) == b"ready\nusr1\nterm\n"
    assert (status["return_code"], status["stop"]["by"], status["stop"]["reason"]) == (
        7,
        "SIGTERM",
        "request",
    )


def test_exit_code_comes_back_through_it(spool):
    spec = json.dumps({"program": {"argv": ["true"], "cwd": 5}})
    run = [*CHAPERONE, "run", "-"]
    failed = subprocess.run(run, input=spec, capture_output=True, text=True, check=False)
    assert failed.returncode == os.EX_DATAERR
    start(spool, sh("exit 3")).wait(60)
    again = json.dumps({"id": "r", "program": {"argv": ["true"]}})
    failed = subprocess.run(run, input=again, capture_output=True, text=True, check=False)
    assert failed.returncode == os.EX_CANTCREAT


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, 40])
def test_death_by_signal_comes_back_through_it(spool, number):
    process = start(spool, sh("exec sleep 1000"))
    status = begun_in(spool)
    # What a chaperone has no answer to kills it, as it did without a guard above it.
    os.kill(status["chaperone_pid" if number == signal.SIGKILL else "guard_pid"], number)
    assert process.wait(60) == -number and is_gone(status["pid"])


def test_its_rusage_includes_the_chaperone_and_the_program(spool):
    process = start(spool, py("import time\nwhile time.process_time() < 0.1: pass"))
    _, process.returncode, usage = os.wait4(process.pid, 0)
    program = final(spool)["rusage"]
    assert process.returncode == 0 and program["utime"] + program["stime"] >= 0.1
    assert usage.ru_utime + usage.ru_stime > program["utime"] + program["stime"]


def test_it_ends_after_the_last_fd_of_the_spool_is_closed(spool):
    for run_id, number in (("a", None), ("b", signal.SIGKILL)):
        process = start(spool, sh("exec sleep 1000"), run_id)
        status = running(spool, run_id)
        ask(spool, "kill", run_id) if number is None else os.kill(status["chaperone_pid"], number)
        process.wait(60)
        assert is_gone(status["chaperone_pid"]) and open_below(str(spool)) == []


def open_below(path):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(path):
                        found.append((pid, fd))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_that_reaches_both_counts_once(spool, number):
    text = "trap 'echo got' TERM USR1; echo ready; while :; do sleep 0.02; done"
    process = start(spool, sh(text))
    until(lambda: stdout(spool) == b"ready\n")
    status = live(spool)
    # It hears both at once: a guard that gets no turn for a second passes on a signal of its own.
    os.kill(status["chaperone_pid"], signal.SIGSTOP)
    for pid in (status["guard_pid"], status["chaperone_pid"]):
        os.kill(pid, number)
    until(lambda: has_taken(status["guard_pid"], number))
    os.kill(status["chaperone_pid"], signal.SIGCONT)
    until(lambda: b"got\n" in stdout(spool))
    if number == signal.SIGTERM:  # asked again, by one of them: that counts
        until(lambda: live(spool)["state"] == "stopping")
    ask(spool, "signal WINCH")  # what comes after it has been heard comes after both
    until(lambda: not pending(status))
    ask(spool, "kill")
    assert process.wait(60) == 0 and stdout(spool) == b"ready\ngot\n"


def pending(status):
    """Whether a signal waits in one of the two."""
    for pid in (status["guard_pid"], status["chaperone_pid"]):
        text = text_of(f"/proc/{pid}/status")
        if any(int(mask, 16) & ~(1 << 16) for mask in re.findall(r"S[ih][gd]Pnd:\s*(\w+)", text)):
            return True
    return False


def test_same_signal_a_moment_later_counts_again(spool):
    text = "trap 'echo got' USR1; echo ready; while :; do sleep 0.02; done"
    process = start(spool, sh(text))
    until(lambda: stdout(spool) == b"ready\n")
    for times in (1, 2, 3):
        process.send_signal(signal.SIGUSR1)
        until(lambda times=times: stdout(spool) == b"ready\n" + times * b"got\n")
    ask(spool, "kill")
    assert process.wait(60) == 0


@pytest.mark.root
def test_as_pid_1_it_reaps_what_others_leave(spool):
    need("unshare", "nsenter")
    spec = spool.parent / "s.json"
    spec.write_text(json.dumps({"id": "r", "program": sh("exec sleep 1000")}))
    command = ["unshare", "--pid", "--fork", "--mount-proc", *CHAPERONE, "run", str(spec)]
    outer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = begun_in(spool)
    assert (status["guard_pid"], status["tracking"]) == (1, "kernel")
    [init] = processes.children(outer.pid)
    orphan = "sleep 1000 & :"
    entered = ["nsenter", "--target", str(init), "--pid", "sh", "-c", orphan]
    before = set(processes.children(init))
    subprocess.run(entered, check=True, stdout=subprocess.DEVNULL)
    [pid] = until(lambda: set(processes.children(init)) - before, what="it has the orphan")
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(processes.children(init)) == 1, what="it has reaped the orphan")
    os.kill(init, signal.SIGTERM)
    assert outer.wait(60) == 0
    assert final(spool)["stop"]["by"] == "SIGTERM"


@pytest.mark.root
def test_as_pid_1_it_kills_what_is_left(spool):
    need("unshare")
    spec = spool.parent / "s.json"
    spec.write_text(json.dumps({"id": "r", "program": sh("setsid sleep 1000 & exec sleep 1000")}))
    command = ["unshare", "--pid", "--fork", "--mount-proc", *CHAPERONE, "run", str(spec)]
    outer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    begun_in(spool)
    [init] = processes.children(outer.pid)
    [chaperone] = processes.children(init)
    os.kill(chaperone, signal.SIGKILL)
    assert outer.wait(60) == 128 + signal.SIGKILL
    assert Spool(spool)["r"].status().state == "lost"


# -- what it has


def test_it_guards_before_the_run_directory_is_visible(spool, tmp_path):
    need("strace")
    trace = tmp_path / "trace"
    spec = tmp_path / "s.json"
    spec.write_text(json.dumps({"id": "r", "program": {"argv": ["true"]}}))
    calls = "trace=prctl,fork,clone,clone3,vfork,sendmsg,renameat"
    subprocess.run(
        ["strace", "-f", "-qq", "-o", trace, "-e", calls, *CHAPERONE, "run", spec],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    words = ["CHILD_SUBREAPER", "fork|clone", "sendmsg.*run -1", 'renameat.*"r"', "VFORK|vfork"]
    text = trace.read_text()
    places = [re.search(word, text).start() for word in words]
    assert places == sorted(places)


def test_lock_is_never_in_it_and_no_write_end(spool, begun):
    status = begun(sh("echo ready; exec sleep 1000"))
    until(lambda: stdout(spool) == b"ready\n")
    held = until(lambda: handed_to(status["guard_pid"]))
    of_spool = {
        target.rpartition("/")[2]: info for target, info in held.values() if str(spool) in target
    }
    assert of_spool.keys() == {"stdout", "stderr", "log", "lock"}
    assert "lock:" not in of_spool["lock"] and "FLOCK" in of_spool["stdout"]
    pipes = [info for target, info in held.values() if target.startswith("pipe:")]
    assert [int(re.search(r"flags:\t(\d+)", info)[1], 8) & os.O_ACCMODE for info in pipes] == [0, 0]
    others = {target for target, _ in held.values()} - {
        str(spool / "r" / name) for name in of_spool
    }
    assert {target.partition(":")[0] for target in others} == {
        "/dev/null",
        "socket",
        "pipe",
    }
    ask(spool, "kill")
    until((spool / "r" / "status.json").exists)


def handed_to(guard):
    """As `fds_of`, once it has read the message with the pipes: a chaperone goes first."""
    held = fds_of(guard)
    return held if held and any(target.startswith("pipe:") for target, _ in held.values()) else None


def fds_of(guard):
    """{number: (target, fdinfo)}; none while it still imports, and has a file of that open."""
    held = {}
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir(f"/proc/{guard}/fd"):
            with open(f"/proc/{guard}/fdinfo/{fd}") as file:
                held[fd] = (os.readlink(f"/proc/{guard}/fd/{fd}"), file.read())
        return held if stat_of(guard)[0] == "S" else None


def test_it_saves_what_the_pipes_still_held_up_to_the_limit(spool):
    text = (
        "import os, time\nos.write(1, b'ready\\n')\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
    )
    text += (
        "os.write(1, b'x' * 50_000)\nos.write(2, b'y' * 100)\nopen('written', 'w')\ntime.sleep(60)"
    )
    process = start(spool, py(text, cwd=str(spool.parent)), output={"max_bytes": 1006})
    until(lambda: stdout(spool) == b"ready\n")
    status = begun_in(spool)
    os.kill(status["chaperone_pid"], signal.SIGSTOP)
    (spool.parent / "go").touch()
    until((spool.parent / "written").exists)
    os.kill(status["chaperone_pid"], signal.SIGKILL)
    process.wait(60)
    assert stdout(spool) == b"ready\n" + 1000 * b"x"
    assert (spool / "r" / "stderr").read_bytes() == 100 * b"y"


# -- its own death


def test_sigkill_of_the_guard_ends_the_program_at_once(spool, begun, tree):
    program, count = tree
    status = begun(program, stop={"grace_period": 60})
    left = left_by(spool, count)
    os.kill(status["guard_pid"], signal.SIGKILL)
    until((spool / "r" / "status.json").exists)
    ended = final(spool)
    assert (ended["state"], ended["signal"], ended["complete"]) == ("terminated", "SIGKILL", True)
    assert (ended["stop"]["reason"], ended["stop"]["signal"]) == ("guard", "SIGKILL")
    assert log(spool)[0] == "the guard was killed: the program is killed as well"
    assert all(is_gone(*process) for process in left)
    until(lambda: is_gone(status["chaperone_pid"]))


def test_sigkill_of_a_schedulers_group_ends_the_run(spool):
    """As `timeout -s KILL` and many schedulers do: the chaperone is in a session of its own."""
    text = json.dumps({"id": "r", "program": sh("exec sleep 1000")})
    process = subprocess.Popen(
        [*CHAPERONE, "run", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    process.stdin.write(text.encode())
    process.stdin.close()
    until((spool / "r").exists)
    status = begun_in(spool)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    until((spool / "r" / "status.json").exists)
    assert is_gone(status["pid"]) and final(spool)["stop"]["reason"] == "guard"


@pytest.mark.parametrize("leads", [False, True], ids=["in-our-session", "leads-a-session"])
def test_sessions_are_as_without_it(spool, leads):
    process = subprocess.Popen(
        [*CHAPERONE, "run", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=leads,
    )
    process.stdin.write(json.dumps({"id": "r", "program": sh("exec sleep 1000")}).encode())
    process.stdin.close()
    until((spool / "r").exists)
    status = begun_in(spool)
    for pid in (status["guard_pid"], status["chaperone_pid"], status["pid"]):
        assert stat_of(pid)[2:4] == (pid, pid)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    assert final(spool)["stop"]["by"] == "SIGTERM"


def test_job_of_a_shell_is_a_child_that_guards(spool):
    """A group's leader can't begin a session: its child does, and is the guard."""
    process = subprocess.Popen(
        [*CHAPERONE, "run", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.setpgid(0, 0),
    )
    process.stdin.write(json.dumps({"id": "r", "program": sh("exec sleep 1000")}).encode())
    process.stdin.close()
    until((spool / "r").exists)
    status = begun_in(spool)
    assert stat_of(status["guard_pid"])[1] == process.pid
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0 and final(spool)["stop"]["by"] == "SIGTERM"
