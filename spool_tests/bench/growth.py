"""
Rows about growth: what a call costs beside more and more ended runs, and beside more live ones.

Each figure is the least of some rounds: any other work of the machine only adds to it. The exponent
is the slope between the sizes in a picture with two logarithmic axes: 0 is a cost that does not
grow, 1 one that grows with the number of runs.
"""

import contextlib
import json
import math
import subprocess
import time

import chaperone
from chaperone.launch import start as starting

from . import lab as labs
from .following import feeder, first_event, make_ended, make_history
from .table import Row

HISTORY = (0, 1_000, 10_000, 100_000)
LIVE = (10, 100, 1_000, 5_000)
ONE = "the-one"  # the beginning of one run's id alone
UNCOLLECTED = (1_000, 4_000, 32_000)
BESIDE = 10  # live runs while the history grows
ROUNDS = 5
A_PROCESS = 1_000  # live runs that one process holds, with 8 files each


def ended(lab, rounds):
    """
    `chaperone follow --cursor` of ended runs that no scheduler has collected: every ending, each
    batch acknowledged.
    """
    row = Row("growth-ended", "follow --cursor of ended runs, each collected")
    curves = {}
    for size in UNCOLLECTED:
        seconds = []
        for _ in range(min(rounds or 1, 3)):
            spool = lab.directory("spool")
            make_ended(spool, size)
            seconds.append(all_collected(lab, spool, size))
        curves.setdefault("follow --cursor", []).append((size, min(seconds)))
        row.figure(f"follow --cursor, {size:,}", [min(seconds)], "s")
    summed_up(row, curves, 1.2)
    row.claim(f"{UNCOLLECTED[-1]:,} ended runs, s", row.figures[-1][3], "<=", 5)
    return row


def all_collected(lab, spool, count):
    """Seconds until so many endings were delivered and their batches acknowledged."""
    words = [*labs.with_fsync(), "follow", "--cursor", lab.new("cursor"), "--spool", spool]
    begun = time.perf_counter()
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=lab.env
    ) as process:
        kind = ""
        while count or kind != "batch":
            event = json.loads(process.stdout.readline())
            kind = event["event"]
            count -= kind == "ended"
            if kind == "batch":
                process.stdin.write(b"%d\n" % event["batch"])
                process.stdin.flush()
        labs.until(lambda: not labs.ended(spool))
        seconds = time.perf_counter() - begun
        process.kill()
    return seconds


def history(lab, rounds):
    """What calls cost beside ended and collected runs."""
    row = Row("growth-history", f"calls beside ended and collected runs, {BESIDE} live")
    spool = lab.directory("spool")
    curves = {}
    with feeder(lab, spool, BESIDE, 0, 0), one_more(lab, spool):
        made = 0
        for size in HISTORY:
            make_history(lab, spool, made, size)
            made = size
            measure(lab, row, curves, spool, size, BESIDE, rounds or ROUNDS)
    summed_up(row, curves, 0.2)
    return row


def live(lab, rounds):
    """What calls cost beside live runs."""
    row = Row("growth-live", "calls beside live runs")
    curves = {}
    for size in LIVE:
        spool = lab.directory("spool")
        with contextlib.ExitStack() as stack:
            for first in range(0, size, A_PROCESS):
                runs = min(A_PROCESS, size - first)
                stack.enter_context(feeder(lab, spool, runs, 0, 0, first))
            stack.enter_context(one_more(lab, spool))
            measure(lab, row, curves, spool, size, size, rounds or ROUNDS)
    summed_up(row, curves, 1.2)
    return row


@contextlib.contextmanager
def one_more(lab, spool):
    """A live run whose id begins as no other does."""
    spec = {"id": f"{ONE}-run", "program": {"argv": ["/bin/sleep", "1000"]}}
    run = chaperone.Spool(spool).start(spec, env=lab.env)
    try:
        yield
    finally:
        run.kill()


