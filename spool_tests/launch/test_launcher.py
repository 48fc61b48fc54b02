"""
The launcher: warm starts that are as good as cold ones, whatever happens to it.

Knows: its socket, its pid.  Must not know: how it forks.
"""

import concurrent.futures
import fcntl
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from chaperone import errors
from chaperone.launch import client, launcher, process
from chaperone.launch import image as images
from chaperone.launch import start as starting
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import need, patiently, until

ECHO = {
    "argv": [
        "/bin/sh",
        "-c",
        (
            'echo "$COLOUR $(umask) $PWD"; readlink /proc/$PPID/fd/* | grep -c '
            '"launcher\\|socket"; exit 3'
        ),  # one socket: the guard's
    ]
}


def final(spool, run_id):
    until((spool / ".ended" / run_id).is_symlink, what=f"{run_id} has ended")
    return json.loads((spool / run_id / "status.json").read_text())


def ends(spool):
    return sorted(os.listdir(spool / ".ended"))


def launcher_pid(spool):
    return int((spool / ".launcher.lock").read_text())


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_warm_start_gives_the_program_the_askers_environment_umask_and_cwd(spool, warm, tmp_path):
    before = os.umask(0o027)
    try:
        run_id = starting.start(
            str(spool),
            {"program": ECHO},
            warm=True,
            env={"COLOUR": "bl\udcff\udcfe", "PATH": os.environ["PATH"]},
            cwd=str(tmp_path),
        )
    finally:
        os.umask(before)
    status = final(spool, run_id)
    assert (status["state"], status["return_code"]) == ("terminated", 3)
    assert (spool / run_id / "stdout").read_bytes() == b"bl\xff\xfe 0027 " + os.fsencode(
        tmp_path
    ) + b"\n1\n"


def test_warm_chaperone_is_a_session_of_its_own_and_its_guard_a_child_of_the_launcher(spool, warm):
    run_id = starting.start(str(spool), {"program": {"argv": ["sleep", "60"]}}, warm=True)
    running = json.loads((spool / run_id / "running.json").read_text())
    chaperone = running["chaperone_pid"]
    guard = running["guard_pid"]
    assert (parent_of(chaperone), parent_of(guard)) == (guard, warm)
    assert os.getsid(guard) == guard
    assert os.getsid(chaperone) == chaperone != os.getsid(warm)
    until(lambda: signals(chaperone, "SigBlk") == 0)
    assert not signals(chaperone, "SigIgn") >> signal.SIGCHLD - 1 & 1
    until(lambda: os.readlink(f"/proc/{chaperone}/cwd") == "/")


def test_sigkill_of_the_launcher_touches_no_run_and_the_next_start_is_cold(spool, warm, chaperone):
    run_id = starting.start(
        str(spool),
        {"program": {"command": "read line < go; echo $line"}},
        warm=True,
        cwd=str(fifo(spool)),
    )
    os.kill(warm, signal.SIGKILL)
    until(lambda: state_of(warm) in "ZX")
    result = chaperone("run", "--warm", "-", spec={"program": {"argv": ["true"]}})
    assert (result.returncode, result.stderr) == (0, "")
    assert final(spool, result.stdout.strip())["return_code"] == 0
    (spool.parent / "go").write_text("on\n")
    assert final(spool, run_id)["return_code"] == 0
    assert (spool / run_id / "stdout").read_text() == "on\n"


def fifo(spool):
    """A directory with a FIFO `go`."""
    os.mkfifo(spool.parent / "go")
    return spool.parent


def signals(pid, name):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith(name))


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_run_warm_prints_the_id_and_returns_when_the_run_is_visible(spool, warm, chaperone):
    result = chaperone(
        "run", "--warm", "--id", "w", "-", spec={"program": {"argv": ["sleep", "60"]}}
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "w\n", "")
    assert parent_of(json.loads((spool / "w" / "running.json").read_text())["guard_pid"]) == warm


