"""
The launcher: warm starts that are as good as cold ones, whatever happens to it.

Knows: its socket, its pid.  Must not know: how it forks.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from chaperone import errors, launch, launcher
from spool_tests.conftest import CHAPERONE, until

ECHO = {"argv": ["/bin/sh", "-c", 'echo "$COLOUR $(umask) $PWD"; readlink /proc/$PPID/fd/* | grep -c "launcher\\|socket"; exit 3']}


@pytest.fixture
def warm(spool):
    """A launcher for the spool; its pid."""
    process = subprocess.Popen([*CHAPERONE, "launcher", "--spool", spool], stdin=subprocess.DEVNULL)
    until((spool / ".launcher").exists)
    yield process.pid
    process.kill()
    process.wait()


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
        run_id = launch.start(str(spool), {"program": ECHO}, warm=True, env={"COLOUR": "bl\udcff\udcfe", "PATH": os.environ["PATH"]}, cwd=str(tmp_path))
    finally:
        os.umask(before)
    status = final(spool, run_id)
    assert (status["state"], status["return_code"]) == ("terminated", 3)
    assert (spool / run_id / "stdout").read_bytes() == b"bl\xff\xfe 0027 " + os.fsencode(tmp_path) + b"\n0\n"


def test_warm_chaperone_is_a_session_of_its_own_and_a_child_of_the_launcher(spool, warm):
    run_id = launch.start(str(spool), {"program": {"argv": ["sleep", "60"]}}, warm=True)
    running = json.loads((spool / run_id / "running.json").read_text())
    chaperone = running["chaperone_pid"]
    assert parent_of(chaperone) == warm
    assert os.getsid(chaperone) == chaperone != os.getsid(warm)
    until(lambda: signals(chaperone, "SigBlk") == 0)
    assert not signals(chaperone, "SigIgn") >> signal.SIGCHLD - 1 & 1
    until(lambda: os.readlink(f"/proc/{chaperone}/cwd") == "/")


def test_sigkill_of_the_launcher_touches_no_run_and_the_next_start_is_cold(spool, warm, chaperone):
    run_id = launch.start(str(spool), {"program": {"command": "read line < go; echo $line"}}, warm=True, cwd=str(fifo(spool)))
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
    result = chaperone("run", "--warm", "--id", "w", "-", spec={"program": {"argv": ["sleep", "60"]}})
    assert (result.returncode, result.stdout, result.stderr) == (0, "w\n", "")
    assert parent_of(json.loads((spool / "w" / "running.json").read_text())["chaperone_pid"]) == warm


def test_second_start_of_an_id_is_refused_by_the_launcher_too(spool, warm, chaperone):
    for _ in range(2):
        result = chaperone("run", "--warm", "--id", "w", "-", spec={"program": {"command": "echo once >> ran"}}, cwd=spool.parent)
    assert (result.returncode, result.stderr) == (73, "chaperone: unable to create run 'w': it exists\n")
    with pytest.raises(errors.RunExistsError, match="^unable to create run 'w': it exists$"):
        launch.start(str(spool), {"id": "w", "program": {"argv": ["true"]}}, warm=True)
    final(spool, "w")
    assert (spool.parent / "ran").read_text() == "once\n"


def test_second_launcher_is_refused(spool, warm, chaperone):
    result = chaperone("launcher")
    assert (result.returncode, result.stderr) == (74, f"chaperone: unable to launch for spool {str(spool)!r}: it has a launcher, pid {warm}\n")


def test_launcher_is_started_on_demand_once_and_ends_when_idle(spool, monkeypatch):
    monkeypatch.setattr(launcher, "ON_DEMAND_IDLE_S", 1)
    first = launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    pid = launcher_pid(spool)
    second = launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    assert {final(spool, run_id)["state"] for run_id in (first, second)} == {"terminated"}
    assert launcher_pid(spool) == pid
    until(lambda: not (spool / ".launcher").exists())


def test_socket_is_the_owners_alone(spool, warm):
    assert (spool / ".launcher").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", [b"", b"{}\n", b'{"image": "9"}\n', b"no json\n", b'{"image":'], ids=["nothing", "empty", "other", "no-json", "half"])
def test_garbage_on_the_socket_starts_nothing_and_keeps_nobody_waiting(spool, warm, text):
    # By the directory's fd: a socket's own path may have 107 bytes at most, a test's directory has more.
    directory = os.open(spool, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"/proc/self/fd/{directory}/.launcher")
        os.close(directory)
        connection.sendall(text)
        if text == b'{"image": "9"}\n':
            assert connection.recv(1000).startswith(b'{"error": "ChaperoneError"')
            return  # it took that for an upgrade, and is gone
        run_id = launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
        assert final(spool, run_id)["state"] == "terminated"
    assert ends(spool) == [run_id]


def test_launcher_of_older_code_ends_and_the_start_is_cold(spool, warm, monkeypatch):
    monkeypatch.setattr(launcher, "IMAGE", "9")
    monkeypatch.setattr(launcher, "start_on_demand", lambda path: False)
    run_id = launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    assert final(spool, run_id)["state"] == "terminated"
    until(lambda: state_of(warm) in "ZX")


def test_stopped_launcher_costs_a_cold_start_and_starts_nothing_twice(spool, warm, monkeypatch):
    monkeypatch.setattr(launcher, "ANSWER_S", 0.2)
    os.kill(warm, signal.SIGSTOP)
    run_id = launch.start(str(spool), {"program": {"command": "echo once >> ran"}}, warm=True, cwd=str(spool.parent))
    assert final(spool, run_id)["return_code"] == 0
    os.kill(warm, signal.SIGCONT)
    late = launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    final(spool, late)
    assert (spool.parent / "ran").read_text() == "once\n"
    assert ends(spool) == sorted([run_id, late])


def test_answer_that_gets_lost_is_no_second_start(spool, warm, monkeypatch):
    answer = launcher._answer
    monkeypatch.setattr(launcher, "_answer", lambda path, request: answer(path, request) and {})
    run_id = launch.start(str(spool), {"program": {"command": "echo once >> ran"}}, warm=True, cwd=str(spool.parent))
    assert final(spool, run_id)["return_code"] == 0
    assert (spool.parent / "ran").read_text() == "once\n"


def test_run_that_appears_while_we_start_cold_is_the_one_that_was_asked_for(spool, warm, monkeypatch):
    real = launcher._answer

    def late(path, request):
        """No answer, and the launcher's fork comes first only when we have looked."""
        monkeypatch.setattr(launch, "_start_cold", lambda *rest: (real(path, request), cold(*rest)))
        return {}

    cold = launch._start_cold
    monkeypatch.setattr(launcher, "_answer", late)
    run_id = launch.start(str(spool), {"program": {"command": "echo once >> ran"}}, warm=True, cwd=str(spool.parent))
    assert final(spool, run_id)["return_code"] == 0
    assert (spool.parent / "ran").read_text() == "once\n"


