"""
Tasks of a real Airflow that chaperone holds: what they end as, what is in their logs, and what is
left when parts of Airflow are killed.

`bin/test --long airflow` installs Airflow. There is one Airflow, because its start takes a minute.
"""

import datetime
import json
import os
import subprocess

import pytest

from chaperone import api
from spool_tests.support.agents import TOKENS, end_all, served
from spool_tests.support.airflow import VENV, Airflow
from spool_tests.support.waiting import until

pytestmark = [pytest.mark.tier("airflow"), pytest.mark.once]
TICKS = 240
LINES = 30_000
# What ends by itself: the program, the state of the task, what the status says, and the log.
TABLE = {
    "exit 3": ("echo before; exit 3", "failed", (3, None), ["before"]),
    "exec": ("echo before; exec sh -c 'exit 4'", "failed", (4, None), ["before"]),
    "set -e": ("echo before; set -e; false; echo after", "failed", (1, None), ["before"]),
    "SIGKILL": ("echo before; kill -9 $$", "failed", (None, "SIGKILL"), ["before"]),
    "a comment": ("echo a # comment", "success", (0, None), ["a"]),
    "two lines": ("echo one; echo two >&2", "success", (0, None), ["one", "two"]),
    "a template": ("echo {{ dag.dag_id }}", "success", (0, None), ["table"]),
    "no newline": ("printf 'a\\n\\nb'", "success", (0, None), ["a", "", "b"]),
    "3.2 MB": (
        f"seq -f %0104.0f {LINES}",
        "success",
        (0, None),
        [f"{number:0104}" for number in range(1, LINES + 1)],
    ),
}
TICKING = f"i=0; while [ $i -lt {TICKS} ]; do echo tick $i; i=$((i+1)); sleep 0.3; done"
DAGS = """
import datetime, os, signal
from airflow.sdk import DAG
from chaperone.integrations.airflow import ChaperoneOperator

class DiesOnce(ChaperoneOperator):
    # A worker that is killed behind the start, and before the task is deferred.
    def defer(self, **keywords):
        if not os.path.exists(MARK):
            open(MARK, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        super().defer(**keywords)

with DAG("table"):
    for number, command in enumerate(COMMANDS):
        ChaperoneOperator(task_id=f"case_{number}", command=command, spool=SPOOL)

with DAG("killed", default_args={"retry_delay": datetime.timedelta(seconds=1)}):
    ChaperoneOperator(task_id="ticking", command=TICKING, spool=SPOOL)
    command = f"echo ran >>{MARK}.ran; echo begun; sleep 90; echo done"
    DiesOnce(task_id="worker", command=command, spool=SPOOL, retries=1)
    ChaperoneOperator(task_id="marked", command="echo ready; exec sleep 1000", spool=SPOOL)

with DAG("agent"):
    argv = ["sh", "-c", "echo out; exit 5"]
    ChaperoneOperator(task_id="remote", argv=argv, chaperone_conn_id="agent")

with DAG("many"):
    commands = [f"echo {number}; sleep 60" for number in range(MANY)]
    ChaperoneOperator.partial(task_id="one", spool=SPOOL).expand(command=commands)
"""


def dags(spool, place, many):
    values = {
        "SPOOL": str(spool),
        "MARK": str(place / "mark"),
        "COMMANDS": [command for command, *_ in TABLE.values()],
        "TICKING": TICKING,
        "MANY": many,
    }
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + DAGS


@pytest.fixture
def place(tmp_path, spool):
    yield tmp_path
    end_all(spool)


