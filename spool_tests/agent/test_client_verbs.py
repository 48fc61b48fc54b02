"""
The verbs with a URL in place of a directory: what they print and how they exit.
"""

import json
import os
import re
import signal
import subprocess
import uuid
import warnings

import pytest

from chaperone.agent.client import following, question
from chaperone.cli.main import main
from spool_tests.support.agents import end_all, served
from spool_tests.support.places import CHAPERONE
from spool_tests.support.runs import sh
from spool_tests.support.timelines import steps
from spool_tests.support.waiting import until
from spool_tests.support.writer import Writer

pytestmark = pytest.mark.once

WORDS = [["run", "--", "true"], ["ls"], ["follow"], ["signal", "r", "USR1"]]
WORDS += [[name, "r"] for name in ("status", "tail", "read", "wait", "stop", "kill", "rm")]


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    with served(tmp_path_factory.mktemp("agent")) as agent:
        yield agent


class Verbs:
    """
    Runs verbs at an agent's spool, which is the directory `path`: in this process, because what
    the client imports takes a process of its own most of its time.
    """

    def __init__(self, agent, path, capfd):
        self.path, self.url, self._capfd = path, f"{agent.url}/{path.name}", capfd

    def begin(self, *words, **keywords):
        """The same in a process of its own."""
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*CHAPERONE, words[0], "--spool", self.url, *words[1:]]
        return subprocess.Popen(command, text=True, **{**how, **keywords})

    def __call__(self, *words):
        """What the verb prints, what it prints on stderr, its exit code."""
        return self._said(words[0], "--spool", self.url, *words[1:])

    def near(self, *words):
        """The same of the directory."""
        return self._said(words[0], "--spool", str(self.path), *words[1:])

    def _said(self, *words):
        self._capfd.readouterr()
        interrupt, show = signal.getsignal(signal.SIGINT), warnings.showwarning
        try:
            code = main([*words])
        finally:
            signal.signal(signal.SIGINT, interrupt)
            warnings.showwarning = show
        said = self._capfd.readouterr()
        return said.out, said.err, code


@pytest.fixture
def verb(agent, capfd, monkeypatch):
    monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["run"]))
    monkeypatch.setenv("CHAPERONE_CA", str(agent.ca))
    path = agent.directory / f"s{uuid.uuid4().hex}"
    path.mkdir(0o700)
    yield Verbs(agent, path, capfd)
    end_all(path)


@pytest.fixture
def spec(tmp_path):
    """Write a spec: the name of its file."""

    def write(text, **more):
        path = tmp_path / f"{uuid.uuid4().hex}.json"
        path.write_text(json.dumps({"program": sh(text), **more}))
        return str(path)

    return write


def test_run_is_started_waited_for_and_looked_at(verb, spec):
    asked = spec("echo out; echo err >&2; exit 3")
    said = verb("run", "--id", "r", "--exit-code", asked)
    assert said == ("r\n", "", 3)
    for words in (
        ("status", "r"),
        ("tail", "r"),
        ("tail", "r", "-f", "-n", "all"),
        ("tail", "r", "stderr"),
        ("tail", "r", "log"),
        ("read", "r"),
        ("read", "r", "--wait", "5s", "--offset", "1", "--bytes", "2"),
        ("wait", "r"),
        ("ls", "--json"),
        ("ls", "--failed", "--json", "r"),
        ("ls", "--state", "running"),
        ("ls", "--all", "--json"),
        ("stop", "r"),
        ("signal", "r", "USR1"),
        ("status", "nope"),
        ("status", "../r"),
    ):
        assert verb(*words) == verb.near(*words), words
    assert verb("rm", "r") == ("", "", 0)
    assert verb("status", "r")[2] == 66 and list(verb.path.glob("r*")) == []


