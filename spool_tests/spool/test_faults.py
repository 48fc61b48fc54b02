"""
Disks that are full, small, or go away under a run: the outcome is kept, the program is not harmed,
losses are counted.
"""

import json
import os
import re
import shutil
import subprocess

import pytest

from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.timelines import timed
from spool_tests.support.waiting import absent, need, until

PACKAGE = os.path.join(ROOT, "chaperone")
TOTAL = 10_000_000
FLOOD = f"yes 123456789 | head -c {TOTAL}; echo done >&2; exit 3"


@pytest.fixture
def small(tmp_path, spool):
    """
    Run a shell text where $SMALL is a tmpfs that only it sees; what it leaves in
    $SMALL/spool is copied to `kept`.

    In a mount namespace, and where we are not root in a user namespace, too: it needs no rights and
    leaves no mount behind.
    """
    need("unshare", "mount")
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        absent("a mount namespace (as root, or with unprivileged user namespaces)")

    def run(text, options="size=1m", **specs):
        for name, spec in specs.items():
            (tmp_path / f"{name}.json").write_text(json.dumps({"id": name, **spec}))
        script = f"""
            mount -t tmpfs -o mode=700,{options} none "$SMALL" || exit 99
            run() {{ "$@" run --spool "$SMALL/spool" "$name.json"; }}
            {text}
            code=$?
            cp -r "$SMALL/spool" "$KEPT"
            exit $code"""
        env = {**os.environ, "SMALL": str(small), "KEPT": str(kept)}
        return subprocess.run(
            [*unshare, "sh", "-c", script, "sh", *CHAPERONE],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    run.kept = kept
    yield run
    shutil.rmtree(kept, ignore_errors=True)


def status(small, run_id):
    return json.loads((small.kept / run_id / "status.json").read_text())


def test_a_full_disk_drops_and_counts_and_keeps_the_outcome(small):
    result = small('name=r; run "$@"', r={"program": {"command": FLOOD}})
    assert result.returncode == 0, result.stderr
    final = status(small, "r")
    assert (final["state"], final["return_code"], final["complete"]) == ("terminated", 3, True)
    kept = (small.kept / "r" / "stdout").read_bytes()
    assert (
        final["stdout"] == {"bytes": len(kept), "dropped": TOTAL - len(kept)}
        and 500_000 < len(kept) < 1_048_576
    )
    assert kept == (b"123456789\n" * (TOTAL // 10))[: len(kept)]
    assert final["stderr"] == {"bytes": 0, "dropped": 5} and final["rusage"]["utime"] is not None


@pytest.mark.parametrize("filler", [0, 1_000, 2_000, 3_000])
def test_full_disk_of_a_run_with_a_timeline_counts_what_has_no_time(small, filler):
    """Whichever of the files needs the last page of the disk: the page of another has room."""
    text = f'head -c {filler} /dev/zero >"$SMALL/filler"; name=r; run "$@"'
    program = {
        "argv": ["/bin/sh", "-c", "while echo 12345678901234567890; do :; done | head -c 1500000"]
    }
    spec = {"program": program, "output": {"timeline": True}}
    result = small(text, options="size=300k", r=spec)
    assert result.returncode == 0, result.stderr
    run, final = small.kept / "r", status(small, "r")
    assert final["stdout"]["bytes"] + final["stdout"]["dropped"] == 1_500_000
    assert final["stdout"]["dropped"] > 0 and final["complete"]
    text = (run / "log").read_text() if (run / "log").exists() else ""
    counted = re.findall(r"timeline: lines about ([0-9]+) bytes were dropped", text)
    assert timed(run, "stdout") + sum(map(int, counted)) == final["stdout"]["bytes"]


def test_a_full_disk_may_stop_the_program(small):
    result = small(
        'name=r; run "$@"', r={"program": {"argv": ["yes"]}, "output": {"on_full": "stop"}}
    )
    assert result.returncode == 0, result.stderr
    final = status(small, "r")
    assert (final["signal"], final["stop"]["reason"]) == ("SIGTERM", "output")


def test_through_files_the_program_sees_the_full_disk_itself(small):
    program = {"command": "head -c 5000000 /dev/zero; code=$?; exit $((code + 10))"}
    result = small('name=r; run "$@"', r={"program": program, "output": {"through": "file"}})
    assert result.returncode == 0, result.stderr
    final = status(small, "r")
    assert (final["return_code"], final["stdout"]["dropped"]) == (11, None)
    assert final["stdout"]["bytes"] == (small.kept / "r" / "stdout").stat().st_size


def test_no_room_for_the_outcome_refuses_the_start(small):
    text = 'head -c 2000000 /dev/zero > "$SMALL/filler" 2>&-; name=r; run "$@"'
    result = small(text, r={"program": {"command": "touch started"}})
    sentence = result.stderr.splitlines()[-1]
    assert (result.returncode, result.stdout) == (os.EX_CANTCREAT, "")
    assert sentence.startswith("chaperone: unable to ") and sentence.endswith(
        ": No space left on device"
    )
    assert not (small.kept.parent / "started").exists()
    assert not [
        name for name in os.listdir(small.kept) if not name.startswith(".")
    ] and not os.listdir(small.kept / ".running")


def test_a_disk_that_has_room_again_takes_the_last_words(small):
    program = {
        "command": (
            "yes 123456789 | head -c 3000000; touch full; until [ -e room ]; "
            "do sleep 0.01; done; echo last words"
        )
    }
    text = """name=r; run "$@" & until [ -e full ]; do sleep 0.01; done
        run=$SMALL/spool/r
        until grep -q dropped "$run/running.json" "$run/stdout" 2>/dev/null || sleep 0.3; do :; done
        rm "$SMALL/filler"; touch room; wait $!"""
    result = small('head -c 500000 /dev/zero > "$SMALL/filler"; ' + text, r={"program": program})
    assert result.returncode == 0, result.stderr
    final, kept = status(small, "r"), (small.kept / "r" / "stdout").read_bytes()
    assert kept.endswith(b"last words\n") and final["stdout"] == {
        "bytes": len(kept),
        "dropped": 3_000_000 + 11 - len(kept),
    }


def test_inodes_that_ran_out_eat_no_outcome(small):
    text = """name=r; run "$@" & until [ -e ready ]; do sleep 0.01; done
        n=0; while true > "$SMALL/filler.$n"; do n=$((n + 1)); done 2>&-; touch go; wait"""
    program = {"command": "touch ready; until [ -e go ]; do sleep 0.01; done; echo out; exit 4"}
    result = small(text, options="size=1m,nr_inodes=40", r={"program": program})
    assert result.returncode == 0, result.stderr
    assert (status(small, "r")["return_code"], (small.kept / "r" / "stdout").read_text()) == (
        4,
        "out\n",
    )


@pytest.mark.parametrize("way", ["unmounted", "removed", "moved"])
def test_a_spool_that_goes_away_does_not_take_the_program_down_and_is_told(small, way):
    """
    What was unmounted or moved is written to its end, where it is now; what was removed has no end.
    """
    do = {
        "unmounted": 'umount -l "$SMALL"; mkdir "$SMALL/spool"',
        "removed": 'rm -r "$SMALL/spool/r"',
        "moved": 'mv "$SMALL/spool/r" "$SMALL/spool/s"',
    }
    text = f"""name=r; run "$@" 2>said & chaperone=$!; until [ -e ready ]; do sleep 0.01; done
        until grep -q '"state": "running"' "$SMALL/spool/r/running.json"; do sleep 0.01; done
        {do[way]}; touch go; wait $chaperone"""
    program = {
        "command": "touch ready; until [ -e go ]; do sleep 0.01; done; echo out; touch ended"
    }
    result = small(text, r={"program": program})
    place = small.kept.parent
    assert result.returncode == (os.EX_IOERR if way == "removed" else 0), result.stderr
    assert (place / "ended").exists()
    told = [
        f"the run is not at '{place}/small/spool/r' any more: it was removed, moved or unmounted"
    ]
    said = [line.partition("Z ")[2] for line in (place / "said").read_text().splitlines()]
    assert said == told + ["unable to publish the status of run 'r': No such file or directory"] * (
        way == "removed"
    )
    if way == "moved":
        assert [
            line.partition("Z ")[2] for line in (small.kept / "s" / "log").read_text().splitlines()
        ] == told
        assert json.loads((small.kept / "s" / "status.json").read_text())["return_code"] == 0


def test_a_limit_on_file_sizes_does_not_kill_the_chaperone(spool):
    spec = {
        "id": "r",
        "program": {"command": "ulimit -f unlimited; head -c 3000000 /dev/zero; exit 5"},
    }
    result = subprocess.run(
        [
            *("sh", "-c", 'ulimit -S -f 1000; exec "$@"', "sh"),
            *(*CHAPERONE, "run", "--spool", str(spool), "-"),
        ],
        input=json.dumps(spec), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    final = json.loads((spool / "r" / "status.json").read_text())
    assert (
        final["return_code"] == 5
        and final["stdout"]["bytes"] + final["stdout"]["dropped"] == 3_000_000
        and final["stdout"]["dropped"] > 0
    )


def test_a_chaperone_keeps_no_code_that_others_can_not_read(spool, tmp_path):
    """
    What it imports after it took its own umask, in a package that was never compiled: the next
    user would compile it at each start.
    """
    shutil.copytree(PACKAGE, tmp_path / "chaperone", ignore=shutil.ignore_patterns("__pycache__"))
    python, *flags, _ = CHAPERONE
    spec = {
        "id": "r",
        "program": {"argv": ["true"]},
        "remote": {"host": "127.0.0.1", "port": 1},
        "timeouts": {"connect": 0.1},
    }
    run = [
        python,
        *flags,
        str(tmp_path / "chaperone" / "__main__.py"),
        "run",
        "--spool",
        str(spool),
        "-",
    ]
    subprocess.run(run, input=json.dumps(spec), text=True, stdout=subprocess.DEVNULL, check=True)
    kept = list((tmp_path / "chaperone" / "__pycache__").iterdir())
    assert kept and all(path.stat().st_mode & 0o444 == 0o444 for path in kept)


@pytest.mark.parametrize("asked", ["ends", "stop", "kill"])
def test_a_chaperone_outlives_its_own_package(spool, tmp_path, asked):
    shutil.copytree(PACKAGE, tmp_path / "site" / "chaperone")
    python, *flags, _ = CHAPERONE
    text = (
        "trap '' TERM; (setsid sleep 60 &); echo ready; until [ -e go ]; do sleep 0.01; "
        "done; yes | head -c 300000; exit 6"
    )
    spec = {
        "id": "r",
        "program": {"command": text, "cwd": str(tmp_path)},
        "output": {"max_bytes": 250_000},
        "timeouts": {"run": 50, "idle": 50},
    }
    run = [
        python,
        *flags,
        str(tmp_path / "site" / "chaperone" / "__main__.py"),
        "run",
        "--spool",
        str(spool),
        "-",
    ]
    chaperone = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    chaperone.stdin.write(json.dumps(spec).encode())
    chaperone.stdin.close()
    until(
        lambda: (
            (spool / "r" / "stdout").exists()
            and (spool / "r" / "stdout").read_bytes() == b"ready\n"
        )
    )
    shutil.rmtree(tmp_path / "site")
    if asked == "ends":
        (tmp_path / "go").touch()
    else:
        with open(spool / "r" / "control", "w") as control:
            control.write(f"nonsense\n{asked}{' 0.1' * (asked == 'stop')} by=test\n")
    assert chaperone.wait(60) == 0
    final = json.loads((spool / "r" / "status.json").read_text())
    if asked == "ends":
        assert (final["return_code"], final["leftovers"], final["stdout"]) == (
            6,
            1,
            {"bytes": 250_000, "dropped": 50_006},
        )
    else:
        assert (final["signal"], final["stop"]["by"]) == ("SIGKILL", "test")
