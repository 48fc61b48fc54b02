"""
What is sent to the far side and comes back: secrets, directories, input, stderr.
"""

import hashlib
import os
import pathlib

import pytest

from chaperone.farside import payload
from spool_tests.support import shells, supervisors
from spool_tests.support import sshd as server
from spool_tests.support.far import held, log, sudo
from spool_tests.support.runs import final, live, py, sh, start, stdout
from spool_tests.support.waiting import patiently, until

far = supervisors.far


def live_state(spool):
    try:
        return live(spool)["state"]
    except FileNotFoundError:  # it has ended
        return "ended"


def test_secrets_are_in_no_argv(spool, sshd, tmp_path):
    secret = "s3cr3t" + os.urandom(8).hex()
    seen = set()
    process = start(
        spool,
        sh(
            'until [ -e go ]; do sleep 0.05; done; cat >/dev/null; test -n "$S"',
            cwd=str(tmp_path),
            env={"S": secret},
            stdin=secret,
        ),
        remote=sshd.remote(),
    )
    while process.poll() is None:
        if live_state(spool) == "running" and any(b"chaperone-ready-1" in argv for argv in seen):
            (tmp_path / "go").touch()
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


def test_directory_of_a_run_that_survives_is_its_user_s_alone(spool, sshd, tmp_path):
    remote = sshd.remote(remote_dir=str(tmp_path / "far"))
    process = start(
        spool,
        sh("echo up; while [ ! -e go ]; do sleep 0.05; done", cwd=str(tmp_path)),
        remote=remote,
        on_disconnect="survive",
    )
    until(lambda: stdout(spool))
    made = [tmp_path / "far", *(tmp_path / "far").glob("*"), *(tmp_path / "far").glob("*/*")]
    assert {path.name for path in made[2:]} >= {"control", "out", "err", "said"}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o700}
    (tmp_path / "go").touch()
    assert process.wait(60) == 0
    until(lambda: list((tmp_path / "far").iterdir()) == [])


@pytest.mark.root
@pytest.mark.parametrize(
    "remote_dir, below", [(None, ".chaperone"), ("runs/far", "runs/far"), ("~/of mine", "of mine")]
)
def test_directory_of_a_run_that_survives_is_below_its_user_s_home(spool, sshd, remote_dir, below):
    user = sshd.user("dash")
    home = pathlib.Path(sshd.directory, "home-dash")
    there = sshd.remote(user, **({"remote_dir": remote_dir} if remote_dir else {}))
    process = start(
        spool,
        sh("echo up; while [ ! -e go ]; do sleep 0.05; done"),
        remote=there,
        on_disconnect="survive",
    )
    until(lambda: stdout(spool))
    (directory,) = (home / below).iterdir()
    assert (directory.stat().st_mode & 0o777, directory.owner()) == (0o700, user)
    (home / "go").touch()
    assert process.wait(60) == 0
    (home / "go").unlink()
    until(lambda: list((home / below).iterdir()) == [])


@pytest.mark.parametrize("size", [0, 5_000_000])
def test_input_from_a_file_arrives_whole(spool, sshd, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "in").write_bytes(data)
    status = held(spool, sshd, {"argv": ["cat"], "stdin": {"file": str(tmp_path / "in")}})
    assert status["return_code"] == 0 and stdout(spool) == data


NOISE = """
import hashlib, os, random, sys
r = random.Random(7); h = hashlib.sha256(); left = int(sys.argv[1])
while left:
    d = r.randbytes(min(left, r.randrange(1, 70000))).replace(b"a", b"\\x1e")
    left -= len(d); h.update(d)
    while d: d = d[os.write(2, d):]
print(h.hexdigest())
"""


