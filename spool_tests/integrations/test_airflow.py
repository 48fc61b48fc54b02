"""
Tasks of a real Airflow that chaperone holds: what they end as, what is in their logs, and what is
left when parts of Airflow are killed.

`bin/test --long airflow` installs Airflow. There is one Airflow, because its start takes a minute.
With CHAPERONE_DOCS=1 what the tests have counted is put into docs/schedulers.rst.
"""

import contextlib
import datetime
import json
import os
import subprocess

import pytest

from chaperone import api
from spool_tests.support.agents import TOKENS, end_all, served
from spool_tests.support.airflow import ENDED, VENV, Airflow
from spool_tests.support.places import ROOT
from spool_tests.support.sshd import me
from spool_tests.support.waiting import absent, until

pytestmark = [pytest.mark.tier("airflow"), pytest.mark.once]
TICKS = 240
LINES = 30_000
MANY = 300
HANGS_S = 3 * 3600  # a busy machine takes long; what takes longer than this hangs
PAGE = os.path.join(ROOT, "docs/schedulers.rst")
BEGIN, END = ".. the counts: CHAPERONE_DOCS=1 bin/test --long airflow", ".. the end of the counts"
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
# Programs wait at a FIFO until the test opens it, so what happens meanwhile finds them running.
TICKING = (
    f"i=0; while [ $i -lt {TICKS} ]; do [ $i != {TICKS // 2} ] || : <GATE; "
    "echo tick $i; i=$((i+1)); sleep 0.3; done"
)
DAGS = """
import datetime, os, signal
from airflow.sdk import DAG
from chaperone.integrations.airflow import ChaperoneOperator

class DiesOnce(ChaperoneOperator):
    # A worker that is killed behind the start, and before the task is deferred: the process of
    # the executor, and the one that it has forked for the task.
    def defer(self, **keywords):
        if not os.path.exists(MARK):
            open(MARK, "w").close()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        super().defer(**keywords)

with DAG("table"):
    for number, command in enumerate(COMMANDS):
        ChaperoneOperator(task_id=f"case_{number}", command=command, spool=SPOOL)

with DAG("killed", default_args={"retry_delay": datetime.timedelta(seconds=1)}):
    ChaperoneOperator(task_id="ticking", command=TICKING, spool=SPOOL)
    command = f"echo ran >>{MARK}.ran; echo begun; : <{GATE}; echo done"
    DiesOnce(task_id="worker", command=command, spool=SPOOL, retries=1)
    ChaperoneOperator(task_id="marked", command="echo ready; exec sleep 1000", spool=SPOOL)

with DAG("agent"):
    argv = ["sh", "-c", "echo $WORD {{ params.word }}; exit 5"]
    spec = {"program": {"env": {"WORD": "{{ task.task_id }}"}}}
    common = {"argv": argv, "spec": spec, "params": {"word": "out"}}
    ChaperoneOperator(task_id="connection", chaperone_conn_id="agent", **common)
    ChaperoneOperator(task_id="url", spool=URL, **common)

with DAG("far"):
    command = "echo ${SSH_CONNECTION:+far}; exit 6"
    spec = {"remote": {"options": SSH_OPTIONS}}
    ChaperoneOperator(task_id="far", command=command, spool=SPOOL, ssh_conn_id="host", spec=spec)

with DAG("many"):
    commands = [f"echo {number}; : <{GATE}" for number in range(MANY)]
    ChaperoneOperator.partial(task_id="one", spool=SPOOL).expand(command=commands)
"""


def dags(spool, place, agent, sshd):
    gate = str(place / "gate")
    values = {
        "SPOOL": str(spool),
        "URL": agent.spool_url,
        "SSH_OPTIONS": {
            name: sshd.options[name] for name in sshd.options if name != "IdentityFile"
        },
        "MARK": str(place / "mark"),
        "GATE": gate,
        "COMMANDS": [command for command, *_ in TABLE.values()],
        "TICKING": TICKING.replace("GATE", gate),
        "MANY": MANY,
    }
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + DAGS


@pytest.fixture
def place(tmp_path, spool):
    os.mkfifo(tmp_path / "gate")
    yield tmp_path
    end_all(spool)


