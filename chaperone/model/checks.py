"""
Checks of JSON values. A check takes (value, path) and returns the canonical value, or raises a
sentence that says where the value is, what is wanted, and what was found.

Knows: JSON values.  Must not know: which field it checks.
"""

from __future__ import annotations

from ..errors import SpecError
from . import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Check = Callable[[Any, str], Any]

# Defaults: the field must be given; it is what the check makes of {}; it stays absent.
REQUIRED, OBJECT, ABSENT = object(), object(), object()
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def cut(text: str) -> str:
    """The text, cut to the 80 characters that a sentence can hold."""
    return text if len(text) <= 80 else text[:77] + "..."


def kind(value: object) -> str:
    """The kind of a value, without its contents, which may be a secret."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next(
        (name for kind, name in kinds.items() if isinstance(value, kind)),
        f"a {type(value).__name__}",
    )


def got(value: object) -> str:
    """
    A string or a number as it is. Of a list or an object only its kind, because it may contain a
    secret.
    """
    if isinstance(value, str):
        return cut(repr(value[:80]))
    return (
        cut(repr(value))
        if type(value) is float or (type(value) is int and abs(value) < 10**80)
        else kind(value)
    )


def fail(path: str, want: str, value: object) -> NoReturn:
    """Raise SpecError for a value that may be shown."""
    raise SpecError(f"{path}: want {want}, got {got(value)}")


def fail_unseen(path: str, want: str, value: object) -> NoReturn:
    """Raise SpecError for a value that may be a secret: only its kind is shown."""
    raise SpecError(f"{path}: want {want}, got {kind(value)}")


def at(path: str, name: object) -> str:
    """The path of a field: `program.env`; `labels["a b"]` if the name is not a plain word."""
    if isinstance(name, str) and name and not set(name) - _PLAIN and len(name) <= 80:
        return f"{path}.{name}" if path else name
    return (
        f"{path}[{cut(jsontext.dumps(name[:80]))}]"
        if isinstance(name, str)
        else f"{path}[{kind(name)}]"
    )


# -- values that may be anything


def shaped(found: Any, unknown: Any, kinds: Any) -> Any:
    """
    An object that was read from a file which a newer version, or a broken disk, may have written.

    Args:
        found (object): The value.
        unknown (dict): Returned in its place if it is no object; None is returned as it is. Its
            values are used in place of those that are of another type.
        kinds (dict): Name to the types that the value of that name may have. Other names stay.
    """
    if not isinstance(found, dict):
        return unknown and dict(unknown)
    inner = unknown or dict.fromkeys(kinds)
    known = {
        name: value if type(value := found.get(name)) in kind else inner[name]
        for name, kind in kinds.items()
    }
    return {**found, **known}


# -- checks


def boolean(value: Any, path: str) -> bool:
    """`true` or `false`."""
    return value if isinstance(value, bool) else fail(path, "true or false", value)


def string(value: Any, path: str) -> str:
    """Any string."""
    return value if isinstance(value, str) else fail(path, "a string", value)


def text(value: Any, path: str) -> str:
    """A non-empty string that execve(2) can pass on."""
    if not isinstance(value, str) or not value:
        fail(path, "a non-empty string", value)
    return passable(value, path)


def passable(value: str, path: str) -> str:
    """A string that execve(2) can pass on: without NUL, surrogates only where they mean bytes."""
    if "\0" in value:
        raise SpecError(
            f"{path}: want a string without NUL bytes, got one at character {value.index(chr(0))}"
        )
    return bytes_or_text(value, path)


def bytes_or_text(value: str, path: str) -> str:
    """
    A string that can be written as bytes: text, and surrogates that mean bytes which are not UTF-8
    (`os.fsdecode`).
    """
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{path}: want text, or bytes as '\\udc80' to '\\udcff',"
            f" got another surrogate at character {error.start}"
        ) from None
    return value


def strings(value: Any, path: str) -> list[str]:
    """A non-empty list of strings."""
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else got(value)
        raise SpecError(f"{path}: want a non-empty list of strings, got {found}")
    for number, item in enumerate(value):
        passable(item, f"{path}[{number}]") if isinstance(item, str) else fail(
            f"{path}[{number}]", "a string", item
        )
    return list(value)


def argv(value: Any, path: str) -> list[str]:
    """What execve takes: as `strings`, the first not empty."""
    found = strings(value, path)
    text(found[0], f"{path}[0]")
    return found


class OneOf:
    """A check that takes one of these words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __call__(self, value: Any, path: str) -> str:
        if value not in self.choices:
            fail(path, " or ".join(map(repr, self.choices)), value)
        return str(value)


class Number:
    """
    A check that takes a number between two limits.

    Args:
        least (float): The lowest one.
        above (bool): Whether `least` itself is refused.
        whole (bool): Whether only ints are taken.
        most (float): The highest one. 1e10 s are 317 years: a longer time is a mistake, and would
            overflow the arithmetic for poll(2).
    """

    def __init__(
        self, least: float, above: bool = False, whole: bool = False, most: float = 1e10
    ) -> None:
        self.least, self.above, self.whole, self.most = least, above, whole, most

    def __call__(self, value: Any, path: str) -> Any:
        least, most = self.least, self.most
        right = type(value) is int or (type(value) is float and not self.whole)
        if not right or not least <= value <= most or (self.above and value == least):
            kind = "a whole number" if self.whole else "a number"
            want = f"{kind} {'above' if self.above else 'of at least'} {least:g}"
            fail(path, f"{want} and at most {most:g}" if right and value > most else want, value)
        return value


class OrNull:
    """What another check takes, or null."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def __call__(self, value: Any, path: str) -> Any:
        return None if value is None else self.check(value, path)


class ListOf:
    """A list whose items all pass one check."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def __call__(self, value: Any, path: str) -> list[object]:
        if not isinstance(value, list):
            fail_unseen(path, "a list", value)
        return [self.check(item, f"{path}[{number}]") for number, item in enumerate(value)]


class Fields:
    """
    An object with these fields and no others.

    Args:
        table (dict): Name to (check, default). A default is taken as it is; REQUIRED, OBJECT and
            ABSENT have a meaning of their own.
        whole (str): The name, in messages, of an object without a path.
    """

    def __init__(self, table: dict[str, tuple[Check, object]], whole: str = "spec") -> None:
        self.table, self.whole = table, whole

    def __call__(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            fail_unseen(path or self.whole, "an object", value)
        for name in value:
            if name not in self.table:
                known = ", ".join(sorted(self.table))
                raise SpecError(f"{at(path, name)}: unknown field; want one of {known}")
        found = {}
        for name, (check, default) in self.table.items():
            if name in value:
                found[name] = check(value[name], at(path, name))
            elif default is REQUIRED:
                raise SpecError(f"{at(path, name)}: required field is missing")
            elif default is not ABSENT:
                found[name] = check({}, at(path, name)) if default is OBJECT else default
        return found


def object_of_strings(value: Any, path: str) -> dict[str, object]:
    """An object that maps any names to strings."""
    if not isinstance(value, dict):
        fail(path, "an object of strings", value)
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            fail(at(path, name), "a string", text)
        for part in (name, text):
            passable(part, at(path, name))
    return dict(value)
