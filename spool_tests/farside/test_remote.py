"""A program behind ssh or sudo, held by real chaperones over a real sshd."""

import json
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from spool_tests.support import shells
from spool_tests.support.far import far_processes, held, log, remotes, sudo
from spool_tests.support.runs import DEADLY, final, sh, start, stdout
from spool_tests.support.waiting import patiently, until


@pytest.mark.parametrize(
    "mode",
    [
        "ssh-as",
        "two ssh",
        *(pytest.param(mode, marks=sudo) for mode in ("ssh-then-sudo", "sudo-then-ssh", "sudo")),
    ],
)
def test_program_behind_hops_is_recorded(spool, sshd, mode):
    script = 'echo out; cat; echo err >&2; echo "$A"; pwd; exit 7'
    status = held(
        spool,
        sshd,
        sh(script, env={"A": "x'y\n\\z!"}, cwd="/usr", stdin="in\n"),
        remote=remotes(sshd, mode),
    )
    assert (status["state"], status["return_code"], status["signal"], status["complete"]) == (
        "terminated",
        7,
        None,
        True,
    ), log(spool)
    assert (status["status"], status["ambiguous"], status["leftovers"], status["started"]) == (
        7 << 8,
        False,
        0,
        True,
    )
    assert stdout(spool) == b"out\nin\nx'y\n\\z!\n/usr\n"
    assert (spool / "r" / "stderr").read_bytes() == b"err\n"
    assert status["connection"]["drops"] == 0 and status["connection"]["argv"][0] == {
        "sudo": "sudo",
        "sudo-then-ssh": "sudo",
    }.get(mode, "ssh")
    assert status["rusage"]["utime"] >= 0 and status["rusage"]["maxrss"] is None
    assert status["pid"] and log(spool) == ""


ODD = [
    "a\\b",
    "x'",
    "\\'",
    "!",
    "a!b",
    "$(id)",
    "`id`",
    '"',
    "~",
    "*",
    "-n",
    "--",
    "",
    "a\nb",
    "\n",
    "é",
    "\udcff\udc80",
    "^x^y",
]
ODD += [" # ", "\t", "${A}", "%s", "&", ";", "@END"]
# Of the far side's own text, or with a meaning to it.
NAMES = [
    "IFS",
    "ENV",
    "BASH_ENV",
    "CDPATH",
    "PS4",
    "LANGUAGE",
    "nonce",
    "cookie",
    "pid",
    "program",
    "c_why",
    "c_found",
    "l",
    "s",
    "g",
    "nl",
]


def odd_bytes(chance, most, without=b""):
    """
    Any of the 255 that a word may hold, or pieces that some shell takes for more than they are.
    """
    if chance.random() < 0.5:
        data = bytes(chance.randrange(1, 256) for _ in range(chance.randrange(most)))
    else:
        data = b"".join(os.fsencode(chance.choice(ODD)) for _ in range(chance.randrange(6)))[:most]
    return data.translate(None, without)


def through_login(spool, server, user, home, seed):
    """Send words of all kinds to a user's login, and have them back as they were."""
    chance = random.Random(seed)
    every = bytes(range(1, 256))
    words = [*map(os.fsencode, ODD), every, bytes(chance.randrange(1, 256) for _ in range(5_000))]
    words += [odd_bytes(chance, chance.choice((5, 40, 400))) for _ in range(150)]
    env = {name: odd_bytes(chance, 30) for name in NAMES}
    env |= {
        "V" + "".join(chance.choice("aZ_09") for _ in range(12)): odd_bytes(chance, 200)
        for _ in range(60)
    }
    env["V"] = every
    place = chance.choice((b"-", b"", b"!")) + odd_bytes(chance, 60, b"/") + b"x"
    directory = os.path.join(os.fsencode(home), place)
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o755)
    os.symlink(
        "/usr/bin/python3", program := os.path.join(directory, odd_bytes(chance, 60, b"/") + b"y")
    )
    text = (
        "import os,sys\nback = [os.getcwdb(), *map(os.fsencode, sys.argv[1:]), *(n + "
        "b'=' + v for n, v in os.environb.items()), b'']\n"
    )
    text += "back = b'\\0'.join(back)\nwhile back: back = back[os.write(1, back):]"
    argv = [os.fsdecode(program), "-I", "-S", "-c", text, *map(os.fsdecode, words)]
    cwd = os.fsdecode(
        chance.choice((directory, place))
    )  # the one that is no path from the root is one from home
    sent = {
        "argv": argv,
        "env": {name: os.fsdecode(value) for name, value in env.items()},
        "cwd": cwd,
    }
    run_id = f"seed-{seed}"
    status = held(spool, server, sent, run_id, remote=server.remote(user))
    assert (status["state"], status["return_code"], status["exception"]) == (
        "terminated",
        0,
        None,
    ), log(spool, run_id)
    back = stdout(spool, run_id).split(b"\0")
    assert back[0] == directory
    assert back[1 : 1 + len(words)] == words
    there = dict(pair.partition(b"=")[::2] for pair in back[1 + len(words) : -1])
    assert {name: there.get(name.encode()) for name in env} == env


