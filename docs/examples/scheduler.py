"""
A scheduler in sixty lines: it starts programs, and keeps their output and how they ended.

    python scheduler.py JOBS.json SPOOL DATABASE

JOBS.json is an object of specs by run id. An event and the cursor that covers it are committed in
one transaction, so every byte and ending arrives exactly once, even if this process is killed.
"""

import json
import pathlib
import sqlite3
import sys

import chaperone

TABLES = """
    create table if not exists output (run_id text, stream text, offset integer, data blob);
    create table if not exists ended (run_id text unique, state text, code integer, signal text);
    create table if not exists cursor (only_one integer unique check (only_one = 1), text text);
"""


def start(spool, run_id, spec):
    try:
        spool.start({**spec, "id": run_id})
        print(f"started   {run_id}", flush=True)
    except chaperone.RunExistsError:  # we started it, and then we were killed
        print(f"is there  {run_id}", flush=True)


def keep(db, event):
    if isinstance(event, chaperone.Output):
        row = (event.run_id, event.stream, event.offset, event.data)
        db.execute("insert into output values (?, ?, ?, ?)", row)
    elif isinstance(event, (chaperone.Ended, chaperone.Lost)):
        row = (event.run_id, event.status.state, event.status.return_code, event.status.signal)
        db.execute("insert into ended values (?, ?, ?, ?)", row)


def main(jobs_path, spool_path, database):
    jobs = json.loads(pathlib.Path(jobs_path).read_text())
    db = sqlite3.connect(database)
    db.executescript(TABLES)
    spool = chaperone.Spool(spool_path)
    cursor = json.loads((db.execute("select text from cursor").fetchone() or ['{"runs": {}}'])[0])
    ended = {run_id for (run_id,) in db.execute("select run_id from ended")}
    for run_id in jobs.keys() - ended:
        start(spool, run_id, jobs[run_id])
    with spool.follow(cursor, runs=jobs.keys() - (ended - cursor["runs"].keys())) as follower:
        for run_id in follower.uncollected:  # endings that were committed before a restart
            follower.collect(run_id)
        for event in follower:
            with db:  # both or neither
                keep(db, event)
                db.execute("replace into cursor values (1, ?)", [json.dumps(follower.cursor)])
            if isinstance(event, (chaperone.Ended, chaperone.Lost)):
                outcome = event.status.signal or event.status.return_code
                print(f"{event.status.state:9} {event.run_id} {outcome}", flush=True)
            for run_id in follower.uncollected:
                follower.collect(run_id)
    db.close()


main(*sys.argv[1:])
