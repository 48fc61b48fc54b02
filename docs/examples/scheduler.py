"""
A scheduler in sixty lines: starts programs, keeps what they write and how they ended, and may be
    killed at any moment.

    python scheduler.py JOBS.json SPOOL DATABASE

JOBS.json is an object of specs by run id. Each event is committed together with the cursor that
covers it, in one transaction: that is all it takes to receive every byte and every ending exactly
once. Started again, it goes on where it was killed.
"""

import json
import sqlite3
import sys

import chaperone

TABLES = """
    create table if not exists output (run_id text, stream text, offset integer, data blob);
    create table if not exists ended (run_id text primary key, state text, return_code integer, signal text);
    create table if not exists cursor (only_one integer primary key check (only_one = 1), text text);
"""


def start(spool, run_id, spec):
    try:
        spool.start({**spec, "id": run_id})
        print(f"started   {run_id}", flush=True)
    except chaperone.RunExistsError:  # by us, before we were killed: an id never runs twice
        print(f"is there  {run_id}", flush=True)


def keep(db, event):
    if isinstance(event, chaperone.Output):
        db.execute(
            "insert into output values (?, ?, ?, ?)",
            (event.run_id, event.stream, event.offset, event.data),
        )
    elif isinstance(event, (chaperone.Ended, chaperone.Lost)):
        status = event.status
        db.execute(
            "insert into ended values (?, ?, ?, ?)",
            (event.run_id, status.state, status.return_code, status.signal),
        )


def main(jobs_path, spool_path, database):
    with open(jobs_path) as file:
        jobs = json.load(file)
    db = sqlite3.connect(database)
    db.executescript(TABLES)
    spool = chaperone.Spool(spool_path)
    for run_id in [*jobs]:
        if db.execute("select 1 from ended where run_id = ?", [run_id]).fetchone():
            del jobs[run_id]
            spool.collect(run_id)
        else:
            start(spool, run_id, jobs[run_id])
    (text,) = db.execute("select text from cursor").fetchone() or ["{}"]
    with spool.follow(json.loads(text), runs=jobs) as follower:
        for event in follower:
            with db:  # both or neither
                keep(db, event)
                db.execute("replace into cursor values (1, ?)", [json.dumps(follower.cursor)])
            if isinstance(event, (chaperone.Ended, chaperone.Lost)):
                print(
                    f"{event.status.state:9} {event.run_id} {event.status.signal or event.status.return_code}",
                    flush=True,
                )
            for run_id in follower.uncollected:
                follower.collect(run_id)
    db.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
