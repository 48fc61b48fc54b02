"""
Programs of Apsis jobs that chaperone holds: `ChaperoneProgram` and `ChaperoneShellProgram`.

Knows: the fields of a job, Apsis's and a spec's.  Must not know: how a run is started or followed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from apsis.exc import SchemaError
from apsis.lib.json import check_schema, ifkey, nkey
from apsis.program import base
from apsis.program.process import BoundStop, Stop
from apsis.runs import join_args, template_expand

from ..model.spec import checked
from .apsis_running import RunningChaperoneProgram
from .fields import merged

NEVER_S = 10.0**9  # 30 years: Apsis may wait for ever before SIGKILL, a spec may not
AT_ONCE_S = 0.001  # the timeout of a spec must be above 0


class _Program(base.Program):  # type: ignore[misc]
    """
    What the programs of a job and of a run have in common.

    Args:
        spool (str): A directory, or the URL of an agent's spool; None for `chaperone.spool` of the
            configuration of Apsis.
        remote (dict): As in a spec; None for a program on the host of the spool.
        spec (dict): Further fields of a spec.
        stop (Stop | BoundStop): Apsis's own.
        timeout (base.Timeout): Apsis's own; None for `program.timeout` of its configuration.
    """

    def __init__(
        self,
        *,
        spool: str | None = None,
        remote: dict[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
        stop: Any,
        timeout: Any = None,
    ) -> None:
        super().__init__()
        self.spool = spool
        self.remote = remote
        self.spec = spec or {}
        self.stop = stop
        self.timeout = timeout

    def to_jso(self) -> dict[str, Any]:
        """As Apsis keeps it in its database, and shows it."""
        return {
            **super().to_jso(),
            **nkey("spool", self.spool),
            **nkey("remote", self.remote),
            **ifkey("spec", self.spec, {}),
            **ifkey("stop", self.stop.to_jso(), {}),
            **nkey("timeout", self.timeout and self.timeout.to_jso()),
        }

    @staticmethod
    def _popped(pop: Callable[..., Any], stop: type) -> dict[str, Any]:
        return {
            "spool": pop("spool", str, None),
            "remote": pop("remote", dict, None),
            "spec": pop("spec", dict, None),
            "stop": pop("stop", stop.from_jso, stop()),  # type: ignore[attr-defined]
            "timeout": pop("timeout", base.Timeout.from_jso, None),
        }


class _JobProgram(_Program):
    """The program of a job: its strings are templates."""

    def _bound(self, argv: list[str], args: dict[str, Any]) -> BoundChaperoneProgram:
        bound = BoundChaperoneProgram(
            argv,
            spool=_expanded(self.spool, args),
            remote=_expanded(self.remote, args),
            spec=_expanded(self.spec, args),
            stop=self.stop.bind(args),
            timeout=self.timeout and self.timeout.bind(args),
        )
        checked(bound.run_spec("r0"), "/")
        return bound

    def _checked(self) -> Any:
        """Refuse at once what is wrong, unless it may be another thing once templates are gone."""
        text = json.dumps(self.to_jso())
        if "{{" not in text and "{%" not in text:
            try:
                self.bind({})
            except ValueError as error:
                raise SchemaError(str(error)) from error
        return self


class ChaperoneProgram(_JobProgram):
    """
    A program given by its argv.

    Args:
        argv (list): Strings.
    """

    def __init__(self, argv: list[str], **fields: Any) -> None:
        super().__init__(**{"stop": Stop(), **fields})
        self.argv = [str(word) for word in argv]

    def __str__(self) -> str:
        return str(join_args(self.argv))

    def bind(self, args: dict[str, Any]) -> BoundChaperoneProgram:
        """The program of a run, its templates expanded; raises SpecError if no spec fits."""
        return self._bound(_expanded(self.argv, args), args)

    def to_jso(self) -> dict[str, Any]:
        """As in a job."""
        return {**super().to_jso(), "argv": self.argv}

    @classmethod
    def from_jso(cls, jso: dict[str, Any]) -> ChaperoneProgram:
        """Made of a job's `program`; raises SchemaError if that is wrong."""
        with check_schema(jso) as pop:
            program = cls(pop("argv", list), **cls._popped(pop, Stop))
        return program._checked()  # type: ignore[no-any-return]


