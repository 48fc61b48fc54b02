"""
Makes the completion scripts of shells from the table of verbs, with shtab.

Knows: shtab, what each metavar means.  Must not know: what a verb does.
The scripts are shipped; `python -m chaperone.cli.completion` writes them again, and needs shtab.
They start no chaperone, so that the Tab key answers at once: run ids are names in the spool.
"""

from __future__ import annotations

import argparse

from ..spool import format
from . import arguments
from .verbs.upkeep import script_path

SIGNALS = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "STOP", "CONT", "KILL", "WINCH", "ALRM")
WORDS = {"STREAM": (*format.STREAMS, format.LOG), "SIG": SIGNALS}
ENTRIES = {"RUN": ".", "LIVE": format.RUNNING}  # of which directory in the spool the names are

# The ids in the spool that the command line names, or in the default one.
PREAMBLE = {
    "bash": """\
_chaperone_entries() {
    local i spool=${CHAPERONE_SPOOL:-spool}
    for ((i = 2; i < COMP_CWORD - 1; i++)); do
        [[ ${COMP_WORDS[i]} != --spool ]] || spool=${COMP_WORDS[i + 1]}
    done
    compgen -W "$(command ls -- "$spool/$1" 2>/dev/null)" -- "$2"
}
_chaperone_runs() { _chaperone_entries . "$1"; }
_chaperone_live() { _chaperone_entries .running "$1"; }
_chaperone_outputs() { _chaperone_runs "$1"; compgen -W "stdout stderr log" -- "$1"; }
""",
    "zsh": """\
_chaperone_entries() {
    local spool=${CHAPERONE_SPOOL:-spool} place=${words[(i)--spool]}
    (( place + 1 < CURRENT )) && spool=${(Q)words[place + 1]}
    local -a names
    names=($spool/$1/*(N:t))
    compadd -a names
}
_chaperone_outputs() { _chaperone_entries .; compadd stdout stderr log; }
""",
    "fish": """\
function __chaperone_entries
    set -l spool spool
    set -q CHAPERONE_SPOOL; and set spool $CHAPERONE_SPOOL
    set -l words (commandline -opc)
    set -l place (contains -i -- --spool $words)
    and set -q words[(math $place + 1)]
    and set spool $words[(math $place + 1)]
    command ls -- $spool/$argv[1] 2>/dev/null
end
function __chaperone_outputs
    __chaperone_entries .
    printf '%s\\n' stdout stderr log
end
""",
}


def made(shell: str) -> str:
    """The script of a shell, made by shtab."""
    import shtab

    fits: dict[str, object] = {
        "SPEC": shtab.FILE,
        "FILE": shtab.FILE,
        "DIR": shtab.DIRECTORY,
        "RUN": _entries("runs", "."),
        "LIVE": _entries("live", format.RUNNING),
        "OUTPUT": {
            "bash": "_chaperone_outputs",
            "zsh": " _chaperone_outputs",
            "fish": "(__chaperone_outputs)",
        },
    }
    parser = argparse.ArgumentParser("chaperone", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="all verbs")
    parser.add_argument("--version", action="store_true", help="the version")
    verbs = parser.add_subparsers()
    for name, verb in arguments.VERBS.items():
        one = verbs.add_parser(name, help=verb.summary, add_help=False)
        one.add_argument("-h", "--help", action="store_true", help="its words")
        metavars = [argument.how.get("metavar") for argument in verb.arguments]
        for argument in verb.arguments:
            action = one.add_argument(*argument.names, **argument.how)
            metavar = str(argument.how.get("metavar"))
            action.choices = action.choices or WORDS.get(metavar)
            if action.nargs == "+" and "STREAM" in metavars:  # any number of runs, then a stream
                metavar = "OUTPUT"
            if metavar in fits:
                action.complete = fits[metavar]  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell, preamble=PREAMBLE[shell])
    if shell == "zsh":
        # shtab completes only the first of several words, and takes `source` for an autoload.
        script = script.replace('"(*)::', '"*:').replace('"(*):', '"*:')
        script = script.replace(
            "zsh_eval_context[-1] == eval", "zsh_eval_context[-1] == (eval|file)"
        )
    return script + "\n"


def _entries(kind: str, directory: str) -> dict[str, str]:
    return {
        "bash": f"_chaperone_{kind}",
        # A space first: otherwise zsh puts options of compadd before our own argument.
        "zsh": f" _chaperone_entries {directory}",
        "fish": f"(__chaperone_entries {directory})",
    }


if __name__ == "__main__":
    for each in PREAMBLE:
        with open(script_path(each), "w", encoding="utf-8") as file:
            file.write(made(each))
