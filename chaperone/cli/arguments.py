"""
The verbs and what may stand behind them: one table, for the parser, for the help and for shell
completion.

Knows: the words of the command line.  Must not know: what a verb does.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Argument = tuple[tuple[str, ...], dict[str, Any]]

SUMMARY = "chaperone stays with a program for its whole life, and leaves its output and outcome in a directory."
EXIT_CODES = """\
Exit: 0 done (run: the outcome is recorded, whatever it was); wait and exec: the program's own code, 128+n for
signal n, 125 if it could not be run or nobody knows how it ended. Else as in sysexits.h: 64 usage, 65 a bad
spec, 66 no such run or spec, 70 a bug of ours, 71 the system, 73 the run exists or can't be created, 74 the disk.
"""


def _argument(*names: str, **how: Any) -> Argument:
    return names, how


# The metavars tell shell completion what fits: SPEC and FILE a file, DIR a directory, RUN and LIVE
# ids, SIG a signal.
_SPOOL = _argument("--spool", metavar="DIR", help="the spool; else $CHAPERONE_SPOOL, else ./spool")
_RUN = _argument("run", metavar="RUN", help="a run id, or a prefix that fits no other run")
_RUNS = _argument(
    "runs", metavar="RUN", nargs="+", help="run ids, or prefixes that fit no other run"
)
_LIVE = _argument("run", metavar="LIVE", help="a run id, or a prefix that fits no other run")
_LIVES = _argument(
    "runs", metavar="LIVE", nargs="+", help="run ids, or prefixes that fit no other run"
)
_SPEC = _argument("spec", metavar="SPEC", help="a file with a spec as JSON; - is stdin")
_NO_WAIT = _argument(
    "--no-wait",
    action="store_true",
    help="return when it was asked for, not when the run has ended",
)
_BY = _argument("--by", metavar="WORD", help="who asks, for the status; else the user's name")

SHELLS = ("bash", "zsh", "fish")

VERBS: dict[str, tuple[str, list[Argument]]] = {
    "run": (
        "run a program and hold it to its end; print the run id first",
        [
            _argument(
                "specs",
                metavar="SPEC",
                nargs="+",
                help="a file with a spec as JSON; - is stdin; several: a chaperone each",
            ),
            _SPOOL,
            _argument(
                "--id", metavar="ID", help="the run's id, instead of the spec's or a new one"
            ),
            _argument(
                "--detach", action="store_true", help="return when the run directory is visible"
            ),
            _argument(
                "--warm",
                action="store_true",
                help="let the spool's launcher start it, if one is there; implies --detach",
            ),
        ],
    ),
    "exec": ("run a program with its streams as ours, exit as it does; no spool", [_SPEC]),
    "check": (
        "tell what would be run, hop by hop, or the one thing that is wrong",
        [
            _SPEC,
            _argument(
                "--far-side",
                action="store_true",
                help="print the text that the far side is sent instead",
            ),
        ],
    ),
    "ls": (
        "list the live runs and those not yet collected",
        [
            _argument("--all", action="store_true", help="the collected runs too"),
            _argument("--json", action="store_true", help="a status a line, as JSON"),
            _SPOOL,
        ],
    ),
    "status": ("print the status of a run as JSON", [_RUN, _SPOOL]),
    "tail": (
        "print the end of a run's output, as the program wrote it",
        [
            _RUN,
            _argument(
                "stream",
                metavar="STREAM",
                nargs="?",
                help="stdout, stderr or log; else stdout and stderr, each to ours",
            ),
            _argument("-f", "--follow", action="store_true", help="go on until the run has ended"),
            _argument(
                "-n",
                "--lines",
                metavar="N",
                default="10",
                help="how many lines; all for everything [10]",
            ),
            _SPOOL,
        ],
    ),
    "wait": ("wait for runs to end, exit as the worst of them", [_RUNS, _SPOOL]),
    "stop": (
        "stop runs: a signal, a grace, then SIGKILL; return when they have ended",
        [
            _LIVES,
            _argument(
                "--grace",
                metavar="SECONDS",
                type=float,
                help="how long until SIGKILL; else the spec's",
            ),
            _NO_WAIT,
            _BY,
            _SPOOL,
        ],
    ),
    "signal": (
        "send a signal to a run's program",
        [_LIVE, _argument("signal", metavar="SIG", help="USR1, SIGUSR1 or 10"), _BY, _SPOOL],
    ),
    "kill": (
        "SIGKILL runs, with all that they started; return when they have ended",
        [_LIVES, _NO_WAIT, _BY, _SPOOL],
    ),
    "follow": (
        "print all events as lines of JSON, for schedulers in other languages",
        [
            _argument(
                "--cursor",
                metavar="FILE",
                help="go on from there; each batch is answered on stdin with its number, then its ended runs are collected",
            ),
            _SPOOL,
        ],
    ),
    "reap": (
        "publish the loss of runs whose chaperone died, sweep what dead starts left",
        [
            _argument(
                "runs",
                metavar="RUN",
                nargs="*",
                help="run ids, or prefixes that fit no other run; else all that need it",
            ),
            _SPOOL,
        ],
    ),
    "adopt": (
        "take over runs that outlived their chaperone, and hold them to their end",
        [
            _argument(
                "runs",
                metavar="RUN",
                nargs="*",
                help="run ids, or prefixes that fit no other run; else all that are unattended",
            ),
            _argument("--detach", action="store_true", help="return when they are taken over"),
            _SPOOL,
        ],
    ),
    "gc": (
        "delete ended runs",
        [
            _argument("--older", metavar="AGE", help="those that ended longer ago: 7d, 12h, 90s"),
            _argument(
                "--keep-failed",
                metavar="AGE",
                help="but those that did not exit with 0 only if they ended longer ago than this",
            ),
            _argument(
                "--max-bytes",
                metavar="SIZE",
                help="then the oldest, until the rest takes no more: 10G, 500M",
            ),
            _argument("--dry-run", action="store_true", help="delete nothing, print the ids"),
            _SPOOL,
        ],
    ),
    "doctor": (
        "tell what this machine, the spool and a far side lack, and how to mend it",
        [
            _argument(
                "host", metavar="HOST", nargs="?", help="a far side to look at too, as ssh knows it"
            ),
            _SPOOL,
        ],
    ),
    "launcher": (
        "start runs of one spool from a warm image, for whoever asks by --warm, until killed",
        [
            _argument(
                "--idle",
                metavar="SECONDS",
                type=float,
                help="end when nobody has asked for so long",
            ),
            _argument("--detach", action="store_true", help="return when it can be asked"),
            _SPOOL,
        ],
    ),
    "completion": (
        "print the completion script of a shell",
        [_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")],
    ),
}


def help_text() -> str:
    """The text of `chaperone --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {summary}" for verb, (summary, _) in VERBS.items()]
    return "\n".join(
        [
            "usage: chaperone VERB ... | --help | --version",
            "",
            SUMMARY,
            "",
            *lines,
            "",
            "chaperone VERB --help tells more.",
            "",
            EXIT_CODES,
        ]
    )