def measure(lab, row, curves, spool, size, living, rounds):
    """Add the figures of one size to the row, and to the curves, {call: [(size, seconds)]}."""
    cursor = {"runs": {f"run-{number}": {} for number in range(living)}}
    verb = [*labs.with_fsync()]
    calls = {
        "start": lambda: started(lab, spool),
        "ls": lambda: lab.ended([*verb, "ls", "--spool", spool]),
        "status PREFIX": lambda: lab.ended([*verb, "status", ONE, "--spool", spool]),
        "reap": lambda: lab.ended([*verb, "reap", "--spool", spool]),
        "gc": lambda: lab.ended([*verb, "gc", "--older", "7d", "--spool", spool, "--dry-run"]),
        "follow --cursor": lambda: first_batch(lab, verb, spool),
        "first event": lambda: first_event(spool, cursor),
    }
    for name, call in calls.items():
        call()  # once for the caches
        best = min(call() for _ in range(rounds))
        curves.setdefault(name, []).append((size, best))
        row.figure(f"{name}, {size:,}", [best], "ms", 1e3)


def started(lab, spool):
    """Seconds of a cold start, to the run directory; the run is gone afterwards."""
    begun = time.perf_counter()
    run_id = starting.start(spool, {"program": {"argv": ["/bin/true"]}}, env=lab.env)
    seconds = time.perf_counter() - begun
    run = chaperone.Spool(spool)[run_id]
    run.wait()
    labs.until(lambda: run_id in labs.ended(spool))
    chaperone.Spool(spool).collect(run_id)
    run.delete()
    return seconds


def first_batch(lab, verb, spool):
    """Seconds from the start of `chaperone follow --cursor` to the end of its first batch."""
    words = [*verb, "follow", "--cursor", lab.new("cursor"), "--spool", spool]
    begun = time.perf_counter()
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=lab.env
    ) as process:
        while json.loads(process.stdout.readline()).get("event") != "batch":
            pass
        seconds = time.perf_counter() - begun
        process.kill()
    return seconds


def summed_up(row, curves, bound):
    """Claim the exponent of each curve, and keep the curves for their picture."""
    for name, points in curves.items():
        exponent = slope(points)
        row.claim(f"exponent of {name}", exponent, "<=", bound)
    row.curves = curves


def slope(points):
    """The slope of the least squares through the logarithms of all points but those at 0."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points if size]
    middle = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    over = sum((x - middle[0]) * (y - middle[1]) for x, y in logs)
    return over / sum((x - middle[0]) ** 2 for x, _ in logs)


# -- the picture

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 64, 40
COLOURS = ("#0a58b0", "#b3261e", "#16702f", "#8a2a8a", "#7a5200", "#0b6470", "#57606a")


def picture(curves, across):
    """
    Curves as an SVG with two logarithmic axes; a size of 0 is drawn at the left edge.

    Args:
        curves (dict): call to [(size, seconds)].
        across (str): What the sizes are.
    """
    sizes = sorted({size for points in curves.values() for size, _ in points})
    times = [seconds for points in curves.values() for _, seconds in points]
    least = min(size for size in sizes if size)
    edge = least / 10 if sizes[0] == 0 else least
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))

    def x(size):
        span = math.log(sizes[-1] / edge)
        return LEFT + math.log(max(size, edge) / edge) / span * (WIDTH - LEFT - 150)

    def y(seconds):
        return 16 + (high - math.log10(seconds)) / (high - low) * (HEIGHT - BOTTOM - 16)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        ms = f"{10.0**power * 1e3:g} ms"
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 150}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d0d7de"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{ms}</text>'
        )
    for size in sizes:
        lines.append(
            f'<text x="{x(size):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{size:,}</text>"
        )
    middle = (LEFT + WIDTH - 150) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{across}</text>')
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(size):.1f},{y(seconds):.1f}" for size, seconds in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = 24 + 18 * number
        lines.append(
            f'<line x1="{WIDTH - 140}" x2="{WIDTH - 120}" y1="{at}" y2="{at}" stroke="{colour}"'
            f' stroke-width="2"/><text x="{WIDTH - 114}" y="{at + 4}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])
