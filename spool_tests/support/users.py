"""
What tests of users share.
"""

import asyncio  # noqa: F401
import contextlib
import itertools
import os
import re
import signal

# What verbs import is imported here, once, and not again by each child.
from chaperone import api  # noqa: F401
from chaperone.cli import completion, main  # noqa: F401
from chaperone.cli.verbs import control, hold, look, pieces, read, upkeep  # noqa: F401
from chaperone.farside import lives  # noqa: F401
from chaperone.follow import batches  # noqa: F401
from chaperone.hold import adopt, chaperone  # noqa: F401
from chaperone.launch import launcher  # noqa: F401
from chaperone.model.hops import remote  # noqa: F401
from chaperone.spool import gc, reap  # noqa: F401
from spool_tests.support import disk


@contextlib.contextmanager
def telling(path):
    """Our stdout and stderr go to a file."""
    saved = [os.dup(fd) for fd in (1, 2)]
    told = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for fd in (1, 2):
        os.dup2(told, fd)
    yield
    for fd, number in zip(saved, (1, 2), strict=True):
        os.dup2(fd, number)


def said(tmp_path, *each_words, seconds=20):
    """
    What command lines print, [(exit code, text)], one after the other in a child of ours; verbs
    that become a chaperone each in their own.

    A verb that hangs dies of SIGALRM, and fails the test.
    """
    found, path = [], tmp_path / "said"
    for lean, each in itertools.groupby(each_words, key=lambda words: words[0] in main.LEAN):
        for group in [[words] for words in each] if lean else [list(each)]:
            path.unlink(missing_ok=True)

            def act(group=group):
                with telling(path):
                    for words in group:
                        signal.alarm(seconds)
                        code = main.main([*map(str, words)])
                        os.write(1, f"\1{code}\2".encode()) if len(group) > 1 else os._exit(code)
                os._exit(0)

            code = disk.waited(disk.forked(act))
            text = path.read_text()
            assert code >= 0, (group, text)
            found += (
                [(code, text)]
                if len(group) == 1
                else [(int(code), text) for text, code in re.findall("([^\1]*)\1(\\d+)\2", text)]
            )
    assert len(found) == len(each_words)
    return found


# -- the spool's owner and modes

VERBS = [
    ["ls"],
    ["ls", "--all", "--json"],
    ["status", "r"],
    ["tail", "r"],
    ["tail", "-f", "r"],
    ["wait", "r"],
    ["stop", "--no-wait", "r"],
    ["signal", "r", "USR1"],
    ["kill", "--no-wait", "r"],
    ["follow"],
    ["reap"],
    ["adopt"],
    ["adopt", "r"],
    ["gc", "--older", "0s"],
    ["launcher", "--idle", "0"],
]