def test_run_that_is_detached_is_followed_and_stopped(verb):
    out, err, code = verb("run", "--detach", "--", "sh", "-c", "echo up; exec sleep 600")
    assert (err, code) == ("", 0)
    run_id = out.strip()
    following = verb.begin("tail", "-f", run_id)
    assert following.stdout.readline() == "up\n"
    piece = json.loads(verb("read", run_id, "--wait", "30s")[0])
    assert (piece["text"], piece["ended"]) == ("up\n", False)
    waiting = verb.begin("wait", run_id, "--timeout", "0s")
    assert waiting.communicate(timeout=60) == ("", "") and waiting.returncode == 124
    assert verb("stop", run_id[:12], "--no-wait", "--by", "ops") == ("", "", 0)
    assert verb("wait", run_id)[2] == 143
    assert following.communicate(timeout=60) == ("", "")
    status = json.loads(verb("status", run_id)[0])
    assert status["stop"]["by"] == "ops"


def test_run_that_can_not_be_started_says_why(verb, spec, tmp_path):
    out, err, code = verb("run", "--", "/no/such/program")
    message = "unable to run '/no/such/program': No such file or directory"
    assert (err, code) == (f"chaperone: {message}\n", 0) and re.fullmatch(r"\S+\n", out)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"program": {"argv": "ls"}}')
    assert verb("run", str(wrong)) == (
        "",
        "chaperone: unable to start a run: program.argv: want a non-empty list of strings,"
        " got 'ls'\n",
        65,
    )
    wrong.write_text("{")
    out, err, code = verb("run", str(wrong))
    assert (out, code) == ("", 65)
    assert err.startswith(f"chaperone: unable to read spec {str(wrong)!r}: ")
    assert verb("run", "--id", "x", spec("exit 0")) == ("x\n", "", 0)
    again = verb("run", "--id", "x", spec("exit 0"))
    assert again == ("", "chaperone: unable to create run 'x': it exists\n", 73)


def test_several_runs_are_started_and_ended(verb, spec):
    names = [spec("exec sleep 600", id=run_id) for run_id in ("a", "b")]
    assert verb("run", "--warm", *names) == ("a\nb\n", "", 0)
    assert verb("run", "--id", "c", *names) == (
        "",
        "chaperone: unable to start 2 runs with id 'c': each run needs an id of its own\n",
        65,
    )
    assert verb("kill", "a", "b", "nope")[2] == 66
    assert verb("kill", "a", "b") == ("", "", 0)
    assert [len(verb("ls", *words)[0].splitlines()) for words in ([], ["a"])] == [3, 2]


def test_prefix_means_one_run(verb):
    with Writer(verb.path, "slow-1"), Writer(verb.path, "slow-2") as two:
        assert verb("status", "slow") == (
            "",
            "chaperone: unable to find run 'slow': it is ambiguous; it matches: slow-1, slow-2\n",
            66,
        )
        assert verb("status", "zz")[1:] == verb.near("status", "zz")[1:]
        assert json.loads(verb("status", "slow-2")[0])["run_id"] == "slow-2"
        two.end()
    assert verb("ls", "slow-2", "--json") == verb.near("ls", "slow-2", "--json")


def test_follow_prints_batches_and_collects_what_was_acknowledged(verb, tmp_path):
    with Writer(verb.path, key=uuid.uuid4().hex) as writer:
        writer.write(b"abc").end(3)
    cursor = tmp_path / "cursor"
    process = verb.begin("follow", "--cursor", str(cursor), stdin=subprocess.PIPE)
    events, kinds = process.stdout, []
    while "ended" not in kinds:
        event = json.loads(events.readline())
        kinds.append(event["event"])
        if event["event"] == "batch":
            process.stdin.write(f"{event['batch']}\n")
            process.stdin.flush()
    batch = json.loads(events.readline())["batch"]
    process.stdin.write(f"{batch}\n")
    process.stdin.flush()
    until(lambda: os.listdir(verb.path / ".ended") == [])
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert [kind for kind in kinds if kind != "batch"] == ["started", "output", "ended"]


