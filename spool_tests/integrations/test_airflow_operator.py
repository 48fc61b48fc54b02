"""
The operator for Airflow and its trigger, where Airflow is a stand-in; `test_airflow.py` tries them
in a real one.
"""

import asyncio
import datetime
import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spool_tests.support import agents, airflow_standin
from spool_tests.support.airflow_standin import Connection, TaskDeferred, TaskInstance
from spool_tests.support.waiting import until

airflow_standin.have()

from chaperone import api  # noqa: E402
from chaperone.errors import SpecError  # noqa: E402
from chaperone.integrations import airflow_trigger  # noqa: E402
from chaperone.integrations.airflow import ChaperoneOperator, run_id_of  # noqa: E402


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch, caplog):
    """The lines of output that a task's log has got; no log is there from before."""
    logs = {("logging", "base_log_folder"): str(tmp_path / "logs")}
    monkeypatch.setattr(airflow_standin.Conf, "settings", logs)
    monkeypatch.setattr(airflow_trigger, "SETTLE_S", 0.0)
    monkeypatch.setattr(airflow_trigger, "STUCK_S", 0.0)
    caplog.set_level(logging.INFO)
    return lambda: [each.getMessage() for each in caplog.records if each.name == "chaperone.output"]


def operator(spool, command="echo out", **fields):
    return ChaperoneOperator(task_id="task", command=command, spool=str(spool), **fields)


def deferred(task, ti):
    """Execute a task: its trigger, as another process makes it again."""
    with pytest.raises(TaskDeferred) as raised:
        task.execute({"ti": ti})
    fields = vars(raised.value)
    trigger = fields.pop("trigger")
    assert fields == {"method_name": "execute_complete", "kwargs": None, "timeout": None}
    path, arguments = json.loads(json.dumps(trigger.serialize()))
    assert path == "chaperone.integrations.airflow_trigger.ChaperoneTrigger"
    trigger = airflow_trigger.ChaperoneTrigger(**arguments)
    trigger.task_instance = ti
    return trigger


def fired(trigger):
    async def main():
        return [event.payload async for event in trigger.run()]

    (event,) = asyncio.run(main())
    return json.loads(json.dumps(event))


def completed(task, ti):
    """A task from its start to its end."""
    return task.execute_complete({"ti": ti}, fired(deferred(task, ti)))


def test_task_returns_the_status_and_its_log_has_the_output(spool, log):
    ti = TaskInstance()
    task = operator(
        spool, "echo out; echo err >&2; echo $AIRFLOW_CTX_TASK_ID; printf 'a\\n\\nb\\377'"
    )
    status = completed(task, ti)
    assert (status["state"], status["return_code"]) == ("terminated", 0)
    assert log() == ["out", "err", "task", "a", "", "b\\xff"]
    assert status["run_id"] == run_id_of(ti, 1)
    assert status["labels"] == {
        "dag_id": "dag",
        "task_id": "task",
        "run_id": ti.run_id,
        "map_index": "-1",
        "try_number": "1",
    }
    assert os.listdir(spool / ".ended") == []


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("exit 3", "exited with code 3"),
        ("kill -9 $$", "was killed by SIGKILL"),
    ],
)
def test_task_fails_with_a_reason_and_the_status_is_its_xcom(spool, command, sentence):
    ti = TaskInstance()
    with pytest.raises(airflow_standin.AirflowException) as raised:
        completed(operator(spool, command), ti)
    assert str(raised.value) == f"run {run_id_of(ti, 1)!r} {sentence}"
    assert ti.pushed["return_value"]["run_id"] == run_id_of(ti, 1)


def test_program_that_can_not_be_started_fails_the_task(spool):
    ti = TaskInstance()
    task = ChaperoneOperator(task_id="task", argv=["/nowhere"], spool=str(spool))
    with pytest.raises(airflow_standin.AirflowException) as raised:
        completed(task, ti)
    assert str(raised.value) == (
        f"run {run_id_of(ti, 1)!r} is error: unable to run '/nowhere': No such file or directory"
    )


