"""The sink: run directories fed by offsets, and what a reader concludes when it has died."""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chaperone
from chaperone.agent import sink as sinks
from chaperone.agent.fed_run import ConflictError, GapError
from chaperone.agent.sink import Sink
from chaperone.errors import RunExistsError, SpecError, SpoolError
from chaperone.model import status as statuses
from chaperone.spool import look
from chaperone.spool import reap as reaping
from spool_tests.support import disk
from spool_tests.support.fed import KEY, ORIGIN, URL, far_final, far_running, far_spec, fed
from spool_tests.support.places import ROOT
from spool_tests.support.processes import open_fds
from spool_tests.support.runs import ask, final, live, log
from spool_tests.support.waiting import until


@pytest.fixture
def sink(spool):
    with Sink(str(spool)) as sink:
        yield sink


# -- what is written


def test_fed_run_is_an_ordinary_run_directory(spool, sink):
    run = fed(sink, status=far_running())
    assert (spool / ".running" / "r").is_symlink()
    assert sorted(path.name for path in (spool / "r").iterdir()) == [
        ".status",
        "control",
        "lock",
        "log",
        "running.json",
        "spec.json",
        "stderr",
        "stdout",
    ]
    assert live(spool) == far_running() | {
        name: live(spool)[name] for name in ("create_time", "start_time")
    }
    assert json.loads((spool / "r" / "spec.json").read_text()) == {
        **far_spec(),
        "on_disconnect": "survive",
        "lease": 2400,
        "origin": {"by": "mirror", "url": URL},
    }
    assert run.append("stdout", 0, b"one\n") == 4
    assert run.append("stderr", 0, b"two\n") == 4
    status = far_final(4, 4)
    run.ended(status)
    assert (spool / "r" / "status.json").read_text() == disk_text(status)
    assert (spool / ".ended" / "r").is_symlink()
    assert not (spool / ".running" / "r").is_symlink()
    assert sorted(path.name for path in (spool / "r").iterdir()) == [
        "spec.json",
        "status.json",
        "stderr",
        "stdout",
    ]


def disk_text(status):
    return json.dumps(status, separators=(", ", ": ")) + "\n"


def test_run_of_which_nothing_is_known_has_an_empty_spec(spool, sink):
    run = sink.run("r", KEY, {}, sinks.origin("receiver", "https://near/r"))
    status = chaperone.Spool(str(spool))["r"].status()
    assert (status.state, status.program["argv"], status.labels) == ("starting", None, {})
    run.ended(far_final())
    assert final(spool)["program"]["argv"] == ["true"]


def test_status_of_any_size_is_kept_as_it_is(spool, sink):
    run = sink.run("r", KEY, {}, sinks.origin("receiver", "https://near/r"))
    connection = {"argv": ["x" * 100_000], "pid": 5, "drops": 0, "state": "up", "since": None}
    status = {**far_final(), "connection": connection}
    run.ended(status)
    assert final(spool) == status


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("append"),
                st.sampled_from(["stdout", "stderr"]),
                st.integers(0, 40),
                st.integers(0, 40),
            ),
            st.just(("die",)),
            st.tuples(st.just("end"), st.integers(-2, 2)),
        ),
        max_size=30,
    )
)
def test_any_order_of_pieces_gives_the_bytes_of_the_agent(tmp_path_factory, steps):
    """Offsets, replays, gaps and deaths at random, against two arrays of bytes."""
    path = tmp_path_factory.mktemp("model") / "spool"
    whole = {"stdout": bytes(range(100)), "stderr": bytes(range(100, 200))}
    have = {"stdout": 0, "stderr": 0}
    ended = None
    sink = Sink(str(path))
    try:
        run = fed(sink)
        for step in steps:
            if step[0] == "die":
                sink.close()
                sink = Sink(str(path))
                run = fed(sink)
                assert run.is_ended() == (ended is not None)
            elif step[0] == "append":
                _, stream, offset, length = step
                data = whole[stream][offset : offset + length]
                if offset > have[stream]:
                    with pytest.raises(GapError) as error:
                        run.append(stream, offset, data)
                    assert error.value.sizes == have
                elif ended is not None and offset + len(data) > have[stream]:
                    with pytest.raises(ConflictError, match="it has ended"):
                        run.append(stream, offset, data)
                else:
                    have[stream] = max(have[stream], offset + len(data))
                    assert run.append(stream, offset, data) == have[stream]
            else:
                said = have["stdout"] + step[1]
                status = {**far_final(max(said, 0), have["stderr"])}
                if ended is not None:
                    run.ended(ended)  # repeated: nothing changes
                    with pytest.raises(ConflictError, match="ended in another way"):
                        run.ended({**ended, "return_code": 7})
                elif max(said, 0) > have["stdout"]:
                    with pytest.raises(GapError) as error:
                        run.ended(status)
                    assert error.value.sizes == have
                elif max(said, 0) < have["stdout"]:
                    with pytest.raises(ConflictError, match="more bytes than its final status"):
                        run.ended(status)
                else:
                    run.ended(status)
                    ended = status
            assert run.sizes == have
        for stream, size in have.items():
            assert (path / "r" / stream).read_bytes() == whole[stream][:size]
        assert (ended is not None) == (path / "r" / "status.json").exists()
    finally:
        sink.close()