def test_launcher_killed_during_a_burst_starts_each_run_once(spool, warm):
    count, workers = 60, 4
    ids = [f"burst-{number}" for number in range(count)]
    failed = []

    def ask(mine):
        for run_id in mine:
            try:
                launch.start(str(spool), {"id": run_id, "program": {"command": f"echo {run_id} >> ran"}}, warm=True, cwd=str(spool.parent))
            except errors.ChaperoneError as error:
                failed.append((run_id, error))

    threads = [threading.Thread(target=ask, args=(ids[worker::workers],)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    until(lambda: len(ends(spool)) > 10, timeout=30)
    os.kill(warm, signal.SIGKILL)
    for thread in threads:
        thread.join()
    on_demand = launcher_pid(spool)
    until(lambda: len(ends(spool)) == count, timeout=30)
    assert failed == []
    assert sorted((spool.parent / "ran").read_text().split()) == sorted(ids)
    assert ends(spool) == sorted(ids)
    if on_demand != warm:
        os.kill(on_demand, signal.SIGTERM)


def test_launcher_imports_nothing_that_a_chaperone_must_not_hold(spool):
    code = "import sys; sys.path.append(sys.argv[1]); from chaperone import cli, launcher, remote; print(*sorted(sys.modules))"
    root = os.path.dirname(os.path.dirname(launch.__file__))
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True, check=True).stdout.split()
    assert not {"json", "re", "enum", "typing", "subprocess", "signal", "argparse", "attr", "filelock", "socket", "threading"} & set(loaded)


def test_program_is_executed_soon_after_the_ask(spool, warm):
    launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    begun = time.monotonic()
    launch.start(str(spool), {"program": {"argv": ["true"]}}, warm=True)
    assert time.monotonic() - begun < launcher.ANSWER_S  # that is: it was answered, not waited for in vain
