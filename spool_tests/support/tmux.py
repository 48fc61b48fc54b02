"""
A terminal of tmux that types a script step by step, and is read after each step.

Knows: tmux.  Must not know: what is typed.
"""

import os
import subprocess

from spool_tests.support.waiting import until


class Pane:
    """
    Args:
        place (pathlib.Path): The directory in which bash starts; some files are made there.
        columns (int): Of the terminal.
        steps (list): Shell texts.
    """

    def __init__(self, place, columns, steps):
        self._place = place
        script = place / "steps.sh"
        script.write_text(
            "".join(
                f"{step}\n: >shown-{number}\nuntil [ -e seen-{number} ]; do sleep 0.01; done\n"
                for number, step in enumerate(steps)
            )
            + "exec sleep 1000\n"  # the server ends with its last session
        )
        size = ("-x", str(columns), "-y", "1000")
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "bash", str(script))

    def _tmux(self, *words):
        # Its socket by a relative name: an absolute one may be longer than a socket's may be.
        env = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm"}
        done = subprocess.run(
            ["tmux", "-u", "-S", "tmux", *words],
            cwd=self._place,
            env=env,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._tmux("kill-server")

    def shown(self, number):
        """
        The screen after a step, as rows, and as lines: a line that was wrapped is one again.
        """
        until(lambda: (self._place / f"shown-{number}").exists(), 60)
        rows, lines = (
            self._tmux("capture-pane", "-p", *how).rstrip("\n").split("\n") for how in ((), ("-J",))
        )
        self._tmux("send-keys", "-R")
        (self._place / f"seen-{number}").touch()
        return [row.rstrip() for row in rows], [line.rstrip() for line in lines]
