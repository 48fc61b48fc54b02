"""
What chaperone reads from others, fed with anything: specs, statuses, the far side's records,
cursors and run directories.

fuzz.py TARGET SECONDS [CORPUS]    coverage-guided, by atheris; prints how many inputs it took

A target takes bytes and raises where chaperone does what it must not: crash, lose count, or answer
in anything but one sentence.
"""

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
import warnings

if __name__ == "__main__":
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from chaperone.cli import tables, terminal
from chaperone.errors import ChaperoneError, SpecError
from chaperone.farside import records, remote
from chaperone.follow import batches
from chaperone.follow.follower import Follower
from chaperone.hold import begin, chaperone, direct
from chaperone.model import events, jsontext, transitions
from chaperone.model import spec as specs
from chaperone.model import status as statuses
from chaperone.model.hops import kinds
from chaperone.spool import format

ESCAPE = set(map(chr, (*range(32), *range(127, 160)))) - {"\n"}


def is_sentence(error):
    """One line, of a length that a person reads, that says what was not possible."""
    text = str(error)
    assert (
        text.startswith(("unable to ", "cursor"))
        and "\n" not in terminal.escaped(text)
        and len(text) < 4_000
    ), repr(text[:300])


def spec(data):
    """A spec is taken in its canonical form, which stays as it is, or refused in a sentence."""
    try:
        canonical = begin.canonical_spec("fuzz", data, "/")
    except SpecError as error:
        is_sentence(error)
        return
    assert specs.checked(jsontext.loads(jsontext.dumps(canonical)), "/") == canonical
    specs.without_secrets(canonical)


def status(data):
    """
    Whatever is in a status file, there is a status, and it can be shown without a character that
    moves a terminal's cursor.
    """
    try:
        value = jsontext.loads(data)
    except ValueError:
        value = None
    final = statuses.final_known(value, "r")
    for found in (statuses.last_known(value, "r"), *([final] if final else [])):
        assert found["run_id"] == "r" and found["state"] in statuses.STATES
        view = events.status_view(found)
        shown = tables.table([(found, "here")], 1e9, 80, False) + terminal.indented(found)
        assert not ESCAPE & set(shown), repr(shown)
        view.is_final()
        text = transitions.fitted(found, format.RESERVE + 2 * len(data))
        assert isinstance(jsontext.loads(text), dict)
    assert final is None or final["state"] in statuses.FINAL


class Connection:
    """In the place of the one to the far side."""

    pid = 1

    def send(self, line):
        assert "\n" not in line

    close = terminate = close_input = lambda self: None


class Run(direct.DirectRun):
    """A run without files, whose end is published once."""

    def __init__(self, null):
        super().__init__("r", "0" * 32)
        self.streams = {name: os.dup(null) for name in ("stdout", "stderr")}  # it closes them
        self.log_fd, self.log_path = null, os.devnull

    def publish(self, status, durable=False):
        assert self.final is None, "published twice"
        jsontext.dumps(status)
        assert status["state"] in statuses.FINAL
        super().publish(status, durable)


NONCE = "\x1en"
INHERITED = {"env": {}, "umask": 0o22}
NULL = os.open(os.devnull, os.O_WRONLY | os.O_APPEND)


def far_side(data):
    """
    Whatever comes from the far side: no byte of the program is lost or doubled however it is cut,
    and no message ends us.
    """
    how, data = data[:8] or b"\0", data[8:]
    whole, parser = records.Records(NONCE), records.Records(NONCE)
    clean, told = whole.feed(data)
    clean += whole.end()
    parts, heard, left = [], [], data
    for cut in how:
        part, said = parser.feed(left[:cut])
        parts.append(part)
        heard += said
        left = left[cut:]
    part, said = parser.feed(left)
    assert (b"".join(parts) + part + parser.end(), heard + said, parser.noise) == (
        clean,
        told,
        whole.noise,
    )
    records.farewell(clean, kinds.Ssh.farewell)
    life = "survive" if how[0] % 2 else "kill"
    asked = specs.checked(
        {"id": "r", "program": {"argv": ["x"]}, "remote": {"host": "h"}, "on_disconnect": life}, "/"
    )
    run = Run(NULL)
    asked = {**asked, "id": "r"}
    starting = transitions.starting(asked, 1, "here", None, 0)
    with chaperone.Chaperone(
        run,
        asked,
        starting,
        lambda holder: remote.RemoteProgram(asked, holder, INHERITED, "c", None),
    ) as holder:
        program = holder.program
        program._far._dialer._connection = Connection()
        program.connected()
        for words in told:
            if words:
                program.record(words)
        if how[0] % 4 > 1:
            program._far._dialer._connection = None
            program.closed(how[0] % 3, True, b"")
    assert run.final is None or "version" in run.final


