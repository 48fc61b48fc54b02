"""
Calls of a run in all their forms, and what comes of each: to be the same wherever the run is.
"""

import asyncio
import inspect

CALLS = {
    "status": lambda run: run.status(),
    "spec": lambda run: run.spec(),
    "size": lambda run: run.size("stderr"),
    "size of no stream": lambda run: run.size("x"),
    "read": lambda run: run.read("stdout", 1, 3),
    "read of no stream": lambda run: run.read("x"),
    "read from nowhere": lambda run: run.read("stdout", -1),
    "cursor": lambda run: run.cursor(1, 2),
    "cursor of no offset": lambda run: run.cursor(-1),
    "wait": lambda run: run.wait(),
    "wait with a time": lambda run: run.wait(0),
    "tail": lambda run: run.tail(),
    "tail from an offset": lambda run: run.tail("stderr", 1),
    "tail of no stream": lambda run: run.tail("log"),
    "tail from nowhere": lambda run: run.tail("stdout", -1),
    "stop": lambda run: run.stop(),
    "stop without waiting": lambda run: run.stop(wait=False),
    "stop with no grace": lambda run: run.stop(grace_s=-1),
    "stop by two words": lambda run: run.stop(by="a b"),
    "kill": lambda run: run.kill(),
    "signal": lambda run: run.signal("USR1"),
    "no signal": lambda run: run.signal("NOPE"),
    "number of no signal": lambda run: run.signal(1000),
}


def outcome(call, *arguments):
    """What a call returns, or raises: a coroutine's, an iterator's and an ordinary one's alike."""

    async def awaited():
        value = call(*arguments)
        if inspect.isasyncgen(value):
            return [data async for data in value]
        return await value if inspect.isawaitable(value) else value

    try:
        value = asyncio.run(awaited())
        return list(value) if inspect.isgenerator(value) else value
    except Exception as error:  # noqa: BLE001  whatever it is, it must be the same
        return type(error), str(error), getattr(error, "errno", None)