def test_second_start_of_an_id_is_refused_by_the_launcher_too(spool, warm, chaperone):
    for _ in range(2):
        result = chaperone(
            "run",
            "--warm",
            "--id",
            "w",
            "-",
            spec={"program": {"command": "echo once >> ran"}},
            cwd=spool.parent,
        )
    assert (result.returncode, result.stderr) == (
        73,
        "chaperone: unable to create run 'w': it exists\n",
    )
    with pytest.raises(errors.RunExistsError, match="^unable to create run 'w': it exists$"):
        starting.start(str(spool), {"id": "w", "program": {"argv": ["true"]}}, warm=True)
    final(spool, "w")
    assert (spool.parent / "ran").read_text() == "once\n"


def test_second_launcher_is_refused(spool, warm, chaperone):
    result = chaperone("launcher")
    assert (result.returncode, result.stderr) == (
        74,
        f"chaperone: unable to start a launcher for spool {str(spool)!r}: "
        f"one is already running, pid {warm}\n",
    )


def test_launcher_may_be_idle_for_longer_than_the_kernel_counts(spool, chaperone):
    """poll(2) takes 24.8 days at most."""
    assert chaperone("launcher", "--detach", "--idle", "2592000").returncode == 0
    try:
        assert (
            chaperone("run", "--warm", "-", spec={"id": "r", "program": {"argv": ["true"]}}).stdout
            == "r\n"
        )
        assert (spool / ".launcher").exists()
    finally:
        os.kill(int((spool / ".launcher.lock").read_text()), signal.SIGTERM)


