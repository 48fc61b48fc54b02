"""
Every call of a chaperone that writes, or opens something, fails in turn: with EIO, with no room or
no inode left, with a quota that is used up, with too many open files.

The calls are found by strace and made to fail by it, so a new one is a new fault by itself. A start
may then be refused, in one sentence and with nothing left; a program that was started keeps its
outcome, its CPU times and an exact count of its bytes.
"""

import errno
import json
import os
import random
import re
import subprocess

import pytest

from spool_tests.support import crash
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import need

pytestmark = pytest.mark.once

# What can't fail because a disk is full or bad, or is the kernel's own business between
# processes.
UNHARMED = set(
    """
    access arch_prctl brk chdir clock_gettime clock_nanosleep clone clone3 close close_range
    dup2 execve exit_group faccessat2 fadvise64 fchdir fstat futex getcwd getdents64 getegid
    geteuid getgid getpgid getpgrp getpid getppid getrandom getresgid getresuid getrlimit
    getrusage getsid gettid getuid ioctl kill lseek madvise mmap mprotect mremap munmap
    newfstatat pidfd_send_signal poll prctl pread64 prlimit64 read readlink readlinkat readv
    restart_syscall rseq recvfrom rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity
    set_robust_list sendmsg set_tid_address setsid sigaltstack statfs statx sysinfo umask
    uname vfork wait4 waitid
    """.split()
)
DESCRIPTORS = {
    "openat",
    "pipe2",
    "pidfd_open",
    "dup",
    "dup3",
    "fcntl",
    "socket",
    "epoll_create1",
    "eventfd2",
}
KINDS = {
    "here": {"output": {"timeline": True}, "timeouts": {"run": 60}},
    "survive": {"on_disconnect": "survive", "lease": 20},
}
# how many calls in a row fail in the long form; of the last step more than one would only test our
# patience
LASTING = 3
FAULTS = 8  # that the short form waits for
CALL = re.compile(r"^([a-z_0-9]+)\((.*)")
OUT, ERR = b"out\n" * 5, b"err\n" * 5
PROGRAM = "for i in 1 2 3 4 5; do echo out; echo err >&2; done; : > effect; exit 3"


class Run:
    """A run in a directory of its own, its chaperone under strace, which may let calls fail."""

    def __init__(self, directory, *options, limit=None, command=PROGRAM, **asked):
        directory.mkdir()
        self.directory, self.spool = directory, directory / "spool"
        self.spool.mkdir(0o700)
        spec = {"id": "r", "program": {"command": command, "cwd": str(directory)}, **asked}
        (directory / "spec.json").write_text(json.dumps(spec))
        words = ["run", "--spool", str(self.spool), "-"]
        tracer = crash.Tracer(directory, options=options)
        # A file: messages after the run is visible would otherwise only go to a terminal.
        with open(directory / "stderr", "w") as said, open(directory / "spec.json") as stdin:
            streams = {"stdin": stdin, "stderr": said}
            if limit is not None:
                limited = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *CHAPERONE, *words]
                done = subprocess.run(
                    limited, **streams, stdout=subprocess.DEVNULL, timeout=300, check=False
                )
                self.code = done.returncode
            elif "on_disconnect" in asked:
                self.code = tracer.run([*CHAPERONE, *words], **streams)
            else:
                self.code = tracer.run_below_guard(words, **streams)
        self.stderr = (directory / "stderr").read_text()
        self.trace = (directory / "trace").read_text() if limit is None else ""

    def calls(self):
        """
        The calls from the spool's own making on: (name, number among those of that name,
        arguments).
        """
        counts, begun = {}, False
        for line in self.trace.splitlines():
            if call := CALL.match(line):
                name, arguments = call.groups()
                counts[name] = counts.get(name, 0) + 1
                begun = begun or (name == "mkdirat" and ".running" in arguments)
                if begun:
                    yield name, counts[name], arguments

    def status(self):
        return json.loads((self.spool / "r" / "status.json").read_text())

    def has_failed(self):
        """
        Whether a call failed for us, and none that a disk could not have failed: how many of those
        come before moves from run to run.
        """
        injected = [line for line in self.trace.splitlines() if "(INJECTED)" in line]
        return bool(injected) and not any(
            "(" in line and "<pipe:" in line.partition(",")[0] for line in injected
        )