def test_standin_of_the_other_tests_is_called_as_the_real_one(tmp_path):
    python = f"{VENV}/bin/python"
    if not os.path.exists(python):
        absent(f"needs Airflow in {VENV}: bin/test --long airflow")
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": ROOT}
    command = [python, "-m", "spool_tests.support.airflow_standin"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_table(place, spool, sshd, told):
    """One test, because there is one Airflow."""
    lines = []

    def says(line):
        told(line)
        lines.append(line)

    with served(place) as agent:
        airflow = Airflow(place / "airflow", dags(spool, place, agent, sshd))
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
        airflow.env["AIRFLOW_CONN_HOST"] = json.dumps(
            {
                "conn_type": "ssh",
                "host": sshd.address,
                "port": sshd.port,
                "login": me(),
                "extra": {"key_file": sshd.options["IdentityFile"]},
            }
        )
        airflow.env["CHAPERONE_TOKEN_FILE"] = str(agent.token_files["run"])
        airflow.env["CHAPERONE_CA"] = str(agent.ca)
        with airflow:
            says(versions(airflow))
            killed_parts(airflow, place, spool, says)
            through_an_agent(airflow, says)
            over_ssh(airflow, says)
            ends_by_themselves(airflow, says)
            many_at_a_time(airflow, place, spool, says)
    until(lambda: os.listdir(spool / ".running") == [], HANGS_S)
    if os.environ.get("CHAPERONE_DOCS"):
        keep(lines)


def keep(lines):
    """Put the lines into the docs."""
    with open(PAGE) as file:
        text = file.read()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    shown = "".join(f"    {line}\n" for line in lines)
    with open(PAGE, "w") as file:
        file.write(f"{before}{BEGIN}\n\n::\n\n{shown}\n{END}{after}")


@contextlib.contextmanager
def opened(gate):
    """Let the programs that wait at the FIFO go on, and those that come."""
    fd = os.open(gate, os.O_RDWR)  # without waiting for one
    try:
        yield
    finally:
        os.close(fd)


def versions(airflow):
    command = [
        f"{VENV}/bin/python",
        "-c",
        "import airflow, sys; print(airflow.__version__, sys.version.split()[0])",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=airflow.env)
    version, python = done.stdout.split()[-2:]
    return f"Airflow {version}, Python {python}, {datetime.date.today()}"


def ends_by_themselves(airflow, says):
    run = airflow.begin("table")
    states = airflow.ended(run, HANGS_S)
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
        says(f"{name}: {states[task]}, {how}, {len(shown)} of {len(lines)} lines")
        assert found == (state, ending, len(lines), True), name


def through_an_agent(airflow, says):
    run = airflow.begin("agent")
    assert airflow.ended(run, HANGS_S) == {"connection": "failed", "url": "failed"}
    for task, how in (("connection", "a connection"), ("url", "its URL")):
        assert airflow.xcom(run, task)["return_code"] == 5
        assert airflow.log(run, task) == [f"{task} out"]
        says(f"through an agent, by {how}: failed, 5, 1 of 1 lines")


def over_ssh(airflow, says):
    run = airflow.begin("far")
    assert airflow.ended(run, HANGS_S) == {"far": "failed"}
    assert airflow.xcom(run, "far")["return_code"] == 6
    assert airflow.log(run, "far") == ["far"]
    says("over SSH, by a connection: failed, 6, 1 of 1 lines")


def killed_parts(airflow, place, spool, says):
    run = airflow.begin("killed")
    until(lambda: [*airflow.states(run).values()] == ["deferred"] * 3, HANGS_S)
    until(lambda: len(airflow.log(run, "ticking")) >= 20, HANGS_S)
    assert (place / "mark.ran").read_text() == "ran\n" * 2
    airflow.ask(f"{run}/taskInstances/marked", {"new_state": "failed"}, "PATCH")
    marked = until(lambda: held(spool, "marked"), HANGS_S)
    status = until(lambda: marked.status().is_final() and marked.status(), HANGS_S)
    assert (status.signal, status.stop["by"]) == ("SIGTERM", "airflow")
    says("marked failed while deferred: SIGTERM by airflow")
    for service in ("triggerer", "scheduler"):
        airflow.kill(service)
        airflow.start(service)
    assert not held(spool, "ticking").status().is_final()
    with opened(place / "gate"):
        states = airflow.ended(run, HANGS_S)
    shown = airflow.log(run, "ticking")
    assert shown == [f"tick {number}" for number in range(TICKS)]
    how = f"{states['ticking']}, {len(shown)} of {TICKS} lines once each"
    says(f"triggerer and scheduler killed: {how}")
    assert states == {"ticking": "success", "worker": "success", "marked": "failed"}
    assert airflow.log(run, "worker", attempt=2) == ["begun", "done"]
    says("worker killed behind its start: the program is stopped, the next try has 2 of 2 lines")


def held(spool, task):
    return next(
        (run for run in api.Spool(spool).all() if run.run_id.startswith(f"killed.{task}-")), None
    )


def many_at_a_time(airflow, place, spool, says):
    run = airflow.begin("many")

    def states():
        return [each["state"] for each in airflow.tasks(run).values()]

    # The spool first: many questions to Airflow would take the cores from it.
    live = spool / ".running"
    until(lambda: len(os.listdir(live)) == MANY, HANGS_S)
    until(lambda: states() == ["deferred"] * MANY, HANGS_S)
    with opened(place / "gate"):
        until(lambda: os.listdir(live) == [], HANGS_S)
        until(lambda: all(state in ENDED for state in states()), HANGS_S)
    assert states() == ["success"] * MANY
    for index in range(MANY):
        assert airflow.log(run, "one", index) == [str(index)]
    says(f"{MANY} tasks: all deferred at a time, {MANY} of {MANY} lines")
