"""A program behind ssh or sudo, held by real chaperones over a real sshd."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from spool_tests import shells
from spool_tests import sshd as server
from spool_tests.conftest import need, processes_with, until
from spool_tests.test_farside import PROGRAMS
from spool_tests.test_supervise import DEADLY, final, py, running, sh, start, stdout

sshd = server.sshd
network = server.network
sudo = pytest.mark.root  # a plain user may not


def held(spool, sshd, program, run_id="r", remote=None, timeout=60, **spec):
    """Run to the end: the final status."""
    chaperone = start(spool, program, run_id, remote=remote or sshd.remote(), **spec)
    assert chaperone.wait(timeout) == 0
    return final(spool, run_id)


def log(spool, run_id="r"):
    path = spool / run_id / "log"
    return path.read_text() if path.exists() else ""


def far_processes(spool, run_id="r"):
    """What belongs to a run on the far side, told from the same run of another test that runs now: {pid: command}."""
    key = json.loads((spool / run_id / "spec.json").read_text())["key"]
    found = processes_with(f"CHAPERONE_COOKIE={key[:16]}\0".encode())
    return {pid: command for pid, command in found.items() if not command.startswith("grep ")}  # the far side's own search


def remotes(sshd, mode):
    need(*(["sudo"] if "sudo" in mode else []))
    return {
        "ssh-as": sshd.remote(),
        "ssh-then-sudo": sshd.remote(mode="ssh-then-sudo"),
        "sudo-then-ssh": sshd.remote(mode="sudo-then-ssh"),
        "sudo": {"mode": "sudo", "user": server.me()},
        "two ssh": {"hops": [{"ssh": {**sshd.remote()}}, {"ssh": {**sshd.remote()}}]},
    }[mode]


@pytest.mark.parametrize("mode", ["ssh-as", "two ssh", *(pytest.param(mode, marks=sudo) for mode in ("ssh-then-sudo", "sudo-then-ssh", "sudo"))])
def test_program_behind_hops_is_recorded(spool, sshd, mode):
    script = 'echo out; cat; echo err >&2; echo "$A"; pwd; exit 7'
    status = held(spool, sshd, sh(script, env={"A": "x'y\n\\z!"}, cwd="/usr", stdin="in\n"), remote=remotes(sshd, mode))
    assert (status["state"], status["return_code"], status["signal"], status["complete"]) == ("terminated", 7, None, True), log(spool)
    assert (status["status"], status["ambiguous"], status["leftovers"], status["started"]) == (7 << 8, False, 0, True)
    assert stdout(spool) == b"out\nin\nx'y\n\\z!\n/usr\n"
    assert (spool / "r" / "stderr").read_bytes() == b"err\n"
    assert status["connection"]["drops"] == 0 and status["connection"]["argv"][0] == {"sudo": "sudo", "sudo-then-ssh": "sudo"}.get(mode, "ssh")
    assert status["rusage"]["utime"] >= 0 and status["rusage"]["maxrss"] is None
    assert status["pid"] and log(spool) == ""


@pytest.mark.root
@pytest.mark.once
@pytest.mark.parametrize("shell", shells.LOGIN)
def test_every_login_shell_lets_odd_words_through(spool, sshd, shell):
    words = ["a\\b", "x'", "\\'", "!", "a!b", "$(id)", "`id`", '"', "~", "*", "-n", "", "a\nb", "\n", "é", "\udcff\udc80", "^x^y", " # "]
    words += ["".join(chr(0xDC00 + byte) if byte > 127 else chr(byte) for byte in range(1, 256))]
    env = {f"V{number}": word for number, word in enumerate(words)}
    user = sshd.user(shell)
    home = pathlib.Path(sshd.directory, f"home-{shell}")
    directory = home / "odd '!\\ dir"
    directory.mkdir(exist_ok=True)
    text = "import os,sys\no=os.write\nfor w in sys.argv[1:]: o(1,os.fsencode(w)+b'\\0')\n"
    text += f"for n in range({len(words)}): o(1,os.environb[b'V%d'%n]+b'\\0')\no(1,os.fsencode(os.getcwd()))"
    program = {"argv": ["/usr/bin/python3", "-I", "-S", "-c", text, *words], "env": env, "cwd": str(directory)}
    status = held(spool, sshd, program, remote=sshd.remote(user))
    assert (status["state"], status["return_code"]) == ("terminated", 0), log(spool)
    raw = [word.encode("utf-8", "surrogateescape") for word in words]
    assert stdout(spool).split(b"\0") == [*raw, *raw, os.fsencode(directory)]


@pytest.mark.root
@pytest.mark.once
@pytest.mark.parametrize("shell, name", [("bash", ".bashrc"), ("zsh", ".zshenv"), ("fish", ".config/fish/config.fish"), ("tcsh", ".tcshrc")])
def test_noise_of_startup_files_goes_to_the_log(spool, sshd, shell, name):
    user = sshd.user(shell)
    path = pathlib.Path(sshd.directory, f"home-{shell}", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("echo noise on stdout\nsh -c 'echo noise on stderr >&2'\n")
    try:
        status = held(spool, sshd, sh("echo out; echo err >&2"), remote=sshd.remote(user))
        assert status["return_code"] == 0
        assert (stdout(spool), (spool / "r" / "stderr").read_bytes()) == (b"out\n", b"err\n")
        assert "noise on stdout" in log(spool) and "noise on stderr" in log(spool)
        if shell in ("bash", "zsh"):  # fish and tcsh go on
            path.write_text("exit 5\n")
            status = held(spool, sshd, sh("echo out"), "exits", remote=sshd.remote(user))
            assert (status["state"], status["exception"]["stage"], status["started"]) == ("error", "far-side", False)
        path.write_text("cat >/dev/null\n")
        status = held(spool, sshd, sh("echo out"), "hangs", remote=sshd.remote(user), timeouts={"connect": 1})
        assert (status["state"], status["exception"]["stage"], status["started"]) == ("error", "far-side", False)
        assert status["exception"]["message"] == "unable to reach a shell on the far side: no ready word within 1 s"
    finally:
        path.unlink()


@pytest.mark.parametrize("mode", ["ssh-as", pytest.param("ssh-then-sudo", marks=sudo)])
def test_every_exit_code_and_signal_is_told_exactly(spool, sshd, mode):
    """Many runs at once, as it is the connections that take the time."""
    remote = remotes(sshd, mode)
    codes = range(256) if os.environ.get("CI") else (*range(0, 256, 15), 1, 126, 127, 128, 130, 137, 143, 254)
    codes, waiting, results = sorted(set(codes)), [], {}
    tasks = [(f"c{code}", f"exit {code}") for code in codes]
    tasks += [(f"s{number}", f"ulimit -c 0; kill -{number} $$; sleep 9") for number in DEADLY]
    while tasks or waiting:
        while tasks and len(waiting) < 12:
            run_id, script = tasks.pop()
            waiting.append((run_id, start(spool, sh(script), run_id, remote=remote)))
        run_id, chaperone = waiting.pop(0)
        assert chaperone.wait(60) == 0
        status = final(spool, run_id)
        results[run_id] = (status["state"], status["status"], status["ambiguous"], status["exception"])
    assert results == {
        **{f"c{code}": ("terminated", code << 8, False, None) for code in codes},
        **{f"s{number}": ("terminated", number, False, None) for number in DEADLY},
    }


@pytest.mark.parametrize(
    "fields, options, stage, words",
    [
        ({"port": 1}, {}, "connect", "Connection refused"),
        ({"host": "no-such-host.invalid"}, {}, "name", "Could not resolve hostname"),
        ({}, {"IdentityFile": "/dev/null"}, "auth", "Permission denied"),
        ({}, {"UserKnownHostsFile": "/dev/null"}, "host-key", "Host key verification failed"),
        ({"mode": "ssh-then-sudo", "user": "no-such-user"}, {}, "auth", "sudo: "),
    ],
)
def test_failure_to_connect_is_an_error_with_ssh_s_words(spool, sshd, fields, options, stage, words):
    remote = sshd.remote(options=options)
    remote.update(fields)
    begun = time.monotonic()
    status = held(spool, sshd, sh("echo out"), remote=remote, timeouts={"connect": 2})
    assert (status["state"], status["exception"]["stage"], status["started"]) == ("error", stage, False), status["exception"]
    assert words in status["exception"]["message"]
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize(
    "program, stage, message",
    [
        ({"argv": ["no-such"]}, "spawn", "unable to run 'no-such': not found on the far side"),
        ({"argv": ["/etc/passwd"]}, "spawn", "unable to run '/etc/passwd': not executable on the far side"),
        ({"argv": ["true"], "cwd": "/no/such"}, "spawn", "unable to change to cwd '/no/such': no such directory, or no permission"),
        ({"argv": ["true"], "stdin": {"file": "/no/such"}}, "spawn", "unable to open stdin '/no/such': No such file or directory"),
    ],
)
def test_failure_to_start_is_an_error_and_proven(spool, sshd, program, stage, message):
    status = held(spool, sshd, program)
    assert (status["state"], status["exception"]["stage"], status["exception"]["message"]) == ("error", stage, message)
    assert status["started"] is False


def test_stop_and_signals_reach_the_program(spool, sshd, chaperone):
    script = "trap 'echo usr1' USR1; trap '' TERM; (setsid sleep 1000 &); echo up; while :; do sleep 0.05; done"
    process = start(spool, sh(script), remote=sshd.remote(), stop={"grace_period": 0.4})
    until(lambda: stdout(spool) == b"up\n")
    assert chaperone("signal", "r", "USR1").returncode == 0
    until(lambda: stdout(spool) == b"up\nusr1\n")
    assert chaperone("stop", "r").returncode == 0
    assert process.wait(20) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["stop"]["reason"], status["complete"]) == ("terminated", "SIGKILL", "request", True)
    assert not far_processes(spool)


def test_stop_before_the_connection_is_there_starts_nothing(spool, sshd):
    process = start(spool, sh("echo out"), remote={**sshd.remote(), "port": 1})
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    status = final(spool)
    assert (status["state"], status["exception"]["stage"], status["started"]) == ("error", "stopped", False)


@pytest.mark.parametrize("leave", [False, True])
def test_leftovers_are_ended_or_left(spool, sshd, leave):
    status = held(spool, sshd, sh("sleep 1000 & setsid sleep 1000 & echo out; exit 3"), leftovers="leave" if leave else "stop")
    left = far_processes(spool)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (status["state"], status["return_code"], status["leftovers"], status["complete"]) == ("terminated", 3, 2, True)
    assert len(left) == (2 if leave else 0)
    assert stdout(spool) == b"out\n"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("victim", ["chaperone", "ssh", "session"])
def test_nothing_is_left_when_something_of_the_connection_is_killed(spool, sshd, victim, program):
    process = start(spool, sh(PROGRAMS[program]), remote=sshd.remote(), stop={"grace_period": 0.4})
    status = running(spool)
    until(lambda: stdout(spool))
    sessions = session_of(sshd, status["connection"]["pid"]) if victim == "session" else []
    for pid in {"chaperone": [process.pid], "ssh": [status["connection"]["pid"]], "session": sessions}[victim]:
        with contextlib.suppress(ProcessLookupError):  # the one half of a session ends with the other
            os.kill(pid, signal.SIGKILL)
    until(lambda: not far_processes(spool), 0.4 + 4.5)
    assert process.wait(20) == (-9 if victim == "chaperone" else 0)
    if victim != "chaperone":
        status = final(spool)
        assert (status["state"], status["exception"]["stage"], status["started"], status["complete"]) == ("lost", "connection", True, False)
        assert status["gone_by"] > status["end_time"] and status["return_code"] is None
        assert b"Connection to" not in (spool / "r" / "stderr").read_bytes()


@pytest.mark.root
@pytest.mark.parametrize("program", PROGRAMS)
def test_silent_cut_ends_the_program_by_its_lease(spool, network, program):
    remote = network.sshd.remote(options={"ServerAliveInterval": 1, "ServerAliveCountMax": 3})
    process = start(spool, sh(PROGRAMS[program]), remote=remote, lease=3, stop={"grace_period": 0.4})
    running(spool)
    until(lambda: stdout(spool))
    network.cut()
    begun = time.monotonic()
    try:
        until(lambda: not far_processes(spool), 3 + 0.4 + 1 + 4)
        assert time.monotonic() - begun > 1.5, "it did not wait for its lease"
        assert process.wait(20) == 0
    finally:
        network.heal()
    status = final(spool)
    assert (status["state"], status["exception"]["stage"], status["started"]) == ("lost", "connection", True)
    assert "not responding" in status["exception"]["message"], status["exception"]
    assert status["gone_by"] is not None


@pytest.mark.root
def test_short_cut_is_as_if_nothing_had_been(spool, network):
    process = start(spool, sh("i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.1; done"), remote=network.sshd.remote(), lease=20)
    until(lambda: stdout(spool))
    network.cut()
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 1)
    network.heal()
    assert process.wait(30) == 0
    assert (final(spool)["state"], final(spool)["complete"]) == ("terminated", True)
    assert stdout(spool) == b"".join(b"%d\n" % number for number in range(40))


def session_of(sshd, client_pid):
    """The processes of sshd that serve one client, by its port."""
    found = subprocess.run(["ss", "-Htnp", "sport", "=", f":{sshd.port}"], capture_output=True, text=True).stdout
    ports = subprocess.run(["ss", "-Htnp", "dport", "=", f":{sshd.port}"], capture_output=True, text=True).stdout
    local = next(line.split()[3].rpartition(":")[2] for line in ports.splitlines() if f"pid={client_pid}," in line)
    line = next(line for line in found.splitlines() if line.split()[4].endswith(f":{local}"))
    return [int(piece.partition(",")[0]) for piece in line.split("pid=")[1:]]


def test_secrets_are_in_no_argv(spool, sshd):
    secret = "s3cr3t" + os.urandom(8).hex()
    seen = set()
    process = start(spool, sh('sleep 0.4; cat >/dev/null; test -n "$S"', env={"S": secret}, stdin=secret), remote=sshd.remote())
    while process.poll() is None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                seen.add(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
            except OSError:
                continue
    assert final(spool)["return_code"] == 0
    assert not [argv for argv in seen if secret.encode() in argv]
    assert any(b"chaperone-ready-1" in argv for argv in seen)
    for name in ("status.json", "log"):
        path = spool / "r" / name
        assert not path.exists() or secret not in path.read_text()


@pytest.mark.parametrize("size", [0, 5_000_000])
def test_input_from_a_file_arrives_whole(spool, sshd, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "in").write_bytes(data)
    status = held(spool, sshd, {"argv": ["cat"], "stdin": {"file": str(tmp_path / "in")}})
    assert status["return_code"] == 0 and stdout(spool) == data


def test_twenty_megabytes_of_stderr_are_exact(spool, sshd):
    size = 20_000_000 if os.environ.get("CI") else 5_000_000
    text = f"import os,random,hashlib\nr=random.Random(7);h=hashlib.sha256();n=0\nwhile n<{size}:\n"
    text += " d=r.randbytes(r.randrange(1,70000));n+=len(d);h.update(d)\n while d: d=d[os.write(2,d):]\nprint(h.hexdigest())"
    status = held(spool, sshd, py(text), lease=1)  # a heartbeat each 0.25 s
    assert status["complete"] and hashlib.sha256((spool / "r" / "stderr").read_bytes()).hexdigest() == stdout(spool).decode().strip()


def test_bare_program_is_run_with_what_can_be_known(spool, sshd):
    bare = sshd.remote(supervise=False)
    status = held(spool, sshd, sh("echo out; echo err >&2; cat; exit 3", stdin="in"), "a", remote=bare)
    assert (status["state"], status["return_code"], status["ambiguous"], status["pid"]) == ("terminated", 3, False, None)
    assert stdout(spool, "a") == b"out\nin"
    status = held(spool, sshd, sh("exit 137"), "b", remote=bare)
    assert (status["return_code"], status["ambiguous"], status["status"]) == (137, True, None)
    status = held(spool, sshd, sh("exit 255"), "c", remote=bare)
    assert (status["state"], status["return_code"], status["started"]) == ("lost", None, True)
    assert "ssh ended with code 255, which tells nothing of the program" in status["exception"]["message"]
    status = held(spool, sshd, sh("exit 0"), "d", remote={**bare, "port": 1}, timeouts={"connect": 1})
    assert (status["state"], status["exception"]["stage"], status["started"]) == ("error", "connect", False)
    status = held(spool, sshd, sh("exit 0", env={"A": "b"}), "e", remote=bare)
    assert (status["state"], status["started"]) == ("error", False)


def test_only_eight_connect_to_one_host_at_a_time(spool, sshd):
    count = 100 if os.environ.get("CI") else 24
    runs = [start(spool, sh("exit 0"), f"r{number}", remote=sshd.remote()) for number in range(count)]
    assert [run.wait(120) for run in runs] == [0] * count
    assert {final(spool, f"r{number}")["return_code"] for number in range(count)} == {0}
    assert not any("unable to connect" in log(spool, f"r{number}") for number in range(count))