def test_status_that_is_not_final_ends_nothing(sink):
    run = fed(sink)
    for status in (far_running(), {}, {**far_final(), "run_id": "other"}):
        with pytest.raises(ConflictError) as error:
            run.ended(status)
        assert str(error.value) == "unable to end run 'r': want a final status of this run"


def test_status_so_far_is_replaced_where_it_changed(spool, sink):
    run = fed(sink, status=far_running())
    before = os.stat(spool / "r" / "running.json").st_ino
    run.changed(run.status)
    assert os.stat(spool / "r" / "running.json").st_ino == before
    run.changed({**run.status, "leftovers": 3})
    assert live(spool)["leftovers"] == 3
    for _ in range(2):
        run.changed({**run.status, "state": "unattended"})
    assert live(spool)["state"] == "running"
    assert log(spool) == ["its agent finds the run unattended"]


def test_stream_that_was_truncated_is_copied_again(spool, sink):
    run = fed(sink)
    run.append("stdout", 0, b"before")
    run.cut("stdout")
    run.append("stdout", 0, b"after")
    assert (spool / "r" / "stdout").read_bytes() == b"after"
    assert log(spool) == ["stdout was truncated where it runs: it is copied again from its start"]


def test_run_that_the_agent_lost_is_told_as_it_is(spool, sink):
    run = fed(sink, status=far_running())
    run.append("stdout", 0, b"some")
    run.lost("its run directory was deleted before its end was mirrored")
    status = chaperone.Spool(str(spool))["r"].status()
    assert (status.state, status.complete, status.gone_by) == ("lost", False, None)
    assert status.exception["message"] == (
        "its run directory was deleted before its end was mirrored"
    )
    assert status.stdout.bytes == 4


# -- whose run it is


def test_run_of_another_key_or_of_a_chaperone_is_refused(spool, sink):
    fed(sink)
    with pytest.raises(RunExistsError) as error:
        sink.run("r", "f" * 32, far_spec(), ORIGIN)
    assert str(error.value) == "unable to write the copy of run 'r': another run has its id"
    local = disk.create(spool, "local")
    with pytest.raises(RunExistsError):
        sink.run("local", local.key, far_spec("local"), ORIGIN)
    local.close()


def test_second_sink_of_a_run_is_refused(spool, sink):
    fed(sink)
    with Sink(str(spool)) as second, pytest.raises(SpoolError) as error:
        fed(second)
    assert str(error.value) == "unable to write the copy of run 'r': another process writes it"


def test_sink_finds_what_an_earlier_one_left(spool, sink):
    fed(sink, "a")
    sink.run("b", KEY, far_spec("b"), sinks.origin("mirror", "https://other/etl"))
    sink.run("c", KEY, far_spec("c"), sinks.origin("receiver", "https://near/c"))
    disk.create(spool, "local").close()
    assert sink.left("mirror") == ["a", "b"]
    assert sink.left("mirror", URL) == ["a"]
    assert sink.left("receiver") == ["c"]


def test_run_directory_that_was_removed_is_made_again(spool, sink):
    fed(sink).append("stdout", 0, b"gone")
    subprocess.run(["rm", "-rf", spool / "r"], check=True)
    again = fed(sink)
    assert again.sizes == {"stdout": 0, "stderr": 0}
    assert again.append("stdout", 0, b"here") == 4


def test_nothing_stays_open(spool):
    before = open_fds(str(spool))
    with Sink(str(spool)) as sink:
        fed(sink)
        fed(sink, "ended").ended(far_final(run_id="ended"))
    assert open_fds(str(spool)) == before


