"""A program behind ssh or sudo, held by real chaperones over a real sshd."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import time

import pytest

from chaperone.farside import payload
from chaperone.farside.connection import Connection
from chaperone.farside.unsupervised import Plain
from chaperone.model.hops import route
from chaperone.program.loop import Loop
from spool_tests import disk, shells, test_farside
from spool_tests import sshd as server
from spool_tests.conftest import need, processes_with, until
from spool_tests.test_supervise import DEADLY, final, py, running, sh, start, stdout

sshd = server.sshd
network = server.network
sshd_with = server.sshd_with
far = test_farside.far
PROGRAMS = test_farside.PROGRAMS
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
    """
    What belongs to a run on the far side, told from the same run of another test that runs now:
    {pid: command}.
    """
    key = json.loads((spool / run_id / "spec.json").read_text())["key"]
    found = processes_with(f"CHAPERONE_COOKIE={key[:16]}\0".encode())
    return {
        pid: command for pid, command in found.items() if not command.startswith("grep ")
    }  # the far side's own search


def remotes(sshd, mode):
    need(*(["sudo"] if "sudo" in mode else []))
    return {
        "ssh-as": sshd.remote(),
        "ssh-then-sudo": sshd.remote(mode="ssh-then-sudo"),
        "sudo-then-ssh": sshd.remote(mode="sudo-then-ssh"),
        "sudo": {"mode": "sudo", "user": server.me()},
        "two ssh": {"hops": [{"ssh": {**sshd.remote()}}, {"ssh": {**sshd.remote()}}]},
    }[mode]


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
    text = "import os,sys\nback = [os.getcwdb(), *map(os.fsencode, sys.argv[1:]), *(n + b'=' + v for n, v in os.environb.items()), b'']\n"
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
        status = held(
            spool, sshd, sh("echo out"), "hangs", remote=sshd.remote(user), timeouts={"connect": 1}
        )
        assert (status["state"], status["exception"]["stage"], status["started"]) == (
            "error",
            "far-side",
            False,
        )
        assert (
            status["exception"]["message"]
            == "unable to reach a shell on the far side: no ready word within 1 s"
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
    in the long form.
    """
    codes, signals = (
        (range(256), DEADLY)
        if request.config.option.long
        else (TELLING_CODES, TELLING_SIGNALS.intersection(DEADLY))
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
    begun = time.monotonic()
    status = held(
        spool, sshd, sh("echo out"), remote=remote, timeouts={"connect": 2 if passing else 40}
    )
    assert (status["state"], status["exception"]["stage"], status["started"]) == (
        "error",
        stage,
        False,
    ), status["exception"]
    assert words in status["exception"]["message"]
    assert time.monotonic() - begun < 20


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
        assert (done.returncode, done.stdout, said.seek(0) or said.read()) == (0, "r\n", "")
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
    script = "trap 'echo usr1' USR1; trap '' TERM; (setsid sleep 1000 &); echo up; while :; do sleep 0.05; done"
    process = start(spool, sh(script), remote=sshd.remote(), stop={"grace_period": 0.4})
    until(lambda: stdout(spool) == b"up\n")
    assert chaperone("signal", "r", "USR1").returncode == 0
    until(lambda: stdout(spool) == b"up\nusr1\n")
    assert chaperone("stop", "r").returncode == 0
    assert process.wait(20) == 0
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
    assert process.wait(20) == 0
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


VICTIMS = ("chaperone", "ssh", "session")
CELLS = [(victim, program) for program in PROGRAMS for victim in VICTIMS]
SLACK_S = 4.5  # more than it takes alone: the machine is shared with the other tests


class Orphans:
    """Runs that are about to lose their connection, and how long something of them lives on."""

    def __init__(self, spool):
        self._spool, self._keys, self._since, self.took = spool, {}, {}, {}

    def start(self, run_id, program, **spec):
        chaperone = start(self._spool, sh(PROGRAMS[program]), run_id, **spec)
        self._keys[run_id] = json.loads((self._spool / run_id / "spec.json").read_text())["key"][
            :16
        ].encode()
        return chaperone

    def cut(self, *run_ids):
        self._since |= dict.fromkeys(run_ids, time.monotonic())

    def are_gone(self):
        """One look: whether nothing is left of all that were cut."""
        alive = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                environ = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
                command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                for run_id, key in self._keys.items():
                    if (
                        b"CHAPERONE_COOKIE=" + key in environ
                        and command
                        and not command.startswith(b"grep")
                    ):  # that is the far side's own search
                        alive.setdefault(run_id, []).append(command)
        for run_id, since in self._since.items():
            if run_id not in alive and run_id not in self.took:
                self.took[run_id] = time.monotonic() - since
        return self._since.keys() <= self.took.keys()

    def within(self, seconds):
        """The longest time that it took, after it took no longer than this."""
        with contextlib.suppress(AssertionError):  # for one that tells more
            until(self.are_gone, seconds)
        assert self._since.keys() <= self.took.keys(), (
            f"something lives on of {self._since.keys() - self.took.keys()}, others were gone after {self.took}"
        )
        return max(self.took.values())


def assert_no_supervisor(sshd):
    with contextlib.suppress(AssertionError):
        until(lambda: not sshd.others())
    assert not sshd.others()


def kill_one(sshd, victim, chaperone, client):
    for pid in {
        "chaperone": [chaperone.pid],
        "ssh": [client],
        "session": session_of(sshd, client) if victim == "session" else [],
    }[victim]:
        with contextlib.suppress(
            ProcessLookupError
        ):  # the one half of a session ends with the other
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("as it is", marks=pytest.mark.user),
        *(pytest.param(shell, marks=pytest.mark.root) for shell in shells.SH),
    ],
)
def test_nothing_is_left_when_something_of_the_connection_is_killed(spool, request, shell):
    """
    Whatever /bin/sh is. In the long form one after the other, each with a clock; in the short one
    at once, a third for each shell and all for two.
    """
    long, as_it_is = request.config.option.long, shell == "as it is"
    there = (
        request.getfixturevalue("sshd") if as_it_is else request.getfixturevalue("sshd_with")(shell)
    )
    cells = (
        CELLS
        if long or as_it_is
        else [
            cell
            for number, cell in enumerate(CELLS)
            if (number + number // 3 + shells.SH.index(shell)) % 3 == 0
        ]
    )
    orphans, runs = Orphans(spool), {}
    for victim, program in cells:
        run_id = f"{victim}-{program.replace(' ', '-')}"
        runs[run_id] = (
            victim,
            orphans.start(run_id, program, remote=there.remote(), stop={"grace_period": 0.4}),
        )
    clients = {run_id: running(spool, run_id)["connection"]["pid"] for run_id in runs}
    for run_id in runs:
        until(lambda run_id=run_id: stdout(spool, run_id))
    for run_id, (victim, chaperone) in runs.items():
        kill_one(there, victim, chaperone, clients[run_id])
        orphans.cut(run_id)
        if long:
            orphans.within(0.4 + 0.5 + SLACK_S)
    slowest = orphans.within(0.4 + 0.5 + SLACK_S)
    print(
        f"/bin/sh {shell}: gone after {slowest:.2f} s at most, "
        + ", ".join(f"{run_id} {took:.2f}" for run_id, took in orphans.took.items())
    )
    for run_id, (victim, chaperone) in runs.items():
        assert chaperone.wait(20) == (-9 if victim == "chaperone" else 0)
        if victim == "chaperone":
            assert disk.seen(spool, run_id)[1]["state"] == "lost"
        else:
            status = final(spool, run_id)
            assert (
                status["state"],
                status["exception"]["stage"],
                status["started"],
                status["complete"],
            ) == ("lost", "connection", True, False)
            assert status["gone_by"] > status["end_time"] and status["return_code"] is None
            assert b"Connection to" not in (spool / run_id / "stderr").read_bytes()
    if not as_it_is:
        assert_no_supervisor(there)


@pytest.mark.root
def test_silent_cut_ends_the_program_by_its_lease(spool, network, request):
    """Whatever /bin/sh is; all runs lose the same cable at once."""
    lease, grace, tick = 3, 0.4, payload.tick_s(3)
    orphans, runs = Orphans(spool), {}
    for number, shell in enumerate(shells.SH):
        there = network.sshd_with(shell)
        for turn, program in enumerate(PROGRAMS):
            if request.config.option.long or turn == number % len(PROGRAMS):
                run_id = f"{shell}-{program.replace(' ', '-')}"
                remote = there.remote(options={"ServerAliveInterval": 1, "ServerAliveCountMax": 3})
                runs[run_id] = orphans.start(
                    run_id, program, remote=remote, lease=lease, stop={"grace_period": grace}
                )
    for run_id in runs:
        running(spool, run_id)
        until(lambda run_id=run_id: stdout(spool, run_id))
    network.cut()
    orphans.cut(*runs)
    try:
        slowest = orphans.within(lease + grace + tick + SLACK_S)
        assert min(orphans.took.values()) > 1.5, f"it did not wait for its lease: {orphans.took}"
        print(
            f"gone after {slowest:.2f} s at most: "
            + ", ".join(f"{run_id} {took:.2f}" for run_id, took in orphans.took.items())
        )
        for chaperone in runs.values():
            assert chaperone.wait(20) == 0
    finally:
        network.heal()
    for run_id in runs:
        status = final(spool, run_id)
        assert (status["state"], status["exception"]["stage"], status["started"]) == (
            "lost",
            "connection",
            True,
        )
        assert "not responding" in status["exception"]["message"], status["exception"]
        assert status["gone_by"] is not None
    for shell in shells.SH:
        assert_no_supervisor(network.sshd_with(shell))


class Ending(Loop):
    """A loop, and a connection's owner, that end when the connection does."""

    def connected(self):
        pass

    def closed(self, code, ready, noise):
        self.end()


def test_connection_that_finds_no_descriptor_leaves_none_open():
    """A run that survives tries again and again."""
    loop, before, limits = (
        Ending(),
        os.listdir("/proc/self/fd"),
        resource.getrlimit(resource.RLIMIT_NOFILE),
    )
    connection, room = None, 4
    while connection is None:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
            connection = Connection(loop, ["/bin/cat"], route([]), Plain(b""), loop, loop)
        except OSError as error:
            assert error.errno in (
                errno.EMFILE,
                errno.EINVAL,
            )  # the latter for a number that the limit does not reach
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert connection or os.listdir("/proc/self/fd") == before
        room += 1
    assert room > 14
    connection.begin()
    loop.run()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.root
def test_short_cut_is_as_if_nothing_had_been(spool, network):
    process = start(
        spool,
        sh("i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.1; done"),
        remote=network.sshd.remote(),
        lease=20,
    )
    until(lambda: stdout(spool))
    network.cut()
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 1)
    network.heal()
    assert process.wait(30) == 0
    assert (final(spool)["state"], final(spool)["complete"]) == ("terminated", True)
    assert stdout(spool) == b"".join(b"%d\n" % number for number in range(40))


