"""
The supervisor on hosts that lack awk, setsid, /proc or anything but sh.
"""

import os
import random
import signal

import pytest

from chaperone.farside import payload
from spool_tests.support import shells, supervisors
from spool_tests.support.mounts import WITHOUT_PROC
from spool_tests.support.processes import processes_with
from spool_tests.support.supervisors import PROGRAMS, every_sh, only_what_sh_needs
from spool_tests.support.waiting import until

far = supervisors.far
removed = supervisors.removed


@pytest.fixture
def little(tmp_path):
    """The environment of such a host."""
    only_what_sh_needs(tmp_path)
    return {"PATH": str(tmp_path), "HOME": "/"}


@every_sh
def test_family_is_ended_where_there_is_no_group_and_no_cookie(shell, far, little):
    token = f"1000.{random.SystemRandom().randrange(10**12)}"
    script = f"(env -i /bin/sleep {token}; :) & (env -i /bin/sleep {token}; :) & echo up; wait"
    run = far(shell, {"argv": ["sh", "-c", script]}, env=little, stop={"grace_period": 0.2})

    def sleepers():
        return [
            pid
            for pid, command in processes_with(token.encode()).items()
            if command.startswith("/bin/sleep")
        ]

    try:
        until(lambda: run.read(0.05) or len(sleepers()) == 2)
        run.close()
        until(lambda: run.read(0.01) or not sleepers())
        assert run.ended() == 0
    finally:
        for pid in sleepers():
            os.kill(pid, signal.SIGKILL)


@every_sh
def test_hosts_with_little_say_what_they_can_not_know(shell, far, little):
    run = far(
        shell,
        {"argv": ["sh", "-c", "sleep 1000 & kill -INT $$; sleep 1000"]},
        env=little,
        stop={"grace_period": 0.2},
    )
    assert "setsid=" in run.wait("hello")
    found = run.outcome()
    # Only in ksh93 `$?` alone distinguishes a signal from an exit.
    assert found["ambiguous"] == (shell != "ksh93")
    assert found["return_code"] == (None if shell == "ksh93" else 130)
    run.send("q 1")
    assert run.ended() == 0
    until(lambda: not run.alive())


@pytest.mark.root
@every_sh
def test_host_without_proc_still_ends_the_group_and_says_what_it_can_not_know(shell, far):
    """What the near side does with it: `tracking=group` becomes a line of the log."""
    hidden = [*WITHOUT_PROC, shells.as_sh(shell), *payload.CONSTANT[1:]]
    run = far(shell, {"argv": ["sh", "-c", "sleep 1000 & kill -INT $$"]}, argv=hidden)
    assert run.wait("hello")[1:] == ["setsid=setsid", "tracking=group"]
    assert (run.outcome()["wait_status"], run.outcome()["ambiguous"]) == (signal.SIGINT, False)
    run.send("q 0")
    assert run.wait("left") == ["1"]
    assert run.ended() == 0
    assert run.alive() == {}
    for end in ("connection", "signal"):
        run = far(
            shell,
            {"argv": ["sh", "-c", PROGRAMS["stubborn"]]},
            argv=hidden,
            stop={"grace_period": 0.2},
        )
        until(lambda run=run: run.read(0.05) or run.output["stdout"])
        if end == "connection":
            run.close()
        else:
            run.send("z")
            assert run.outcome()["wait_status"] == signal.SIGKILL
        until(lambda run=run: run.read(0.01) or not run.alive())


@pytest.mark.root
@every_sh
def test_program_alone_is_ended_where_nothing_tells_of_others(shell, far, little, tmp_path):
    """No group, no cookie, no ps: as the docs say."""
    (tmp_path / "ps").unlink()
    hidden = [
        "/usr/bin/unshare",
        "--mount",
        "/bin/sh",
        "-c",
        '/bin/mount -t tmpfs none /proc && exec "$@"',
        "sh",
        shells.as_sh(shell),
        *payload.CONSTANT[1:],
    ]
    text = "trap '' TERM; sleep 1000 & echo up; while :; do sleep 1; done"
    run = far(
        shell,
        {"argv": ["sh", "-c", text]},
        argv=hidden,
        env={**little, "PATH": f"{tmp_path}:/nowhere"},
        stop={"grace_period": 0.2},
    )
    until(lambda: run.read(0.05) or run.output["stdout"] == b"up\n")
    pid = int(run.wait("start")[0])
    assert run.wait("hello")[1:] == ["setsid=", "tracking=group"]
    run.close()
    until(lambda: run.read(0.01) or pid not in run.alive())
    assert any("1000" in command for command in run.alive().values())


def test_busybox_awk_that_lies_is_found_out(far, tmp_path):
    (tmp_path / "awk").symlink_to(shells.path_of("busybox"))
    run = far(
        "dash", {"argv": ["sh", "-c", "kill -KILL $$"]}, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    found = run.outcome()
    assert (found["wait_status"], found["return_code"], found["ambiguous"]) == (None, 137, True)


@every_sh
def test_binary_stderr_is_exact_with_records_between(shell, far):
    text = (
        "import os,random\nr=random.Random(7)\nfor i in range(200):\n"
        " d=r.randbytes(r.randrange(1,20000))\n"
    )
    text += " os.write(2,d.replace(b'a',b'\\x1e'));os.write(1,d[:50])"
    run = far(shell, {"argv": ["/usr/bin/python3", "-I", "-S", "-c", text]})
    run.wait("start")
    number = 0
    while not any(record[0] == "end" for record in run.records):
        if number < 300:
            number += 1
            run.send(f"h {number}")
        run.read(0.1)
    run.send("q 5")
    run.ended()
    source = random.Random(7)
    pieces = [source.randbytes(source.randrange(1, 20000)) for _ in range(200)]
    assert run.output["stderr"] == b"".join(piece.replace(b"a", b"\x1e") for piece in pieces)
    assert run.output["stdout"] == b"".join(piece[:50] for piece in pieces)
    assert sum(record[0] == "beat" for record in run.records) == number