def test_launcher_is_started_on_demand_once_and_ends_when_idle(spool, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_S", 60)

    def attempt(number, idle_s):
        monkeypatch.setattr(client, "ON_DEMAND_IDLE_S", idle_s)
        first = starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
        pid = launcher_pid(spool)
        second = starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
        again = launcher_pid(spool)
        assert {final(spool, run_id)["state"] for run_id in (first, second)} == {"terminated"}
        until(lambda: not (spool / ".launcher").exists())
        return pid == again  # or the second came after the first one's end

    patiently(attempt, 1, 5, 20)


def test_socket_is_the_owners_alone(spool, warm):
    assert (spool / ".launcher").stat().st_mode & 0o777 == 0o600


@pytest.mark.root
def test_another_user_who_can_reach_the_socket_is_refused(spool, warm):
    """
    The modes of the spool and the socket keep others out; if they are opened to others, the
    kernel still reports who asks.
    """
    reached = socket.socket(socket.AF_UNIX)
    directory = os.open(spool, os.O_RDONLY)
    os.chmod(spool / ".launcher", 0o666)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.chdir(directory)  # by then the parents of the spool need not let it through
            os.chmod(directory, 0o711)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            reached.connect(
                ".launcher"
            )  # that is enough to be answered; what was sent after the answer would fail
            os.write(writing, reached.recv(1_000))
        finally:
            os._exit(0)
    os.close(writing)
    with reached, open(reading, "rb") as answers:
        answer = json.loads(answers.read())
    os.waitpid(pid, 0)
    os.close(directory)
    assert answer == {
        "error": "ChaperoneError",
        "message": "unable to launch a run for uid 65534: want uid 0",
        "errno": None,
    }


@pytest.mark.parametrize(
    "text",
    [b"", b"{}\n", b'{"image": "9"}\n', b"no json\n", b'{"image":'],
    ids=["nothing", "empty", "other", "no-json", "half"],
)
def test_garbage_on_the_socket_starts_nothing_and_keeps_nobody_waiting(spool, warm, text):
    # By the directory's fd: a socket's own path may have 107 bytes at most, a test's directory has
    # more.
    directory = os.open(spool, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"/proc/self/fd/{directory}/.launcher")
        os.close(directory)
        connection.sendall(text)
        if text == b'{"image": "9"}\n':
            assert connection.recv(1000).startswith(b'{"error": "ChaperoneError"')
            return  # it took that for an upgrade, and is gone
        run_id = starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
        assert final(spool, run_id)["state"] == "terminated"
    assert ends(spool) == [run_id]


@pytest.mark.parametrize(
    "image", ["9", client.IMAGE[: images.TIME_DIGITS] + " 0 /"], ids=["newer", "elsewhere"]
)
def test_launcher_of_other_code_ends_and_the_start_is_cold(spool, warm, monkeypatch, image):
    """Also where a packager has set the times of all files alike."""
    monkeypatch.setattr(client, "IMAGE", image)
    monkeypatch.setattr(client, "start_on_demand", lambda path: False)
    run_id = starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    assert final(spool, run_id)["state"] == "terminated"
    until(lambda: state_of(warm) in "ZX")


def test_code_is_told_apart_whose_files_have_all_the_same_time(monkeypatch, tmp_path):
    found = set()
    for name, text in (("1.0/a.py", "x"), ("2.0/a.py", "x"), ("2.0/a.py", "xy")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (1, 1))
        monkeypatch.setattr(images, "PACKAGE", str(path.parent))
        found.add(images._image())
    assert len(found) == 3


def test_upgrade_ends_the_launcher_alone():
    """By its pidfd, which is nobody else's when it has died meanwhile."""
    process = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(process.pid)
    try:
        launcher._end(pidfd)
        assert process.wait() == -signal.SIGTERM
        launcher._end(pidfd)
        launcher._end(-1)
    finally:
        os.close(pidfd)


def test_launcher_of_a_spool_that_was_moved_starts_nothing_elsewhere(spool, warm, chaperone):
    """The socket moves with the spool; the run is to be where it was asked for."""
    moved = spool.parent / "moved"
    spool.rename(moved)
    spool.mkdir(0o700)
    result = chaperone(
        "run", "--warm", "--id", "r", "--spool", moved, "-", spec={"program": {"argv": ["true"]}}
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "r\n", "")
    assert final(moved, "r")["state"] == "terminated"
    assert os.listdir(spool) == []
    until(lambda: state_of(warm) in "ZX", what="it is of no use any more")


def test_stopped_launcher_costs_a_cold_start_and_starts_nothing_twice(spool, warm, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_S", 0.2)
    os.kill(warm, signal.SIGSTOP)
    run_id = starting.start(
        str(spool), {"program": {"command": "echo once >> ran"}}, warm=True, cwd=str(spool.parent)
    )
    assert final(spool, run_id)["return_code"] == 0
    os.kill(warm, signal.SIGCONT)
    late = starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    final(spool, late)
    assert (spool.parent / "ran").read_text() == "once\n"
    assert ends(spool) == sorted([run_id, late])


def test_answer_that_gets_lost_is_no_second_start(spool, warm, monkeypatch):
    answer = client._answer
    monkeypatch.setattr(client, "_answer", lambda path, request: answer(path, request) and {})
    run_id = starting.start(
        str(spool), {"program": {"command": "echo once >> ran"}}, warm=True, cwd=str(spool.parent)
    )
    assert final(spool, run_id)["return_code"] == 0
    assert (spool.parent / "ran").read_text() == "once\n"


def test_run_that_appears_while_we_start_cold_is_the_one_that_was_asked_for(
    spool, warm, monkeypatch
):
    real = client._answer

    def late(path, request):
        """No answer, and the launcher's fork comes first only when we have looked."""
        monkeypatch.setattr(
            starting, "_start_cold", lambda *rest: (real(path, request), cold(*rest))
        )
        return {}

    cold = starting._start_cold
    monkeypatch.setattr(client, "_answer", late)
    run_id = starting.start(
        str(spool), {"program": {"command": "echo once >> ran"}}, warm=True, cwd=str(spool.parent)
    )
    assert final(spool, run_id)["return_code"] == 0
    assert (spool.parent / "ran").read_text() == "once\n"


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(10, 20))]
)
def test_launcher_killed_again_and_again_during_a_burst_starts_each_run_once(spool, warm, seed):
    """
    At random moments; those that were killed are followed by others, started on demand.
    A refusal would have to be a clear one.
    """
    dice = random.Random(seed)
    count, kills, askers = (300, 8, 8) if seed >= 10 else (60, 3, 4)
    ids = [f"burst-{number}" for number in range(count)]
    refused = {}

    def ask(run_id):
        begun = time.monotonic()
        try:
            spec = {
                "id": run_id,
                "program": {"command": f"echo {run_id} >> ran; exit {len(run_id)}"},
            }
            assert starting.start(str(spool), spec, warm=True, cwd=str(spool.parent)) == run_id
        except errors.ChaperoneError as error:
            refused[run_id] = str(error)
        took.append(time.monotonic() - begun)

    took = []
    killed = []
    with concurrent.futures.ThreadPoolExecutor(askers) as pool:
        asked = [pool.submit(ask, run_id) for run_id in ids]
        for kill in range(kills):
            due = int(count * (kill + dice.random()) / kills / 1.2)
            until(lambda: sum(future.done() for future in asked) >= due, timeout=60)  # noqa: B023
            select.select([], [], [], dice.random() * 0.01)
            if pid := kill_launcher(spool):
                killed.append(pid)
    for future in asked:
        future.result()
    kill_launcher(spool)
    print(
        f"seed {seed}: {len(killed)} launchers killed, {len(refused)} starts refused, "
        f"{max(took):.2f} s for the slowest"
    )
    assert killed, f"seed {seed}"
    assert all(sentence.startswith("unable to ") for sentence in refused.values()), (
        f"seed {seed}: {refused}"
    )
    once = sorted(set(ids) - refused.keys())
    until(
        lambda: ends(spool) == once,
        timeout=60,
        what=f"seed {seed}: each that was started has ended, and no other",
    )
    assert sorted((spool.parent / "ran").read_text().split()) == once, f"seed {seed}"
    assert {
        json.loads((spool / run_id / "status.json").read_text())["return_code"] - len(run_id)
        for run_id in once
    } == {0}, f"seed {seed}"
    assert refused == {}, f"seed {seed}: nothing was in the way of a cold start"
    assert os.listdir(spool / ".running") == []


