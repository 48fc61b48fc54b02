"""
reap, adopt, gc, doctor, follow and launcher as verbs.
"""

import json
import os
import re
import signal
import subprocess

import pytest

from spool_tests.support.commands import ECHO, SLEEP, shell, streams
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

# -- looking after a spool


def test_reap_publishes_what_was_lost(chaperone, held):
    held({**SLEEP, "id": "live"})
    directory = held(SLEEP)
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    assert streams(chaperone("wait", "sleep"))[0] == 125
    assert streams(chaperone("reap")) == (
        0,
        "sleep: lost: the chaperone died before the program's end was recorded\n",
        "",
    )
    assert json.loads((directory / "status.json").read_text())["state"] == "lost"
    assert streams(chaperone("reap")) == (0, "", "")
    assert streams(chaperone("reap", "sle", "live")) == (
        0,
        "sleep: ended: nothing is left to do\nlive: alive: its chaperone is running\n",
        "",
    )


def test_adopt_holds_what_outlived_its_chaperone(chaperone, held, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    directory = held(
        shell(
            "survivor",
            f"echo begin; read x <{tmp_path}/fifo; echo $x; exit 5",
            on_disconnect="survive",
        )
    )
    until(lambda: (directory / "stdout").read_bytes())
    assert streams(chaperone("adopt", "surv")) == (
        os.EX_CANTCREAT,
        "",
        "chaperone: unable to adopt run 'survivor': it is running, not unattended\n",
    )
    os.kill(json.loads((directory / "running.json").read_text())["chaperone_pid"], signal.SIGKILL)
    until(lambda: '"unattended"' in chaperone("status", "survivor").stdout)
    for verb in ("stop", "kill"):
        refused = (
            "chaperone: unable to send a request to run 'survivor': its chaperone died, and its "
            "program may be running; adopt it first\n"
        )
        assert streams(chaperone(verb, "surv")) == (os.EX_NOINPUT, "", refused)
    assert streams(chaperone("adopt", "--detach")) == (0, "survivor\n", "")
    (tmp_path / "fifo").write_text("end\n")
    assert streams(chaperone("wait", "survivor")) == (5, "", "")
    assert (directory / "stdout").read_bytes() == b"begin\nend\n"
    assert streams(chaperone("adopt")) == (0, "", "")


def test_rm_deletes_what_has_ended_and_refuses_the_rest(chaperone, held, spool):
    for run_id in ("a", "b", "c"):
        chaperone("run", "--id", run_id, "-", spec=ECHO)
    (spool / ".ended" / "a").unlink()
    held(SLEEP)
    assert streams(chaperone("rm", "a", "sleep", "b")) == (
        os.EX_CANTCREAT,
        "",
        "chaperone: unable to delete run 'sleep': it is running; stop it first\n",
    )
    assert chaperone("rm", "c", "d").returncode == os.EX_NOINPUT
    assert sorted(path.name for path in spool.glob("[a-z]*")) == ["c", "sleep"]
    assert streams(chaperone("rm", "c")) == (0, "", "")
    assert streams(chaperone("rm", "c")) == (
        os.EX_NOINPUT,
        "",
        "chaperone: unable to find run 'c': no run id in this spool begins with that\n",
    )


def test_gc_deletes_what_has_ended(chaperone, held, spool):
    chaperone("run", "-", spec=ECHO)
    held(SLEEP)
    assert streams(chaperone("gc", "--older", "1d")) == (
        0,
        "removed 0 runs (0 bytes); left: 1 ended, 1 live\n",
        "",
    )
    assert streams(chaperone("gc", "--older", "0s", "--keep-failed", "1w")) == (
        0,
        "removed 0 runs (0 bytes); left: 1 ended, 1 live\n",
        "",
    )
    spared = "1 run spared: no scheduler has collected them; --uncollected deletes them too"
    assert streams(chaperone("gc", "--older", "0s")) == (
        0,
        "removed 0 runs (0 bytes); left: 1 ended, 1 live\n",
        f"chaperone: {spared}\n",
    )
    assert streams(chaperone("gc", "--older", "0s", "--uncollected", "--dry-run")) == (
        0,
        "echo\nwould remove 1 runs; left: 0 ended, 1 live\n",
        "",
    )
    assert (spool / "echo").exists()
    result = chaperone("gc", "--max-bytes", "0B", "--uncollected")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"removed 1 runs \([\d.]+K bytes\); left: 0 ended, 1 live\n", result.stdout)
    assert not (spool / "echo").exists() and (spool / "sleep").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            [],
            (
                "unable to understand 'chaperone gc': want --older or --max-bytes, "
                "to choose what is deleted"
            ),
        ),
        (
            ["--older", "soon"],
            "unable to understand '--older': want an age such as 90s, 30m, 12h or 7d, got 'soon'",
        ),
        (
            ["--older", "7dd"],
            "unable to understand '--older': want an age such as 90s, 30m, 12h or 7d, got '7dd'",
        ),
        (
            ["--older=-1d"],
            "unable to understand '--older': want an age such as 90s, 30m, 12h or 7d, got '-1d'",
        ),
        (
            ["--older", "30"],
            "unable to understand '--older': want an age such as 90s, 30m, 12h or 7d, got '30'",
        ),
        (
            ["--max-bytes", "10"],
            "unable to understand '--max-bytes': want a size such as 10G or 500M, got '10'",
        ),
        (
            ["--max-bytes", "10X"],
            "unable to understand '--max-bytes': want a size such as 10G or 500M, got '10X'",
        ),
        (
            ["--max-bytes", "nan"],
            "unable to understand '--max-bytes': want a size such as 10G or 500M, got 'nan'",
        ),
    ],
)
def test_gc_refuses_what_it_does_not_understand(chaperone, words, sentence):
    assert streams(chaperone("gc", *words)) == (os.EX_USAGE, "", f"chaperone: {sentence}\n")


