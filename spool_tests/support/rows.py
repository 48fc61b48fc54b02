"""
What the table of worlds comes to at the end of a run: a line for each world.

Knows: the ids of its tests.  Must not know: any world.
"""

import re

CELL = re.compile(r"::test_world(?:_in_short)?\[(.+):(\w+)\]$")


def rows(stats):
    """
    What held in each world, in the order of their first results.

    Args:
        stats (dict): Reports by outcome, as pytest's terminal reporter has them.
    Returns:
        list: Lines of text.
    """
    worlds = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            if cell := CELL.search(report.nodeid):
                world = worlds.setdefault(cell[1], {"passed": [], "failed": [], "skipped": []})
                world["failed" if outcome == "error" else outcome].append((cell[2], report))
    return [f"{name}: {_said(world)}" for name, world in worlds.items()]


def _said(world):
    if world["skipped"] and not world["passed"] and not world["failed"]:
        reason = world["skipped"][0][1].longrepr[2]
        return f"not tried: {reason.removeprefix('Skipped: ').removeprefix('not tried: ')}"
    held, failed = len(world["passed"]), sorted({check for check, _ in world["failed"]})
    text = f"{held} of {held + len(failed)} checks hold"
    return text + (f"; {', '.join(failed)} does not" if failed else "")