@pytest.mark.root
@pytest.mark.once
@pytest.mark.parametrize("number, shell", list(enumerate(shells.LOGIN)), ids=shells.LOGIN)
def test_every_login_shell_lets_odd_words_through(spool, sshd, sshd_with, request, shell, number):
    """
    A failing case names its seed and its /bin/sh: in the short form each login shell has another
    one, in the long form all.
    """
    user = sshd.user(shell)
    several = request.config.option.long
    for turn, one in enumerate(shells.SH if several else [shells.SH[number % len(shells.SH)]]):
        for seed in range(5 if several else 1):
            seed += 100 * number + 10 * turn
            try:
                through_login(
                    spool, sshd_with(one), user, os.path.join(sshd.directory, f"home-{shell}"), seed
                )
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, login shell {shell}, /bin/sh {one}") from error


@pytest.mark.root
@pytest.mark.once
@pytest.mark.parametrize(
    "shell, name",
    [
        ("bash", ".bashrc"),
        ("zsh", ".zshenv"),
        ("fish", ".config/fish/config.fish"),
        ("tcsh", ".tcshrc"),
    ],
)
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
            assert (status["state"], status["exception"]["stage"], status["started"]) == (
                "error",
                "far-side",
                False,
            )
        path.write_text("cat >/dev/null\n")
        there = {"remote": sshd.remote(user), "timeouts": {"connect": 1}}
        status = held(spool, sshd, sh("echo out"), "hangs", **there)
        assert (status["state"], status["exception"]["stage"], status["started"]) == (
            "error",
            "far-side",
            False,
        )
        assert (
            status["exception"]["message"]
            == "unable to reach a shell on the far side: no answer within 1 s"
        )
    finally:
        path.unlink()


TELLING_CODES = (0, 1, 2, 97, 125, 126, 127, 128, 129, 130, 137, 143, 192, 254, 255)
TELLING_SIGNALS = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGPIPE,
    signal.SIGTERM,
    34,
    64,
}