def test_doctor_tells_of_a_spool_that_can_not_be_used(chaperone, spool):
    result = chaperone("doctor")
    assert (result.returncode, result.stderr) in ((0, ""), (os.EX_CONFIG, ""))
    assert "ok  spool: it is ours, and no other user can write to it\n" in result.stdout
    spool.chmod(0o777)
    result = chaperone("doctor")
    assert (result.returncode, result.stderr) == (os.EX_CONFIG, "")
    assert result.stdout.startswith("BAD spool: ")


def test_follow_gives_a_batch_again_until_it_is_answered(chaperone, spool, tmp_path):
    chaperone("run", "-", spec=ECHO)
    command = [*CHAPERONE, "follow", "--cursor", tmp_path / "cursor"]

    def batch(answer):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            lines = []
            while not lines or lines[-1]["event"] != "batch":
                lines.append(json.loads(process.stdout.readline()))
            process.communicate(answer(lines[-1]["batch"]))
        assert process.returncode == 0
        return lines

    first = batch(lambda number: b"")
    assert [line.get("text") for line in first if line["event"] == "output"] == ["out\n", "err\n"]
    assert batch(lambda number: b"") == first
    chaperone("run", "--id", "next", "-", spec=ECHO)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for _ in first:
            process.stdout.readline()
        process.stdin.write(f"{first[-1]['batch']}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["run_id"] == "next"
        process.stdin.close()
        process.stdout.read()
    assert not (spool / ".ended" / "echo").is_symlink()


def test_launcher_starts_runs_that_ask_for_it(chaperone, spool, tmp_path):
    assert streams(chaperone("launcher", "--detach", "--idle=1")) == (0, "", "")
    assert streams(chaperone("run", "--warm", "-", spec=ECHO)) == (0, "echo\n", "")
    assert streams(chaperone("wait", "echo")) == (3, "", "")
    until(lambda: not (spool / ".launcher").exists())
