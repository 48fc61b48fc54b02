"""
Events in short, and followers that come again.
"""

import asyncio
import json
import select

from chaperone.model.events import Output, Shrank, Started


def brief(event):
    """An event as a short tuple: what it is, of which run, and what matters of it."""
    kind = type(event).__name__.lower()
    if isinstance(event, Output):
        return (kind, event.run_id, event.stream, event.offset, event.data)
    if isinstance(event, Started):
        return (kind, event.run_id)
    if isinstance(event, Shrank):
        return (kind, event.run_id, event.stream, event.offset, event.size)
    return (kind, event.run_id, event.status and event.status.state)


def told(follower):
    """What it has to tell by now."""
    events = []
    while (event := follower.next(0)) is not None:
        events.append(brief(event))
    return events


def next_of(follower, kind, timeout=60):
    """The next event of a kind; what comes before it is dropped."""
    while True:
        event = follower.next(timeout)
        assert event is not None, f"no {kind.__name__} within {timeout} s"
        if isinstance(event, kind):
            return event


def again(follower):
    """What a scheduler keeps and gives back: the cursor by way of JSON."""
    return json.loads(json.dumps(follower.cursor))


# -- loops


def is_readable(follower):
    return bool(select.select([follower], [], [], 0)[0])


async def turns(count=5):
    """Let the other tasks of the loop have their turns."""
    for _ in range(count):
        await asyncio.sleep(0)


async def tailed(run, offset=0):
    """All that a run of `chaperone.aio` writes to stdout, from an offset on."""
    return b"".join([data async for data in run.tail(offset=offset)])
