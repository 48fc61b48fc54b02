"""
The two lives of a program on a far side, each as a table: in which state, what is heard or asked,
what is done, and which state is next.

Knows: the names of states, events and actions.  Must not know: what an action does.
"""

from __future__ import annotations

from ..errors import TransitionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Happen = Callable[["Event"], None]

# Of both lives:
#   unsent     nothing was sent: no program can have been started
#   abandoned  the same, and no attempt is wanted any more
#   sent       the payload went out; whether the program was started is not known yet
#   unwanted   the same, and a stop came: it is sent when the program starts
#   running    the program was started
#   ended      how it ended is recorded; what it left running is asked for
#   refused    the far side could not start it
#   over       the outcome is published, nothing is to come
# Of kill:
#   alone      ended, and all of its own output is here; what it left may hold the pipes for ever
# Of survive:
#   unsure     sent, and the connection was lost before a word of the start; we attach again
#   adopted    taken over from a chaperone that died before it recorded a start
#   resuming   taken over from one that had recorded it
#   partial    ended; the rest can't be had any more
#   no start   no more will be heard, and it was never heard that it was started
#   not found  the same, of one that was adopted: it may have run
#   no outcome no more will be heard, and how it ended is not known
#   clearing   published; the far side removes what it keeps of the run
#
# `any` is every state but `over`, or every event; `=` is the same state. An action is a method of
# `FarSide` or `Account`. `call it odd`: a far side that is in order does not say this now.
# `fail`: it can't happen.
KILL = """
unsent | connected | | sent
unsent, abandoned | stop, kill | give up | abandoned
unsent, abandoned | unreachable | report unreachable | over
abandoned | connected | | unwanted
sent, unwanted | stop | | unwanted
sent, unwanted | kill | be patient | unwanted
refused | stop, kill | close | =
sent, unwanted | start | stop waiting, report start, take kept end | running
sent, unwanted | end, no end | stop waiting, keep end | =
sent, unwanted | dead | wait for start | =
sent, unwanted | failed early, failed | stop waiting, keep failure, close | refused
sent, unwanted, running | never | find nothing, close | =
sent, unwanted, running | silence | find end missing, ask to forget, close | =
sent | closed, payload cut | report unknown start | over
unwanted | closed, payload cut | report stopped start | over
running | start | stop waiting | =
running | dead | wait for end | =
running | end | stop waiting, record end | ended
running | no end | stop waiting, find no outcome, close | =
running, ended, alone | stop | ask to stop | =
running | kill | ask to kill, be patient | =
ended, alone | kill | ask to kill | =
running | closed, payload cut | report lost | over
ended | finish | ask for the rest, be patient with the rest | =
ended | left alone | cut off | alone
ended | closed, payload cut | report end | over
alone | closed, payload cut | report whole end | over
refused | closed, payload cut | report failure | over
ended, alone, refused | never | close | =
sent, unwanted, running, refused | unheard | log loss, record far stop | =
ended, alone | unheard | log loss | =
sent, unwanted, running, ended, alone, refused | left | stop waiting, count left | =
sent, unwanted, running, ended, alone, refused | drained | note drained | =
running | unkillable | note unkillable, report unkillable | over
sent, unwanted, ended, alone, refused | unkillable | note unkillable | =
sent, unwanted, running, ended, alone, refused | bye | hang up | =
ended, alone | start, end, no end, dead | | =
refused | end, no end, dead, failed early, failed | | =
sent, unwanted, running, alone, refused | left alone | | =
any | signal | ask to signal | =
any | hello | greet | =
any | out | | =
any | beat | note answer | =
unsent, abandoned | start, end, no end, failed early, failed, never, dead | call it odd | =
unsent, abandoned | unheard, left, unkillable, drained, bye | call it odd | =
running, ended, alone | failed early, failed | call it odd | =
refused | start | call it odd | =
any | sizes, short | call it odd | =
unsent, abandoned | closed, payload cut, left alone | fail | =
sent, unwanted, running, ended, alone, refused | connected, unreachable | fail | =
unsent, abandoned, ended, alone, refused | silence | fail | =
unsent, abandoned, sent, unwanted, running, alone, refused | finish | fail | =
over | any | | =
"""

