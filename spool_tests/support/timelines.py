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


def pieces(found, offsets):
    """
    What is to be delivered from some offsets on, by all lines (stream, offset, end, ms) of a
    timeline: (stream, offset, end, ms); ms is None for bytes that no line is about.
    """
    offsets, told = dict(offsets), []
    for stream, offset, end, ms in found:
        if stream not in offsets or end <= offsets[stream]:
            continue
        if offsets[stream] < offset:
            told.append((stream, offsets[stream], offset, None))
        told.append((stream, max(offset, offsets[stream]), end, ms))
        offsets[stream] = end
    return told
