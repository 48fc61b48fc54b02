"""
A real Apsis server with programs that chaperone holds; for `spool_tests/integrations/apsis` alone,
which installs Apsis. Nothing here is run by bin/test.
"""

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import signal
import socket
import ssl
import subprocess
import time

import pytest
import uvloop

from chaperone import api
from chaperone.agent.client.streaming import connected
from spool_tests.support import agents
from spool_tests.support import apsis as standin
from spool_tests.support.waiting import until

client = pytest.importorskip("apsis.service.client")
RUNS = 300
HANGS_S = 3600  # a busy machine takes long; what takes longer than this hangs


class Server:
    """An Apsis server in a directory: its database, its jobs, its log."""

    def __init__(self, place, spool):
        self.place, self.spool = place, spool
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (place / "jobs").mkdir()
        self.config = {
            "database": {"path": str(place / "apsis.db")},
            "job_dir": str(place / "jobs"),
        }
        self.config["chaperone"] = {"spool": str(spool)}
        (place / "config.yaml").write_text(json.dumps(self.config))  # which is YAML too
        subprocess.run(["apsisctl", "create", place / "apsis.db"], check=True)
        self.client = client.Client(("127.0.0.1", self.port))
        self.process = None

    def job(self, name, **program):
        kind = "ChaperoneProgram" if "argv" in program else "ChaperoneShellProgram"
        program["type"] = f"chaperone.integrations.apsis.{kind}"
        job = {"params": ["n"], "program": program}
        (self.place / f"jobs/{name}.yaml").write_text(json.dumps(job))

    def start(self):
        command = ["apsisctl", "serve", "--config", self.place / "config.yaml"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.place / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.client.wait_running(HANGS_S)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def schedule(self, name, n=0):
        return self.client.schedule(name, {"n": str(n)})["run_id"]

    def run(self, run_id):
        return self.client.get_run(run_id)

    def ended(self, run_id, timeout=HANGS_S):
        early = ("new", "scheduled", "waiting", "starting", "running", "stopping")
        until(lambda: self.run(run_id)["state"] not in early, timeout)
        return self.run(run_id)

    def running(self, run_id):
        until(
            lambda: self.run(run_id)["state"] not in ("new", "scheduled", "waiting", "starting"),
            HANGS_S,
        )
        return self.run(run_id)

    def output(self, run_id):
        return self.client.get_output(run_id, "output")

    def held(self, run_id):
        """The run as chaperone has it."""
        return api.Spool(self.spool)[self.run(run_id)["meta"]["program"]["chaperone"]["run_id"]]


@pytest.fixture
def server(tmp_path, spool, request):
    made = Server(tmp_path, spool)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.terminate()
        made.process.wait(HANGS_S)
    if "binds" not in request.node.name:
        shown = (tmp_path / "log").read_text()
        assert "Traceback" not in shown, shown


def collected(spool):
    return os.listdir(spool / ".running") == os.listdir(spool / ".ended") == []


LINES = """
i=0
while [ $i -lt 400 ]; do echo line $i; echo err $i >&2; i=$((i+1)); sleep 0.02; done
exit 3
"""
EXPECTED = "".join(f"line {i}\nerr {i}\n" for i in range(400)).encode()


def test_server_is_killed_in_mid_run_and_each_line_arrives_once(server, told):
    server.job("noisy", command=LINES)
    server.job("short", command="echo begun; until [ -e {{ n }} ]; do sleep 0.05; done; echo done")
    server.job(
        "trap",
        command="trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done",
        spec={"stop": {"to": "program"}},
    )
    server.start()
    go = server.place / "go"
    noisy, short, trap = (
        server.schedule("noisy"),
        server.schedule("short", go),
        server.schedule("trap"),
    )
    for run_id in (noisy, short, trap):
        assert server.running(run_id)["state"] == "running"
    held = {run_id: server.held(run_id) for run_id in (noisy, short, trap)}
    kills = 0
    while not held[noisy].status().is_final():
        seen = held[noisy].size()
        server.kill()
        kills += 1
        go.touch()  # one of them ends while there is no server
        until(
            lambda seen=seen: held[noisy].size() > seen or held[noisy].status().is_final(), HANGS_S
        )
        until(lambda: held[short].status().is_final(), HANGS_S)
        server.start()
    ended = server.ended(noisy)
    assert (ended["state"], server.output(noisy)) == ("failure", EXPECTED)
    assert ended["meta"]["program"]["status"]["exit_code"] == 3
    assert (server.ended(short)["state"], server.output(short)) == ("success", b"begun\ndone\n")
    server.client.stop_run(trap)
    ended = server.ended(trap)
    assert (ended["state"], server.output(trap)) == ("failure", b"ready\nbye\n")
    assert ended["meta"]["program"]["stop"]["by"] == "apsis"
    until(lambda: collected(server.spool), HANGS_S)
    told(f"SIGKILL of the server in mid-run: {kills} times, 800 lines of 800 once each")


def test_300_runs_at_a_time_share_one_inotify_instance(server, told):
    server.job(
        "many",
        command="echo begun {{ n }}; while [ ! -e "
        + str(server.place / "go")
        + " ]; do sleep 1; done; echo ended {{ n }}",
    )
    server.start()
    begun = time.monotonic()
    runs = {n: server.schedule("many", n) for n in range(RUNS)}
    for run_id in runs.values():
        server.running(run_id)
    running_s = time.monotonic() - begun
    states = {server.run(run_id)["state"] for run_id in runs.values()}
    assert states == {"running"}
    fds = f"/proc/{server.process.pid}/fd"
    links = []
    for fd in os.listdir(fds):
        with contextlib.suppress(FileNotFoundError):  # of a request that has been answered
            links.append(os.readlink(f"{fds}/{fd}"))
    assert links.count("anon_inode:inotify") == 1
    server.kill()
    server.start()
    (server.place / "go").touch()
    begun = time.monotonic()
    for n, run_id in runs.items():
        assert server.ended(run_id)["state"] == "success"
        assert server.output(run_id) == f"begun {n}\nended {n}\n".encode()
    until(lambda: collected(server.spool), HANGS_S)
    told(
        f"{RUNS} runs at a time: running after {running_s:.1f} s; the server was killed, and all "
        f"ended {time.monotonic() - begun:.1f} s after the last was allowed to"
    )


def test_runs_of_an_agent_outlive_server_and_agent(server, tmp_path, monkeypatch, told):
    runs = 30
    with agents.served(tmp_path) as agent:
        monkeypatch.setenv("CHAPERONE_TOKEN_FILE", str(agent.token_files["run"]))
        monkeypatch.setenv("CHAPERONE_CA", str(agent.ca))
        command = "echo begun {{ n }}; : <" + str(server.place / "gate") + "; echo ended {{ n }}"
        os.mkfifo(server.place / "gate")
        server.job("far", command=command, spool=agent.spool_url)
        server.start()
        scheduled = {n: server.schedule("far", n) for n in range(runs)}
        for run_id in scheduled.values():
            assert server.running(run_id)["state"] == "running"
        agent.kill()
        server.kill()
        agent.start()
        server.start()
        gate = os.open(server.place / "gate", os.O_RDWR)
        for n, run_id in scheduled.items():
            assert server.ended(run_id)["state"] == "success"
            assert server.output(run_id) == f"begun {n}\nended {n}\n".encode()
        os.close(gate)
        until(lambda: collected(agent.spool), 300)
    told(f"{runs} runs of an agent, which was killed with the server: each line once")


def test_connection_that_is_cancelled_within_its_handshake_leaves_no_error():
    """A new run ends the stream of all runs, which may be in its handshake; uvloop is Apsis's."""
    errors = []

    class Cancelling(ssl.SSLObject):
        def do_handshake(self):
            task.cancel()
            super().do_handshake()

    context = ssl.create_default_context()
    context.sslobject_class = Cancelling
    agents.authority().configure_trust(context)

    async def main(port):
        nonlocal task
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, error: errors.append(error))

        def be_busy():  # so long that the server answers within the turn
            loop.call_soon(time.sleep, 0.02)
            loop.call_later(0.001, be_busy)

        be_busy()
        for _ in range(10):
            task = loop.create_task(connected("127.0.0.1", port, context, "127.0.0.1"))
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.02)

    task = None
    with agents.silent() as (port, _):
        uvloop.run(main(port))
    assert errors == []


