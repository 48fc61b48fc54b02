"""
A stand-in of the names of Apsis 2.4.3 that `chaperone.integrations` uses.

Knows: what Apsis does with a few classes and functions.  Must not know: how chaperone uses them.
`spool_tests/integrations/apsis CHECKOUT` runs the same tests with the real ones, and compares both.
"""

import contextlib
import dataclasses
import functools
import importlib
import re
import shlex
import sys
import types
from signal import Signals


class SchemaError(ValueError):
    """What is wrong with a job."""


@contextlib.contextmanager
def check_schema(jso):
    left = dict(jso)

    def pop(key, type=None, default=...):
        if key not in left and default is ...:
            raise SchemaError(f"missing key: {key}")
        if key not in left:
            return default
        value = left.pop(key)
        return value if type is None else type(value)

    try:
        yield pop
    except Exception as error:
        raise SchemaError(str(error)) from error
    if left:
        raise SchemaError(f"unexpected keys: {' '.join(left)}")


def nkey(name, value):
    return {} if value is None else {name: value}


def ifkey(name, value, default):
    return {} if value == default else {name: value}


def get_cfg(cfg, path, default):
    *outer, last = path.split(".")
    return functools.reduce(lambda inner, name: inner.get(name, {}), outer, cfg).get(last, default)


def template_expand(template, args):
    """As by Jinja2, for `{{ name }}` alone."""
    return re.sub(r"{{ *(\w+) *}}", lambda found: str(args[found[1]]), str(template))


def join_args(argv):
    return shlex.join(argv)


def _signal(name):
    return Signals[name if name.startswith("SIG") else f"SIG{name}"]


# -- apsis.program


class Program:
    def to_jso(self):
        return {"type": f"{type(self).__module__}.{type(self).__qualname__}"}

    def __eq__(self, other):
        return type(other) is type(self) and other.to_jso() == self.to_jso()


class RunningProgram:
    def __init__(self, run_id):
        self.run_id = run_id


class ProgramRunning:
    def __init__(self, run_state, *, meta={}, times={}):  # noqa: B006
        self.run_state = run_state
        self.meta = meta


class ProgramUpdate:
    def __init__(self, *, meta=None, outputs=None):
        self.meta = meta
        self.outputs = outputs


class ProgramSuccess:
    def __init__(self, *, meta={}, times={}, outputs={}):  # noqa: B006
        self.meta = meta
        self.outputs = outputs


class ProgramError(RuntimeError):
    def __init__(self, message, *, meta={}, times={}, outputs={}):  # noqa: B006
        super().__init__(message)
        self.message = message
        self.meta = meta
        self.outputs = outputs


class ProgramFailure(RuntimeError):
    def __init__(self, message, *, meta={}, times={}, outputs={}):  # noqa: B006
        self.message = message
        self.meta = meta
        self.outputs = outputs


def program_outputs(output, *, length=None, compression=None):
    return {"output": types.SimpleNamespace(data=output, compression=compression)}


@dataclasses.dataclass
class Timeout:
    duration: float
    signal: str

    @classmethod
    def from_jso(cls, jso):
        with check_schema(jso) as pop:
            return cls(pop("duration"), pop("signal", str, "SIGTERM"))

    def to_jso(self):
        return {"duration": self.duration, "signal": self.signal}

    def bind(self, args):
        duration = float(template_expand(self.duration, args))
        return type(self)(duration, _signal(template_expand(self.signal, args)).name)


def get_global_runtime_timeout(cfg):
    duration = get_cfg(cfg, "program.timeout.duration", None)
    name = get_cfg(cfg, "program.timeout.signal", "SIGTERM")
    return None if duration is None else Timeout(duration, name)


@dataclasses.dataclass
class Stop:
    signal: str = "SIGTERM"
    grace_period: str = "60"

    def to_jso(self):
        grace = ifkey("grace_period", self.grace_period, Stop.grace_period)
        return {**ifkey("signal", self.signal, Stop.signal), **grace}

    @classmethod
    def from_jso(cls, jso):
        with check_schema(jso) as pop:
            return cls(pop("signal", str, cls.signal), pop("grace_period", None, cls.grace_period))

    def bind(self, args):
        grace = self.grace_period
        grace = None if grace is None else float(template_expand(grace, args))
        return BoundStop(_signal(template_expand(self.signal, args)), grace)


@dataclasses.dataclass
class BoundStop:
    signal: Signals = Signals.SIGTERM
    grace_period: float = 60

    def to_jso(self):
        grace = ifkey("grace_period", self.grace_period, BoundStop.grace_period)
        return {**ifkey("signal", self.signal, BoundStop.signal), **grace}

    @classmethod
    def from_jso(cls, jso):
        with check_schema(jso) as pop:
            number = pop("signal", Signals, cls.signal)
            return cls(number, pop("grace_period", int, cls.grace_period))


MODULES = {
    "apsis": [],
    "apsis.exc": [SchemaError],
    "apsis.lib": [],
    "apsis.lib.json": [check_schema, ifkey, nkey],
    "apsis.lib.py": [get_cfg],
    "apsis.program": [],
    "apsis.program.base": [
        *(Program, RunningProgram, Timeout, get_global_runtime_timeout, program_outputs),
        *(ProgramRunning, ProgramUpdate, ProgramSuccess, ProgramFailure, ProgramError),
    ],
    "apsis.program.process": [Stop, BoundStop],
    "apsis.runs": [join_args, template_expand],
}


def have():
    """Have `apsis` be importable: the real one if it is installed, otherwise this."""
    try:
        importlib.import_module("apsis.program.base")
    except ImportError:
        for name, values in MODULES.items():
            module = sys.modules[name] = types.ModuleType(name)
            for value in values:
                setattr(module, value.__name__, value)
            above, _, last = name.rpartition(".")
            if above:
                setattr(sys.modules[above], last, module)
