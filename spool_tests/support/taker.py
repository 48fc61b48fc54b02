"""
A scheduler that is killed again and again: it starts runs at an agent, and takes each byte once.

Its state is one file, replaced whole, and its copies are cut to what that file says.

    python taker.py URL PLACE < specs as JSON
"""

import json
import os
import sys

import chaperone


def main(url, place, specs):
    spool = chaperone.Spool(url)
    path = os.path.join(place, "state.json")
    state = {"cursor": {"runs": {}}, "ends": {}}
    if os.path.exists(path):
        with open(path) as file:
            state = json.load(file)
    for spec in specs:
        if spec["id"] not in state["cursor"]["runs"] and spec["id"] not in state["ends"]:
            start(spool, spec)
    for run_id, entry in state["cursor"]["runs"].items():
        for stream in ("stdout", "stderr"):
            cut(os.path.join(place, f"{run_id}.{stream}"), entry.get(stream, 0))
    ids = [spec["id"] for spec in specs]
    with spool.follow(state["cursor"], runs=ids) as follower:
        for event in follower:
            if isinstance(event, chaperone.Output):
                with open(os.path.join(place, f"{event.run_id}.{event.stream}"), "ab") as file:
                    assert file.tell() == event.offset, (event.run_id, file.tell(), event.offset)
                    file.write(event.data)
            elif isinstance(event, (chaperone.Ended, chaperone.Lost)):
                state["ends"].setdefault(event.run_id, []).append(event.status.raw)
            state["cursor"] = follower.cursor
            with open(path + ".new", "w") as file:
                json.dump(state, file)
            os.replace(path + ".new", path)


def start(spool, spec):
    while True:
        try:
            spool.start(spec)
            return
        except chaperone.RunExistsError:  # of an earlier life
            return
        except chaperone.AgentError:
            pass


def cut(path, size):
    if os.path.exists(path):
        os.truncate(path, size)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.load(sys.stdin))
