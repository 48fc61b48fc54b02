"""
A tour of the public names in sixty lines: runs are started, followed, waited for, stopped, deleted.

    python tour.py SPOOL
"""

import asyncio
import sys

import chaperone
from chaperone import AgentError, Changed, Ended, Lost, Output, Shrank, Started, aio

SPEC: chaperone.SpecDict = {"id": "tour", "program": {"command": "echo out; exit 3"}}


def start(spool: chaperone.SpoolLike) -> chaperone.RunLike:
    try:
        return spool.start(SPEC)
    except chaperone.RunExistsError:
        return spool["tour"]


def follow(follower: chaperone.FollowerLike) -> chaperone.Status | None:
    for event in follower:
        if isinstance(event, Output):
            print(f"{event.stream} from byte {event.offset}: {event.data.decode()!r}")
        elif isinstance(event, (Started, Shrank, Changed)):
            print("on the way:", event.run_id)
        elif isinstance(event, (Ended, Lost)):
            follower.collect(event.run_id)
            return event.status
    return None


async def sleep(spool: aio.Spool, number: int) -> chaperone.StatusDict:
    run: aio.Run = await spool.start({"program": {"argv": ["sleep", f"{600 + number}"]}})
    status = await run.stop(grace_s=5, by="tour")
    await run.delete()
    return status.raw


async def sleep_together(spool: aio.Spool) -> list[str | None]:
    follower: aio.Follower = spool.follow(await spool.cursor(), runs=["tour"])
    async with follower:
        print("nothing is new:", await follower.next(timeout=0))
    return [raw["signal"] for raw in await asyncio.gather(*(sleep(spool, n) for n in range(2)))]


print(*chaperone.build_command(chaperone.build_program(["df", "-h"]), host="db3")[-3:])
try:
    spool = chaperone.Spool(sys.argv[1])
    run: chaperone.Run = spool[start(spool).run_id]
    follower: chaperone.Follower = spool.follow(run.cursor(), runs=[run.run_id])
    with follower:
        counts: chaperone.Counts = (follow(follower) or run.wait()).stdout
    print(counts.bytes, run.read(), asyncio.run(sleep_together(aio.Spool(spool.path))))
except (AgentError, chaperone.BusyError, chaperone.NoRunError, chaperone.SpoolError) as fault:
    sys.exit(f"try again: {fault}")
except (chaperone.SpecError, chaperone.ChaperoneError) as fault:
    sys.exit(f"that can't be done: {fault}")
