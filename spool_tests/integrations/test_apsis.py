"""
Programs of Apsis that chaperone holds. Here Apsis is a stand-in; `spool_tests/integrations/apsis`
runs this module with the real one, and a real server.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from spool_tests.support import agents, apsis
from spool_tests.support.places import ROOT
from spool_tests.support.processes import instances
from spool_tests.support.proxy import LosingProxy
from spool_tests.support.waiting import until

pytestmark = pytest.mark.once

apsis.have()

from apsis.exc import SchemaError  # noqa: E402
from apsis.program import base  # noqa: E402

from chaperone import aio, api  # noqa: E402
from chaperone.agent.client import calls, connection, question  # noqa: E402
from chaperone.errors import NoRunError, SpecError, SpoolError  # noqa: E402
from chaperone.integrations import apsis_running, apsis_stream  # noqa: E402
from chaperone.integrations.apsis import (  # noqa: E402
    BoundChaperoneProgram,
    ChaperoneProgram,
    ChaperoneShellProgram,
)

ENDS = (base.ProgramSuccess, base.ProgramFailure, base.ProgramError)


def bound(text, spool, **fields):
    """A shell program of a run, as Apsis makes it of a job and reads it from its database."""
    job = {"command": text, "spool": str(spool), **fields}
    jso = ChaperoneShellProgram.from_jso(job).bind({"job_id": "job"}).to_jso()
    jso = json.loads(json.dumps(jso))
    assert jso.pop("type") == "chaperone.integrations.apsis.BoundChaperoneProgram"
    return BoundChaperoneProgram.from_jso(jso)


def driven(program, cfg=None, then=None, updates=None):
    """
    Have a running program run to its end, as Apsis does; call `then` with it and each update.
    """

    async def main():
        running = program.run("r17", cfg or {})
        return await exhausted(running, [] if updates is None else updates, then)

    return asyncio.run(main())


async def exhausted(running, updates, then=None):
    async for update in running.updates:
        updates.append(update)
        if then is not None:
            await then(running, update)
    assert sum(isinstance(update, ENDS) for update in updates) == 1
    return updates[-1]


def output(update):
    return update.outputs["output"].data if update.outputs else b""


# -- jobs


def test_job_is_read_and_written_as_the_same_json():
    for cls, program in (
        (ChaperoneProgram, {"argv": ["echo", "a b"]}),
        (ChaperoneShellProgram, {"command": "echo"}),
    ):
        jso = {
            **program,
            "spool": "https://db3:8470/etl",
            "remote": {"hops": [{"ssh": {"host": "{{ host }}"}}, {"sudo": {"user": "etl"}}]},
            "spec": {"output": {"max_bytes": 1000}},
            "stop": {"signal": "SIGINT", "grace_period": "5"},
            "timeout": {"duration": "60", "signal": "SIGTERM"},
        }
        made = cls.from_jso(dict(jso))
        assert made.to_jso() == {"type": f"chaperone.integrations.apsis.{cls.__name__}", **jso}
        assert (
            cls.from_jso({key: value for key, value in made.to_jso().items() if key != "type"})
            == made
        )
    assert (str(ChaperoneProgram(["echo", "a b"])), str(made)) == ("echo 'a b'", "echo")


def test_each_string_of_a_job_is_a_template():
    job = ChaperoneProgram.from_jso(
        {
            "argv": ["load", "{{ date }}"],
            "spool": "/spools/{{ team }}",
            "remote": {"hops": [{"ssh": {"host": "{{ host }}", "options": {"Port": "22"}}}]},
            "spec": {"program": {"env": {"DAY": "{{ date }}"}}, "labels": {"team": "{{ team }}"}},
            "stop": {"signal": "{{ signal }}", "grace_period": "{{ grace }}"},
            "timeout": {"duration": "{{ seconds }}"},
        }
    )
    args = {
        "date": "today",
        "team": "etl",
        "host": "db3",
        "signal": "INT",
        "grace": 5,
        "seconds": 9,
    }
    made = job.bind(args)
    assert made.spool == "/spools/etl"
    assert made.run_spec("r1") == {
        "id": None,
        "program": {
            "argv": ["load", "today"],
            "env": {"APSIS_RUN_ID": "r1", "DAY": "today"},
            "merge_stderr": True,
        },
        "remote": {"hops": [{"ssh": {"host": "db3", "options": {"Port": "22"}}}]},
        "stop": {"signal": "SIGINT", "grace_period": 5},
        "labels": {"apsis": "r1", "team": "etl"},
    }
    assert str(made) == "load today"


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ({}, "missing key: command"),
        ({"command": "x", "user": "me"}, "unexpected keys: user"),
        (
            {"command": "x", "spec": {"durabel": True}},
            "durabel: unknown field; want one of ",
        ),
        (
            {"command": "x", "spec": {"program": {"argv": ["y"]}}},
            "spec.program.argv: already set by the scheduler or by another field of the job",
        ),
        (
            {"command": "x", "spec": {"id": "y"}},
            "spec.id: already set by the scheduler or by another field of the job",
        ),
    ],
)
def test_wrong_job_is_refused_when_it_is_loaded(job, sentence):
    with pytest.raises(SchemaError) as raised:
        ChaperoneShellProgram.from_jso(job)
    assert str(raised.value).startswith(sentence)


def test_template_may_make_a_wrong_spec_and_is_refused_when_it_is_bound():
    job = ChaperoneProgram.from_jso({"argv": ["x"], "remote": {"host": "{{ host }}"}})
    with pytest.raises(SpecError) as raised:
        job.bind({"host": "-oProxyCommand=x"})
    assert str(raised.value).startswith("remote")


def test_grace_without_an_end_and_a_timeout_of_nothing_have_a_spec():
    job = {"argv": ["x"], "stop": {"grace_period": None}, "timeout": {"duration": 0}}
    made = ChaperoneProgram.from_jso(job).bind({})
    spec = made.run_spec("r1")
    assert (spec["stop"]["grace_period"], spec["timeouts"]["run"]) == (1e9, 0.001)


# -- runs


def test_run_is_started_and_its_output_and_outcome_are_delivered(spool):
    updates = []
    end = driven(bound("echo out; echo err >&2; echo $APSIS_RUN_ID", spool), updates=updates)
    assert isinstance(end, base.ProgramSuccess)
    assert output(end) == b"out\nerr\nr17\n"
    assert isinstance(updates[0], base.ProgramUpdate), "the run's id, before it is started"
    running = next(update for update in updates if isinstance(update, base.ProgramRunning))
    assert running.run_state == updates[0].meta["chaperone"]
    run_id = running.run_state["run_id"]
    assert run_id.startswith("r17-") and running.run_state["spool"] == str(spool)
    status = api.Spool(spool)[run_id].status()
    assert (end.meta["status"]["exit_code"], end.meta["status"]["signal"]) == (0, None)
    assert (end.meta["proc_stat"]["pid"], end.meta["times"]["elapsed"]) == (
        status.pid,
        status.elapsed,
    )
    assert end.meta["stop"] == {"signals": [], "reason": None, "by": None}
    assert json.loads(json.dumps(end.meta)) == end.meta
    assert status.labels == {"apsis": "r17"}


@pytest.mark.parametrize(
    ("text", "kind", "message", "shown"),
    [
        ("echo before; exit 3", base.ProgramFailure, "exit code 3", b"before\n"),
        ("echo before; kill -9 $$", base.ProgramFailure, "killed by SIGKILL", b"before\n"),
        ("exec sh -c 'exit 4'", base.ProgramFailure, "exit code 4", b""),
    ],
)
def test_failure_has_its_reason_and_all_output(spool, text, kind, message, shown):
    end = driven(bound(text, spool))
    assert (type(end), end.message, output(end)) == (kind, message, shown)


def test_program_that_can_not_be_started_is_an_error(spool):
    program = ChaperoneProgram.from_jso({"argv": ["/nowhere"], "spool": str(spool)}).bind({})
    end = driven(program)
    sentence = "error: unable to run '/nowhere': No such file or directory"
    assert (type(end), end.message) == (base.ProgramError, sentence)


def test_spool_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    end = driven(bound("exit 0", tmp_path / "file" / "spool"))
    assert isinstance(end, base.ProgramError)
    assert end.message.startswith("chaperone: unable to")


def test_spool_and_timeout_may_be_in_the_configuration(spool):
    program = BoundChaperoneProgram(["/bin/sh", "-c", "exec sleep 60"])
    cfg = {"chaperone": {"spool": str(spool)}, "program": {"timeout": {"duration": 0.2}}}
    end = driven(program, cfg)
    assert (end.message, end.meta["stop"]["signals"]) == (
        "killed by SIGTERM (timeout after 0 s)",
        ["SIGTERM"],
    )
    assert program.to_jso()["timeout"] == {"duration": 0.2, "signal": "SIGTERM"}
    end = driven(BoundChaperoneProgram(["true"]))
    assert end.message == (
        "chaperone: unable to start: want `spool` in the job or in the config of Apsis"
    )


def test_timeout_may_have_another_signal_than_a_stop(spool):
    timeout = {"duration": 0.2, "signal": "SIGUSR2"}
    end = driven(
        bound("trap 'echo late; exit 0' USR2; while :; do sleep 0.05; done", spool, timeout=timeout)
    )
    assert (end.message, end.meta["stop"]["signals"], output(end)) == (
        "exit code 0 (timeout after 0 s)",
        ["SIGUSR2"],
        b"late\n",
    )


def test_output_is_delivered_while_the_program_runs(spool, tmp_path):
    os.mkfifo(tmp_path / "go")
    seen = []

    async def then(running, update):
        if isinstance(update, base.ProgramUpdate) and update.outputs:
            seen.append(output(update))
            if seen[-1] == b"first\n":
                (tmp_path / "go").write_text("")

    end = driven(bound(f"echo first; cat {tmp_path}/go; echo last", spool), then=then)
    assert seen[0] == b"first\n" and output(end) == b"first\nlast\n"


def test_stop_is_chaperones_and_says_which_signals_it_took(spool):
    async def stopped(running, update):
        if isinstance(update, base.ProgramUpdate) and output(update):
            await running.stop()

    text = "trap 'echo stopping; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    end = driven(bound(text, spool, spec={"stop": {"to": "program"}}), then=stopped)
    assert (end.message, output(end)) == ("exit code 5", b"ready\nstopping\n")
    assert end.meta["stop"] == {"signals": ["SIGTERM"], "reason": "request", "by": "apsis"}
    text = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    end = driven(bound(text, spool, stop={"grace_period": 0}), then=stopped)
    assert (end.message, end.meta["stop"]["signals"]) == (
        "killed by SIGKILL",
        ["SIGTERM", "SIGKILL"],
    )


def test_signal_reaches_the_program(spool):
    async def signalled(running, update):
        if isinstance(update, base.ProgramUpdate) and output(update):
            await running.signal(signal.SIGUSR1)

    text = "trap 'echo usr1; exit 0' USR1; echo ready; while :; do sleep 0.05; done"
    end = driven(bound(text, spool), then=signalled)
    assert (type(end), output(end)) == (base.ProgramSuccess, b"ready\nusr1\n")


def test_restarted_server_goes_on_with_a_run_from_what_it_stored(spool, tmp_path):
    """Its output from the first byte on, because Apsis kept none; its timeout where it was."""
    os.mkfifo(tmp_path / "go")
    text = f"echo first; cat {tmp_path}/go; echo last; exit 3"
    program = bound(text, spool, timeout={"duration": 60, "signal": "SIGUSR1"})

    async def until_running():
        updates = program.run("r17", {}).updates
        async for update in updates:
            if isinstance(update, base.ProgramRunning):
                break
        await updates.aclose()
        return json.loads(json.dumps(update.run_state))

    async def again(run_state):
        return await exhausted(program.connect("r17", run_state, {}), [])

    run_state = asyncio.run(until_running())
    (tmp_path / "go").write_text("")
    end = asyncio.run(again(run_state))
    assert (end.message, output(end)) == ("exit code 3", b"first\nlast\n")
    assert os.listdir(spool / ".ended") == []
    # Killed between the two commits: the run is collected, and Apsis does not know its end.
    end = asyncio.run(again(run_state))
    assert (end.message, output(end)) == ("exit code 3", b"first\nlast\n")
    api.Spool(spool)[run_state["run_id"]].delete()
    end = asyncio.run(again(run_state))
    assert end.message == (
        f"chaperone: unable to find run {run_state['run_id']!r}: No such file or directory"
    )


def test_run_is_collected_after_apsis_has_recorded_its_end(spool):
    async def then(running, update):
        if isinstance(update, ENDS):
            until(lambda: os.listdir(spool / ".ended") == [running.run_state["run_id"]])

    driven(bound("exit 0", spool), then=then)
    until(lambda: os.listdir(spool / ".ended") == os.listdir(spool / ".running") == [])


@pytest.mark.parametrize("timeout", [None, {"duration": 3600, "signal": "SIGUSR2"}])
def test_run_that_another_process_has_collected_is_an_error_at_once(spool, timeout):
    class Over:
        async def next(self, timeout):
            """As of a follower of which nothing more comes."""
            assert not self.was_asked
            self.was_asked = True

        was_asked = False

    more = {} if timeout is None else {"timeout": timeout}
    running = bound("exit 0", spool, **more).run("r17", {})
    running.run_state = {"spool": str(spool), "run_id": "r17-1", "start": time.time()}

    async def followed():
        return [update async for update in running._followed(Over())]

    with pytest.raises(NoRunError) as caught:
        asyncio.run(followed())
    sentence = "unable to follow run 'r17': another process has collected it"
    assert str(caught.value) == sentence


def test_killed_chaperone_is_an_error_with_what_was_written(spool, monkeypatch):
    monkeypatch.setattr(apsis_running, "COLLECT_S", 0.1)  # nothing here reaps it

    async def kill(running, update):
        if isinstance(update, base.ProgramUpdate) and output(update):
            pid = api.Spool(spool)[running.run_state["run_id"]].status().chaperone_pid
            assert pid > 1
            os.kill(pid, signal.SIGKILL)

    end = driven(bound("echo ready; exec sleep 60", spool), then=kill)
    assert (type(end), output(end)) == (base.ProgramError, b"ready\n")
    assert end.message.startswith("lost: ")


def test_spool_that_can_not_be_read_for_a_moment_ends_no_run(spool, monkeypatch):
    follow, failures = aio.Spool.follow, [SpoolError("unable to read"), SpoolError("still not")]

    def failing(self, *arguments):
        if failures:
            raise failures.pop()
        return follow(self, *arguments)

    monkeypatch.setattr(aio.Spool, "follow", failing)
    monkeypatch.setattr(apsis_running, "RETRY_S", 0.01)
    end = driven(bound("echo out; exit 3", spool))
    assert (end.message, output(end), failures) == ("exit code 3", b"out\n", [])


def test_runs_of_a_server_share_one_inotify_instance(spool, tmp_path):
    count = 12
    os.mkfifo(tmp_path / "go")

    async def main():
        running, ends = set(), []

        async def then(program, update):
            if isinstance(update, base.ProgramUpdate) and output(update):
                running.add(program)
                if len(running) == count:
                    ends.append(len(instances()))
                    for each in running:
                        await each.stop()

        programs = [
            bound("echo ready; exec sleep 60", spool).run(f"r{n}", {}) for n in range(count)
        ]
        outcomes = await asyncio.gather(*(exhausted(each, [], then) for each in programs))
        return ends, {end.message for end in outcomes}

    assert asyncio.run(main()) == ([1], {"killed by SIGTERM"})


def test_spool_may_be_an_agents_url(spool, tmp_path, monkeypatch):
    monkeypatch.setattr(apsis_running, "RETRY_S", 0.1)
    with agents.served(tmp_path) as agent:
        monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["run"]))
        monkeypatch.setenv("CHAPERONE_CA", str(agent.ca))

        async def stopped(running, update):
            if isinstance(update, base.ProgramUpdate) and output(update):
                agent.kill()
                agent.start()  # a killed agent holds no run, and nothing is lost
                await running.stop()

        end = driven(bound("echo ready; exec sleep 60", agent.spool_url), then=stopped)
        assert (end.message, output(end)) == ("killed by SIGTERM", b"ready\n")
        until(lambda: os.listdir(agent.spool / ".ended") == [])


@pytest.mark.parametrize("fate", ["lost", "never"])
def test_start_without_an_answer_is_followed_if_it_was_one(spool, tmp_path, monkeypatch, fate):
    """An error would end the run for Apsis while its program runs on."""
    monkeypatch.setattr(calls, "START_S", 0.1)
    monkeypatch.setattr(question, "PATIENCE_S", 0.1)
    with agents.served(tmp_path) as agent:
        monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["run"]))
        monkeypatch.setenv("CHAPERONE_CA", str(agent.ca))
        with LosingProxy(agent, lambda name, _: fate if name[:3] == "PUT" else "pass") as proxy:
            updates = []
            end = driven(bound("echo over", proxy.url()), updates=updates)
        if fate == "lost":
            assert (type(end), output(end)) == (base.ProgramSuccess, b"over\n")
            until(lambda: os.listdir(agent.spool / ".ended") == [])
        else:
            run_id = updates[0].meta["chaperone"]["run_id"]
            why = "No such file or directory"
            sentence = f"chaperone: unable to find run {run_id!r}: {why}"
            assert (type(end), end.message) == (base.ProgramError, sentence)
            assert [name for name in os.listdir(agent.spool) if name[0] != "."] == []


def connections(port):
    """How many connections this process has to a port."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was closed, or is not connected
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd))) as opened:
                    count += opened.getpeername()[1:2] == (port,)
    return count