class ChaperoneShellProgram(_JobProgram):
    """
    A program given by its text for `/bin/sh -c`.

    Args:
        command (str): The text.
    """

    def __init__(self, command: str, **fields: Any) -> None:
        super().__init__(**{"stop": Stop(), **fields})
        self.command = str(command)

    def __str__(self) -> str:
        return self.command

    def bind(self, args: dict[str, Any]) -> BoundChaperoneProgram:
        """As of `ChaperoneProgram`."""
        return self._bound(["/bin/sh", "-c", _expanded(self.command, args)], args)

    def to_jso(self) -> dict[str, Any]:
        """As in a job."""
        return {**super().to_jso(), "command": self.command}

    @classmethod
    def from_jso(cls, jso: dict[str, Any]) -> ChaperoneShellProgram:
        """As of `ChaperoneProgram`."""
        with check_schema(jso) as pop:
            program = cls(pop("command", str), **cls._popped(pop, Stop))
        return program._checked()  # type: ignore[no-any-return]


class BoundChaperoneProgram(_Program):
    """
    The program of a run.

    Args:
        argv (list): Strings.
    """

    def __init__(self, argv: list[str], **fields: Any) -> None:
        super().__init__(**{"stop": BoundStop(), **fields})
        self.argv = argv

    def __str__(self) -> str:
        return str(join_args(self.argv))

    def to_jso(self) -> dict[str, Any]:
        """As in the database of Apsis."""
        return {**super().to_jso(), "argv": self.argv}

    @classmethod
    def from_jso(cls, jso: dict[str, Any]) -> BoundChaperoneProgram:
        """As of `to_jso`."""
        with check_schema(jso) as pop:
            return cls(pop("argv", list), **cls._popped(pop, BoundStop))

    def run_spec(self, run_id: str) -> dict[str, Any]:
        """
        The spec of a run, without an id.

        Args:
            run_id (str): Apsis's.
        Raises:
            SpecError: If `spec` has a field that is made of another one of the job.
        """
        grace = self.stop.grace_period
        fields: dict[str, Any] = {
            "program": {
                "argv": self.argv,
                "env": {"APSIS_RUN_ID": run_id},
                "merge_stderr": True,  # Apsis shows both streams as one
            },
            "stop": {
                "signal": self.stop.signal.name,
                "grace_period": NEVER_S if grace is None else grace,
            },
            "labels": {"apsis": run_id},
            **nkey("remote", self.remote),
        }
        if self.timeout is not None and self.timeout.signal == self.stop.signal.name:
            fields["timeouts"] = {"run": max(self.timeout.duration, AT_ONCE_S)}
        return merged({"id": None, **fields}, self.spec, "spec")

    def run(self, run_id: str, cfg: dict[str, Any]) -> RunningChaperoneProgram:
        """Start it."""
        return RunningChaperoneProgram(run_id, self, cfg)

    def connect(
        self, run_id: str, run_state: dict[str, Any], cfg: dict[str, Any]
    ) -> RunningChaperoneProgram:
        """Go on with it, after a restart of Apsis."""
        return RunningChaperoneProgram(run_id, self, cfg, run_state)


def _expanded(value: Any, args: dict[str, Any]) -> Any:
    """A JSON value with each string of it expanded as a template."""
    if isinstance(value, str):
        return template_expand(value, args)
    if isinstance(value, list):
        return [_expanded(inner, args) for inner in value]
    if isinstance(value, dict):
        return {name: _expanded(inner, args) for name, inner in value.items()}
    return value