def test_deleted_run_fails_the_task(spool):
    ti = TaskInstance()
    task = operator(spool)
    trigger = deferred(task, ti)
    run = api.Spool(spool)[trigger.run_id]
    run.wait(60)
    until(lambda: os.listdir(spool / ".ended"))
    run.delete()
    with pytest.raises(airflow_standin.AirflowException) as raised:
        task.execute_complete({"ti": ti}, fired(trigger))
    assert str(raised.value) == f"run {trigger.run_id!r} was deleted before its end"


def test_time_of_a_task_is_the_runs_own(spool):
    ti = TaskInstance()
    limit = datetime.timedelta(seconds=0.2)
    with pytest.raises(airflow_standin.AirflowException) as raised:
        completed(operator(spool, "exec sleep 60", execution_timeout=limit), ti)
    assert str(raised.value).endswith(
        "was killed by SIGTERM, stopped for timeout by timeouts.run 0.2"
    )


# -- started again


def test_second_worker_finds_the_run_of_the_first(spool, tmp_path, log):
    ti = TaskInstance()
    task = operator(spool, f"echo ran >>{tmp_path}/ran; echo out")
    first, second = deferred(task, ti), deferred(task, ti)
    assert first.serialize() == second.serialize()
    assert fired(second)["status"]["return_code"] == 0
    assert ((tmp_path / "ran").read_text(), log()) == ("ran\n", ["out"])


def test_next_try_ends_the_program_that_a_dead_worker_has_started(spool, log):
    task = operator(spool, "echo out; exec sleep 60")
    first = deferred(task, TaskInstance())
    second = deferred(operator(spool, "echo again"), TaskInstance(try_number=3))
    status = api.Spool(spool)[first.run_id].status()
    assert (status.signal, status.stop["by"]) == ("SIGTERM", "airflow")
    assert second.run_id == run_id_of(TaskInstance(), 3)
    assert fired(second)["status"]["return_code"] == 0
    assert log() == ["again"]


def test_next_try_after_an_end_starts_at_once(spool):
    with pytest.raises(airflow_standin.AirflowException):
        completed(operator(spool, "exit 1"), TaskInstance())
    completed(operator(spool), TaskInstance(try_number=2))


def test_worker_that_is_killed_by_a_user_stops_the_run(spool):
    task = operator(spool, "exec sleep 60")
    task.on_kill()  # it has no run yet
    trigger = deferred(task, TaskInstance())
    task.on_kill()
    status = fired(trigger)["status"]
    assert (status["signal"], status["stop"]["by"]) == ("SIGTERM", "airflow")


def test_next_triggerer_goes_on_behind_the_lines_that_are_in_the_log(spool, tmp_path, log):
    logs = tmp_path / "logs/dag/task"
    logs.mkdir(parents=True)
    line = '{"event":"one","logger":"chaperone.output"}'
    other = json.dumps({"event": line, "logger": "airflow"}, separators=(",", ":"))
    (logs / "attempt=1.log.trigger.1.log").write_text(f"{other}\n{line}\n")
    (logs / "attempt=1.log.trigger.2.log").write_text(f"{line}\n{line[:-2]}")  # killed in a write
    (logs / "attempt=2.log.trigger.1.log").write_text(f"{line}\n")
    completed(operator(spool, "echo one; echo two; echo three; echo four"), TaskInstance())
    assert log() == ["three", "four"]


@given(st.lists(st.binary()), st.integers(0, 5))
def test_lines_are_the_same_in_whatever_pieces_the_output_comes(pieces, skipped):
    def lines(pieces, skipped=0):
        taken = airflow_trigger.Lines(skipped)
        found = [line for piece in pieces for line in taken.taken(piece)]
        return [*found, *taken.rest()]

    whole = b"".join(pieces)
    assert lines(pieces) == lines([whole])
    assert lines(pieces, skipped) == lines([whole])[skipped:]


