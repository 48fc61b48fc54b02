"""
The same promises behind every engine: streams, outcome, stop, kill, what is left, what survives.
"""

import hashlib
import json
import os
import signal
import subprocess

import pytest

from spool_tests.support.engines import sleepers, word
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import ask, final, live, log, running, sh, start, stdout
from spool_tests.support.waiting import until

pytestmark = [pytest.mark.tier("engines"), pytest.mark.root]

REFUSED = (
    "chaperone: unable to read spec '-': on_disconnect: want 'kill' behind {}, got 'survive'\n"
)
CODES = (0, 1, 2, 97, 125, 126, 127, 128, 137, 255)
SIGNALS = (signal.SIGHUP, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)


def held(spool, way, program, run_id="r", **spec):
    assert start(spool, program, run_id, remote=way.remote, **spec).wait(90) == 0
    return final(spool, run_id)


def test_streams_input_and_place_are_as_asked(spool, way):
    text = 'echo out; printf "%s\\n" "$A" >&2; pwd; cat; exit 3'
    data = {"env": {"A": "x'y\n\\z!"}, "cwd": "/tmp", "stdin": "in\n"}
    status = held(spool, way, sh(text, **data))
    assert (status["state"], status["return_code"], status["complete"]) == ("terminated", 3, True)
    assert stdout(spool) == b"out\n/tmp\nin\n"
    assert (spool / "r/stderr").read_bytes() == b"x'y\n\\z!\n"
    assert status["leftovers"] in (0, None) and status["started"] is True


def test_three_megabytes_pass_unchanged_both_ways(spool, way, tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "in").write_bytes(data)
    held(spool, way, {"argv": ["cat"], "stdin": {"file": str(tmp_path / "in")}})
    assert hashlib.sha256(stdout(spool)).digest() == hashlib.sha256(data).digest()


def test_codes_and_signals_are_exact(spool, way):
    scripts = {f"c{code}": f"exit {code}" for code in CODES}
    scripts |= {f"s{int(number)}": f"kill -{int(number)} $$; sleep 9" for number in SIGNALS}
    runs = [
        (name, start(spool, sh(text), name, remote=way.remote)) for name, text in scripts.items()
    ]
    found = {}
    for name, chaperone in runs:
        assert chaperone.wait(120) == 0
        status = final(spool, name)
        found[name] = (status["state"], status["status"])
        # The docs: where awk is busybox's, above 128 it can't be known which.
        if status["ambiguous"]:
            assert way.image == "busybox" and status["return_code"] > 128
            found[name] = (status["state"], scripts[name])
    expected = {f"c{code}": ("terminated", code << 8) for code in CODES}
    expected |= {f"s{int(number)}": ("terminated", int(number)) for number in SIGNALS}
    ambiguous = {name: value for name, value in found.items() if isinstance(value[1], str)}
    assert {**found, **{name: expected[name] for name in ambiguous}} == expected


def test_payload_that_is_cut_runs_nothing(spool, way):
    cut = {"exec": {"argv": ["sh", "-c", 'head -c 5000 | "$@"', "cut"]}}
    assert start(spool, sh("echo ran"), remote={"hops": [cut, *way.remote["hops"]]}).wait(90) == 0
    status = final(spool)
    assert (status["state"], status["started"]) == ("error", False), log(spool)
    assert status["exception"]["stage"] == "far-side"
    assert stdout(spool) == b""


def test_program_that_is_not_there_was_not_started(spool, way):
    status = held(spool, way, {"argv": ["/no/such/program"]})
    assert (status["state"], status["started"]) == ("error", False)
    assert status["exception"]["stage"] == "spawn"