def test_program_that_can_not_be_started_or_binds_to_no_spec_is_an_error(server):
    server.job("nowhere", argv=["/nowhere"])
    server.job("host", argv=["true"], remote={"host": "{{ n }}"})
    server.start()
    run_id = server.schedule("nowhere")
    assert server.ended(run_id)["state"] == "error"
    messages = [line["message"] for line in server.client.get_run_log(run_id)]
    assert "error: error: unable to run '/nowhere': No such file or directory" in messages
    run_id = server.schedule("host", "-oProxyCommand=x")
    assert server.ended(run_id)["state"] == "error"


# -- the stand-in


def names():
    for module, values in standin.MODULES.items():
        for value in values:
            if not inspect.isclass(value):
                yield module, value.__name__, value
            else:
                for name, method in vars(value).items():
                    if inspect.isfunction(inspect.unwrap(getattr(method, "__func__", method))):
                        yield module, f"{value.__name__}.{name}", getattr(value, name)


@pytest.mark.parametrize(
    ("module", "name", "ours"), list(names()), ids=lambda value: getattr(value, "__name__", value)
)
def test_standin_is_called_as_the_real_one(module, name, ours):
    real = importlib.import_module(module)
    for part in name.split("."):
        real = getattr(real, part)
    assert signature(ours) == signature(real)


