"""
A stand-in of the names of Airflow 3.3 that `chaperone.integrations` uses.

Knows: what Airflow does with a few classes and functions.  Must not know: how chaperone uses them.
`bin/test --long airflow` tries the operator in a real one, and runs this module with the Python of
that: it prints where the stand-in and the real one differ.
"""

import importlib
import inspect
import json
import logging
import sys
import types


class AirflowException(Exception):  # noqa: N818  its name there
    """A task has failed."""


class TaskDeferred(BaseException):
    """A task waits for a trigger."""

    def __init__(self, *, trigger, method_name, kwargs=None, timeout=None):
        self.trigger, self.method_name = trigger, method_name
        self.kwargs, self.timeout = kwargs, timeout


class BaseOperator:
    def __init__(self, *, task_id, execution_timeout=None, do_xcom_push=True):
        self.task_id = task_id
        self.execution_timeout = execution_timeout
        self.do_xcom_push = do_xcom_push
        self.log = logging.getLogger("airflow.task")

    def defer(self, *, trigger, method_name, kwargs=None, timeout=None):
        raise TaskDeferred(trigger=trigger, method_name=method_name, kwargs=kwargs, timeout=timeout)


class Connection:
    def __init__(self, host=None, login=None, port=None, schema=None, password=None, **extra):
        self.host, self.login, self.port = host, login, port
        self.schema, self.password = schema, password
        self.extra_dejson = extra


class BaseHook:
    connections = {}

    @classmethod
    def get_connection(cls, conn_id):
        return cls.connections[conn_id]

    @classmethod
    async def aget_connection(cls, conn_id):
        return cls.connections[conn_id]


class BaseTrigger:
    def __init__(self):
        self.task_instance = None
        self.log = logging.getLogger("airflow.triggers")


class TriggerEvent:
    def __init__(self, payload):
        self.payload = payload


class TaskInstance:
    """What an operator and a trigger know of a try of a task."""

    def __init__(self, task_id="task", try_number=1, run_id="manual__2026-11-26T01:02:03+00:00"):
        self.dag_id, self.task_id, self.run_id = "dag", task_id, run_id
        self.map_index, self.try_number = -1, try_number
        self.pushed = {}

    def xcom_push(self, key, value):
        self.pushed[key] = json.loads(json.dumps(value))


class Conf:
    settings = {}

    def get(self, section, key):
        return self.settings[section, key]


def context_to_airflow_vars(context, in_env_var_format=False):
    return {"AIRFLOW_CTX_TASK_ID": context["ti"].task_id}


def log_filename_template_renderer():
    return lambda ti, try_number: f"{ti.dag_id}/{ti.task_id}/attempt={try_number}.log"


MODULES = {
    "airflow": {},
    "airflow.configuration": {"conf": Conf()},
    "airflow.sdk": {"BaseHook": BaseHook, "BaseOperator": BaseOperator},
    "airflow.sdk.exceptions": {"AirflowException": AirflowException, "TaskDeferred": TaskDeferred},
    "airflow.sdk.execution_time": {},
    "airflow.sdk.execution_time.context": {"context_to_airflow_vars": context_to_airflow_vars},
    "airflow.triggers": {},
    "airflow.triggers.base": {"BaseTrigger": BaseTrigger, "TriggerEvent": TriggerEvent},
    "airflow.utils": {},
    "airflow.utils.helpers": {"log_filename_template_renderer": log_filename_template_renderer},
}


# What no import of these names gives: an instance has these attributes, or more.
INSTANCES = {
    "airflow.sdk.Connection": Connection(),
    "airflow.sdk.BaseOperator": BaseOperator(task_id="task"),
    "airflow.sdk.execution_time.task_runner.RuntimeTaskInstance": TaskInstance(),
    "airflow.triggers.base.BaseTrigger": BaseTrigger(),
    "airflow.triggers.base.TriggerEvent": TriggerEvent("payload"),
}
OURS = {"pushed"}  # attributes that tests look at


def differences():
    """In what the real Airflow, which is importable, is not like this: sentences."""
    found = []
    for module, values in MODULES.items():
        for name, ours in values.items():
            real = getattr(importlib.import_module(module), name)
            found += differing(f"{module}.{name}", ours, real)
    for path, ours in INSTANCES.items():
        module, _, name = path.rpartition(".")
        real = getattr(importlib.import_module(module), name)
        found += differing(path, type(ours), real, ("xcom_push",))
        found += [
            f"{path} has no attribute {attribute!r}"
            for attribute in vars(ours).keys() - OURS
            if not has(real, attribute)
        ]
    return sorted(set(found))


def has(cls, attribute):
    """Whether instances of a class have an attribute, as far as the class says it."""
    names = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    return attribute in names or hasattr(cls, attribute)


def differing(path, ours, real, methods=None):
    """In what a class, an instance or a function is not called as the real one."""
    if inspect.isfunction(ours) or inspect.ismethod(ours):
        return called(path, ours, real)
    found = []
    if inspect.isclass(ours) and issubclass(ours, Exception) != issubclass(real, Exception):
        found.append(f"{path} is an Exception in one of both")
    for name in methods or vars(ours if inspect.isclass(ours) else type(ours)):
        function = getattr(ours, name, None)
        if inspect.isfunction(function) or inspect.ismethod(function):
            found += called(f"{path}.{name}", function, getattr(real, name, None))
    return found


def called(path, ours, real):
    """In what a call that the stand-in takes would be taken differently by the real one."""
    if real is None:
        return [f"{path} is missing"]
    found = []
    if inspect.iscoroutinefunction(ours) != inspect.iscoroutinefunction(real):
        found.append(f"{path} is to be awaited in one of both")
    mine, theirs = (inspect.signature(each).parameters for each in (ours, real))
    more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in theirs.values())
    for name, parameter in mine.items():
        if name not in theirs:
            found += [] if more else [f"{path} takes no {name!r}"]
        elif (parameter.kind, parameter.default) != (theirs[name].kind, theirs[name].default):
            found.append(f"{path} takes {theirs[name]}, the stand-in {parameter}")
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in theirs.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in variable
        if needed and name not in mine:
            found.append(f"{path} wants {name!r}")
    return found


def have():
    """Have these names be importable as Airflow's."""
    for name, values in MODULES.items():
        module = sys.modules[name] = types.ModuleType(name)
        for key, value in values.items():
            setattr(module, key, value)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)


if __name__ == "__main__":
    print(json.dumps(differences()))
