"""
Checks of JSON values: (value, path) to the canonical value, or a sentence that says where, what was
wanted and what was got.

Knows: JSON values.  Must not know: which field is checked.
"""

from __future__ import annotations

from ..errors import SpecError
from . import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Check = Callable[[Any, str], Any]

# Defaults: it must be given; what the check makes of {}; a field that is not given stays absent.
REQUIRED, OBJECT, ABSENT = object(), object(), object()
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def cut(text: str) -> str:
    """Not more of it than a sentence can take."""
    return text if len(text) <= 80 else text[:77] + "..."


def kind(value: object) -> str:
    """What a value is, without what is in it: that may be a secret."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next(
        (name for kind, name in kinds.items() if isinstance(value, kind)),
        f"a {type(value).__name__}",
    )


def got(value: object) -> str:
    """
    A string or a number as it is; of a list or an object its kind alone, for somewhere in it may be
    a secret.
    """
    if isinstance(value, str):
        return cut(repr(value[:80]))
    return (
        cut(repr(value))
        if type(value) is float or (type(value) is int and abs(value) < 10**80)
        else kind(value)
    )


def fail(path: str, want: str, value: object) -> NoReturn:
    """Raise the sentence for a value that is no secret."""
    raise SpecError(f"{path}: want {want}, got {got(value)}")


def fail_unseen(path: str, want: str, value: object) -> NoReturn:
    """Raise the sentence for a value that may be a secret."""
    raise SpecError(f"{path}: want {want}, got {kind(value)}")


def at(path: str, name: object) -> str:
    """The path of a field: `program.env`, and `labels["a b"]` where the name is no plain word."""
    if isinstance(name, str) and name and not set(name) - _PLAIN and len(name) <= 80:
        return f"{path}.{name}" if path else name
    return (
        f"{path}[{cut(jsontext.dumps(name[:80]))}]"
        if isinstance(name, str)
        else f"{path}[{kind(name)}]"
    )


# -- what may be anything


def shaped(found: Any, unknown: Any, kinds: Any) -> Any:
    """
    A value that a newer writer, or a broken disk, may have left: itself where it is what its field
    holds, otherwise `unknown`.

    Args:
        kinds: The types that it may have; for an object a dict, name to types. What else is in an
            object stays there.
    """
    if isinstance(kinds, tuple):
        return found if type(found) in kinds else unknown
    if not isinstance(found, dict):
        return unknown and dict(unknown)
    inner = unknown or dict.fromkeys(kinds)
    known = {name: shaped(found.get(name), inner[name], kind) for name, kind in kinds.items()}
    return {**found, **known}


# -- checks


def boolean(value: Any, path: str) -> bool:
    """`true` or `false`."""
    return value if isinstance(value, bool) else fail(path, "true or false", value)


def string(value: Any, path: str) -> str:
    """Any string."""
    return value if isinstance(value, str) else fail(path, "a string", value)


def text(value: Any, path: str) -> str:
    """A string that is not empty and can be passed on."""
    if not isinstance(value, str) or not value:
        fail(path, "a non-empty string", value)
    return passable(value, path)


def passable(value: str, path: str) -> str:
    """What execve can pass on: no NUL, and no surrogate but those that stand for bytes."""
    if "\0" in value:
        raise SpecError(
            f"{path}: want a string without NUL bytes, got one at character {value.index(chr(0))}"
        )
    return bytes_or_text(value, path)


def bytes_or_text(value: str, path: str) -> str:
    """
    What can be written as bytes: text, and surrogates that stand for bytes that are none
    (`os.fsdecode`).
    """
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{path}: want text or escaped bytes, got a lone surrogate at character {error.start}"
        ) from None
    return value


def strings(value: Any, path: str) -> list[str]:
    """A list of strings, one of them at least."""
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else got(value)
        raise SpecError(f"{path}: want a non-empty list of strings, got {found}")
    for number, item in enumerate(value):
        passable(item, f"{path}[{number}]") if isinstance(item, str) else fail(
            f"{path}[{number}]", "a string", item
        )
    return list(value)


class OneOf:
    """One of these words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __call__(self, value: Any, path: str) -> str:
        if value not in self.choices:
            fail(path, " or ".join(map(repr, self.choices)), value)
        return str(value)


class Number:
    """
    A number between two others.

    Args:
        above (bool): Not `least` itself.
        most (float): 1e10 s are 317 years: what is above is a mistake and would overflow poll(2)
            arithmetic elsewhere.
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
    """The same as another check, or null."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def __call__(self, value: Any, path: str) -> Any:
        return None if value is None else self.check(value, path)


def json_object(value: Any, path: str) -> dict[str, object]:
    """Any JSON object; never shown, for it may have a secret in it."""
    if not isinstance(value, dict):
        fail_unseen(path, "an object", value)
    if not _is_json(
        value,
        100,
        # the parser takes some 900 levels, on a shallow stack; 100 are told apart from a loop
        # everywhere
    ):
        raise SpecError(f"{path}: want JSON values, nested at most 100 deep")
    return dict(value)


def _is_json(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(
            isinstance(name, str) and _is_json(inner, depth - 1) for name, inner in value.items()
        )
    if isinstance(value, list):
        return depth > 0 and all(_is_json(inner, depth - 1) for inner in value)
    if isinstance(value, float):
        return value - value == 0
    return (
        value is None
        or isinstance(value, (str, bool))
        or (isinstance(value, int) and abs(value) < 10**4000)
    )


class ListOf:
    """A list of what one check takes."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def __call__(self, value: Any, path: str) -> list[object]:
        if not isinstance(value, list):
            fail_unseen(path, "a list", value)
        return [self.check(item, f"{path}[{number}]") for number, item in enumerate(value)]


class Fields:
    """
    An object with these fields and no other; a default is canonical as it is, or made by checking
    {}.

    Args:
        whole (str): What an object without a path is called.
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
    """Any names, to strings."""
    if not isinstance(value, dict):
        fail(path, "an object of strings", value)
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            fail(at(path, name), "a string", text)
        for part in (name, text):
            passable(part, at(path, name))
    return dict(value)
