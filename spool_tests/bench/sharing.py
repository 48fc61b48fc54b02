"""
Rows about shared connections and about engines: many starts to one host, one start, and what the
supervisor adds behind each engine.
"""

import json
import os
import time

from chaperone.launch import start as starting
from spool_tests.support import engines
from spool_tests.support.processes import processes_with

from . import lab as labs
from .table import Row, interleaved

COUNT = 100
AT_A_TIME = 8  # sshd refuses at ten that are not logged in yet


def share(lab, rounds):
    """
    100 starts of `true` at once to one host by a warm launcher: with masters there, from nothing,
    and each with a connection of its own; and one start alone. Against `ssh host true`.
    """
    row = Row("share", "starts over ssh on shared connections")
    sshd, user = lab.sshd()
    if sshd is None:
        row.note("no sshd could be started")
        return row
    spools = {}

    def spec(shared):
        remote = {**sshd.remote(user), "share": shared}
        return {
            "program": {"argv": ["true"], "cwd": "/"},
            "remote": remote,
            "timeouts": {"connect": 120},
        }

    def spool_of(name):
        if name not in spools:
            spools[name] = lab.new("spool")
            lab.launcher(spools[name])
        return spools[name]

    def all_ended(spool, count, shared):
        begun = time.perf_counter()
        names = [starting.start(spool, spec(shared), warm=True, env=lab.env) for _ in range(count)]
        for name in names:
            final = os.path.join(spool, name, "status.json")
            labs.until(lambda final=final: os.path.exists(final), timeout=120)
        seconds = time.perf_counter() - begun
        failed = [name for name in names if labs.status(spool, name)["return_code"] != 0]
        assert not failed, labs.status(spool, failed[0])
        return seconds

    def by_ssh():
        begun, running, left = time.perf_counter(), set(), COUNT
        while running or left:
            while left and len(running) < AT_A_TIME:
                running.add(lab.spawn([*sshd.argv(user), "true"]))
                left -= 1
            pid, status = os.waitpid(-1, 0)
            assert pid not in running or status == 0
            running.discard(pid)
        return time.perf_counter() - begun

    def from_nothing():
        spool = lab.new("spool")
        lab.launcher(spool)
        seconds = all_ended(spool, COUNT, True)
        end_masters(spool)
        return seconds

    many = {
        f"ssh host true, {COUNT}, {AT_A_TIME} at a time": by_ssh,
        f"shared, {COUNT}, masters there": lambda: all_ended(spool_of("shared"), COUNT, True),
        f"shared, {COUNT}, from nothing": from_nothing,
        f"not shared, {COUNT}": lambda: all_ended(spool_of("own"), COUNT, False),
    }
    middle = row.figures_of(interleaved(min(rounds or 3, 10), many), "s")
    floor, there, nothing, own = middle.values()
    row.claim("shared, masters there / ssh", there / floor, "<=", 0.5)
    row.claim("shared, from nothing / ssh", nothing / floor, "<=", 0.7)
    row.claim("not shared / ssh", own / floor, "<=", 1.2)
    one = {
        "ssh host true": lambda: lab.ended([*sshd.argv(user), "true"]),
        "one start, shared": lambda: all_ended(spool_of("shared"), 1, True),
    }
    middle = row.figures_of(interleaved(rounds or 20, one), "ms", 1e3)
    row.claim(
        "one start, shared / ssh host true",
        middle["one start, shared"] / middle["ssh host true"],
        "<=",
        0.3,
    )
    end_masters(spool_of("shared"))
    return row


