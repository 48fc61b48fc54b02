"""
Tasks of Airflow whose programs chaperone holds: `ChaperoneOperator`.

Knows: what Airflow 3 asks of an operator.  Must not know: how a run is followed.
A worker starts the run and goes; what waits is `ChaperoneTrigger`, in a triggerer.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from typing import Any

from airflow.sdk import BaseHook, BaseOperator
from airflow.sdk.exceptions import AirflowException
from airflow.sdk.execution_time.context import context_to_airflow_vars

from .. import aio
from ..errors import NoRunError, RunExistsError, SpecError
from .airflow_trigger import BY, ChaperoneTrigger, opened
from .fields import merged

ID_NAMES = 100  # of the 128 characters of a run id: those that say whose it is


class ChaperoneOperator(BaseOperator):  # type: ignore[misc]
    """
    Run a program, and wait for its end without a worker.

    Its output is in the task's log while it runs, both streams in the order in which they were
    written. The final status is the task's XCom, as `chaperone status` prints it. The task succeeds
    if the program exits with 0.

    Args:
        command (str): A text for `/bin/sh -c` (templated).
        argv (list): The words of the program instead (templated).
        spool (str): A directory on the host of worker and triggerer, or the URL of an agent's spool
            (templated).
        chaperone_conn_id (str): A connection in its place: host, port, schema (the spool's name)
            and password (the token) for an agent, `ca` in its extra; or `spool` in its extra.
        remote (dict): As in a spec (templated).
        ssh_conn_id (str): An SSH connection in its place: host, login, port, and `key_file` in its
            extra.
        spec (dict): Further fields of a spec (templated).
    """

    template_fields = ("command", "argv", "spool", "remote", "spec")
    template_fields_renderers = {
        "command": "bash",
        "argv": "json",
        "remote": "json",
        "spec": "json",
    }

    def __init__(
        self,
        *,
        command: str | None = None,
        argv: list[str] | None = None,
        spool: str | None = None,
        chaperone_conn_id: str | None = None,
        remote: dict[str, Any] | None = None,
        ssh_conn_id: str | None = None,
        spec: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.command = command
        self.argv = argv
        self.spool = spool
        self.chaperone_conn_id = chaperone_conn_id
        self.remote = remote
        self.ssh_conn_id = ssh_conn_id
        self.spec = spec
        self._run_id: str | None = None  # of what a worker may have to stop

    def execute(self, context: Any) -> None:
        """Start the run, or find the one that an earlier worker started; then wait for it."""
        if (self.spool is None) == (self.chaperone_conn_id is None):
            raise SpecError("unable to start: want either spool or chaperone_conn_id")
        run_id, key = asyncio.run(self._started(context))
        trigger = ChaperoneTrigger(run_id, key, self.spool, self.chaperone_conn_id)
        # Without a timeout: Airflow would leave the program running. The run has its own.
        self.defer(trigger=trigger, method_name="execute_complete")

    async def _started(self, context: Any) -> tuple[str, str]:
        """The id and the key of this try's run."""
        ti = context["ti"]
        async with opened(self.spool, self.chaperone_conn_id) as spool:
            for number in range(1, ti.try_number):
                await self._end(spool, run_id_of(ti, number))
            self._run_id = run_id_of(ti, ti.try_number)
            try:
                await spool.start({**self.run_spec(context), "id": self._run_id})
                self.log.info("run %s is started", self._run_id)
            except RunExistsError:
                self.log.info("run %s is there", self._run_id)
            return self._run_id, (await spool[self._run_id].spec())["key"]

    async def _end(self, spool: aio.Spool, run_id: str) -> None:
        """
        End the run of an earlier try, so that no two run beside each other. It is there if its
        worker died before it could defer, or if a user has just cleared the task.
        """
        try:
            run = spool[run_id]
            status = await run.status()
        except NoRunError:
            return
        if not status.is_final():
            self.log.info("run %s of an earlier try is stopped first", run_id)
            await run.stop(by=BY)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, Any]:
        """
        The end of the run.

        Returns:
            dict: The final status.
        Raises:
            AirflowException: If the program did not exit with 0; the status is the XCom then, too.
        """
        asyncio.run(self._collect(event["run_id"]))
        status: dict[str, Any] | None = event["status"]
        if status is None:
            raise AirflowException(f"run {event['run_id']!r} was deleted before its end")
        if status["return_code"] == 0:
            return status
        if self.do_xcom_push:
            context["ti"].xcom_push(key="return_value", value=status)
        raise AirflowException(outcome(status))

    async def _collect(self, run_id: str) -> None:
        async with opened(self.spool, self.chaperone_conn_id) as spool:
            await spool.collect(run_id)

    def on_kill(self) -> None:
        """Stop the run, if the task is killed while a worker has it."""
        if self._run_id is not None:
            # Airflow calls this in a signal handler, perhaps inside of our event loop.
            stopping = threading.Thread(target=lambda: asyncio.run(self._stop(self._run_id or "")))
            stopping.start()
            stopping.join()

    async def _stop(self, run_id: str) -> None:
        async with opened(self.spool, self.chaperone_conn_id) as spool:
            try:
                await spool[run_id].stop(wait=False, by=BY)
            except NoRunError as error:
                self.log.info("%s", error)

    def run_spec(self, context: Any) -> dict[str, Any]:
        """
        The spec of the run, without an id.

        Raises:
            SpecError: If `spec` has a field that the operator determines.
        """
        ti = context["ti"]
        labels = {name: str(getattr(ti, name)) for name in LABELS}
        program = {"argv": self.argv, "command": self.command, "merge_stderr": True}
        program["env"] = context_to_airflow_vars(context, in_env_var_format=True)
        fields: dict[str, Any] = {
            "program": {name: value for name, value in program.items() if value is not None},
            "labels": labels,
        }
        if self.remote is not None:
            fields["remote"] = self.remote
        elif self.ssh_conn_id is not None:
            fields["remote"] = remote_of(self.ssh_conn_id)
        if self.execution_timeout is not None:
            fields["timeouts"] = {"run": self.execution_timeout.total_seconds()}
        return merged({"id": None, **fields}, self.spec or {}, "spec")


