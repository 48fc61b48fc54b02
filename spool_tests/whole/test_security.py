"""
What docs/security.rst says, claim by claim: what each user may do, what planted things come
to, what can't be smuggled and what is never shown.

Knows: the command line, other users.  Must not know: how chaperone works inside.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess

import pytest

from chaperone.api import Spool
from chaperone.cli import completion, main  # noqa: F401  imported once here, and not by each child
from chaperone.errors import NoRunError
from chaperone.model import spec as specs
from chaperone.model.hops import remote as remotes
from chaperone.model.hops.route import Route
from spool_tests.support import disk
from spool_tests.support.processes import processes_with
from spool_tests.support.users import VERBS, said
from spool_tests.support.waiting import need, until

NOBODY = 65_534
SECRETS = {"TOKEN": "hunter2-in-env"}
STDIN = "hunter2-in-stdin"
AGENT = {"callback": {"url": "https://scheduler/", "token": "hunter2-in-callback"}}


def refused(tmp_path, spool, sentence):
    """Every verb says so, in one sentence, and changes nothing."""
    before = disk.tree(spool)
    (tmp_path / "spec").write_text('{"program": {"argv": ["true"]}}')
    for words in [
        *VERBS,
        ["run", tmp_path / "spec"],
        ["run", "--detach", tmp_path / "spec"],
        ["run", "--warm", tmp_path / "spec"],
    ]:
        ((code, text),) = said(tmp_path, words)
        assert code in (os.EX_IOERR, os.EX_CANTCREAT) and text == f"chaperone: {sentence}\n", words
    assert disk.tree(spool) == before


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_spool_that_others_may_write_to_is_refused_by_every_verb(spool, tmp_path, mode):
    disk.end(disk.create(spool))
    spool.chmod(mode)
    refused(
        tmp_path,
        spool,
        f"unable to use spool {str(spool)!r}: want it writable only by its owner,"
        f" got mode {mode:04o}",
    )


@pytest.mark.root
def test_spool_of_somebody_else_is_refused_by_every_verb_for_root_too(spool, tmp_path):
    disk.end(disk.create(spool))
    os.chown(spool, NOBODY, NOBODY)
    refused(
        tmp_path,
        spool,
        f"unable to use spool {str(spool)!r}: want it owned by uid 0, got uid {NOBODY}",
    )
    os.chown(spool, 0, 0)


def test_everything_in_a_spool_is_its_owners_alone_whatever_the_umask(tmp_path, chaperone):
    spool, spec = tmp_path / "mine", {"id": "live", "program": {"argv": ["sleep", "60"]}}
    for run_id, umask in (("open", 0), ("closed", 0o777)):
        assert (
            chaperone(
                "run",
                "--spool",
                spool,
                "--id",
                run_id,
                "-",
                spec={"program": {"argv": ["true"]}},
                umask=umask,
            ).returncode
            == 0
        )
    assert chaperone("reap", "--spool", spool, umask=0).returncode == 0
    chaperone("launcher", "--spool", spool, "--detach", umask=0)
    chaperone("run", "--spool", spool, "--detach", "-", spec=spec, umask=0)
    live = spool / "live"
    until(lambda: json.loads((live / "running.json").read_text())["state"] == "running")
    until(lambda: not (live / ".running.json").exists())  # it replaces running.json
    kinds = {stat.S_IFDIR: 0o700, stat.S_IFREG: 0o600, stat.S_IFIFO: 0o600, stat.S_IFSOCK: 0o600}
    paths = [path for path in (spool, *spool.rglob("*")) if not path.is_symlink()]
    modes = {str(path.relative_to(spool)): path.lstat().st_mode for path in paths}
    assert {
        "live/control",
        "live/.status",
        "closed/status.json",
        ".launcher",
        ".launcher.lock",
        ".sweep.lock",
        ".running",
        ".",
    } <= modes.keys()
    assert {
        name: oct(mode)
        for name, mode in modes.items()
        if stat.S_IMODE(mode) != kinds[stat.S_IFMT(mode)]
    } == {}
    os.kill(int((spool / ".launcher.lock").read_text()), signal.SIGTERM)
    assert chaperone("kill", "--spool", spool, "live").returncode == 0
    until(lambda: not processes_with(os.fsencode(spool)))


def test_directory_that_was_there_keeps_its_mode_and_shows_no_more_than_ids(tmp_path, chaperone):
    spool = tmp_path / "there"
    spool.mkdir(mode=0o755)
    spool.chmod(0o755)
    assert (
        chaperone(
            "run", "--spool", spool, "--id", "r", "-", spec={"program": {"argv": ["true"]}}
        ).returncode
        == 0
    )
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (spool, *spool.iterdir())}
    assert modes == {"there": 0o755, ".running": 0o700, ".ended": 0o700, "r": 0o700}


# -- another user, really


def as_nobody(directory, function):
    """
    Call a function as another user, who starts in a directory however closed its parents are; what
    it returns must be true.
    """

    def act():
        os.chdir(directory)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os._exit(0 if function() else 1)

    assert disk.waited(disk.forked(act)) == 0


def denied(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return True
    return False


@pytest.mark.root
def test_other_users_read_nothing_and_stop_nothing(spool, held, chaperone):
    chaperone("launcher", "--detach")
    directory = held({"id": "r", "program": {"argv": ["sleep", "60"]}})
    status = until(
        lambda: (found := json.loads((directory / "running.json").read_text()))["pid"] and found
    )

    def asks():
        connection = socket.socket(socket.AF_UNIX)
        paths = [os.path.join(base, name) for base in ("r", ".") for name in files]
        return (
            denied(connection.connect, ".launcher")
            and all(
                denied(os.open, path, flags | os.O_NONBLOCK)
                for path in paths
                for flags in (os.O_RDONLY, os.O_WRONLY)
            )
            and denied(os.open, "r/new", os.O_CREAT | os.O_WRONLY)
            and all(
                denied(os.kill, pid, number)
                for pid in (status["pid"], status["chaperone_pid"])
                for number in (0, signal.SIGTERM, signal.SIGKILL)
            )
        )

    files = [path.name for path in directory.iterdir()]
    as_nobody(spool, asks)
    # Were both directories open to be passed through, each thing in them would still be closed.
    spool.chmod(0o711), directory.chmod(0o711)
    files = [name for name in files if (directory / name).exists()]

    def asks_inside():
        connection = socket.socket(socket.AF_UNIX)
        return denied(connection.connect, ".launcher") and all(
            denied(os.open, f"r/{name}", flags | os.O_NONBLOCK)
            for name in files
            for flags in (os.O_RDONLY, os.O_WRONLY)
        )

    assert {"control", "stdout", "spec.json", "running.json", "lock"} <= set(files)
    as_nobody(spool, asks_inside)
    (spool / ".launcher").chmod(0o777)

    def is_told_off():
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(".launcher")
        return b"unable to launch a run for uid 65534: want uid 0" in connection.recv(1_000)

    as_nobody(spool, is_told_off)
    assert (
        chaperone("status", "r").returncode == 0
        and json.loads((directory / "running.json").read_text())["state"] == "running"
    )
    os.kill(int((spool / ".launcher.lock").read_text()), signal.SIGTERM)


# -- what can't be smuggled

WRONG = [
    "-oProxyCommand=touch x",
    "-",
    "--",
    "a b",
    "a\nb",
    "a\tb",
    "",
    "a;b",
    "$(a)",
    "`a`",
    "a|b",
    "a'b",
    "a\\b",
    "\x7f",
    "a\u2028b",
]
# What a spec accepts as a host or a user, odd as it is.
ODD = [
    "a" * 255,
    "::1",
    "fe80::1%eth0",
    "10.0.0.1",
    "%h",
    "a:b",
    "~root",
    "*",
    "a!b",
    "k=v",
    "#",
    "[::1]",
    "é",
    "a,b",
]


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("field", ["host", "user"])
def test_name_that_could_be_an_option_or_a_command_is_refused(field, text):
    wanted = "a name without white space, quotes or shell characters"
    if not text or text.startswith("-"):
        wanted = "a non-empty name that does not begin with '-'"
    for mode in remotes.MODES[:3]:
        remote = {"host": "h", "user": "u", "mode": mode, field: text}
        with pytest.raises(ValueError) as caught:
            specs.checked({"program": {"argv": ["true"]}, "remote": remote}, "/")
        assert str(caught.value) == f"remote.{field}: want {wanted}, got {text!r}"


def test_id_is_no_path_and_no_option(spool, chaperone):
    for run_id in ("-x", "--id", "../x", "a/b", ".running", ".x", "", "a b", "a\n", "é", "a" * 129):
        assert (
            chaperone("run", "-", spec={"id": run_id, "program": {"argv": ["true"]}}).returncode
            == os.EX_DATAERR
        )
        with pytest.raises(NoRunError):
            Spool(spool)[run_id].status()
    assert not spool.exists() or os.listdir(spool) == []


@pytest.mark.parametrize("odd", ODD)
def test_ssh_takes_odd_names_for_names(odd):
    """
    ssh's own word for what an argv means (-G): the host and the user that were asked for, and no
    option that was not.
    """
    need("ssh")
    remote = {
        "host": odd,
        "user": odd,
        "options": {"Port": "2222", "SetEnv": "A=b -oProxyCommand=x"},
    }
    argv = specs.checked({"program": {"argv": ["true"]}, "remote": remote}, "/")["remote"]["hops"]
    ssh = Route.of(argv).argv(["true"])
    ssh = [*ssh[: ssh.index("--")], "-F", "none", "-G", *ssh[ssh.index("--") :]]
    result = subprocess.run(ssh, capture_output=True, text=True)
    meant = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    if result.returncode:  # ssh would not go there at all, and says so
        assert result.stderr.count("\n") >= 1 and meant == {}
        return
    assert (
        meant["host"] if "host" in meant else meant["hostname"],
        meant["user"],
        meant["port"],
    ) == (odd, odd, "2222")
    assert (
        meant["batchmode"] == "yes" and "proxycommand" not in meant and "localcommand" not in meant
    )


# -- secrets


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("way", [(), ("--warm",)], ids=["cold", "warm"])
def test_secrets_are_told_to_nobody_but_the_program(spool, tmp_path, chaperone, way, keep):
    chaperone("launcher", "--detach") if way else None
    program = {
        "command": 'cat > got; printf %s "$TOKEN" >> got; touch there; exec sleep 60',
        "env": SECRETS,
        "stdin": STDIN,
        "cwd": str(tmp_path),
    }
    spec = {"id": "r", "program": program, "keep_secrets": keep, **AGENT}
    assert chaperone("run", "--detach", *way, "-", spec=spec).returncode == 0
    until((tmp_path / "there").exists)
    assert (tmp_path / "got").read_text() == STDIN + SECRETS["TOKEN"]
    until(lambda: json.loads((spool / "r" / "running.json").read_text())["state"] == "running")

    def commands():
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                yield pathlib.Path("/proc", pid, "cmdline").read_bytes()

    until(lambda: any(b"sleep\x0060" in line for line in commands()))
    assert not [line for line in commands() if b"hunter2" in line]

    def told():
        """All that is on disk but the spec, and all that is shown."""
        run = Spool(spool)["r"]
        shown = [
            repr(run),
            repr(run.status()),
            repr(Spool(spool)),
            repr(vars(run.status()) if hasattr(run.status(), "__dict__") else run.status().raw),
        ]
        shown += [
            chaperone(*words).stdout
            for words in (("ls", "--all"), ("ls", "--json"), ("status", "r"), ("tail", "r"))
        ]
        shown += [
            chaperone("check", "-", spec=spec).stdout,
            chaperone("run", "-", spec=spec).stderr,
        ]
        kept = [
            path.read_text(errors="replace")
            for path in (spool / "r").iterdir()
            if path.is_file() and path.name != "spec.json"
        ]
        return [text for text in shown + kept if "hunter2" in text]

    assert told() == []
    kept = (spool / "r" / "spec.json").read_text()
    assert [secret in kept for secret in (SECRETS["TOKEN"], STDIN, "hunter2-in-callback")] == [
        keep
    ] * 3
    assert '"TOKEN"' in kept and '"token"' in kept
    assert chaperone("kill", "r").returncode == 0 and told() == []
    os.kill(int((spool / ".launcher.lock").read_text()), signal.SIGTERM) if way else None


@pytest.mark.parametrize(
    "wrong",
    [
        {"cwd": "/nowhere"},
        {"argv": ["/nowhere"]},
        {"umask": "9"},
        {"env": {"TOKEN": ["hunter2"]}},
        {"rlimits": {"nofile": "x"}},
    ],
)
def test_secrets_are_in_no_error(spool, chaperone, wrong):
    spec = {
        "id": "r",
        "program": {"argv": ["true"], "env": SECRETS, "stdin": STDIN, **wrong},
        **AGENT,
    }
    for verb in ("exec", "run", "check"):
        result = chaperone(verb, "-", spec=spec)
        assert "hunter2" not in result.stdout + result.stderr
    for path in spool.glob("r/*"):
        assert path.name == "spec.json" or "hunter2" not in path.read_text(), path