def test_runs_of_an_agent_share_one_stream(spool, tmp_path, monkeypatch):
    """However many there are, and although they begin one after the other."""
    monkeypatch.setattr(connection, "KEPT_S", 0.05)
    ready, counts = set(), []
    with agents.served(tmp_path) as agent:
        monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["run"]))
        monkeypatch.setenv("CHAPERONE_CA", str(agent.ca))
        port = int(agent.listen.rpartition(":")[2])
        text = f"echo ready; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo over"

        async def then(running, update):
            is_update = isinstance(update, base.ProgramUpdate)
            if is_update and output(update) and running.run_id not in ready:
                ready.add(running.run_id)
                if len(ready) == 5:
                    while connections(port) != 1:  # those of questions close when they are idle
                        await asyncio.sleep(0.02)
                    counts.append(connections(port))
                    (tmp_path / "go").touch()

        async def main():
            programs = [bound(text, agent.spool_url).run(f"r{n}", {}) for n in range(5)]
            ends = await asyncio.gather(*(exhausted(each, [], then) for each in programs))
            while connections(port):
                await asyncio.sleep(0.02)
            return ends

        ends = asyncio.run(asyncio.wait_for(main(), 120))
        assert [output(end) for end in ends] == [b"ready\nover\n"] * 5
        assert {type(end) for end in ends} == {base.ProgramSuccess} and counts == [1]
        until(lambda: os.listdir(agent.spool / ".ended") == [])