SURVIVE = """
unsent | connected | | sent
unsent, abandoned | stop, kill | give up | abandoned
unsent, abandoned | unreachable | report unreachable | over
abandoned | connected | | unwanted
unsure, adopted, resuming, running, ended | connected | | =
sent, unwanted | stop | | unwanted
sent, unwanted | kill | be patient | unwanted
unsure, adopted | stop, kill | | =
no start, not found, refused | stop, kill | close | =
sent, unwanted, unsure | start | stop waiting, report start, take kept end | running
adopted, resuming | start | stop waiting, report resumed, take kept end | running
sent, unwanted, unsure, adopted | end, no end | stop waiting, keep end | =
sent, unwanted, unsure, adopted | dead | wait for start | =
sent, unwanted, unsure | never | find nothing, close | no start
adopted | never | find nothing, close | not found
sent, unwanted, unsure | silence | find end missing, ask to forget | no start
adopted | silence | find end missing, ask to forget | not found
sent, unwanted, unsure, adopted | failed early | stop waiting, keep failure, close | refused
no start, not found | failed early | stop waiting, keep failure, close | refused
sent, unwanted, unsure, adopted | failed | stop waiting, publish failure, clear | clearing
no start, not found | failed | stop waiting, publish failure, clear | clearing
sent, unwanted, unsure | closed | count drop, come back | unsure
sent | payload cut | report unknown start | over
unwanted | payload cut | report stopped start | over
unsure | payload cut | count drop, come back | =
adopted, resuming, running, ended | closed, payload cut | count drop, come back | =
unsure, adopted, resuming, running, ended | unreachable | come back | =
unsure, adopted, resuming, running, ended | too late | report out of reach | over
resuming, running, ended | dead | wait for end | =
resuming | end | stop waiting, note connection, record end | ended
running | end | stop waiting, record end | ended
resuming, running | no end | stop waiting, find no outcome, close | no outcome
resuming, running | never | find nothing, close | no outcome
resuming, running | silence | find end missing, ask to forget | no outcome
resuming, running, ended, partial, no outcome | stop | ask to stop | =
resuming, running, ended, partial, no outcome | kill | ask to kill | =
running, ended | start | stop waiting | =
ended, partial | finish | ask for the rest | =
ended | all here | compare streams, publish end, clear | clearing
ended | silence | warn of streams, find end missing, publish partial end, clear | clearing
ended | never | find nothing, close | partial
no start | start | report start, take kept end | no outcome
not found | start | report resumed, take kept end | no outcome
no start, not found | end, no end | keep end | =
no outcome | end | record end | partial
no outcome | no end | find no outcome, close | =
no start | closed, payload cut | report never started | over
not found, no outcome | closed, payload cut | report lost | over
partial | closed, payload cut | report cut end | over
refused | closed, payload cut | report failure | over
clearing | closed, payload cut | leave | over
no start, not found, no outcome, partial, refused, clearing | never | close | =
sent, unwanted, unsure, adopted, resuming, running | unheard | log loss, record far stop | =
no start, not found, no outcome, refused | unheard | log loss, record far stop | =
ended, partial, clearing | unheard | log loss | =
sent, unwanted, unsure, adopted, resuming, running, ended | left | stop waiting, count left | =
sent, unwanted, unsure, adopted, resuming, running, ended | sizes | note sizes | =
sent, unwanted, unsure, adopted, resuming, running, ended | short | note damage | =
no start, not found, no outcome, partial, refused, clearing | left, sizes, short, dead | | =
sent, unwanted, unsure, adopted, resuming, running | all here | | =
no start, not found, no outcome, partial, refused, clearing | all here | | =
no outcome, partial, clearing | start | | =
ended, partial, refused, clearing | end, no end | | =
refused, clearing | failed early, failed | | =
clearing | stop, kill | | =
resuming, running | unkillable | note unkillable, ask to forget, report unkillable | over
sent, unwanted, unsure, adopted, ended | unkillable | note unkillable | =
no start, not found, no outcome, partial, refused, clearing | unkillable | note unkillable | =
sent, unwanted, unsure, adopted, resuming, running, ended | bye | hang up | =
no start, not found, no outcome, partial, refused, clearing | bye | hang up | =
any | signal | ask to signal | =
any | hello | greet | =
any | out | | =
any | beat | note answer | =
unsent, abandoned | start, end, no end, failed early, failed, never, dead | call it odd | =
unsent, abandoned | unheard, left, unkillable, sizes, short, bye | call it odd | =
resuming, running, ended, no outcome, partial | failed early, failed | call it odd | =
refused | start | call it odd | =
any | drained | call it odd | =
unsent, abandoned | closed, payload cut, all here | fail | =
sent, unwanted, no start, not found, no outcome | connected, unreachable | fail | =
partial, refused, clearing | connected, unreachable | fail | =
unsent, abandoned, no start, not found, no outcome, partial, refused, clearing | silence | fail | =
unsent, abandoned, sent, unwanted, unsure, adopted, resuming, running | finish | fail | =
no start, not found, no outcome, refused, clearing | finish | fail | =
unsent, abandoned, sent, unwanted, no start, not found | too late | fail | =
no outcome, partial, refused, clearing | too late | fail | =
over | any | | =
"""


class Event:
    """
    What was heard or asked: one column of a life.

    Args:
        name (str): As in `lives`.
        said (list): All words of a record.
        number (int): A signal, or the exit code of a client.
        seconds (float): A grace.
        stage, text (str): Why there is no connection any more, or none yet.
    """

    __slots__ = ("name", "number", "said", "seconds", "stage", "text")

    def __init__(
        self,
        name: str,
        *,
        said: Sequence[str] = (),
        number: int = 0,
        seconds: float = 0.0,
        stage: str = "",
        text: str = "",
    ) -> None:
        self.name, self.said, self.number, self.seconds = name, said, number, seconds
        self.stage, self.text = stage, text


class Life:
    """
    A table of states.

    Args:
        text (str): Its rows, `KILL` or `SURVIVE`.

    Attributes:
        rows (list): (states, events, actions, next state) as written: lists of str, and a str.
    """

    def __init__(self, text: str) -> None:
        self.rows: list[tuple[list[str], list[str], list[str], str]] = []
        for line in text.strip().splitlines():
            states, events, actions, after = line.split("|")
            self.rows.append((_names(states), _names(events), _names(actions), after.strip()))

    def step(self, state: str, event: str) -> tuple[list[str], str]:
        """
        What is done, and which state is next.

        Raises:
            TransitionError: If that can't happen.
        """
        for states, events, actions, after in self.rows:
            here = state in states or (states == ["any"] and state != "over")
            if here and (event in events or events == ["any"]) and actions != ["fail"]:
                return actions, state if after == "=" else after
        raise TransitionError(f"unable to take {event!r} in state {state!r} of a far side")


def _names(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]
