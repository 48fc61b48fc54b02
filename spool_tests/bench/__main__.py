"""The bench's command line: which rows, how often, where, and how it is told."""

import argparse
import json
import os
import platform
import sys

from . import capturing, following, remoting, sharing, starting
from .lab import Lab

ROWS = {
    "cold": starting.cold,
    "warm": starting.warm,
    "heap": following.heap,
    "memory": starting.memory,
    "capture": capturing.capture,
    "timeline": capturing.timeline,
    "ssh-capture": remoting.capture,
    "ssh-cost": remoting.cost,
    "ssh-starts": remoting.starts,
    "share": sharing.share,
    "engines": sharing.engine_cost,
    "append": following.append,
    "scale": following.scale,
    "death": following.death,
    "end": following.end,
    "reconnect": following.reconnect,
    "gc": following.gc,
    "fsync": following.fsync,
}


def machine():
    """What it ran on, in one line."""
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")),
            platform.machine(),
        )
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python "
        f"{platform.python_version()}"
    )


def main():
    parser = argparse.ArgumentParser(
        prog="bin/bench",
        description="Measure rows of docs/performance.rst beside their peers and floors.",
    )
    parser.add_argument(
        "rows",
        metavar="ROW",
        nargs="*",
        help=f"of {', '.join(ROWS)}; ssh for all of ssh; none for all",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there too; - for stdout, and no table"
    )
    parser.add_argument("--rounds", type=int, help="how often; else as the row needs it")
    parser.add_argument("--dir", default="/var/tmp", help="where spools are made [/var/tmp]")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="measure before all other work of the machine, which should be none (needs root)",
    )
    given = parser.parse_args()
    meant = {
        name: [row for row in ROWS if row == name or row.startswith(f"{name}-")]
        for name in given.rows or ROWS
    }
    unknown = [name for name, found in meant.items() if not found]
    if unknown:
        parser.error(f"no row {unknown[0]!r}: want {', '.join(ROWS)}")
    if given.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    rows = []
    told = sys.stderr if given.json == "-" else sys.stdout
    print(machine(), file=told)
    for name in dict.fromkeys(row for found in meant.values() for row in found):
        with Lab(given.dir) as lab:
            row = ROWS[name](lab, given.rounds)
        print(f"\n{row.as_text()}", file=told, flush=True)
        rows.append(row)
    short = [(row.name, claim[0]) for row in rows for claim in row.short()]
    print(
        "\n"
        + (
            f"falls short: {'; '.join(f'{name} ({label})' for name, label in short)}"
            if short
            else "every bound was reached"
        ),
        file=told,
    )
    if given.json:
        text = (
            json.dumps({"machine": machine(), "rows": [row.as_json() for row in rows]}, indent=1)
            + "\n"
        )
        if given.json == "-":
            sys.stdout.write(text)
        else:
            with open(given.json, "w") as file:
                file.write(text)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