@pytest.mark.parametrize("length", [16_383, 16_384, 16_385, 32_768, 40_000])
def test_long_line_is_cut_the_same_in_whatever_pieces_it_comes(length):
    def lines(pieces):
        taken = airflow_trigger.Lines()
        return [len(line) for piece in pieces for line in taken.taken(piece)] + [
            len(line) for line in taken.rest()
        ]

    data = b"x" * length
    expected = [min(16_384, length - start) for start in range(0, length, 16_384)]
    assert lines([data + b"\n"]) == lines([data]) == expected
    assert lines([data[i : i + 1000] for i in range(0, length, 1000)] + [b"\n"]) == expected


# -- where it runs


def test_spool_is_named_once(spool):
    for fields in ({"spool": None}, {"chaperone_conn_id": "agent"}):
        task = operator(spool)
        vars(task).update(fields)
        with pytest.raises(SpecError) as raised:
            task.execute({"ti": TaskInstance()})
        assert str(raised.value) == "unable to start: want either spool or chaperone_conn_id"


def test_ssh_connection_is_a_remote(spool, monkeypatch):
    connection = Connection("db3", "etl", 2222, key_file="/etc/airflow/key")
    monkeypatch.setattr(airflow_standin.BaseHook, "connections", {"db3": connection})
    task = operator(spool, ssh_conn_id="db3", spec={"lease": 5, "labels": {"team": "etl"}})
    spec = task.run_spec({"ti": TaskInstance()})
    options = {"IdentityFile": "/etc/airflow/key"}
    assert spec["remote"] == {"host": "db3", "user": "etl", "port": 2222, "options": options}
    assert (spec["lease"], spec["labels"]["team"]) == (5, "etl")
    for secret in ({"password": "x"}, {"private_key": "x"}):
        connection = Connection("db3", "etl", 2222, **secret)
        monkeypatch.setattr(airflow_standin.BaseHook, "connections", {"db3": connection})
        with pytest.raises(SpecError) as raised:
            task.run_spec({"ti": TaskInstance()})
        assert str(raised.value) == (
            f"unable to use connection 'db3': ssh takes no {[*secret][0]};"
            " want `key_file` in its extra"
        )
    task.ssh_conn_id = None
    task.spec = {"program": {"merge_stderr": False}}
    with pytest.raises(SpecError) as raised:
        task.run_spec({"ti": TaskInstance()})
    assert str(raised.value) == (
        "spec.program.merge_stderr: already set by the scheduler or by another field of the job"
    )


def test_connection_may_be_an_agents_or_have_a_spool(spool, tmp_path, monkeypatch, log):
    with agents.served(tmp_path) as agent:
        port = int(agent.url.rpartition(":")[2])
        connections = {
            "agent": Connection(
                "127.0.0.1",
                None,
                port,
                "etl",
                agents.TOKENS["run"],
                ca=str(agent.ca),
            ),
            "here": Connection(spool=str(spool)),
            "neither": Connection(),
        }
        monkeypatch.setattr(airflow_standin.BaseHook, "connections", connections)
        for name in ("agent", "here"):
            task = ChaperoneOperator(task_id="task", command="echo out", chaperone_conn_id=name)
            assert completed(task, TaskInstance())["return_code"] == 0
        with pytest.raises(SpecError) as raised:
            task = ChaperoneOperator(task_id="task", command="x", chaperone_conn_id="neither")
            task.execute({"ti": TaskInstance()})
    assert str(raised.value) == (
        "unable to use connection 'neither': want a host, or `spool` in its extra"
    )
    assert log() == ["out", "out"]


def test_id_of_a_run_is_of_the_task_instance_and_fits():
    ti = TaskInstance("größe/" + "x" * 250, run_id="scheduled__" + "y" * 250)
    run_id = run_id_of(ti, 7)
    assert run_id.startswith("dag.gr__e_xxx") and run_id.endswith("-7") and len(run_id) <= 128
    assert run_id != run_id_of(TaskInstance(ti.task_id + "x", run_id=ti.run_id), 7)
