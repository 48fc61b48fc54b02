"""
The recipes of the docs that are no transcripts: what can be run of them is run.

Knows: code blocks of a page.  Must not know: how chaperone does it.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from spool_tests.support.commands import shell, streams
from spool_tests.support.pages import blocks
from spool_tests.support.places import CHAPERONE, ROOT
from spool_tests.support.waiting import need, until

pytestmark = pytest.mark.once
RECIPES = pathlib.Path(ROOT, "docs/recipes.rst")
UNITS = pathlib.Path(ROOT, "docs/systemd-and-cron.rst")
ID = "0" * 32


def block(page, words, language="sh"):
    """The one code block with these words."""
    (found,) = [block for block in blocks(page, language) if words in block]
    return found


@pytest.fixture
def place(on_path, spool, monkeypatch):
    """A directory with `chaperone` on PATH, and the test's spool."""
    monkeypatch.setenv("CHAPERONE_SPOOL", str(spool))
    need("jq")
    return on_path


def sh(text, place, **options):
    return subprocess.run(
        ["sh", "-c", text], cwd=place, capture_output=True, text=True, timeout=300, **options
    )


def in_spool(text, spool):
    """With the spool and the program of the test, for those of the docs."""
    return text.replace("/var/lib/etl/spool", str(spool)).replace("/usr/local/bin/", "")


# -- many runs


def at_most_eight_at_once(spool, name, count):
    ended = [json.loads(path.read_text()) for path in spool.glob(f"{name}-*/status.json")]
    assert len(ended) == count
    changes = [(status["create_time"], 1) for status in ended]
    changes += [(status["end_time"], -1) for status in ended]
    at_once = [sum(step for _, step in sorted(changes)[:end]) for end in range(len(changes))]
    return max(at_once) <= 8


COUNTS = [16, pytest.param(200, marks=pytest.mark.long)]


@pytest.mark.parametrize("count", COUNTS)
def test_many_runs_some_at_a_time(place, spool, count):
    result = sh(block(RECIPES, "xargs").replace("seq 200", f"seq {count}"), place)
    assert result.returncode == 0, result.stderr
    lines = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    failed = [f"item-{number}" for number in range(1, count + 1) if number % 50 == 7]
    assert sorted(lines) == sorted(failed)
    assert at_most_eight_at_once(spool, "item", count)


@pytest.mark.parametrize("count", COUNTS)
def test_many_runs_some_at_a_time_in_python(place, spool, count):
    text = block(RECIPES, "Semaphore", "python").replace("range(200)", f"range({count})")
    result = subprocess.run(
        [sys.executable, "-c", text], cwd=place, capture_output=True, text=True, timeout=300
    )
    failed = [f"job-{number}" for number in range(count) if number % 50 == 7]
    assert streams(result) == (0, " ".join(failed) + "\n", "")
    assert at_most_eight_at_once(spool, "job", count)


# -- a message for each failure


def test_message_is_sent_for_each_failure_and_again_for_none(place, chaperone, spool):
    mail = place / "bin" / "mail"
    mail.write_text('#!/bin/sh\n[ "$*" = "-s runs failed ops@example.com" ] && cat >>mails\n')
    mail.chmod(0o755)
    script = place / "notify.sh"
    script.write_text(block(RECIPES, "mail -s"))

    def mails():
        return (place / "mails").read_text() if (place / "mails").exists() else ""

    def answered():
        """Every batch that was printed is answered: all runs are collected."""
        return not os.listdir(spool / ".running") and not os.listdir(spool / ".ended")

    chaperone("run", "-", spec=shell("good", "exit 0"))
    chaperone("run", "-", spec=shell("bad", "exit 3"))
    sent = "bad: 3\n"
    for run_id, text, reason in (
        ("killed", "kill -KILL $$", "SIGKILL"),
        ("typo", None, "unable to run '/nowhere': No such file or directory"),
    ):
        script_of_it = subprocess.Popen(["sh", script], cwd=place, start_new_session=True)
        try:
            until(lambda sent=sent: mails() == sent and answered())
            program = {"argv": ["/nowhere"]} if text is None else {"command": text}
            chaperone("run", "-", spec={"id": run_id, "program": program})
            sent += f"{run_id}: {reason}\n"
            until(lambda sent=sent: mails() == sent and answered())
        finally:
            os.killpg(script_of_it.pid, signal.SIGKILL)
            script_of_it.wait()


# -- metrics


def test_metrics_are_in_the_text_format_of_prometheus(place, chaperone):
    script = block(RECIPES, "chaperone.prom")
    assert streams(sh(script, place)) == (0, "", "")
    assert "chaperone_failed 0\n" in (place / "chaperone.prom").read_text()
    chaperone("run", "-", spec=shell("good", "echo one"))
    chaperone("run", "-", spec=shell("bad", "echo two >&2; exit 3"))
    chaperone("run", "-", spec={"id": "typo", "program": {"argv": ["/nowhere"]}})
    assert streams(sh(script, place)) == (0, "", "")
    text = (place / "chaperone.prom").read_text()
    line = r'# (HELP [a-z_]+ .*|TYPE [a-z_]+ gauge)|[a-z_]+(\{state="[a-z]+"\})? \d+'
    assert [each for each in text.splitlines() if not re.fullmatch(line, each)] == []
    assert [each for each in text.splitlines() if each[0] != "#"] == [
        'chaperone_runs{state="error"} 1',
        'chaperone_runs{state="terminated"} 2',
        "chaperone_failed 2",
        "chaperone_output_bytes 8",
    ]
    assert [name for name in os.listdir(place) if "prom" in name] == ["chaperone.prom"]


