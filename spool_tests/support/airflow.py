"""
A real Airflow of a test: api-server, scheduler, dag-processor and triggerer, with SQLite.

Knows: the commands and the REST API of Airflow 3.  Must not know: chaperone.
`bin/test --long airflow` makes the environment that it runs in.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request

from spool_tests.support.places import ROOT
from spool_tests.support.processes import SERVERS
from spool_tests.support.waiting import absent, until

CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
VENV = os.environ.get("CHAPERONE_AIRFLOW") or os.path.join(CACHE, "chaperone-airflow")
SERVICES = ("api-server", "scheduler", "dag-processor", "triggerer")
ENDED = ("success", "failed", "upstream_failed", "skipped", "removed")
START_S = 300  # a service imports for a minute where other programs have the cores


class Airflow:
    """
    An Airflow in a directory of its own.

    Args:
        home (Path): An empty directory.
        dags (str): The text of its only DAG file.
    """

    def __init__(self, home, dags):
        if not os.path.exists(f"{VENV}/bin/airflow"):
            absent(f"needs Airflow in {VENV}: bin/test --long airflow")
        self.home = home
        (home / "dags").mkdir(parents=True)
        (home / "dags/tests.py").write_text(dags)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = {
            "CORE__DAGS_FOLDER": home / "dags",
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": "4",
            "CORE__MAX_ACTIVE_TASKS_PER_DAG": "1000",
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "CORE__DAGBAG_IMPORT_TIMEOUT": "300",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "API__HOST": "127.0.0.1",
            "API__PORT": port,
            "API__WORKERS": "1",
            "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "API_AUTH__JWT_LEEWAY": "600",
            "API__SECRET_KEY": secrets.token_hex(32),
            "DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "600",
            "LOGGING__BASE_LOG_FOLDER": home / "logs",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
            # A triggerer that is silent for so long has lost its triggers to another one.
            "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "60",
            "TRIGGERER__JOB_HEARTBEAT_SEC": "5",
            # The first answer takes long where other programs have the cores.
            "WORKERS__EXECUTION_API_TIMEOUT": "300",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        self.env = {f"AIRFLOW__{name}": str(value) for name, value in settings.items()}
        self.env |= {"AIRFLOW_HOME": str(home), "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1"}
        self.env |= {"PATH": f"{VENV}/bin:{os.environ['PATH']}", "HOME": str(home)}
        self.env |= {
            name: os.environ[name] for name in ("TEST_TOKEN", "LC_ALL") if name in os.environ
        }
        self.processes = {}
        self._token = None

    def run(self, *words):
        """A command of Airflow, to its end: its stdout."""
        command = [f"{VENV}/bin/airflow", *words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name):
        """Start a service; it is the leader of a session."""
        with open(self.home / f"{name}.out", "ab") as out:
            self.processes[name] = subprocess.Popen(
                [f"{VENV}/bin/airflow", name],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        SERVERS.add(self.processes[name].pid)

    def kill(self, name):
        """SIGKILL to a service and all that it has started in its session."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self):
        self.run("db", "migrate")
        try:
            for name in SERVICES:
                self.start(name)
            until(self.is_up, START_S, what="Airflow is up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for name in [*self.processes]:
            self.kill(name)

    def is_up(self):
        """Whether all services answer or beat."""
        for name, process in self.processes.items():
            assert process.poll() is None, (self.home / f"{name}.out").read_text()[-5000:]
        try:
            health = self.ask("/api/v2/monitor/health")
            parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
            return all(health[part]["status"] == "healthy" for part in parts)
        except OSError:
            return False

    def ask(self, path, body=None, method=None):
        """A question to its REST API: the JSON of the answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if path.startswith("/api/v2/dags"):
            if self._token is None:
                self._token = self.ask("/auth/token")["access_token"]
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code}: {error.read()[:2000]!r}") from error

    # -- what a user of it does

    def begin(self, dag):
        """Begin a run of a DAG, as soon as Airflow knows it: its path in the API."""
        until(
            lambda: any(each["dag_id"] == dag for each in self.ask("/api/v2/dags")["dags"]), START_S
        )
        run = self.ask(f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None})
        return f"/api/v2/dags/{dag}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"

    def tasks(self, run):
        """The task instances of a run, by their ids; one that is mapped by its index too."""
        found = self.ask(f"{run}/taskInstances?limit=100")
        instances = found["task_instances"]
        while len(instances) < found["total_entries"]:
            more = self.ask(f"{run}/taskInstances?limit=100&offset={len(instances)}")
            instances += more["task_instances"]
        return {(each["task_id"], each["map_index"]): each for each in instances}

    def states(self, run):
        """The states of the tasks that are not mapped."""
        return {name: each["state"] for (name, _), each in self.tasks(run).items()}

    def ended(self, run, timeout=600):
        """Wait for the end of all tasks of a run; their states."""
        until(
            lambda: (states := self.states(run)) and all(each in ENDED for each in states.values()),
            timeout,
        )
        return self.states(run)

    def xcom(self, run, task, index=-1):
        """The value that a task has returned."""
        path = f"{run}/taskInstances/{task}/xcomEntries/return_value?map_index={index}"
        value = self.ask(f"{path}&deserialize=false")["value"]
        return json.loads(value) if isinstance(value, str) else value

    def log(self, run, task, index=-1, attempt=1):
        """The lines of a task's log that are output of its program, as the web page shows them."""
        path = f"{run}/taskInstances/{task}/logs/{attempt}?full_content=true&map_index={index}"
        shown = self.ask(path)["content"]
        return [each["event"] for each in shown if each.get("logger") == "chaperone.output"]