def faults(run, error):
    """The calls that can fail with this error: (name, number)."""
    for name, number, arguments in run.calls():
        if error == "EMFILE":
            if name in DESCRIPTORS and (name != "fcntl" or "F_DUPFD" in arguments):
                yield name, number
        elif "<pipe:" in arguments.partition(",")[0]:  # no disk is behind it
            continue
        elif (
            name not in UNHARMED
            and name not in DESCRIPTORS - {"openat"}
            and (name != "openat" or "O_CREAT" in arguments)
        ):
            yield name, number


def of_run(directory, *names):
    """strace's options that leave all files alone but these of the run, from when it is visible."""
    return [word for name in names for word in ("-P", f"{directory}/spool/r/{name}")]


def check(run, what):
    """What must be true whatever failed."""
    started = (run.directory / "effect").exists()
    if (run.spool / "r" / "status.json").exists():
        status = run.status()
        assert run.code == 0, what
        if status["state"] == "error":
            assert (
                not started
                and status["started"] is False
                and status["exception"]["message"].startswith("unable to ")
            ), (what, status)
            return "error"
        assert (status["state"], status["return_code"], started) == ("terminated", 3, True), (
            what,
            status,
        )
        assert status["rusage"]["utime"] is not None, what
        for name, sent in (("stdout", OUT), ("stderr", ERR)):
            kept = (run.spool / "r" / name).read_bytes()
            assert status[name] == {"bytes": len(kept), "dropped": len(sent) - len(kept)}, (
                what,
                status[name],
                kept,
            )
            assert len(kept) % 4 == 0 and kept in sent, what
        return (
            "dropped" if status["stdout"]["dropped"] or status["stderr"]["dropped"] else "unharmed"
        )
    # It was refused with a message, and nothing is left of it.
    assert not started, what
    assert run.code in (os.EX_CANTCREAT, os.EX_IOERR, os.EX_OSERR), (what, run.code, run.stderr)
    if not (
        what.startswith("write ") and ".." in what
    ):  # of several writes in a row the one to stderr may be one
        assert run.stderr.startswith("chaperone: unable to ") and run.stderr.count("\n") == 1, (
            what,
            run.stderr,
        )
    assert not (run.spool / "r").exists(), what
    return "refused"


