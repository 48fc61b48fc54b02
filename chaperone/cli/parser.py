"""
Words to what they mean, by argparse and the table of verbs; what argparse would print is raised.

Knows: argparse.  Must not know: what a verb does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ..errors import ChaperoneError
from . import arguments


class UsageError(ChaperoneError, ValueError):
    """The caller's fault: words that no verb takes."""


class HelpAsked(Exception):
    """Not an error: the help of a verb is wanted, not its work."""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"unable to understand {self.prog!r}: {message}")


class _Help(argparse.Action):
    def __call__(self, *_: object) -> None:
        raise HelpAsked


def parser(verb: str) -> argparse.ArgumentParser:
    summary, taken = arguments.VERBS[verb]
    made = _Parser(
        prog=f"chaperone {verb}", description=summary[0].upper() + summary[1:] + ".", add_help=False
    )
    made.add_argument("-h", "--help", action=_Help, nargs=0, help="this text")
    for names, how in taken:
        made.add_argument(*names, **how)
    return made


def parsed(verb: str, words: Sequence[str]) -> argparse.Namespace:
    """
    What the words behind a verb mean.

    Raises:
        UsageError: One sentence.
        HelpAsked: For -h and --help.
    """
    if verb not in arguments.VERBS:
        raise UsageError(
            f"unable to {f'understand {verb!r}' if verb else 'begin'}: want one of {', '.join(arguments.VERBS)}"
        )
    # Intermixed: else the second SPEC of `run a.json --detach b.json` is an unrecognized argument.
    # It forgets what a `--` said, so we heed it: only a file's name may begin with "-", and `./`
    # tells it from an option.
    end = words.index("--") if "--" in words else len(words)
    rest = [
        f"./{word}" if word.startswith("-") and word != "-" else word for word in words[end + 1 :]
    ]
    return parser(verb).parse_intermixed_args([*words[:end], *rest])


def verb_help(verb: str) -> str:
    return parser(verb).format_help()
