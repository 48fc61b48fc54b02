"""
What a chaperone makes of a spec, in a form that is the same each time.

Knows: the command, the files of a run, which of their values differ from run to run.  Must not
know: what the values mean.
"""

import json
import os
import re
import stat
import subprocess
import sys
import time

# Times, pids, random words, names of the host; and how long something took.
DIFFERS = set(
    "key chaperone_pid chaperone_host boot_id pid create_time start_time end_time".split()
)
DIFFERS |= set(
    "elapsed utime stime maxrss minflt inblock oublock nvcsw nivcsw majflt time since".split()
)


def make_place(place):
    """Make the files that the recorded specs name."""
    (place / "sub").mkdir(mode=0o755)
    (place / "input").write_text("from a file\n")
    for name, text, mode in (
        ("not-executable", "#!/bin/sh\n", 0o644),
        ("no-interpreter", "#!/does/not/exist\n", 0o755),
        ("no-format", "\0\1\2\3", 0o755),
    ):
        (place / name).write_text(text)
        (place / name).chmod(mode)


def result(main, place, spool, case):
    """
    Run a spec to its end.

    Args:
        main (str): The `__main__.py` of the version that runs it.
        place (pathlib.Path): What `make_place` has filled; the run is started there.
        spool (pathlib.Path): Where the run is kept.
        case (dict): The `spec` with its `id`, and the `control` that is asked of the running
            program, or None.
    Returns:
        dict: The `exit` code, and the `files` of the run by their names in the spool.
    """
    argv = [sys.executable, "-I", "-S", main, "run", "--spool", str(spool), "-"]
    run_id = case["spec"]["id"]
    environment = {name: os.environ[name] for name in ("PATH", "TEST_TOKEN")}
    environment["HOME"] = str(place)  # a run that survives keeps its state there
    with subprocess.Popen(
        argv,
        cwd=place,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        umask=0o022,
    ) as chaperone:
        chaperone.stdin.write(json.dumps(case["spec"]).encode())
        chaperone.stdin.close()
        if case["control"]:
            _ask(spool / run_id, case["control"])
    return {"exit": chaperone.returncode, "files": _files(spool, run_id, place)}


def _ask(run, words):
    """Write to its control once it has written something, and so was executed."""
    deadline = time.monotonic() + 60
    while not (run / "stdout").exists() or not (run / "stdout").stat().st_size:
        assert time.monotonic() < deadline, f"{run} has written nothing"
        time.sleep(0.005)
    (run / "control").write_text(words)


def _files(spool, run_id, place):
    found = {}
    for path in sorted(spool.rglob("*")):
        name = str(path.relative_to(spool))
        if run_id not in path.parts:
            continue
        kind = path.lstat().st_mode
        found[name] = {"mode": stat.filemode(kind)}
        if stat.S_ISLNK(kind):
            found[name]["target"] = os.readlink(path)
        elif stat.S_ISREG(kind):
            found[name]["text"] = _comparable(path.read_bytes().decode("latin-1"), place)
    return found


def _comparable(text, place):
    """Without what differs from run to run; JSON as its pairs, whose order counts."""
    text = text.replace(os.path.realpath(place), "PLACE")
    if text.startswith("{") and text.endswith("}\n") and text.count("\n") == 1:
        value = json.loads(text)
        assert json.dumps(value) + "\n" == text
        return _without(value)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    text = re.sub(r"(?<=COOKIE=)[0-9a-f]{32}", "COOKIE", text)
    return re.sub(r"(?<=running: )\[[\d, ]+\]", "PIDS", text)


def _without(value, name=""):
    if name in DIFFERS and value is not None:
        return "differs"
    if isinstance(value, dict):
        return [[key, _without(inner, key)] for key, inner in value.items()]
    if isinstance(value, list):
        return [_without(inner) for inner in value]
    return value


def known(new, old):
    """A new result without the fields of a JSON object that the old one does not have."""
    if old and _is_object(old) and _is_object(new):
        inner = dict(old)
        # maxrss is null where it is only the floor that a program inherits: 0.1 gave the floor.
        return [
            [key, inner[key] if key == "maxrss" and value is None else known(value, inner[key])]
            for key, value in new
            if key in inner
        ]
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: known(value, old.get(key)) for key, value in new.items()}
    return new


def _is_object(value):
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in value
    )