class SlowFollower:
    """A follower without events, which takes a while to close."""

    def __init__(self):
        self._closed = asyncio.Event()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        await asyncio.sleep(0.05)

    async def next(self):
        await self._closed.wait()

    async def close(self):
        self._closed.set()

    def entry(self, run_id):
        return None

    def is_over(self):
        return False


def test_run_that_begins_while_the_stream_of_the_last_one_closes_is_followed():
    asked = []

    class Spool:
        def follow(self, cursor, runs, streams):
            asked.append(runs)
            return SlowFollower()

    async def main():
        stream = apsis_stream.SharedStream(Spool())
        first, second = (
            apsis_stream.Share(stream, run_id, {"runs": {run_id: {}}}) for run_id in "ab"
        )
        await stream.add(first)
        while asked != [["a"]]:
            await asyncio.sleep(0.001)
        removing = asyncio.ensure_future(stream.remove(first))
        await asyncio.sleep(0)
        async with second:
            while asked != [["a"], ["b"]]:
                await asyncio.sleep(0.001)
        await removing

    asyncio.run(asyncio.wait_for(main(), 30))


def test_script_for_the_real_one_says_what_it_lacks(tmp_path):
    script = f"{ROOT}/spool_tests/integrations/apsis"

    def said(environ=()):
        result = subprocess.run(
            [sys.executable, script, tmp_path],
            capture_output=True,
            text=True,
            env={**os.environ, **dict(environ)},
        )
        return result.returncode, result.stdout, result.stderr

    sentence = f"unable to try Apsis: {str(tmp_path)!r} is no checkout of it\n"
    assert said() == (1, "", sentence)
    (tmp_path / "pyproject.toml").write_text('version = "9.0"\nrequires-python = "==3.99.*"\n')
    (tmp_path / "python/apsis/program").mkdir(parents=True)
    (tmp_path / "python/apsis/program/base.py").touch()
    sentence = "unable to try Apsis 9.0: it wants Python 3.99, and there is none here\n"
    assert said() == (1, "", sentence)
