"""
A reader for the soak, as a process of its own: `prober.py SPOOL SEED PAUSE_S` looks at live runs
and follows them until its stdin is closed.

It prints each verdict as [run id, verdict, how it was found, [begin and end of the first look that
said so], [of the last]], on the monotonic clock, when another verdict comes or it stops; then how
often it looked.
"""

import json
import os
import random
import select
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from chaperone.errors import NoRunError
from chaperone.follow.follower import Follower
from chaperone.model.events import Ended, Lost
from chaperone.spool import format, look

LIST_S = 0.05  # how often new runs are looked for


def verdict_on(spool_fd, run_id):
    """alive, or the state that a reader concludes."""
    run_fd = format.open_run(spool_fd, run_id)
    try:
        alive, status = look.look(run_fd, run_id)
    finally:
        os.close(run_fd)
    return "alive" if alive else status["state"]


def probe(
    path,
    seed,
    pause_s,
    stopped=lambda: select.select([0], [], [], 0)[0],
    tell=lambda line: os.write(1, line.encode() + b"\n"),
):
    """Look and follow until `stopped()`; `tell` takes lines of JSON."""
    rng, known, looks, listed = random.Random(seed), {}, 0, 0.0
    spool_fd = format.open_spool(path)

    def say(run_id, verdict, how, first, last):
        tell(json.dumps([run_id, verdict, how, first, last]))

    with Follower(path) as follower:
        while not stopped():
            begin = time.monotonic()
            if begin - listed > LIST_S:
                listed = begin
                for run_id in format.live_ids(spool_fd):
                    known.setdefault(run_id, None)
            event = follower.next(0)
            if isinstance(event, (Lost, Ended)):
                told = [begin, time.monotonic()]
                say(
                    event.run_id,
                    "lost" if isinstance(event, Lost) else "terminated",
                    "followed",
                    told,
                    told,
                )
            if known:
                run_id = rng.choice(list(known))
                begin = time.monotonic()
                try:
                    verdict = verdict_on(spool_fd, run_id)
                except NoRunError:  # its entry comes a moment before it, and gc takes both
                    verdict = None
                looked, looks = [begin, time.monotonic()], looks + 1
                before = known[run_id]
                if before is not None and before[0] != verdict:
                    say(run_id, before[0], "looked", *before[1:])
                known[run_id] = verdict and [
                    verdict,
                    before[1] if before and before[0] == verdict else looked,
                    looked,
                ]
                if verdict in ("terminated", "lost", "error"):
                    say(run_id, verdict, "looked", looked, looked)
                if verdict in (None, "terminated", "lost", "error"):
                    del known[run_id]
            time.sleep(rng.random() * 2 * pause_s)
    for run_id, streak in known.items():
        if streak is not None:
            say(run_id, streak[0], "looked", *streak[1:])
    tell(json.dumps(looks))
    os.close(spool_fd)


if __name__ == "__main__":
    probe(sys.argv[1], sys.argv[2], float(sys.argv[3]))