LABELS = ("dag_id", "task_id", "run_id", "map_index", "try_number")


def run_id_of(ti: Any, try_number: int) -> str:
    """
    The id of the run of a try of a task instance: always the same, so a second start is refused.

    Args:
        ti: With `dag_id`, `task_id`, `run_id` and `map_index`.
    """
    whose = [ti.dag_id, ti.task_id, ti.run_id, str(ti.map_index)]
    names = re.sub(r"[^A-Za-z0-9._-]", "_", f"{ti.dag_id}.{ti.task_id}")[:ID_NAMES].lstrip("._-")
    # An id of Airflow has 250 characters, and colons.
    digest = hashlib.sha256("\0".join(whose).encode()).hexdigest()[:16]
    return f"{names or 'run'}-{digest}-{try_number}"


def remote_of(ssh_conn_id: str) -> dict[str, Any]:
    """
    The `remote` of a spec for an SSH connection of Airflow.

    Raises:
        SpecError: If the connection has a secret that Airflow's own operators give to the server.
            ssh takes a key from a file or an agent alone, and the run would fail without a reason.
    """
    connection = BaseHook.get_connection(ssh_conn_id)
    extra = connection.extra_dejson
    given = {"password": connection.password, "private_key": extra.get("private_key")}
    secrets = [name for name, value in given.items() if value]
    if secrets and not extra.get("key_file"):
        what = f"unable to use connection {ssh_conn_id!r}: ssh takes no {secrets[0]}"
        raise SpecError(f"{what}; want `key_file` in its extra")
    fields = {"host": connection.host, "user": connection.login, "port": connection.port}
    remote: dict[str, Any] = {name: value for name, value in fields.items() if value}
    if key_file := extra.get("key_file"):
        remote["options"] = {"IdentityFile": key_file}
    return remote


def outcome(status: dict[str, Any]) -> str:
    """How a run ended that did not end well, in one sentence."""
    run = f"run {status['run_id']!r}"
    if status["state"] != "terminated":
        why = (status["exception"] or {}).get("message") or "its outcome can't be known"
        return f"{run} is {status['state']}: {why}"
    signal = status["signal"]
    sentence = f"was killed by {signal}" if signal else f"exited with code {status['return_code']}"
    stop = status["stop"]
    if stop is not None:
        sentence += f", stopped for {stop['reason']}" + (f" by {stop['by']}" if stop["by"] else "")
    return f"{run} {sentence}{' (out of memory)' if status['oom'] else ''}"
