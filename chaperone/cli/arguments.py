"""
The table of all verbs, and their parsers, which raise what argparse would print.

Knows: argparse, the files of verbs.  Must not know: what a verb does.
A verb is declared only in its file in verbs/; this module collects them.
"""

from __future__ import annotations

from .command import spec_text
from .verb import UsageError, dashes_missing, verbs_in
from .verbs import agent, check, control, doctor, hold, look, pieces, read, upkeep

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence
    from typing import NoReturn

    from .verb import Verb

FAMILIES = (hold, check, look, read, pieces, control, upkeep, agent, doctor)
VERBS = {name: verb for family in FAMILIES for name, verb in verbs_in(family).items()}

HEAD = """\
usage: chaperone VERB ... | --help | --version

chaperone stays with a program for its whole life, and leaves its output and
outcome in a directory.

"""
FOOT = """
chaperone VERB --help has more.

Exit codes: 0 done (run: the outcome is recorded, whatever it is). wait and
exec: the program's own code, 128+n for signal n, 125 if it could not be run or
its end is unknown. Errors as in sysexits.h: 64 invalid command line, 65 invalid
spec, 66 no such run or spec, 69 an agent does not answer, 70 a bug in
chaperone, 71 a system call failed, 73 the run exists or can't be created, 74
the disk, 75 try again later.
"""

# What other tools call it.
MEANT = {
    "cat": "tail",
    "delete": "rm",
    "help": "--help",
    "list": "ls",
    "log": "tail",
    "logs": "tail",
    "ps": "ls",
    "start": "run",
    "terminate": "stop",
    "version": "--version",
}


class HelpAsked(Exception):
    """Not an error: the caller wants the help of the verb."""


def help_text() -> str:
    """The text of `chaperone --help`, at most 80 columns wide."""
    width = max(map(len, VERBS))
    lines = [f"  {verb.name:{width}}  {verb.summary}\n" for verb in VERBS.values()]
    return HEAD + "".join(lines) + FOOT


def verb_named(name: str) -> Verb:
    """
    The verb with this name.

    Raises:
        UsageError: If there is none; it suggests a similar name.
    """
    if name in VERBS:
        return VERBS[name]
    want = f"want one of {', '.join(VERBS)}"
    if not name:
        raise UsageError(f"unable to understand the command line: the verb is missing; {want}")
    near = near_miss(name, VERBS)
    raise UsageError(f"unable to understand {name!r}: {near.removeprefix('; ') or want}")


def near_miss(word: str, names: Iterable[str]) -> str:
    """`; did you mean 'ls'?` where a word is close to one of the names, else an empty text."""
    import difflib

    names = list(names)
    meant = MEANT.get(word)
    close = [name for name in names if word and name.startswith((word, f"-{word}"))]
    if meant in (*names, "--help", "--version"):
        close = [meant]
    elif not close:
        # Without the dashes, which would make `--id` like `--cwd`.
        bare = {name.lstrip("-"): name for name in names}
        bare_word = word.lstrip("-")
        turned = [name for name in bare if sorted(name) == sorted(bare_word)]  # `sl`
        close = [bare[name] for name in turned or difflib.get_close_matches(bare_word, bare, 1)]
    return f"; did you mean {close[0]!r}?" if close else ""


def near_option(verb: Verb, word: str, names: Iterable[str], others: Iterable[str]) -> str:
    """
    As `near_miss`, of an option of a verb. The option may be one of a command without `--`, as in
    `run ls -l`.

    Args:
        others (list): The words before it that are no options.
    """
    return (dashes_missing(list(others)) if verb.takes_command else "") or near_miss(word, names)


# -- one verb


def parser(verb: Verb) -> argparse.ArgumentParser:
    """The argparse parser of a verb."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"unable to understand {self.prog!r}: {message}")

    class Help(argparse.Action):
        def __call__(self, *_: object) -> None:
            raise HelpAsked

    prog = f"chaperone {verb.name}"
    usage = f"{prog} [-h] [options] SPEC\n       {prog} [-h] [options] -- CMD ARG..."
    made = Parser(
        prog=prog,
        usage=usage if verb.takes_command else None,
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        add_help=False,
    )
    nothing = argparse.SUPPRESS
    made.add_argument("-h", "--help", action=Help, nargs=0, default=nothing, help="this text")
    for argument in verb.arguments:
        made.add_argument(*argument.names, **argument.how)
    if verb.takes_command:
        made.set_defaults(command=None)
    return made


def parsed(verb: Verb, words: Sequence[str]) -> argparse.Namespace:
    """
    Parse the words after a verb.

    Raises:
        UsageError: One sentence.
        HelpAsked: For -h and --help.
    """
    words = list(words)
    end = words.index("--") if "--" in words and verb.takes_command else len(words)
    _refuse_unknown_options(verb, words[:end])
    # Intermixed: otherwise the second RUN of `stop a --no-wait b` is an unrecognized argument.
    given = parser(verb).parse_intermixed_args(words[:end])
    if end < len(words):
        given.command = spec_text(verb.name, given, words[end + 1 :])
    return given


def _refuse_unknown_options(verb: Verb, words: Sequence[str]) -> None:
    """
    Say which option was meant. argparse first complains of a word that is missing, and takes `-5`
    for a run.
    """
    options = {name: each for each in verb.arguments if each.is_option for name in each.names}
    is_value = False
    others: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        if is_value:
            is_value = False
            continue
        if word == "-" or not word.startswith("-"):
            others.append(word)
            continue
        if word == "--" or name == "-h" or (len(name) > 2 and "--help".startswith(name)):
            return
        full = [each for each in options if each == name or (each > "--" and each.startswith(name))]
        if not full and name[:2] not in options:
            near = near_option(verb, name, options, others)
            if name[1:].isdigit() and "-n" in options:  # of head(1) and tail(1), for 40 years
                near = f"; did you mean '-n {name[1:]}'?"
            reason = f"it has no option {name!r}{near}"
            raise UsageError(f"unable to understand 'chaperone {verb.name}': {reason}")
        is_value = bool(full) and not equals and not options[full[0]].is_flag


def verb_help(verb: Verb) -> str:
    """The text of `chaperone VERB --help`, as wide as the terminal."""
    return parser(verb).format_help()
