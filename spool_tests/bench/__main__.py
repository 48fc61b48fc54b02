"""The bench's command line: which rows, how often, where, and how they are shown."""

import argparse
import json
import os
import sys
import tempfile
import time

if os.environ.get("CHAPERONE_BENCH_ROOT"):  # an older version, of --against
    sys.path.insert(0, os.environ["CHAPERONE_BENCH_ROOT"])

from . import (
    against,
    agents,
    capturing,
    costing,
    following,
    growth,
    machine,
    page,
    remoting,
    sharing,
    starting,
)
from .lab import ROOT, Lab
from .table import Row

ROWS = {
    "cold": starting.cold,
    "warm": starting.warm,
    "heap": following.heap,
    "memory": starting.memory,
    "cpu": costing.cpu,
    "capture": capturing.capture,
    "timeline": capturing.timeline,
    "ssh-capture": remoting.capture,
    "ssh-cost": remoting.cost,
    "ssh-starts": remoting.starts,
    "share": sharing.share,
    "share-memory": sharing.idle,
    "engines": sharing.engine_cost,
    "append": following.append,
    "scale": following.scale,
    "death": following.death,
    "end": following.end,
    "reconnect": following.reconnect,
    "gc": following.gc,
    "fsync": following.fsync,
    "growth-history": growth.history,
    "growth-live": growth.live,
    "growth-ended": growth.ended,
    "agent-append": agents.append,
    "agent-scale": agents.scale,
    "agent-bytes": agents.transfer,
    "agent-enemy": agents.enemy,
    "page": agents.page,
}
FIGURES, PAGE = "docs/performance.json", "docs/performance.rst"


def main():
    machine.in_own_mounts()
    parser = argparse.ArgumentParser(
        prog="bin/bench",
        description="Measure rows of docs/performance.rst beside their peers and floors.",
    )
    parser.add_argument(
        "rows",
        metavar="ROW",
        nargs="*",
        help=f"of {', '.join(ROWS)}; ssh for all of ssh, agent for all of agents; none for all",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there too; - for stdout, and no table"
    )
    parser.add_argument("--rounds", type=int, help="how often; otherwise as the row needs it")
    parser.add_argument(
        "--dir", default="/var/tmp", help="where the image of the filesystem is made [/var/tmp]"
    )
    parser.add_argument(
        "--against", metavar="REV", help="measure this older version beside today's, in turns"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help=f"measure nothing: make the table in {PAGE} of {FIGURES}",
    )
    given = parser.parse_args()
    meant = {
        name: [row for row in ROWS if row == name or row.startswith(f"{name}-")]
        for name in given.rows or ROWS
    }
    unknown = [name for name, found in meant.items() if not found]
    if unknown:
        parser.error(f"no row {unknown[0]!r}: want {', '.join(ROWS)}")
    names = list(dict.fromkeys(row for found in meant.values() for row in found))
    if given.page:
        page.write(os.path.join(ROOT, FIGURES), os.path.join(ROOT, PAGE))
        return 0
    if given.against:
        return beside(parser, given, names)
    return measured(given, names)


def measured(given, names):
    """Measure rows, and print them; returns the exit code."""
    rows = []
    shown = sys.stderr if given.json == "-" else sys.stdout
    print(machine.described(), file=shown)
    with machine.journaled(given.dir) as (directory, disk):
        print(f"spools on {disk}", file=shown)
        for name in names:
            busy = machine.busy_percent()
            try:
                with Lab(directory) as lab:
                    row = ROWS[name](lab, given.rounds)
            except Exception as error:  # noqa: BLE001  the other rows are not to be lost
                row = Row(name, "not measured")
                row.note(f"{type(error).__name__}: {error}")
            if busy > machine.BUSY_PERCENT:
                row.note(f"the machine was busy before this row: {busy:.0f} % of its cores")
            print(f"\n{row.as_text()}", file=shown, flush=True)
            rows.append(row)
    short = [(row.name, claim[0]) for row in rows for claim in row.short()]
    short += [(row.name, "not measured") for row in rows if not row.figures]
    missed = "; ".join(f"{name} ({label})" for name, label in short)
    print(f"\n{f'falls short: {missed}' if short else 'every bound was reached'}", file=shown)
    if given.json:
        found = {
            "machine": machine.described(),
            "date": time.strftime("%Y-%m-%d"),
            "words": "".join(f" {name}" for name in given.rows),
            "disk": disk,
            "rows": [row.as_json() for row in rows],
        }
        text = json.dumps(found, indent=1) + "\n"
        if given.json == "-":
            sys.stdout.write(text)
        else:
            with open(given.json, "w") as file:
                file.write(text)
    return 1 if short else 0


def beside(parser, given, names):
    """Compare rows with an older version's; returns the exit code: 1 if one is worse."""
    words = ["--dir", given.dir]
    words += ["--rounds", str(given.rounds)] if given.rounds else []
    print(f"{machine.described()}\nbefore is {given.against}")
    worse = []
    with tempfile.TemporaryDirectory(prefix="chaperone-bench-", dir=given.dir) as directory:
        os.chmod(directory, 0o711)  # a remote row logs in as a plain user
        try:
            root = against.unpacked(directory, given.against)
        except against.UnknownRevisionError as error:
            parser.error(f"unable to measure {given.against!r}: {error}")
        for name in names:
            figures = against.compared(root, name, words)
            print(f"\n{against.as_text(name, figures)}", flush=True)
            worse += [f"{name} ({each[0]})" for each in figures if against.is_worse(*each[1:])]
    print(f"\n{f'worse: {chr(59).join(worse)}' if worse else 'no figure is worse'}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