def port_of(sshd, client_pid):
    """The near end of a client's connection."""
    ports = subprocess.run(
        ["ss", "-Htnp", "dport", "=", f":{sshd.port}"], capture_output=True, text=True
    ).stdout
    return next(
        line.split()[3].rpartition(":")[2]
        for line in ports.splitlines()
        if f"pid={client_pid}," in line
    )


def session_of(sshd, client_pid):
    """The processes of sshd that serve one client, by its port."""
    found = subprocess.run(
        ["ss", "-Htnp", "sport", "=", f":{sshd.port}"], capture_output=True, text=True
    ).stdout
    local = port_of(sshd, client_pid)
    line = next(line for line in found.splitlines() if line.split()[4].endswith(f":{local}"))
    return [int(piece.partition(",")[0]) for piece in line.split("pid=")[1:]]


def test_secrets_are_in_no_argv(spool, sshd):
    secret = "s3cr3t" + os.urandom(8).hex()
    seen = set()
    process = start(
        spool,
        sh('sleep 0.4; cat >/dev/null; test -n "$S"', env={"S": secret}, stdin=secret),
        remote=sshd.remote(),
    )
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
    assert process.wait(30) == 0
    assert list((tmp_path / "far").iterdir()) == []


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
    assert process.wait(30) == 0
    (home / "go").unlink()
    assert list((home / below).iterdir()) == []


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
    d = r.randbytes(min(left, r.randrange(1, 70000))).replace(b"a", b"\\x1e"); left -= len(d); h.update(d)
    while d: d = d[os.write(2, d):]