def signature(function):
    """How it is called: each parameter's name, kind and default; whether it is to be awaited."""
    parameters = inspect.signature(function).parameters.values()
    called = [(each.name, each.kind.name, each.default) for each in parameters]
    return called, inspect.iscoroutinefunction(function), inspect.isclass(function)


CALLS = """
join_args(["echo", "a b"])
template_expand("a {{ b }}{{c}}", {"b": 1, "c": "x"})
ifkey("a", 1, 1), ifkey("a", 2, 1), nkey("a", None), nkey("a", 0)
get_cfg({"a": {"b": 1}}, "a.b", None), get_cfg({}, "a.b", 7)
Stop().to_jso(), Stop.from_jso({"signal": "INT", "grace_period": 5}).bind({}).to_jso()
Stop.from_jso({"grace_period": None}).bind({}).grace_period
BoundStop.from_jso({"signal": 2, "grace_period": 5}).to_jso(), BoundStop().to_jso()
Timeout.from_jso({"duration": "5"}).to_jso(), Timeout.from_jso({"duration": "5"}).bind({}).to_jso()
get_global_runtime_timeout({})
get_global_runtime_timeout({"program": {"timeout": {"duration": 5}}})
program_outputs(b"x")["output"].data, program_outputs(b"x")["output"].compression
Stop.from_jso({"other": 1})
Timeout.from_jso({})
""".strip().splitlines()


@pytest.mark.parametrize("call", CALLS)
def test_standin_returns_what_the_real_one_returns(call):
    def outcome(of):
        found = {
            value.__name__: of(module, value)
            for module, values in standin.MODULES.items()
            for value in values
        }
        try:
            return str(eval(call, found)).replace("apsis.program.base.", "")
        except ValueError as error:
            return type(error).__name__, str(error)

    def real(module, value):
        return getattr(importlib.import_module(module), value.__name__)

    assert outcome(lambda module, value: value) == outcome(real)
