"""
What comes back from the far side: its records, separated from what the program writes.

Knows: bytes, records, a client's last words.  Must not know: processes, sockets, the clock,
what was sent.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..model.hops.route import Route

RECORD_BYTES = 4_096  # PIPE_BUF: what is longer was not written as one record


class Records:
    """
    One stream from the far side, parted into what the program wrote and the records between.

    Args:
        nonce (str): As in `settings`.

    Attributes:
        noise (bytearray): What came before the first record: the startup files' words, and a hop's
            own.
        heard (bool): Whether there was a record yet.
    """

    NOISE_BYTES = 65_536  # of noise that is kept; more would not help

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce.encode()
        self._rest = b""
        self.noise = bytearray()
        self.heard = False

    def feed(self, data: bytes) -> tuple[bytes, list[list[str]]]:
        """
        Take what was read.

        Args:
            data (bytes): The next bytes of the stream.
        Returns:
            tuple: The program's bytes, exact; the records, each a list of words. What may be the
                beginning of a record is kept back.
        """
        if not self._rest and self.heard and self._nonce[0] not in data:
            return data, []
        data = self._rest + data if self._rest else data
        clean, records, start = [], [], 0
        while (found := data.find(self._nonce, start)) >= 0:
            end = data.find(b"\n", found, found + RECORD_BYTES)
            if (
                end < 0 and len(data) - found >= RECORD_BYTES
            ):  # no record is that long: the program had our nonce
                clean.append(data[start : found + 1])
                start = found + 1
                continue
            clean.append(self._heard(data[start:found]))
            start = found
            if end < 0:
                break
            self.heard = True
            records.append(data[found + len(self._nonce) : end].decode("ascii", "replace").split())
            start = end + 1
        kept = len(data) if found < 0 else start
        if found < 0:
            kept = len(data) - _overlap(data, self._nonce, len(data) - start)
            clean.append(self._heard(data[start:kept]))
        self._rest = data[kept:]
        return b"".join(clean), records

    def _heard(self, data: bytes) -> bytes:
        """Before the first record it is noise."""
        if self.heard:
            return data
        self.noise += data[: max(0, self.NOISE_BYTES - len(self.noise))]
        return b""

    def end(self) -> bytes:
        """The stream has ended: what was kept back was no record."""
        rest, self._rest = self._rest, b""
        return self._heard(rest)


class Recorded:
    """
    A dialogue with a far side whose answers have records in them, on both streams.

    Args:
        nonce (str): As for `Records`.
        ready_word, payload, stdin: As in `Dialogue`.
    """

    takes_lines = True

    def __init__(
        self, nonce: str, ready_word: bytes, payload: bytes, stdin: tuple[int, int] | None
    ) -> None:
        self.ready_word, self.payload, self.stdin = ready_word, payload, stdin
        self._streams = {"stdout": Records(nonce), "stderr": Records(nonce)}

    def feed(self, stream: str, data: bytes) -> tuple[bytes, list[list[str]]]:
        """As `Records.feed`, of one of the streams."""
        return self._streams[stream].feed(data)

    def end(self, stream: str) -> bytes:
        """As `Records.end`, of one of the streams."""
        return self._streams[stream].end()

    def noise(self) -> bytes:
        """What came before the first record of each."""
        return b"".join(bytes(records.noise) for records in self._streams.values())


def _overlap(data: bytes, word: bytes, most: int) -> int:
    """The length of the longest end of `data` that is a beginning of `word`."""
    for length in range(min(most, len(word) - 1), 0, -1):
        if data.endswith(word[:length]):
            return length
    return 0


class Farewell:
    """
    The end of a stderr that may be a client's own last words: kept back until the next byte, or the
    client's end, decides.

    Args:
        route (Route): Of the hops; it says what these words are, if there are any.
    """

    def __init__(self, route: Route) -> None:
        self._said, self._codes = route.farewell, route.own_codes
        self._held = b""

    def feed(self, data: bytes, is_followed: bool = False) -> bytes:
        """
        What of the next bytes is the program's; all of it where something that is no last word
        follows.
        """
        if self._said is None:
            return data
        data = self._held + data
        kept = 0 if is_followed else farewell(data, self._said)
        self._held = data[len(data) - kept :]
        return data[: len(data) - kept]

    def end(self, code: int) -> tuple[bytes, bytes]:
        """
        What was kept back, parted by the exit code of the client.

        Returns:
            tuple: The program's bytes, the client's; one of them is empty.
        """
        if self._said and code in self._codes and self._held.endswith(self._said[1]):
            return b"", self._held
        return self._held, b""


def farewell(data: bytes, said: tuple[bytes, bytes]) -> int:
    """
    How many bytes at the end of a stderr may be the beginning of a client's own last words.

    Args:
        data (bytes): What came last.
        said (tuple): The text before and after the host in them, as `Kind.farewell` of a hop.
    """
    before, after = said
    start = data.rfind(before)
    if start >= 0:
        rest = data[start + len(before) :]
        host, space, words = rest.partition(b" ")
        if len(host) <= 255 and b"\n" not in host and after.startswith(space + words):
            return len(data) - start
    return _overlap(data, before, len(data))


GONE = "-1"  # the size of a file that somebody removed
TRACKING = ("kernel", "cookie", "group")  # how the far side knows what belongs to the run
NUMBERS = {"start": (1,), "left": (1,), "eof": (0, 2)}  # how many a record of that name brings
NAMES = ("out", "hello", "start", "beat", "dead", "lost", "left", "short", "unkillable", "bye")


def event_of(words: list[str]) -> str | None:
    """
    What a record says, as an event of `lives`.

    Returns:
        str: None if it is no record that we know, or does not bring the numbers that its name
            promises: the far side may be broken, or be another's by now.
    """
    name, *rest = words
    if name == "end":
        return "end" if outcome(rest) else "no end"
    if name == "fail":
        why = rest[0] if rest else ""
        if why == "never":
            return why
        # Of the other reasons the directory of a run that survives is there already.
        early = ("stdin", "directory", "lease", "no")
        return "failed early" if why.partition(".")[0] in early else "failed"
    if not _is_sound(name, rest):
        return None
    if name == "eof":
        return "sizes" if rest else "drained"
    if name == "lost":  # of contact; `lost` is a state of a run
        return "unheard"
    return name if name in NAMES else None


def _is_sound(name: str, rest: list[str]) -> bool:
    if name == "short":
        return rest in (["out"], ["err"])
    if name == "unkillable":
        return bool(rest) and len(rest) % 2 == 1 and all(map(_is_number, [rest[0], *rest[1::2]]))
    if name not in NUMBERS:
        return True
    if name == "start" and rest[1:] and rest[1] in TRACKING:  # the text of 0.1 did not say it
        rest = rest[:1] + rest[2:]
    numbers = [word for word in rest if not (name == "eof" and word == GONE)]
    return len(rest) in NUMBERS[name] and all(map(_is_number, numbers))


def _is_number(word: str) -> bool:
    return word.isdigit() and len(word) <= 18


def unkillable(words: Sequence[str]) -> str:
    """
    What the far side could not kill, as a text: `2 processes can't be killed: 41 (su), 42 (sh)`.

    Args:
        words (list): Of a sound record `unkillable`: how many, then of some the pid and the name,
            `-` where it is not known.
    """
    named = ", ".join(f"{pid} ({name})" for pid, name in zip(words[2::2], words[3::2], strict=True))
    processes = "1 process" if words[1] == "1" else f"{words[1]} processes"
    return f"{processes} can't be killed: {named}"


class Tail:
    """
    What the far side has said of the end of a run.

    Attributes:
        counts (bool): Whether something there can count what the program leaves.
        left (int): How many processes the program left running; None until that was counted.
        sizes (tuple): Of stdout and stderr there, in bytes, -1 for one that somebody removed; None
            until both have ended.
        drained (bool): Whether all that the program itself wrote to stdout is here.
        damaged (bool): Whether a stream was cut short by somebody.
    """

    def __init__(self) -> None:
        self.counts = True
        self.left: int | None = None
        self.sizes: tuple[int, int] | None = None
        self.drained = self.damaged = False

    def is_here(self, here: tuple[int, int]) -> bool:
        """Whether both streams are here to their ends; `here` are their sizes."""
        return self.sizes is not None and here[0] >= self.sizes[0] and here[1] >= self.sizes[1]


def outcome(words: list[str]) -> dict[str, Any]:
    """
    How the program ended, by the words of an `end` record.

    Args:
        words (list): `R7` and four times, as of times(1p); `ambiguous` after it if 128 + n may be a
            signal or an exit code.
    Returns:
        dict: `wait_status` (int, None if it can't be known), `return_code`, `ambiguous`, `rusage`;
            {} if the words do not say how it ended.
    """
    results = [word for word in words if word[0] == "R" and word[1:].isdigit()]
    if not results:
        return {}
    value, ambiguous = int(results[0][1:]), "ambiguous" in words
    rusage = _times(words[words.index(results[0]) + 1 :])
    if value >= 256:  # awk: 256 + signal, 512 + signal with a core; ksh93's $?: 256 + signal
        if value >= 768 or not 0 < value % 256 <= 64:
            return {}
        return {
            "wait_status": value % 256 | (0x80 if value >= 512 else 0),
            "return_code": None,
            "ambiguous": False,
            "rusage": rusage,
        }
    unsure = ambiguous and value > 128
    return {
        "wait_status": None if unsure else value << 8,
        "return_code": value,
        "ambiguous": unsure,
        "rusage": rusage,
    }


def oom_counted(words: Sequence[str]) -> bool | None:
    """
    Whether the kernel counted an OOM kill in the program's cgroup while it ran, by the words of an
    `end` record; None if that can't be known.
    """
    found = [word[4:] for word in words if word.startswith("oom=")]
    return int(found[0]) > 0 if found and found[0].isdigit() else None


def _times(words: list[str]) -> dict[str, float | None] | None:
    """Of the children: the third and fourth of words like `1m2.25s`; None for missing ones."""
    found = [word for word in words if word[0].isdigit() and word.endswith("s") and "m" in word]
    if len(found) < 4:
        return None
    try:
        utime, stime = (
            int(word.partition("m")[0]) * 60 + float(word.partition("m")[2][:-1])
            for word in found[2:4]
        )
    except ValueError:
        return None
    unknown = dict.fromkeys(("maxrss", "minflt", "majflt", "inblock", "oublock", "nvcsw", "nivcsw"))
    return {"utime": utime, "stime": stime, **unknown}


def ending(code: int) -> str:
    """How a connection ended, by its client's exit code or, negative, signal."""
    return f"code {code}" if code >= 0 else f"signal {-code}"


# -- what its words mean

LACKING = {
    "setsid=": "setsid: the program has no group of its own, and is stopped process by process",
    "tracking=group": "/proc that its grep can search: "
    "processes that leave the program's group are not found",
}
FAILURES = {
    "cwd": ("change to cwd {cwd!r}", "no such directory, or no permission"),
    "notfound": ("run {program!r}", "not found on the far side"),
    "permission": ("run {program!r}", "not executable on the far side"),
    "interpreter": (
        "run {program!r}",
        "the interpreter that its first line names is not on the far side",
    ),
    "exec": (
        "run {program!r}",
        "the far side can't execute it; its shell's message is in stderr",
    ),
    "lease": ("watch the lease on the far side", "no /proc, and no room for a FIFO in its TMPDIR"),
    "stdin": ("keep standard input on the far side", "no room or no permission in its TMPDIR"),
    "directory": (
        "make the run's directory on the far side",
        "it is there already, or can't be made",
    ),
    "setup": (
        "prepare the program on the far side",
        "its shell refused the environment, the umask or a limit",
    ),
}


def failure(why: str, program: dict[str, Any]) -> tuple[str, str]:
    """
    A `fail` record as a stage and a sentence; each proves that the program was not started.

    Args:
        why (str): The record's word.
        program (dict): `spec["program"]`.
    """
    kind, _, name = why.partition(".")
    if kind == "no":
        doing, reason = "prepare the program on the far side", f"its PATH has no {name!r}"
    else:
        doing = f"set rlimit {name!r}" if name else "start the program"
        doing, reason = FAILURES.get(why, (doing, "the far side refused it"))
    here = ("stdin", "directory", "setup", "lease", "no")
    stage = "far-side" if kind in here else "spawn"
    return (
        stage,
        f"unable to {doing.format(cwd=program['cwd'], program=program['argv'][0])}: {reason}",
    )