@pytest.mark.parametrize("words", [["stop", "r"], ["kill", "r"], ["signal", "r", "1"], ["rm", "r"]])
def test_token_that_only_looks_is_refused(verb, agent, monkeypatch, words):
    monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["look"]))
    with Writer(verb.path) as writer:
        said = verb(*words)
        writer.end()
    sentence = "unable to answer a request: token 'looker' has only the right 'look'"
    assert said == ("", f"chaperone: {sentence}\n", 69)


def test_times_are_printed_as_of_a_directory(verb, spec):
    verb("run", "--id", "r", spec(steps(verb.path / "r"), output={"timeline": True}))
    verb("run", "--id", "quiet", spec("true", output={"timeline": True}))
    for words in (
        ("r",),
        ("r", "-n", "all"),
        ("r", "-n", "1"),
        ("-f", "r"),
        ("r", "stderr"),
        ("r", "quiet"),
    ):
        said = verb("tail", "--timestamps", *words)
        assert said == verb.near("tail", "--timestamps", *words) and said[2] == 0, words
    out, err, _ = verb("tail", "--timestamps", "r")
    assert (out.count("Z out"), err.count("Z err")) == (3, 3)


def test_times_of_many_lines_take_few_questions(verb, agent):
    with Writer(verb.path) as writer:
        writer.write(b"".join(b"%04d\n" % number for number in range(4_000))).end()
    lines = [b"%d 1 %d 5\n" % (1_764_130_000_000 + n, 5 * n) for n in range(4_000)]
    (verb.path / "r" / "timeline").write_bytes(b"".join(lines))
    before = agent.log.read_text().count("\n")
    said = verb("tail", "--timestamps", "-n", "all", "r")
    assert said[0].count("Z ") == 4_000 and said == verb.near(
        "tail", "--timestamps", "-n", "all", "r"
    )
    assert agent.log.read_text().count("\n") - before < 20


def test_run_without_a_timeline_is_refused(verb):
    with Writer(verb.path) as writer:
        writer.end()
    for word, why in (
        ("r", "unable to print the times of run 'r': it has no timeline;"
         " its spec would need output.timeline"),
        ("nope", "unable to find run 'nope': no run id in this spool begins with that"),
    ):  # fmt: skip
        said = verb("tail", "--timestamps", word)
        assert said == verb.near("tail", "--timestamps", word)
        assert said == ("", f"chaperone: {why}\n", 66)


def test_list_says_how_many_runs_are_collected(verb):
    for run_id in ("a1", "a2", "b1", "live"):
        with Writer(verb.path, run_id) as writer:
            writer.end()
    for run_id in ("a1", "a2", "b1"):
        (verb.path / ".ended" / run_id).unlink()
    for words in ([], ["a"], ["a1", "b"], ["live"], ["--all"], ["--state", "terminated"]):
        said = verb("ls", *words)
        assert re.sub(r" [0-9.]+s", "", said[0]) == re.sub(
            r" [0-9.]+s", "", verb.near("ls", *words)[0]
        )
        assert said[1:] == ("", 0)
    assert verb("ls")[0].splitlines()[-1] == "3 collected: --all"
    assert verb("ls", "a")[0].splitlines()[-1] == "2 collected: --all"


@pytest.mark.parametrize(
    "words", [["gc", "--older", "1d"], ["reap"], ["adopt"], ["launcher"], ["doctor"]]
)
def test_verb_of_a_directory_refuses_a_url(verb, words):
    assert verb(*words) == (
        "",
        f"chaperone: unable to open spool {verb.url!r}: this verb works on a directory of this"
        " host\n",
        64,
    )


def test_spool_of_the_environment_may_be_a_url(verb, monkeypatch):
    monkeypatch.setenv("CHAPERONE_SPOOL", verb.url)
    done = subprocess.run([*CHAPERONE, "ls"], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == verb.near("ls")


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[0])
def test_agent_that_is_not_there_is_one_sentence(verb, words, monkeypatch):
    for module in (question, following):
        monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    verb.url = "https://127.0.0.1:1/etl"
    why = "unable to reach the agent of 'https://127.0.0.1:1/etl': Connection refused"
    assert verb(*words) == ("", f"chaperone: {why}\n", 69)
