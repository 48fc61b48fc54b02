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


def steps(directory):
    """
    The text of a program that writes `out N` and `err N` to both streams in turn, three times: each
    line when the timeline of its run has the one before, however busy the machine is.
    """
    noted = f'$(cat "{directory}/timeline" 2>/dev/null | wc -l)'
    wait = f"noted() {{ while [ {noted} -lt $1 ]; do sleep 0.01; done; sleep 0.01; }}; "
    out, err = "echo out $n; noted $((2 * n - 1))", "echo err $n >&2; noted $((2 * n))"
    return f"{wait}for n in 1 2 3; do {out}; {err}; done"