def follower(data):
    """
    Whatever is in a cursor, or in the files of a run directory, a follower ends, and every event is
    one.

    Parts of the input, divided by NUL NUL: cursor, running.json, status.json, spec.json, stdout,
    each optional.
    """
    parts = (data.split(b"\0\0") + [b""] * 5)[:5]
    try:
        cursor = json.loads(parts[0]) if parts[0] else None
    except (ValueError, RecursionError):
        cursor = None
    spool = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        run = os.path.join(spool, "r")
        os.mkdir(run)
        for name in (format.RUNNING, format.ENDED):
            os.mkdir(os.path.join(spool, name))
        os.symlink("../r", os.path.join(spool, format.RUNNING, "r"))
        for name, content in zip(
            (format.LIVE_STATUS, format.FINAL_STATUS, format.SPEC, "stdout"), parts[1:], strict=True
        ):
            if content:
                with open(os.path.join(run, name), "wb") as file:
                    file.write(content)
        with open(os.path.join(run, format.LOCK), "w") as lock:
            if len(data) % 3:
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                with Follower(spool, cursor) as followed:
                    for _ in range(20):
                        event = followed.next(0)
                        if event is None:
                            break
                        if isinstance(event, events.Output):
                            said = (event.run_id, event.stream, event.offset, event.data)
                            line = batches.output_line(*said, event.time)
                        else:
                            line = batches.event_line(event)
                        assert isinstance(json.loads(line)["run_id"], str)
                    else:
                        raise AssertionError("20 events and no end")
                    Follower(spool, followed.cursor).close()
            except (ChaperoneError, SpecError) as error:
                is_sentence(error)
    finally:
        shutil.rmtree(spool)


TARGETS = {target.__name__: target for target in (spec, status, far_side, follower)}
_STATUS = jsontext.dumps(statuses.last_known(None, "r")).encode()
_FINAL = _STATUS.replace(b'"starting"', b'"terminated"')
SEEDS = {
    "spec": [
        b'{"program": {"argv": ["a"]}}',
        b'{"id": "r", "program": {"command": "x", "env": {"K": "v"}, "stdin": "t",'
        b' "rlimits": {"nofile": 10}, "umask": "022"}, "remote": {"host": "h", "user": "u",'
        b' "port": 22, "mode": "ssh-as", "options": {"ConnectTimeout": 10}},'
        b' "on_disconnect": "survive", "lease": 10, "leftovers": "leave",'
        b' "stop": {"signal": "SIGTERM", "grace_period": 1.5},'
        b' "timeouts": {"connect": 3, "run": 2, "idle": null}, "output": {"through": "pipe",'
        b' "max_bytes": 9, "on_full": "stop", "timeline": true}, "durable": true,'
        b' "keep_secrets": false, "labels": {"team": "etl"}, "callback":'
        b' {"url": "https://h:8443/p", "token": "t"}, "config": {"output_buffer": 1}}',
    ],
    "status": [
        _STATUS,
        _FINAL,
        b'{"state": "newer", "return_code": 0, "version": 9, "program": {"argv": ["\\u001b[2J"]},'
        b' "stop": {"time": "2026-01-01T00:00:00Z"}}',
    ],
    "far_side": [
        b"\1\2\3\4\5\6\7\1noise\x1en out\n\x1en hello 12 setsid= environ=proc\n\x1en start 77\n"
        b"data\x1en beat 1\n\x1en end R7 0m0.1s 0m0.2s 1m0.5s 0m0.25s\n"
        b"\x1en left 0\n\x1en eof 1 2\n\x1en bye\nConnection to h closed by remote host.\r\n",
        b"\0\2\3\4\5\6\7\1\x1en hello\n\x1en fail setup\n\x1en dead\n\x1en lost 60\n"
        b"\x1en end R265 ambiguous\n\x1en eof\n\x1en fail never\n",
    ],
    "follower": [
        b"\0\0".join(
            [
                b'{"runs": {"r": {"key": "k", "stdout": 2, "stderr": 0, "ended": true}}}',
                *(_STATUS, _FINAL, b'{"key": "k", "version": 1}', b"text"),
            ]
        ),
        b"\0\0".join(
            [b"", _STATUS, b"", b'{"key": "k", "on_disconnect": "survive", "lease": 60}', b"text"]
        ),
        b'{"runs": {"r": {}}}',
    ],
}


def main(name, seconds, corpus=None):
    """Fuzz one target for so long."""
    import atheris

    atheris.instrument_all()
    target, begin, taken = TARGETS[name], time.monotonic(), 0

    def take(data):
        nonlocal taken
        taken += 1
        if taken % 1_000 == 0 or time.monotonic() - begin > seconds:
            print(
                f"{name}: {taken} inputs in {time.monotonic() - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        target(data)

    with tempfile.TemporaryDirectory() as directory:
        corpus = corpus or directory
        for number, seed in enumerate(SEEDS[name]):
            with open(os.path.join(corpus, f"seed-{number}"), "wb") as file:
                file.write(seed)
        options = [
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-max_len=4096",
            f"-artifact_prefix={corpus}/",
        ]
        atheris.Setup([sys.argv[0], *options, corpus], take)
        atheris.Fuzz()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4])
