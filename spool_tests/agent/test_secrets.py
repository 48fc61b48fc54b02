"""
Secrets of an agent, of its clients and of their runs: in no command line, no environment but the
program's own, no file and no log, on either side, while a run is started, mirrored and ended.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys

from spool_tests.support.agents import served
from spool_tests.support.places import CHAPERONE
from spool_tests.support.waiting import until

# Gets the secrets from its input, because its own argv is looked at too; prints a line when it sees
# the first; ends with its input, and prints how often it looked and where it saw which secret, in a
# process of which name.
POLL = """
import json, os, sys
secrets, looks, seen = json.loads(sys.stdin.buffer.readline()), 0, set()
said = False
os.set_blocking(0, False)
while True:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for where in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{where}", "rb") as file:
                    data = file.read()
                with open(f"/proc/{pid}/comm") as file:
                    name = file.read().strip()
            except OSError:
                continue
            there = [word for word, text in secrets.items() if text.encode() in data]
            seen.update((word, where, name) for word in there)
    looks += 1
    if seen and not said:
        said = True
        print("something is seen", flush=True)
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
print(json.dumps([looks, sorted(seen)]))
"""


@contextlib.contextmanager
def polled(secrets, found):
    """
    Meanwhile every process is looked at; afterwards `found` has [secret, where, name].

    Yields: What waits until the first was seen.
    """
    poll = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", POLL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    poll.stdin.write(json.dumps(secrets) + "\n")
    poll.stdin.flush()
    try:
        yield poll.stdout.readline
    finally:
        looks, seen = json.loads(poll.communicate()[0])
    assert looks > 0
    found += seen


def test_secrets_are_in_no_process_and_no_file_of_either_side(tmp_path):
    near, found = tmp_path / "near", []
    with served(tmp_path) as agent, open(tmp_path / "mirror.log", "wb") as log:
        # Of its own: another test has the usual one in a command line.
        token = "s3cr3t" + os.urandom(20).hex()
        token_file = agent.private("own.token", f"{token}\n")
        with open(agent.tokens, "a") as tokens:
            tokens.write(f"own run {hashlib.sha256(token.encode()).hexdigest()}\n")
        secrets = {
            "token": token,
            "key": agent.key.read_text().splitlines()[1],
            "env": "s3cr3t" + os.urandom(8).hex(),
            "stdin": "s3cr3t" + os.urandom(8).hex(),
        }
        environ = {**os.environ, "CHAPERONE_CA": str(agent.ca)}
        environ["CHAPERONE_TOKEN_FILE"] = str(token_file)
        script = 'read line; echo "$line" | wc -c; until [ -e go ]; do sleep 0.02; done; test "$S"'
        program = {"argv": ["/bin/sh", "-c", script], "cwd": str(tmp_path)}
        program |= {"env": {"S": secrets["env"]}, "stdin": secrets["stdin"] + "\n"}
        spec = {"id": "r", "program": program, "keep_secrets": False}
        mirror = subprocess.Popen(
            [*CHAPERONE, "mirror", agent.spool_url, "--spool", near],
            env=environ,
            stderr=log,
        )
        try:
            with polled(secrets, found) as first_seen:
                subprocess.run(
                    [*CHAPERONE, "run", "--detach", "--spool", agent.spool_url, "-"],
                    input=json.dumps(spec),
                    env=environ,
                    text=True,
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                until(lambda: (near / "r" / "stdout").exists())
                words = [*CHAPERONE, "status", "r", "--spool", agent.spool_url]
                subprocess.run(words, env=environ, check=True, stdout=subprocess.DEVNULL)
                assert first_seen() == "something is seen\n"
                (tmp_path / "go").touch()
                until(lambda: (near / "r" / "status.json").exists(), 60)
        finally:
            mirror.terminate()
            mirror.wait()
        agent.stop()
        assert json.loads((near / "r" / "status.json").read_text())["return_code"] == 0
    programs = {"sh", "sleep", "wc", "test"}
    assert [each for each in found if each[:2] != ["env", "environ"]] == []
    assert {name for _, _, name in found} <= programs and found  # it was looked at often enough
    theirs = {agent.key, token_file}
    for path in pathlib.Path(tmp_path).rglob("*"):
        if path.is_file() and path not in theirs and not path.is_fifo():
            data = path.read_bytes()
            assert [word for word, text in secrets.items() if text.encode() in data] == [], path
