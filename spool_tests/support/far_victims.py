"""
What is killed of runs with a far side, and of reap and gc.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess

from chaperone.model.events import Ended, Lost
from chaperone.spool import gc
from chaperone.spool import reap as reaping
from spool_tests.support import crash
from spool_tests.support.processes import processes_with
from spool_tests.support.victims import (
    HELD,
    Cold,
    Durable,
    Guard,
    Launcher,
    Starter,
    Warm,
    ends_told,
    looked,
)
from spool_tests.support.waiting import until


class Ssh(Cold):
    """A chaperone that holds a program over ssh, killed: the program over there goes with it."""

    over_ssh = True

    def trace(self, tracer):
        """It has no guard."""
        tracer.run(self.command(*self.verb, self.spec_file()), env=self.env)


class Survive(Cold):
    """
    A chaperone whose program may outlive it, killed: it is adopted, and ends as if nothing had
    been.
    """

    spec = {"on_disconnect": "survive", "lease": 40}
    states = ("unattended", "terminated", "error")

    def trace(self, tracer):
        """It has no guard."""
        tracer.run(self.command(*self.verb, self.spec_file()), env=self.env)

    def settle(self):
        """What may live on does so; what has ended leaves nothing."""
        if not (self.spool / "r").exists() or self.is_over():
            self.forget()
            super().settle()

    def is_over(self):
        """
        Whether the far side need be empty: a chaperone that was killed after it had published
        leaves the far side to its lease.
        """
        return (self.spool / "r" / "status.json").exists() and not (
            self.spool / "r" / "lock"
        ).exists()

    def forget(self):
        try:
            until(self.is_forgotten, self.spec["lease"] + 20 if self.patient else 2)
        except AssertionError:
            if self.patient:
                raise
            until(self.is_killed)  # before that it may still write
            shutil.rmtree(self.far)

    def is_killed(self):
        """Kill what lives on the far side: whether there is nothing any more."""
        found = self.far_processes()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    def is_forgotten(self):
        for pid, command in self.far_processes().items():
            if (
                command == "sleep 60 "
            ):  # for a minute the far side keeps the sign that a run never began
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return not self.far.exists() or not list(self.far.iterdir())

    def may_have_started(self, ran):
        """What was on its way to the far side starts there."""
        return (ran, 1)

    def far_processes(self):
        marks = [f"CRASH={self.directory}".encode(), *([self.server.mark] if self.over_ssh else [])]
        return {pid: command for mark in marks for pid, command in processes_with(mark).items()}

    def recover(self, before):
        """reap lets it live, adopt takes it to its end."""
        reaping.reap(str(self.spool))
        if before is not None and before["state"] == "unattended":
            assert looked(self.spool, "r")[1]["state"] == "unattended"
            assert self.called("adopt", "r") == (0, ""), self.said()
        status = json.loads((self.spool / "r" / "status.json").read_text())
        # What ran has its outcome in the status, what never began has none.
        assert status["state"] == ("terminated" if self.started() else "lost"), self.said()

    def said(self):
        return {
            name: (self.spool / "r" / name).read_text()
            for name in ("log", "running.json")
            if (self.spool / "r" / name).exists()
        }


class SurviveSsh(Survive):
    """The same over ssh."""

    over_ssh = True


class Adopt(Survive):
    """A chaperone that adopts, killed: another one adopts."""

    def prepare(self):
        spec = self.directory / "held.json"
        spec.write_text(json.dumps(self.run_spec(HELD)))
        first = subprocess.Popen(
            self.command("run", str(spec)),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            until(
                lambda: (
                    (self.spool / "r" / "stderr").exists()
                    and (self.spool / "r" / "stderr").stat().st_size
                )
            )
        finally:
            first.kill()
            first.wait()
        self.go.touch()

    def trace(self, tracer):
        tracer.run(self.command("adopt", "r"), env=self.env)


class AdoptSsh(Adopt):
    """The same over ssh."""

    over_ssh = True


class Reap(Cold):
    """`chaperone reap`, killed: it is done by the next one."""

    verb = ("reap",)
    hidden = {".sweep.lock", ".gone.0123456789abcdef.gone"}  # the directory is gc's to sweep
    wanted = {
        "r": ("lost", False),
        "half": ("terminated", True),
        "over": ("lost", False),
        "r0": ("terminated", True),
    }

    def prepare(self):
        """A spool with all that reap may find; made once, by real deaths, and copied."""
        template = self.directory.parent / "dead"
        if not template.exists():
            make_dead_spool(template, self)
        subprocess.run(["cp", "-a", template, self.spool], check=True)

    def trace(self, tracer):
        tracer.run(self.command(*self.verb), env=self.env)

    def check(self):
        self.settle()
        for run_id, (state, _) in self.wanted.items():
            alive, status = looked(self.spool, run_id)
            assert not alive and status["state"] == state
        kinds = {"lost": Lost, "terminated": Ended}
        assert sorted(ends_told(self.spool)) == sorted(
            (run_id, kinds[state]) for run_id, (state, _) in self.wanted.items()
        )
        assert {reaped.done for reaped in reaping.reap(str(self.spool))} <= {
            "lost",
            "finished",
            "swept",
        }
        assert reaping.reap(str(self.spool)) == []
        self.is_whole()
        assert self.runs() == set(self.wanted)
        for run_id, (state, _) in self.wanted.items():
            assert json.loads((self.spool / run_id / "status.json").read_text())["state"] == state
        self.is_collected()

    def agree(self, status, ran):
        pass


class Gc(Reap):
    """`chaperone gc`, killed: each run is there whole or not at all, and the next one goes on."""

    verb = ("gc", "--older", "0s", "--max-bytes", "0B", "--uncollected")

    def check(self):
        self.settle()
        left = self.runs()
        assert {"r", "over"} <= left
        for run_id in left:
            alive, status = looked(self.spool, run_id)
            assert not alive and status["state"] == self.wanted[run_id][0]
        ends_told(self.spool)
        summary = gc.gc(str(self.spool), older_s=-1, uncollected=True)
        assert (
            set(summary.removed) == left - {"r", "over"}
            and summary.live == 2
            and not summary.failed
        )
        assert not [path for path in self.spool.iterdir() if path.name.endswith(".gone")]
        assert {looked(self.spool, run_id)[1]["state"] for run_id in ("r", "over")} == {"lost"}
        reaping.reap(str(self.spool))
        self.is_whole()
        # An id that is free again is a new run's.
        spec = self.directory / "new.json"
        spec.write_text(json.dumps({"id": "half", "program": {"argv": ["true"]}}))
        assert (
            self.called("run", str(spec)) == (0, "")
            and looked(self.spool, "half")[1]["return_code"] == 0
        )
        self.is_collected()


KINDS = {
    kind.__name__: kind
    for kind in (
        Cold,
        Durable,
        Starter,
        Guard,
        Warm,
        Launcher,
        Ssh,
        Survive,
        SurviveSsh,
        Adopt,
        AdoptSsh,
        Reap,
        Gc,
    )
}


def make_dead_spool(path, kind):
    """
    A spool of deaths: a lost run, one whose lease is over, endings and a start half done, a
        deletion too.

    Args:
        kind (Cold): For its directory and its environment.
    """
    place = kind.directory / "dead"
    place.mkdir()
    maker = Cold(place)

    def killed(run_id, point, **spec):
        text = json.dumps({**maker.run_spec(), "id": run_id, **spec})
        (place / "spec.json").write_text(text)
        tracer = crash.Tracer(place, point)
        tracer.run_below_guard(maker.words("run", str(place / "spec.json")), env=maker.env)
        assert tracer.has_killed() == (point is not None)

    killed("r0", None)
    killed("half", ("unlinkat", 1))
    killed("unborn", ("renameat", 2))
    killed("gone", None)
    os.rename(maker.spool / "gone", maker.spool / ".gone.0123456789abcdef.gone")
    (maker.spool / ".ended" / "gone").unlink()
    for run_id, spec in (("r", {}), ("over", {"on_disconnect": "survive", "lease": 1})):
        spec_file = place / "held.json"
        spec_file.write_text(json.dumps({**maker.run_spec(HELD), "id": run_id, **spec}))
        held = subprocess.Popen(
            maker.command("run", str(spec_file)),
            env=maker.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        until(
            lambda run_id=run_id: (
                (maker.spool / run_id / "stderr").exists()
                and (maker.spool / run_id / "stderr").stat().st_size
            )
        )
        os.kill(looked(maker.spool, run_id)[1]["chaperone_pid"], signal.SIGKILL)
        held.wait()
    maker.go.touch()
    maker.settle()
    until(lambda: looked(maker.spool, "over")[1]["state"] == "lost")
    os.rename(maker.spool, path)