@pytest.mark.parametrize("ending", ["stop", "kill", "grace"])
def test_stop_and_kill_end_all_of_it(spool, way, ending):
    name = word()
    trap = "trap 'echo bye; exit 5' TERM; " if ending == "stop" else "trap '' TERM; "
    text = f"{trap}sleep {name} & echo up; wait; while :; do sleep {name}; done"
    chaperone = start(spool, sh(text), remote=way.remote, stop={"grace_period": 0.5})
    running(spool)
    until(lambda: stdout(spool) and sleepers(name))
    ask(spool, "kill" if ending == "kill" else "stop")
    assert chaperone.wait(60) == 0
    status = final(spool)
    expected = (5, None) if ending == "stop" else (None, "SIGKILL")
    if status["ambiguous"]:
        assert way.image == "busybox"
        expected = (137, None)
    assert (status["return_code"], status["signal"]) == expected, log(spool)
    until(lambda: not sleepers(name))


def test_what_it_leaves_is_ended(spool, way):
    name = word()
    status = held(spool, way, sh(f"setsid sleep {name} >/dev/null 2>&1 & sleep 0.3; exit 3"))
    assert (status["state"], status["return_code"]) == ("terminated", 3)
    assert status["leftovers"] == (1 if status["tracking"] != "group" else None)
    if status["tracking"] != "group":
        until(lambda: not sleepers(name))
    elif "exec" in way.name:
        pytest.fail("a container that stays must find what was left")
    until(lambda: not sleepers(name))


@pytest.mark.parametrize("victim", ["chaperone", "client"])
def test_nothing_is_left_of_a_run_that_lost_its_holder(spool, way, victim):
    name = word()
    chaperone = start(
        spool,
        sh(f"trap '' HUP TERM; echo up; sleep {name}"),
        remote=way.remote,
        stop={"grace_period": 1},
    )
    status = running(spool)
    until(lambda: stdout(spool) and sleepers(name))
    os.kill(status["chaperone_pid"] if victim == "chaperone" else status["connection"]["pid"], 9)
    chaperone.wait(60)
    until(lambda: not sleepers(name))
    if victim == "client":
        status = final(spool)
        if way.name == "exec" and status["state"] == "terminated":
            # What the hop started lives on until the program is gone, and says so in time.
            assert (status["signal"], status["stop"]["reason"]) == ("SIGKILL", "disconnect")
        else:
            assert (status["state"], status["exception"]["stage"]) == ("lost", "connection")


def test_survivor_outlives_its_client_and_its_chaperone(spool, way):
    """To the last byte; what can't survive is refused in one sentence."""
    spec = {"remote": way.remote, "on_disconnect": "survive"}
    if not way.survives:
        done = subprocess.run(
            [*CHAPERONE, "check", "-"],
            input=json.dumps({"program": sh("true"), **spec}),
            capture_output=True,
            text=True,
        )
        what = "srun, because the job step ends when srun ends"
        if way.image:
            client = f"{way.engine.program} run"
            what = f"{client}, because the container ends when {client} ends"
        said = REFUSED.format(what)
        assert (done.returncode, done.stderr) == (65, said)
        return
    text = "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); sleep 0.1; done; exit 4"
    chaperone = start(spool, sh(text), **spec)
    status = running(spool)
    until(lambda: b"5\n" in stdout(spool))
    os.kill(status["connection"]["pid"], 9)
    until(lambda: live(spool)["connection"]["drops"] == 1)
    until(lambda: live(spool)["connection"]["state"] == "up")
    os.kill(status["chaperone_pid"], 9)
    chaperone.wait(60)
    adopted = subprocess.Popen([*CHAPERONE, "adopt", "--spool", str(spool), "r"])
    assert adopted.wait(60) == 0
    status = final(spool)
    assert (status["state"], status["return_code"], status["complete"]) == ("terminated", 4, True)
    assert stdout(spool) == b"".join(b"%d\n" % number for number in range(60))


def test_survivor_ends_with_its_lease(spool, way):
    if not way.survives:
        return
    name = word()
    chaperone = start(
        spool,
        sh(f"trap '' TERM; echo up; sleep {name}"),
        remote=way.remote,
        on_disconnect="survive",
        lease=2,
        stop={"grace_period": 0.5},
    )
    status = running(spool)
    until(lambda: sleepers(name))
    os.kill(status["chaperone_pid"], 9)
    chaperone.wait(60)
    until(lambda: not sleepers(name))
