"""
Timelines as they are on disk, read by other means than chaperone's.
"""

STREAMS = {"1": "stdout", "2": "stderr"}


def lines(directory):
    """The lines of a run directory's timeline: (milliseconds, stream, offset, length)."""
    text = (directory / "timeline").read_text()
    assert text == "" or text.endswith("\n")
    found = []
    for line in text.splitlines():
        ms, number, offset, length = line.split(" ")
        found.append((int(ms), STREAMS[number], int(offset), int(length)))
    return found


def timed(directory, stream):
    """How many bytes of a stream have a time; no two lines are about one byte, none about more."""
    end = total = 0
    for _, name, offset, length in lines(directory):
        if name == stream:
            assert offset >= end and length > 0
            end, total = offset + length, total + length
    assert end <= (directory / stream).stat().st_size
    return total