def test_twenty_megabytes_of_stderr_are_exact(spool, sshd):
    def attempt(number, lease_s):
        run_id = f"r{number}"
        program = py(NOISE.replace("sys.argv[1]", "20_000_000"))
        status = held(spool, sshd, program, run_id, lease=lease_s)
        if status["stop"]:
            assert status["stop"]["reason"] == "lease"
            return False
        found = hashlib.sha256((spool / run_id / "stderr").read_bytes()).hexdigest()
        assert status["complete"] and found == stdout(spool, run_id).decode().strip()
        assert status["stderr"]["bytes"] == 20_000_000
        return True

    patiently(attempt, 1, 2, 4)


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("as it is", marks=pytest.mark.user),
        *(pytest.param(shell, marks=pytest.mark.root) for shell in shells.SH),
    ],
)
def test_binary_stderr_is_exact_over_ssh_with_records_between(request, far, shell):
    """More records than a chaperone asks for: as fast as they are answered."""
    there = (
        request.getfixturevalue("sshd")
        if shell == "as it is"
        else request.getfixturevalue("sshd_with")(shell)
    )
    size = 20_000_000 if request.config.option.long or shell in ("as it is", "dash") else 4_000_000
    program = {"argv": ["/usr/bin/python3", "-I", "-S", "-c", NOISE, str(size)]}
    run = far(shell, program, argv=[*there.argv(), f"exec /bin/sh -c '{payload.CONSTANT[2]}'"])
    run.wait("start")
    asked = 0
    while not any(record[0] == "end" for record in run.records):
        if (
            asked - sum(record[0] == "beat" for record in run.records) < 50
        ):  # no more on their way than their pipe holds
            asked += 1
            run.send(f"h {asked}")
        run.read(0.1)
    run.send("q 5")
    assert run.ended() == 0
    assert len(run.output["stderr"]) == size
    assert hashlib.sha256(run.output["stderr"]).hexdigest() == run.output["stdout"].decode().strip()
    told = [record[1] for record in run.records if record[0] == "beat"]
    assert told == [str(number) for number in range(1, asked + 1)]
    assert asked > 20, "too few records to show anything"
    print(f"{size} bytes, {asked} records")


def test_bare_program_is_run_with_what_can_be_known(spool, sshd):
    bare = sshd.remote(supervise=False)
    status = held(
        spool, sshd, sh("echo out; echo err >&2; cat; exit 3", stdin="in"), "a", remote=bare
    )
    assert (
        status["state"],
        status["return_code"],
        status["ambiguous"],
        status["pid"],
        status["leftovers"],
    ) == ("terminated", 3, False, None, None)
    assert stdout(spool, "a") == b"out\nin"
    status = held(spool, sshd, sh("exit 137"), "b", remote=bare)
    assert (status["return_code"], status["ambiguous"], status["status"]) == (137, True, None)
    status = held(spool, sshd, sh("exit 255"), "c", remote=bare)
    assert (status["state"], status["return_code"], status["started"]) == ("lost", None, True)
    assert (
        "ssh ended with code 255, which says nothing about the program"
        in status["exception"]["message"]
    )

    def attempt(number, time_s):
        there = {"remote": {**bare, "port": 1}, "timeouts": {"connect": time_s}}
        status = held(spool, sshd, sh("exit 0"), f"d{number}", **there)
        assert (status["state"], status["started"]) == ("error", False)
        return status["exception"]["stage"] == "connect"

    patiently(attempt, 1, 8, 30)
    status = held(spool, sshd, sh("exit 0", env={"A": "b"}), "e", remote=bare)
    assert (status["state"], status["started"]) == ("error", False)


@pytest.mark.parametrize(
    "hops",
    [
        pytest.param([{"sudo": {"user": server.me()}}], marks=sudo, id="sudo"),
        pytest.param([{"exec": {"argv": ["env", "A=b"]}}], id="exec"),
    ],
)
def test_bare_program_that_no_hop_announces_is_taken_for_started(spool, hops):
    bare = {"hops": hops, "supervise": False}
    status = held(spool, None, sh("echo out; cat; exit 255", stdin="in"), remote=bare)
    assert (status["state"], status["return_code"], status["pid"], status["complete"]) == (
        "terminated",
        255,  # it is the program's: no hop has it for a word of its own
        None,
        True,
    )
    assert stdout(spool) == b"out\nin"


@pytest.mark.once
def test_only_eight_connect_to_one_host_at_a_time(spool, sshd, request):
    count = 100 if request.config.option.long else 24
    runs = [
        start(spool, sh("exit 0"), f"r{number}", remote=sshd.remote(), timeouts={"connect": 300})
        for number in range(count)
    ]
    assert [run.wait(300) for run in runs] == [0] * count
    assert {final(spool, f"r{number}")["return_code"] for number in range(count)} == {0}
    assert not any("unable to connect" in log(spool, f"r{number}") for number in range(count))