def kill_launcher(spool):
    """
    SIGKILL the launcher that is there, and return its pid once it is dead; None if there is none.
    """
    with open(spool / ".launcher.lock", "r+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None  # what it says is no launcher's pid any more
        except BlockingIOError:
            pid = int(lock.read() or 0)
    if not is_launcher(pid, spool):  # a new one holds the lock, and has not said yet who it is
        return None
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_launcher(pid, spool), what=f"launcher {pid} is dead")
    return pid


def is_launcher(pid, spool):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsencode(spool) in file.read()  # empty for a zombie
    except OSError:
        return False


# -- many at once


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def switches(pids):
    """
    How often each process has gone to sleep so far: one that is not woken doesn't fall asleep
    again.
    """
    found = {}
    for pid in pids:
        with open(f"/proc/{pid}/status") as file:
            found[pid] = next(
                int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches")
            )
    return found


def uss(pid):
    """KiB that are its own."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.long)])
def test_runs_that_are_started_all_at_once_idle_without_a_wake_up_and_each_ends_as_its_program_did(
    spool, warm, count
):
    os.mkfifo(spool.parent / "go")
    go = os.open(spool.parent / "go", os.O_RDWR)
    together = threading.Barrier(count)

    def start(number):
        together.wait()
        return starting.start(
            str(spool),
            {"program": {"command": f"read _ < go; exit {number % 256}"}},
            warm=True,
            cwd=str(spool.parent),
        )

    try:
        with concurrent.futures.ThreadPoolExecutor(count) as askers:
            ids = list(askers.map(start, range(count)))
        assert len(set(ids)) == count
        live = [json.loads((spool / run_id / "running.json").read_text()) for run_id in ids]
        chaperones = [status["chaperone_pid"] for status in live]
        guards = [status["guard_pid"] for status in live]
        assert len(set(chaperones)) == count
        assert {parent_of(pid) for pid in guards} == {warm}, "all of them warm"
        until(
            lambda: all(
                json.loads((spool / run_id / "running.json").read_text())["state"] == "running"
                for run_id in ids
            ),
            timeout=60,
        )
        holding = [warm, *chaperones]
        quiet = select.poll()  # nothing is registered: it sleeps
        for _ in range(30):  # a busy machine takes its time for the last preparations
            before = switches(holding)
            quiet.poll(2_000)
            after = switches(holding)
            if after == before:
                break
        assert {
            pid: after[pid] - before[pid] for pid in holding if after[pid] != before[pid]
        } == {}, "woken in two seconds in which nothing happened"
        sizes = sorted(uss(pid) for pid in chaperones)
        helpers = sorted(sum(uss(child) for child in children_of(pid)) for pid in chaperones)
        print(
            (
                f"{count} runs: {sum(sizes) / count:.0f} KiB USS a chaperone on average, "
                f"{sizes[count // 2]} at the median, {sizes[-1]} at most;"
            ),
            end=" ",
        )
        print(f"its children {helpers[count // 2]} KiB at the median")
        os.write(go, b"\n" * count)
        until(lambda: len(ends(spool)) == count, timeout=120, what="all have ended")
    finally:
        os.close(go)
    codes = {
        run_id: json.loads((spool / run_id / "status.json").read_text())["return_code"]
        for run_id in ids
    }
    assert codes == {run_id: number % 256 for number, run_id in enumerate(ids)}
    assert ends(spool) == sorted(ids)
    assert os.listdir(spool / ".running") == []


def test_launcher_imports_nothing_that_a_chaperone_must_not_hold(spool):
    code = (
        "import sys; sys.path.append(sys.argv[1]); from chaperone.cli import main; "
        "from chaperone.launch import launcher; from chaperone.farside import remote; "
        "print(*sorted(sys.modules))"
    )
    root = os.path.dirname(process.PACKAGE)
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {
        "json",
        "re",
        "enum",
        "typing",
        "subprocess",
        "signal",
        "argparse",
        "attr",
        "filelock",
        "socket",
        "threading",
    } & set(loaded)


def test_fork_of_a_launcher_imports_nothing(spool, tmp_path):
    """The package may be another by then."""
    need("strace")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-ttt", "-o", trace, "-e", "trace=open,openat", *CHAPERONE]
    with subprocess.Popen([*command, "launcher", "--spool", spool]) as traced:
        until((spool / ".launcher").exists)
        # It listens a moment before it is ready: then it has answered.
        final(spool, starting.start(str(spool), {"program": {"argv": ["true"]}}, True))
        now = time.time()
        asked = {"timeouts": {"run": 60}, "renew": 60, "output": {"timeline": True}}
        final(spool, starting.start(str(spool), {"program": {"argv": ["true"]}, **asked}, True))
        later = time.time()
        behind = {"hops": [{"exec": {"argv": ["env"]}}]}
        for remote in (behind, {**behind, "supervise": False}):
            spec = {"program": {"argv": ["true"]}, "remote": remote}
            assert final(spool, starting.start(str(spool), spec, True))["return_code"] == 0
        os.kill(launcher_pid(spool), signal.SIGTERM)
        traced.wait(60)
    opened = [line for line in trace.read_text().splitlines() if re.search(r'\.(pyc?|so)"', line)]
    assert len(opened) > 20
    late = [(float(line.split(None, 2)[1]), line) for line in opened]
    assert [line for moment, line in late if now < moment < later] == []
    # The far side may be a Python, which opens modules of its own.
    assert [line for moment, line in late if moment > now and process.PACKAGE in line] == []


def test_program_is_executed_soon_after_the_ask(spool, warm):
    starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    begun = time.monotonic()
    starting.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    assert (
        time.monotonic() - begun < client.ANSWER_S
    )  # that is: it was answered, not waited for in vain