# -- vector: its command, and what it would decode


def test_command_of_vectors_source_prints_lines_of_json(place, chaperone, spool):
    chaperone("run", "-", spec=shell("r", "echo one"))
    text = block(RECIPES, "[sources.runs]", "toml")
    words = json.loads(re.search(r"^command = (.*)$", text, re.M)[1])
    largest = int(re.search(r"^maximum_buffer_size_bytes = ([\d_]+)", text, re.M)[1])
    with subprocess.Popen(
        [in_spool(word, spool) for word in words], cwd=place, stdout=subprocess.PIPE
    ) as follow:
        events = [json.loads(follow.stdout.readline()) for _ in range(3)]
        follow.kill()
    assert [event["event"] for event in events] == ["started", "output", "ended"]
    assert {"run_id", "stream", "offset", "text"} <= set(events[1])
    # An event has at most 1 MiB, and JSON writes one byte as six at most.
    assert largest > 6 << 20


# -- the dashboard


def test_dashboard_shows_the_runs(place, chaperone, spool):
    example = pathlib.Path(ROOT, "docs/examples/dashboard.py")
    code = re.sub(r'^(""".*|import .*|from .*|\s*)\n', "", example.read_text(), flags=re.M)
    assert len(code.splitlines()) <= 20
    chaperone("run", "-", spec=shell("r", "echo '<b>&' ; exit 3"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, example, spool, str(port)], cwd=place, stderr=subprocess.DEVNULL
    )

    def page():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=300) as answer:
                return answer.read().decode()
        except OSError:  # not there yet
            return None

    try:
        text = until(page)
    finally:
        server.kill()
        server.wait()
    assert "<td>r<td>terminated<td>3<td>None<td>" in text
    assert "<pre>&lt;b&gt;&amp;\n</pre>" in text


# -- units and crontabs


def test_units_are_what_systemd_takes(place):
    need("systemd-analyze")
    names = []
    for text in blocks(UNITS, "ini"):
        path = re.match(r"# /etc/systemd/system/(\S+)\n", text)
        names.append(path[1])
        # It looks for the programs.
        text = re.sub(r"=(-?)/(opt|usr/local)/\S*bin/\S+", rf"=\1{place}/bin/chaperone", text)
        (place / path[1]).write_text(text)
    assert len(names) == 6
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(f"./{name}" for name in names)],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert streams(result) == (0, "", "")


@pytest.mark.parametrize("code", [0, 3])
def test_oneshot_service_exits_as_its_program(place, spool, code):
    """Its ExecStart, as systemd expands it."""
    text = block(UNITS, "nightly.service", "ini")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    (place / "nightly.json").write_text(json.dumps({"program": {"command": f"exit {code}"}}))
    command = command.replace("%N", "nightly").replace("/etc/etl/", "")
    result = sh(in_spool(command, spool), place, env={**os.environ, "INVOCATION_ID": ID})
    assert streams(result) == (code, f"nightly-{ID}\n", "")


def test_command_of_a_scope_is_a_detached_run(place, spool):
    """
    No systemd answers here, so the words of systemd-run are only looked at; what it would run is.
    """
    (words,) = [
        line.split() for line in block(UNITS, "--scope").splitlines() if "--property" in line
    ]
    own, command = words[: words.index("chaperone")], words[words.index("chaperone") :]
    assert own == "systemd-run --user --scope --collect --quiet --property=MemoryMax=2G".split()
    (place / "spec.json").write_text(json.dumps({"id": "r", "program": {"argv": ["true"]}}))
    assert streams(sh(" ".join(command), place)) == (0, "r\n", "")
    assert subprocess.run([*CHAPERONE, "wait", "r"]).returncode == 0
    if subprocess.run(["sh", "-c", "command -v systemd-run"], capture_output=True).returncode == 0:
        listed = subprocess.run(["systemd-run", "--help"], capture_output=True, text=True).stdout
        assert [word for word in own[1:] if f"{word.partition('=')[0]}" not in listed] == []


def test_lines_for_cron_start_once_a_day(place, spool):
    lines = re.findall(r"^[\d*]+ [\d*]+ \* \* \*  (.*run .*)$", block(UNITS, "nightly-"), re.M)
    assert len(lines) == 2
    for name in ("nightly", "hourly"):
        (place / f"{name}.json").write_text(json.dumps({"program": {"argv": ["true"]}}))
    for line in lines:
        # cron takes the first % for a newline, and \% for %.
        command = line.replace("\\%", "%").replace("/etc/etl/", "")
        assert "%" not in line.replace("\\%", "")
        first, second = sh(command, place), sh(command, place)
        assert streams(first) == (0, "", "")
        refused = r"chaperone: unable to create run '(nightly|hourly)-[\d-]+': it exists\n"
        assert second.returncode == os.EX_CANTCREAT
        # At midnight, or when the hour changes, it is another run.
        assert second.stdout == "" and re.fullmatch(refused, second.stderr)
    assert len(list(spool.glob("*/status.json"))) == 2