def idle(lab, rounds):
    """
    Memory on the near side of 100 idle remote runs, warm, shared and not: each page by the part
    that falls to a process (PSS), of all chaperones, ssh clients and masters.
    """
    row = Row("share-memory", f"memory of {COUNT} idle runs over ssh (PSS)")
    sshd, user = lab.sshd()
    if sshd is None:
        row.note("no sshd could be started")
        return row
    whole = {}
    for name, shared in (("not shared", False), ("shared", True)):
        spool = lab.new("spool")
        lab.launcher(spool)
        spec = {
            "program": {"argv": ["sleep", "1000"], "cwd": "/"},
            "remote": {**sshd.remote(user), "share": shared},
            "timeouts": {"connect": 300},
        }
        names = [starting.start(spool, spec, warm=True, env=lab.env) for _ in range(COUNT)]
        labs.until(lambda spool=spool, names=names: are_up(spool, names), timeout=300, pause=0.1)
        statuses = [labs.status(spool, name) for name in names]
        parts = {
            "chaperones": [status["chaperone_pid"] for status in statuses],
            "ssh clients": [status["connection"]["pid"] for status in statuses],
            "masters": masters(spool),
        }
        found = {part: [sum(map(labs.share_of_memory, pids))] for part, pids in parts.items()}
        whole[name] = row.figure(f"{name}, in all", [sum(sum(found.values(), []))], "MiB", 1 / 1024)
        for part, pids in parts.items():
            if pids:
                row.figure(f"{name}: {len(pids)} {part}", found[part], "MiB", 1 / 1024)
        for run_id in names:
            labs.ask(spool, run_id, "kill")
        labs.until(lambda spool=spool: not labs.live(spool), timeout=300, pause=0.1)
        end_masters(spool)
    row.note("the launcher and what runs on the far side are not in it")
    return row


def are_up(spool, names):
    return all(labs.status(spool, name).get("state") == "running" for name in names)


def masters(spool):
    """The pids of a spool's masters, by their log: a long path of a socket is not in their argv."""
    found = processes_with(b"ControlMaster=yes")
    return [
        pid
        for pid, command in found.items()
        if " -N -f " in command
        and any(
            os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"{spool}/.connect/")
            for fd in os.listdir(f"/proc/{pid}/fd")
        )
    ]


def end_masters(spool):
    """They would end by themselves when they were idle for a minute."""
    for pid in masters(spool):
        os.kill(pid, 15)


def engine_cost(lab, rounds):
    """
    What the supervisor adds to `srun` and `docker exec` of nothing: the whole run, less the same
    run here, less the bare command.
    """
    row = Row("engines", "cost of the supervisor behind engines")
    here = lab.spec(["true"])
    for kind, made in (("srun", slurm), ("docker", docker)):
        if not labs.has(kind):
            row.note(f"no {kind} is here")
            continue
        hop, bare, engine = made(lab)
        env, spool = {**lab.env, **engine.env}, lab.new("spool")
        remote = {"remote": {"hops": [hop]}}
        spec = lab.file("spec.json", json.dumps({"program": {"argv": ["true"]}, **remote}))
        variants = {
            f"{kind}, bare": lambda bare=bare, env=env: lab.ended(bare, env=env),
            "chaperone, here": lambda spool=spool: lab.ended([*labs.RUN, "--spool", spool, here]),
            f"chaperone, {kind}": lambda spec=spec, spool=spool, env=env: lab.ended(
                [*labs.RUN, "--spool", spool, spec], env=env
            ),
        }
        middle = row.figures_of(interleaved(rounds or 10, variants), "ms", 1e3)
        added = middle[f"chaperone, {kind}"] - middle[f"{kind}, bare"] - middle["chaperone, here"]
        row.claim(f"added by the supervisor behind {kind}, ms", added * 1e3, "<=", 60)
    return row


def slurm(lab):
    engine = engines.Slurm(lab.directory("slurm"))
    lab.at_end(engine.close)
    engine.begin_all()
    return {"srun": {}}, ["srun", "true"], engine


def docker(lab):
    engine = engines.Docker(lab.directory("docker"), lab.directory("images"))
    lab.at_end(engine.close)
    engine.begin_all()
    box = engine.container("busybox")
    return {"docker": {"container": box}}, ["docker", "exec", "-i", box, "true"], engine