def test_table(place, spool, told):
    """One test, because there is one Airflow."""
    # An idle machine defers 300 tasks in some minutes; a busy one loses its heartbeats.
    many = 300 if os.getloadavg()[0] < os.cpu_count() else 30
    with served(place) as agent:
        airflow = Airflow(place / "airflow", dags(spool, place, many))
        airflow.env["AIRFLOW_CONN_AGENT"] = json.dumps(
            {
                "conn_type": "generic",
                "host": "127.0.0.1",
                "port": int(agent.url.rpartition(":")[2]),
                "schema": "etl",
                "password": TOKENS["run"],
                "extra": {"ca": str(agent.ca)},
            }
        )
        with airflow:
            told(versions(airflow))
            killed_parts(airflow, place, spool, told)
            through_an_agent(airflow, told)
            ends_by_themselves(airflow, told)
            many_at_a_time(airflow, many, told)
    until(lambda: os.listdir(spool / ".running") == [])


def versions(airflow):
    command = [
        f"{VENV}/bin/python",
        "-c",
        "import airflow, sys; print(airflow.__version__, sys.version.split()[0])",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=airflow.env)
    version, python = done.stdout.split()[-2:]
    return f"Airflow {version}, Python {python}, {datetime.date.today()}"


def ends_by_themselves(airflow, told):
    run = airflow.begin("table")
    states = airflow.ended(run)
    for number, (name, (_, state, ending, lines)) in enumerate(TABLE.items()):
        task = f"case_{number}"
        status = airflow.xcom(run, task)
        shown = airflow.log(run, task)
        found = (
            states[task],
            (status["return_code"], status["signal"]),
            len(shown),
            shown == lines,
        )
        how = status["signal"] or status["return_code"]
        told(f"{name}: {states[task]}, {how}, {len(shown)} of {len(lines)} lines")
        assert found == (state, ending, len(lines), True), name


def through_an_agent(airflow, told):
    run = airflow.begin("agent")
    assert airflow.ended(run) == {"remote": "failed"}
    assert airflow.xcom(run, "remote")["return_code"] == 5
    assert airflow.log(run, "remote") == ["out"]
    told("through an agent, by a connection: failed, 5, 1 of 1 lines")


def killed_parts(airflow, place, spool, told):
    run = airflow.begin("killed")
    until(
        lambda: airflow.states(run)["ticking"] == airflow.states(run)["marked"] == "deferred", 600
    )
    until(lambda: len(airflow.log(run, "ticking")) >= 20, 600)
    airflow.ask(f"{run}/taskInstances/marked", {"new_state": "failed"}, "PATCH")
    marked = until(lambda: held(spool, "marked"), 60)
    status = until(lambda: marked.status().is_final() and marked.status(), 120)
    assert (status.signal, status.stop["by"]) == ("SIGTERM", "airflow")
    told("marked failed while deferred: SIGTERM by airflow")
    airflow.kill("triggerer")
    airflow.start("triggerer")
    airflow.kill("scheduler")
    airflow.start("scheduler")
    states = airflow.ended(run, 1_200)
    shown = airflow.log(run, "ticking")
    assert shown == [f"tick {number}" for number in range(TICKS)]
    how = f"{states['ticking']}, {len(shown)} of {TICKS} lines once each"
    told(f"triggerer and scheduler killed: {how}")
    assert states == {"ticking": "success", "worker": "success", "marked": "failed"}
    assert (place / "mark.ran").read_text() == "ran\n" * 2
    assert airflow.log(run, "worker", attempt=2) == ["begun", "done"]
    told("worker killed behind its start: the program is stopped, the next try has 2 of 2 lines")


def held(spool, task):
    return next(
        (run for run in api.Spool(spool).all() if run.run_id.startswith(f"killed.{task}-")), None
    )


def many_at_a_time(airflow, many, told):
    run = airflow.begin("many")
    most = 0

    def over():
        nonlocal most
        states = [each["state"] for each in airflow.tasks(run).values()]
        most = max(most, states.count("deferred"))
        return len(states) == many and all(state == "success" for state in states)

    until(over, 1_800)
    for index in range(many):
        assert airflow.log(run, "one", index) == [str(index)]
    told(f"{many} tasks: at most {most} deferred at a time, {many} of {many} lines")