@pytest.mark.parametrize("mode", ["ssh-as", pytest.param("ssh-then-sudo", marks=sudo)])
def test_every_exit_code_and_signal_is_told_exactly(spool, sshd, mode, request):
    """
    Many runs at once, as it is the connections that take the time; all of 0 to 255 and every signal
    in the long form. Behind a sudo every third of the short form: the records are the same.
    """
    each = 1 if mode == "ssh-as" else 3
    codes, signals = (
        (range(256), DEADLY)
        if request.config.option.long
        else (TELLING_CODES[::each], sorted(TELLING_SIGNALS.intersection(DEADLY))[::each])
    )
    remote, waiting, results = remotes(sshd, mode), [], {}
    tasks = [(f"c{code}", f"exit {code}") for code in codes]
    tasks += [(f"s{number}", f"ulimit -c 0; kill -{number} $$; sleep 9") for number in signals]
    while tasks or waiting:
        while tasks and len(waiting) < 12:
            run_id, script = tasks.pop()
            waiting.append((run_id, start(spool, sh(script), run_id, remote=remote)))
        run_id, chaperone = waiting.pop(0)
        assert chaperone.wait(60) == 0
        status = final(spool, run_id)
        results[run_id] = (
            status["state"],
            status["status"],
            status["ambiguous"],
            status["exception"],
        )
    assert results == {
        **{f"c{code}": ("terminated", code << 8, False, None) for code in codes},
        **{f"s{number}": ("terminated", int(number), False, None) for number in signals},
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
def test_failure_to_connect_is_an_error_with_ssh_s_words(
    spool, sshd, fields, options, stage, words
):
    remote = sshd.remote(options=options)
    remote.update(fields)
    passing = stage in (
        "connect",
        "name",
    )  # tried again until the time is over; the others are final at once

    def attempt(number, time_s):
        run_id = f"r{number}"
        begun = time.monotonic()
        status = held(
            spool, sshd, sh("echo out"), run_id, remote=remote, timeouts={"connect": time_s}
        )
        assert (status["state"], status["started"]) == ("error", False), status["exception"]
        assert passing or time.monotonic() - begun < 200
        found = status["exception"]
        return found["stage"] == stage and words in found["message"]

    patiently(attempt, *((2, 10, 40) if passing else (400,)))


def test_host_without_ssh_is_told_and_the_chaperone_ends_as_ever(chaperone, tmp_path):
    """The failure comes before there is anything to wait for."""
    with open(tmp_path / "said", "w+") as said:
        spec = {"id": "r", "program": {"argv": ["true"]}, "remote": {"host": "h"}}
        done = chaperone(
            "run",
            "-",
            spec=spec,
            env={**os.environ, "PATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=said,
        )
        assert (done.returncode, done.stdout, said.seek(0) or said.read()) == (
            0,
            "r\n",
            "chaperone: unable to run 'ssh': No such file or directory\n",
        )
    status = json.loads(chaperone("status", "r").stdout)
    assert (status["state"], status["exception"]["message"]) == (
        "error",
        "unable to run 'ssh': No such file or directory",
    )


@pytest.mark.parametrize(
    "program, stage, message",
    [
        ({"argv": ["no-such"]}, "spawn", "unable to run 'no-such': not found on the far side"),
        (
            {"argv": ["/etc/passwd"]},
            "spawn",
            "unable to run '/etc/passwd': not executable on the far side",
        ),
        (
            {"argv": ["true"], "cwd": "/no/such"},
            "spawn",
            "unable to change to cwd '/no/such': no such directory, or no permission",
        ),
        (
            {"argv": ["true"], "stdin": {"file": "/no/such"}},
            "spawn",
            "unable to open stdin '/no/such': No such file or directory",
        ),
    ],
)
def test_failure_to_start_is_an_error_and_proven(spool, sshd, program, stage, message):
    status = held(spool, sshd, program)
    assert (status["state"], status["exception"]["stage"], status["exception"]["message"]) == (
        "error",
        stage,
        message,
    )
    assert status["started"] is False


def test_stop_and_signals_reach_the_program(spool, sshd, chaperone):
    script = (
        "trap 'echo usr1' USR1; trap '' TERM; (setsid sleep 1000 &); echo up; while :; "
        "do sleep 0.05; done"
    )
    process = start(spool, sh(script), remote=sshd.remote(), stop={"grace_period": 0.4})
    until(lambda: stdout(spool) == b"up\n")
    assert chaperone("signal", "r", "USR1").returncode == 0
    until(lambda: stdout(spool) == b"up\nusr1\n")
    assert chaperone("stop", "r").returncode == 0
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["signal"], status["stop"]["reason"], status["complete"]) == (
        "terminated",
        "SIGKILL",
        "request",
        True,
    )
    assert not far_processes(spool)


def test_stop_before_the_connection_is_there_starts_nothing(spool, sshd):
    process = start(spool, sh("echo out"), remote={**sshd.remote(), "port": 1})
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["exception"]["stage"], status["started"]) == (
        "error",
        "stopped",
        False,
    )


@pytest.mark.parametrize("leave", [False, True])
def test_leftovers_are_ended_or_left(spool, sshd, leave):
    status = held(
        spool,
        sshd,
        sh("sleep 1000 & setsid sleep 1000 & echo out; exit 3"),
        leftovers="leave" if leave else "stop",
    )
    left = far_processes(spool)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (status["state"], status["return_code"], status["leftovers"], status["complete"]) == (
        "terminated",
        3,
        2,
        True,
    )
    assert len(left) == (2 if leave else 0)
    assert stdout(spool) == b"out\n"