@pytest.mark.parametrize("error", ["EIO", "EDQUOT", "ENOSPC", "EROFS", "EMFILE"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_that_fails_costs_what_it_must_and_no_more(
    tmp_path, monkeypatch, kind, error, request, told
):
    need("strace")
    monkeypatch.setenv("HOME", str(tmp_path))
    long = request.config.option.long
    first = Run(tmp_path / "0", **KINDS[kind])
    assert check(first, "nothing failed") == "unharmed"
    points = list(faults(first, error))
    assert len(points) > 15
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = points if long else random.Random(seed).sample(points, len(points))
    seen, count = {}, 0
    for name, number in chosen:
        if not long and sum(seen.values()) == FAULTS:
            break
        for when in (f"{number}", f"{number}..{number + LASTING - 1}") if long else (f"{number}",):
            count += 1
            what = f"{name} number {when} fails with {error}"
            run = Run(
                tmp_path / str(count),
                "-e",
                f"inject={name}:error={error}:when={when}",
                **KINDS[kind],
            )
            if run.has_failed():  # or this run took a shorter way, as it may on a busy machine
                cost = check(run, what)
                seen[cost] = seen.get(cost, 0) + 1
    told(f"{kind}, {error}: {count} faults at {len(points)} calls: {seen}")
    assert sum(seen.values()) > count / 2 if long else sum(seen.values()) == FAULTS


def test_a_limit_on_open_files_is_told_or_does_no_harm(tmp_path):
    """From too few to begin with to more than enough."""
    limits = range(6, 40)
    seen = [
        check(Run(tmp_path / str(limit), limit=limit), f"at most {limit} open files")
        for limit in limits
    ]
    print(dict(zip(limits, seen, strict=True)))
    assert seen[0] == "refused" and seen[-1] == "unharmed" and "error" in seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_stdin_that_memory_does_not_take_is_an_error(tmp_path, monkeypatch, kind):
    need("strace")
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Run(
        tmp_path / "0",
        "-e",
        "inject=memfd_create:error=ENFILE",
        program={"argv": ["cat"], "stdin": "text"},
        **KINDS[kind],
    )
    status = run.status()
    assert (run.code, status["state"], status["started"]) == (0, "error", False)
    message = "unable to keep stdin in memory: Too many open files in system"
    assert status["exception"] == {
        "stage": "spawn",
        "type": "OSError",
        "errno": errno.ENFILE,
        "message": message,
    }


@pytest.mark.parametrize("on_full", ["drop", "stop"])
def test_a_disk_that_takes_nothing_any_more_keeps_the_outcome(tmp_path, on_full):
    """
    From when the run is visible no write succeeds, to the streams, running.json or the log: the
    room for the outcome was made before.
    """
    need("strace")
    command = (
        "yes | head -c 3000000; exit 3"
        if on_full == "drop"
        else "yes | head -c 3000000; exec sleep 600"
    )
    files = of_run(tmp_path / "1", "stdout", "stderr", "log", ".running.json")
    run = Run(
        tmp_path / "1",
        *files,
        "-e",
        "inject=write:error=EIO",
        command=command,
        output={"on_full": on_full},
    )
    status = run.status()
    assert (run.code, status["state"], status["stdout"]["bytes"], status["rusage"] is None) == (
        0,
        "terminated",
        0,
        False,
    )
    if on_full == "drop":
        assert (status["return_code"], status["stdout"]["dropped"]) == (3, 3_000_000)
    else:
        assert (status["signal"], status["stop"]["reason"]) == ("SIGTERM", "output")


def test_a_spool_that_is_read_only_for_a_while_gets_its_outcome_later(tmp_path):
    need("strace")
    run = Run(tmp_path / "0", "-e", "inject=pwrite64:error=EROFS:when=1..2")
    assert (
        run.has_failed() and check(run, "no write of the outcome succeeds at first") == "unharmed"
    )


def test_a_spool_that_turns_read_only_is_told_on_stderr_and_in_the_log_once_that_takes_it(tmp_path):
    need("strace")
    faults = [
        f"-einject={name}:error=EROFS:when=1..{times}"
        for name, times in (("write", 3), ("pwrite64", 2))
    ]
    run = Run(
        tmp_path / "0",
        *of_run(tmp_path / "0", "stdout", "log", ".status"),
        *faults,
        command="echo out",
    )
    assert (run.code, run.status()["stdout"]) == (0, {"bytes": 0, "dropped": 4}), run.trace
    dropped, refused = (
        "stdout: bytes are dropped from offset 0 on: Read-only file system",
        "unable to publish the status of run 'r': Read-only file system",
    )
    said, log = (
        [line.partition("Z ")[2] for line in text.splitlines()]
        for text in (run.stderr, (run.spool / "r" / "log").read_text())
    )
    assert (said, log) == (
        [dropped, refused],
        [dropped, refused, refused],
    )  # the last one finds a log that takes it, and all before it


def test_timeline_opens_no_module_once_the_run_is_visible(tmp_path):
    """With too few descriptors for that the run was left without a chaperone."""
    need("strace")
    run = Run(tmp_path / "0", command="exit 3", output={"timeline": True})
    assert run.status()["return_code"] == 3
    _, visible, rest = run.trace.partition(', "r") = 0\n')
    assert visible and [line for line in rest.splitlines() if ".py" in line] == []
