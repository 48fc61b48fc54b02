"""
A stand-in of the names of Airflow 3.3 that `chaperone.integrations` uses.

Knows: what Airflow does with a few classes and functions.  Must not know: how chaperone uses them.
`bin/test --long airflow` tries the operator in a real one.
"""

import json
import logging
import sys
import types


class AirflowException(Exception):  # noqa: N818  its name there
    """A task has failed."""


class TaskDeferred(Exception):  # noqa: N818
    """A task waits for a trigger."""

    def __init__(self, **fields):
        self.fields = fields


class BaseOperator:
    def __init__(self, *, task_id, execution_timeout=None, do_xcom_push=True):
        self.task_id = task_id
        self.execution_timeout = execution_timeout
        self.do_xcom_push = do_xcom_push
        self.log = logging.getLogger("airflow.task")

    def defer(self, **fields):
        raise TaskDeferred(**fields)


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
    "airflow.sdk.exceptions": {"AirflowException": AirflowException},
    "airflow.sdk.execution_time": {},
    "airflow.sdk.execution_time.context": {"context_to_airflow_vars": context_to_airflow_vars},
    "airflow.triggers": {},
    "airflow.triggers.base": {"BaseTrigger": BaseTrigger, "TriggerEvent": TriggerEvent},
    "airflow.utils": {},
    "airflow.utils.helpers": {"log_filename_template_renderer": log_filename_template_renderer},
}


def have():
    """Have these names be importable as Airflow's."""
    for name, values in MODULES.items():
        module = sys.modules[name] = types.ModuleType(name)
        for key, value in values.items():
            setattr(module, key, value)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
