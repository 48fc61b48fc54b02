"""
A process that holds runs and writes lines into them: `feeder SPOOL RUNS LINES_A_SECOND SECONDS
FIRST`; the runs are called run-FIRST and so on.

It says "ready" when the runs are there, begins at the first line on its stdin, and holds the runs
until it is killed.
"""

import os
import resource
import sys
import time

from spool_tests.support.writer import Writer


def main(spool, runs, lines_s, seconds, first):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    numbers = range(int(first), int(first) + int(runs))
    writers = [Writer(spool, f"run-{number}").running() for number in numbers]
    fds = [writer.run.streams["stdout"] for writer in writers]
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    for count in range(int(lines_s) * int(seconds)):
        due = begun + count / int(lines_s)
        while (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        os.write(fds[count * 7 % len(fds)], b"%.9f\n" % time.monotonic())
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