# -- what no agent of ours sends


@pytest.mark.parametrize("run_id", ["../x", "", ".hidden", "a/b", "x" * 129, None, 7])
def test_id_of_an_evil_agent_is_refused(spool, sink, run_id):
    with pytest.raises(
        SpecError, match="^unable to write the copy of run .*: want an id that matches "
    ):
        sink.run(run_id, KEY, far_spec(), ORIGIN)
    assert disk.tree(spool.parent)[:2] == ["spool", "spool/.ended"]


@pytest.mark.parametrize("key", ["../x", "", "a b", "a/b", "x" * 200, None, 7])
def test_key_of_an_evil_agent_is_refused(spool, sink, key):
    with pytest.raises(SpecError) as error:
        sink.run("r", key, far_spec(), ORIGIN)
    assert (
        str(error.value) == "unable to write the copy of run 'r': want a key of letters and digits"
    )
    assert not (spool / "r").exists()


@pytest.mark.parametrize(
    "spec",
    [
        {"program": "rm -rf /", "output": 7, "labels": [], "durable": "yes", "lease": -1},
        {"program": {"argv": 5, "env": ["A"], "cwd": {}}, "output": {"timeline": True}},
        {"origin": {"by": "mirror", "url": "https://other"}, "id": "../x", "key": "y"},
        {"renew": "x", "stop": {"grace_period": "x"}, "timeouts": None},
    ],
)
def test_spec_of_an_evil_agent_harms_nothing(spool, sink, spec, chaperone):
    sink.run("r", KEY, spec, ORIGIN)
    assert not (spool / "r" / "timeline").exists()
    kept = json.loads((spool / "r" / "spec.json").read_text())
    assert (kept["id"], kept["key"], kept["origin"]) == ("r", KEY, ORIGIN)
    sink.close()
    sink.__init__(str(spool))
    assert look_at(spool, "r") == "unattended"
    for verb in (["ls"], ["status", "r"], ["reap"], ["tail", "r", "--lines", "1"]):
        assert chaperone(*verb).stderr == ""


def test_stream_of_an_evil_agent_is_refused(sink):
    with pytest.raises(SpecError) as error:
        fed(sink).append("../x", 0, b"x")
    assert str(error.value) == "unable to append to stream '../x': want stdout or stderr"


# -- a dead sink


def test_run_of_a_dead_sink_is_unattended_until_its_lease_is_over(spool, sink):
    fed(sink)
    fed(sink, "short", lease_s=0.2)
    assert look_at(spool, "r") == look_at(spool, "short") == "starting"
    sink.close()
    sink.__init__(str(spool))
    assert look_at(spool, "r") == "unattended"
    until(lambda: look_at(spool, "short") == "lost")
    with chaperone.Spool(str(spool)).follow() as follower:
        last = {}
        until(
            lambda: (
                (event := follower.next(0))
                and last.update({event.run_id: event})
                or isinstance(last.get("short"), chaperone.Lost)
            )
        )
        assert last["r"].status.state == "unattended"


def look_at(spool, run_id):
    return chaperone.Spool(str(spool))[run_id].status().state


def test_only_its_feeder_goes_on_with_a_run(spool, sink, chaperone):
    """`adopt` refuses it in one sentence, `reap` leaves it, a request names whom to start."""
    fed(sink)
    sink.close()
    sink.__init__(str(spool))
    feeder = f"the mirror of {URL}"
    done = chaperone("adopt", "r")
    assert (done.returncode, done.stderr) == (
        73,
        f"chaperone: unable to adopt run 'r': an agent has it; start {feeder} again\n",
    )
    assert chaperone("adopt").returncode == 0  # none is left that could be adopted
    done = chaperone("rm", "r")
    assert done.stderr == (
        f"chaperone: unable to delete run 'r': it is unattended; start {feeder} again first\n"
    )
    done = chaperone("stop", "--no-wait", "r")
    assert done.stderr == (
        f"chaperone: unable to send a request to run 'r': an agent has it; start {feeder} again\n"
    )
    (reaped,) = reaping.reap(str(spool))
    assert reaped.done == "unattended"
    assert reaped.says.endswith(f" s more without {feeder}: start that again")