print(h.hexdigest())
"""


def test_twenty_megabytes_of_stderr_are_exact(spool, sshd):
    status = held(spool, sshd, py(NOISE.replace("sys.argv[1]", "20_000_000")), lease=1)
    assert (
        status["complete"]
        and hashlib.sha256((spool / "r" / "stderr").read_bytes()).hexdigest()
        == stdout(spool).decode().strip()
    )
    assert status["stderr"]["bytes"] == 20_000_000


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
        "ssh ended with code 255, which tells nothing of the program"
        in status["exception"]["message"]
    )
    status = held(
        spool, sshd, sh("exit 0"), "d", remote={**bare, "port": 1}, timeouts={"connect": 1}
    )
    assert (status["state"], status["exception"]["stage"], status["started"]) == (
        "error",
        "connect",
        False,
    )
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


def test_only_eight_connect_to_one_host_at_a_time(spool, sshd):
    count = 100 if os.environ.get("CI") else 24
    runs = [
        start(spool, sh("exit 0"), f"r{number}", remote=sshd.remote()) for number in range(count)
    ]
    assert [run.wait(120) for run in runs] == [0] * count
    assert {final(spool, f"r{number}")["return_code"] for number in range(count)} == {0}
    assert not any("unable to connect" in log(spool, f"r{number}") for number in range(count))
