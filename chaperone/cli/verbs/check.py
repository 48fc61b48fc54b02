"""
The verbs that say what a spec would do, and what one may be: check, schema.

Knows: what each field of a spec means to a reader.  Must not know: how it is done.
"""

from __future__ import annotations

import os

from ...model import jsontext
from ...model.hops.kinds import quoted
from ...model.hops.route import Route
from ..common import user_name
from ..terminal import escaped, indented
from ..verb import COMMAND, SPECS, Argument, UsageError, specs_given, verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..terminal import Terminal
    from ..verb import Given

    Spec = dict[str, Any]


@verb(
    "show what would run, hop by hop, or the first error of the spec",
    SPECS,
    *COMMAND,
    Argument(
        "--far-side",
        action="store_true",
        help="print the text that would be sent to the far side",
    ),
    Argument("--json", action="store_true", help="print the spec as JSON"),
)
def check(given: Given, terminal: Terminal) -> int:
    from ...farside import payload
    from ...hold import begin

    ((name, text),) = specs_given("check", given, at_most=1)
    spec = begin.canonical_spec(name, text, os.getcwd())
    remote = spec["remote"]
    if given.json:
        written = jsontext.loads(text)
        shown = indented(written) if terminal.is_terminal() else jsontext.dumps(written)
        terminal.text(f"{shown}\n")
    elif given.far_side:
        _print_far_side(spec, terminal)
    elif remote is None or remote["supervise"]:
        terminal.text(plan(spec, user_name(), list(payload.CONSTANT)))
    else:
        terminal.text(plan(spec, user_name(), spec["program"]["argv"]))
    return os.EX_OK


@verb("print the JSON Schema of a spec, for editors and generators")
def schema(given: Given, terminal: Terminal) -> int:
    from ...model import schema as schemas

    terminal.text(f"{indented(schemas.of_spec())}\n")
    return os.EX_OK


def _print_far_side(spec: Spec, terminal: Terminal) -> None:
    """
    Print the text that would be sent, without random and secret parts; on a terminal, without
    characters that could move its cursor.
    """
    from ...farside import payload

    remote = spec["remote"]
    why = None
    if remote is None and spec["on_disconnect"] == "kill":
        why = "the program runs here, as a child of its chaperone"
    elif remote is not None and not remote["supervise"]:
        why = "none is sent if remote.supervise is false"
    if why is not None:
        raise UsageError(f"unable to show the payload: {why}")
    umask = os.umask(0)
    os.umask(umask)
    text = payload.shown(spec, umask)
    if not terminal.is_terminal():
        terminal.data(text)
        return
    lines = text.decode("utf-8", "surrogateescape").split("\n")
    terminal.text("\n".join(escaped(line.expandtabs()) for line in lines))


def _callback(callback: Any, config: Any) -> str:
    if callback is None:
        return ""
    proof = "its token" if callback["token_file"] is None else f"that in {callback['token_file']!r}"
    return (
        f"POST to {callback['url']} with {proof}, {config['output_buffer']} bytes at once and"
        f" {config['output_latency']:g} s late at most; again every"
        f" {config['retry_frequency']:g} s, stopped after {config['timeout']:g} s without an answer"
    )


# -- what a spec would do


def plan(spec: Spec, user: str, far_argv: list[str]) -> str:
    """
    What would run, one fact a line. It shows the names of variables but never their values, and
    only the length of a text for stdin.

    Args:
        spec (dict): Canonical.
        user (str): The user of this process.
        far_argv (list): The argv that the last hop of a remote run starts.
    """
    way = spec["remote"]["hops"] if spec["remote"] else []
    steps = []
    for number in range(len(way)):
        place = Route.of(way[:number]).place(user)
        argv = Route.of(way[number:]).argv(far_argv)
        steps.append((f"hop {number + 1}", f"{place}: {_words(argv)}"))
    program, stop = spec["program"], spec["stop"]
    facts = [
        ("run", spec["id"] or "an id that is made at the start"),
        *steps,
        ("program", f"{Route.of(way).place(user)}: {_words(program['argv'])}"),
        ("cwd", program["cwd"] or "the home directory"),
        ("env", _environment(program, bool(way))),
        ("stdin", _stdin(program["stdin"])),
        ("process", _process(program)),
        ("output", _output(spec["output"], program["merge_stderr"])),
        ("timeouts", ", ".join(_limit(*item) for item in spec["timeouts"].items())),
        (
            "stop",
            f"{stop['signal']}{' to the program alone' if stop['to'] == 'program' else ''},"
            f" SIGKILL {stop['grace_period']:g} s later; leftovers: {spec['leftovers']}",
        ),
        ("life", _life(spec, bool(way))),
        ("callback", _callback(spec["callback"], spec["config"])),
        ("labels", ", ".join(f"{name}={value}" for name, value in spec["labels"].items())),
    ]
    return "".join(f"{name + ':':10}{escaped(fact)}\n" for name, fact in facts if fact)


def _words(argv: list[str]) -> str:
    return " ".join(map(quoted, argv))


def _environment(program: Spec, far: bool) -> str:
    inherit, names = program["inherit_env"], ", ".join(sorted(program["env"]))
    if isinstance(inherit, list):
        ours = "the login environment" if far else "ours"
        base = f"{', '.join(inherit) or 'nothing'} of {ours}"
    elif inherit:
        base = "the login environment there" if far else "all of ours"
    else:
        base = "nothing inherited"
    return base + (f"; set: {names}" if names else "")


def _stdin(stdin: Any) -> str:
    if stdin is None:
        return "empty"
    if isinstance(stdin, dict):
        return f"the file {stdin['file']!r}"
    return f"a text of {len(stdin.encode('utf-8', 'surrogateescape'))} bytes"


def _process(program: Spec) -> str:
    umask = [f"umask {program['umask']}"] if program["umask"] else []
    limits = [
        f"{name} {':'.join('unlimited' if end is None else str(end) for end in ends)}"
        for name, ends in program["rlimits"].items()
    ]
    return ", ".join(umask + limits)


FULL = {
    "drop": "what the disk refuses is dropped and counted",
    "stop": "a dropped byte stops the program",
}


def _output(output: Spec, merged: bool) -> str:
    limit, full = "no limit", FULL[output["on_full"]]
    if output["through"] == "file":
        full = "the program itself sees a full disk"
    elif output["max_bytes"] is not None:
        limit = f"at most {output['max_bytes']} bytes a stream"
    to_stdout = "; stderr goes to stdout" if merged else ""
    timed = "; a timeline records when it came" if output["timeline"] else ""
    return f"through a {output['through']}, {limit}, {full}{to_stdout}{timed}"


def _limit(name: str, seconds: float | None) -> str:
    return f"{name} -" if seconds is None else f"{name} {seconds:g} s"


def _life(spec: Spec, far: bool) -> str:
    with_us = "its connection" if far else "its chaperone"
    latest = f", at the latest {spec['lease']:g} s after it was last heard" if far else ""
    life = f"ends with {with_us}{latest}"
    if spec["on_disconnect"] == "survive":
        life = f"outlives {with_us} for {spec['lease']:g} s, so that it can be adopted"
    renew_s = spec["renew"]
    return life if renew_s is None else f"{life}; stopped {renew_s:g} s after the last renewal"