@pytest.mark.parametrize("renew", [None, 0.2])
def test_run_whose_lease_is_over_is_lost(spool, sink, renew):
    """With `renew` its chaperone has ended it by then; without, it may run for ever."""
    spec = {**far_spec(), "renew": renew, "stop": {"grace_period": 5}}
    sink.run("r", KEY, spec, ORIGIN, far_running(), lease_s=0.2)
    sink.close()
    sink.__init__(str(spool))
    until(lambda: look_at(spool, "r") == "lost")
    assert [found.done for found in reaping.reap(str(spool))] == ["lost"]
    status = final(spool)
    assert status["exception"]["message"] == (
        f"the mirror of {URL} died before the program's end was recorded, and its lease is over"
    )
    gone_ns, end_ns = (statuses.moment_ns(status[name]) for name in ("gone_by", "end_time"))
    assert (gone_ns is None) == (renew is None)
    assert renew is None or 14e9 < gone_ns - end_ns <= 15e9


def test_sink_goes_on_where_a_dead_one_was(spool, sink):
    fed(sink, status=far_running()).append("stdout", 0, b"one")
    sink.close()
    sink.__init__(str(spool))
    run = fed(sink)
    assert run.sizes == {"stdout": 3, "stderr": 0}
    assert run.append("stdout", 0, b"one two") == 7
    run.ended(far_final(7))
    assert (spool / "r" / "stdout").read_bytes() == b"one two"


def test_death_inside_an_ending_is_finished(spool, sink):
    run = fed(sink)
    status = far_final()
    run._directory.publish(status)
    sink.close()
    sink.__init__(str(spool))
    assert (spool / ".running" / "r").is_symlink()
    run = fed(sink)
    assert run.is_ended()
    assert (spool / ".ended" / "r").is_symlink()
    run.ended(status)


FEEDER = f"""
import sys
sys.path.insert(0, {ROOT!r})
from chaperone.agent import sink as sinks
from spool_tests.support.fed import far_final, fed
whole = bytes(range(256)) * 4_000
with sinks.Sink(sys.argv[1]) as sink:
    run = fed(sink)
    print(run.sizes["stdout"], flush=True)
    while not run.is_ended() and (size := run.sizes["stdout"]) < len(whole):
        run.append("stdout", max(0, size - 7), whole[max(0, size - 7):size + 500])
    run.is_ended() or run.ended(far_final(len(whole)))
"""


def test_any_number_of_deaths_loses_and_repeats_no_byte(spool):
    whole = bytes(range(256)) * 4_000
    stream = spool / "r" / "stdout"
    for number in range(4):
        feeder = subprocess.Popen(
            [sys.executable, "-c", FEEDER, str(spool)], stdout=subprocess.PIPE
        )
        with feeder.stdout:
            begun = int(feeder.stdout.readline())
        wanted = min(begun + 200_000 * number, len(whole) - 1)
        until(lambda wanted=wanted: stream.stat().st_size >= wanted)
        feeder.send_signal(signal.SIGKILL)
        feeder.wait()
    subprocess.run([sys.executable, "-c", FEEDER, str(spool)], stdout=subprocess.PIPE, check=True)
    assert stream.read_bytes() == whole
    assert final(spool)["state"] == "terminated"


# -- requests


def test_requests_come_out_in_order_and_invalid_ones_are_logged(spool, sink):
    run = fed(sink)
    assert sink.requests() == []
    ask(spool, "signal USR1 by=me")
    ask(spool, "dance")
    ask(spool, "stop 5 by=ops")
    lines = [(found, request.line("r")) for found, request in sink.requests()]
    assert lines == [(run, b"signal SIGUSR1 by=me\n"), (run, b"stop 5.0 by=ops\n")]
    assert sink.requests() == []
    assert log(spool) == [
        "unable to take the request 'dance': want stop [SECONDS], signal NAME, kill or renew"
    ]


def test_stop_that_was_not_passed_on_outlives_its_sink(spool, sink):
    run = fed(sink, status=far_running())
    ask(spool, "signal USR1")
    ask(spool, "stop 5 by=ops")
    _, (_, stop) = sink.requests()
    run.changed({**run.status, "leftovers": 1})
    assert live(spool)["pending"] == ["stop 5.0 by=ops"]
    sink.close()
    sink.__init__(str(spool))
    run = fed(sink)
    (again,) = run.pending
    assert again.line("r") == stop.line("r")
    run.passed_on(again)
    assert "pending" not in live(spool)
    assert look.is_fed(run.spec)
