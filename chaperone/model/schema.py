"""
The JSON Schema (2020-12) of a spec, made from the table that checks it.

Knows: JSON Schema, what each check takes.  Must not know: how anything is checked.
"""

from __future__ import annotations

from typing import Any

from . import checks
from . import spec as specs
from .hops import engines
from .hops import remote as remotes
from .hops.route import KINDS

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# What no schema can say, or only by means that not every validator has; the validator is stricter.
BEYOND = (
    "a whole number is written without a fraction: 1, not 1.0",
    "a string has no lone surrogate but those that stand for a byte, and in the name of a host or "
    "a user not even these",
    "a soft limit of program.rlimits is not above the hard one",
    "every character in the name of an image is printable",
    "the port of callback.url is from 1 to 65535",
    "remote.share is true only where the first hop is ssh without a ControlPath of its own",
    "an object has each key once, and a spec has at most 64 MiB",
)


def of_spec() -> Schema:
    """The schema of a spec: what it takes `specs.checked` takes, but for `BEYOND`, and no more."""
    schema = _of(checks.Fields(specs.TABLE))
    schema["properties"]["program"]["oneOf"] = [{"required": ["argv"]}, {"required": ["command"]}]
    beyond = "chaperone check also wants what is not in this schema: " + "; ".join(BEYOND) + "."
    head = {"$schema": DIALECT, "title": "A spec of chaperone", "$comment": beyond}
    return {**head, **schema, "allOf": _contradictions()}


def _of(check: object) -> Schema:
    """The schema of a check: from what it was made with, otherwise by its name."""
    if isinstance(check, checks.OrNull):
        return _or_null(_of(check.check))
    if isinstance(check, checks.OneOf):
        return {"enum": list(check.choices)}
    if isinstance(check, checks.Number):
        least = {"exclusiveMinimum" if check.above else "minimum": check.least}
        return {"type": "integer" if check.whole else "number", **least, "maximum": check.most}
    if isinstance(check, checks.ListOf):
        return {"type": "array", "items": _of(check.check)}
    if isinstance(check, checks.Fields):
        return _object(check.table)
    module = check.__module__.rpartition(".")[2]
    return dict(_BY_NAME[f"{module}.{check.__name__.lstrip('_')}"])  # type: ignore[attr-defined]


def _or_null(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str) and not {"not", "allOf"} & set(schema):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _object(table: dict[str, tuple[checks.Check, object]]) -> Schema:
    properties = {}
    for name, (check, default) in table.items():
        shown = {"default": default} if isinstance(default, (str, int)) else {}
        properties[name] = {**_of(check), **shown}
    required = [name for name, (_, default) in table.items() if default is checks.REQUIRED]
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


# -- strings. Patterns are unanchored at the end: `$` of some engines fits before a last newline.

_PASSABLE = {"type": "string", "pattern": r"^[^\x00]*$"}  # by execve
_TEXT = {**_PASSABLE, "minLength": 1}
_VARIABLE = {"type": "string", "pattern": r"^[^\x00=]+$"}
# A name that a shell can export.
_EXPORTABLE = {"pattern": r"^[A-Za-z_]", "not": {"pattern": r"[^A-Za-z0-9_]"}}
# ASCII and Unicode white space, quotes, and what a shell takes for a command.
_NO_WORD = r"[\x00- \x7f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'\"`$;&<>|(){}\\]"
_ID = {
    "type": "string",
    "minLength": 1,
    "maxLength": specs.ID_LENGTH,
    "pattern": r"^[A-Za-z0-9]",
    "not": {"pattern": r"[^A-Za-z0-9._-]"},
}


def _name(refused: str = _NO_WORD) -> Schema:
    return {"type": "string", "pattern": "^[^-]", "not": {"pattern": refused}}


def _signal() -> Schema:
    """Each name in any case, with `SIG` or without, and each number with leading zeros."""
    named = {specs.signal_name_of(number) for number in range(1, specs.SIGNALS["SIGRTMAX"] + 1)}
    names = sorted(name for name in named if specs.signal_name(name) == name)
    bare = [name.removeprefix("SIG").replace("+", r"\+") for name in names]
    any_case = "".join(
        f"[{char}{char.lower()}]" if char.isalpha() else char
        for char in f"(?:SIG)?(?:{'|'.join(bare)})"
    )
    numbers = [str(number) for number in range(1, 100) if specs.signal_name(str(number))]
    long = "|".join(number for number in numbers if len(number) == 2)
    short = "|".join(number for number in numbers if len(number) == 1)
    return {
        "type": "string",
        "pattern": f"^(?:{any_case}|0?(?:{long})|0{{0,2}}(?:{short}))$",
        "not": {"pattern": r"\n"},
        "examples": ["SIGTERM", "INT", "SIGRTMIN+3"],
    }


# -- values that have a check of their own

_LIMIT = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
                    {"enum": ["unlimited", None]}]}  # fmt: skip
_ONE_LINE = {"anyOf": [{"type": "string", "not": {"pattern": r"[\x00\r\n]"}},
                       {"type": ["number", "boolean"]}]}  # fmt: skip


_WORD = {"anyOf": [_PASSABLE, {"type": ["number", "boolean"]}]}


def _hop() -> Schema:
    """An object with one key, a kind of hop."""
    kinds = {kind: _object(KINDS[kind].table) for kind in KINDS}
    for kind, found in kinds.items():
        if issubclass(KINDS[kind], engines.Container):
            found["oneOf"] = [_at(name, {"type": "string"}) for name in ("container", "image")]
    return {
        "type": "object",
        "properties": kinds,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _dies_with_client() -> Schema:
    """A hop behind which nothing survives."""
    found = [{"required": [kind]} for kind in KINDS if KINDS[kind].dies_with_client]
    for kind in KINDS:
        if issubclass(KINDS[kind], engines.Container):
            found.append(_at(f"{kind}.image", {"type": "string"}))
    return {"type": "array", "contains": {"anyOf": found}}


def _remote() -> Schema:
    """`remote`: its five short fields are those of the hops that they stand for."""
    ssh, sudo = KINDS["ssh"].table, KINDS["sudo"].table
    found = _object(specs.REMOTE)
    found["properties"] = {
        **{name: _of(ssh[name][0]) for name in ("host", "user", "port", "options")},
        "mode": _or_null({"enum": list(remotes.MODES)}),
        "hops": _or_null({"type": "array", "items": _hop(), "minItems": 1}),
        **found["properties"],
    }
    for name in ("host", "options"):
        found["properties"][name] = _or_null(found["properties"][name])
    *short, _ = remotes.HOP_FIELDS
    has_hops = _at("hops", {"type": "array"})
    is_sudo = _at("mode", {"const": "sudo"})
    has_host = _at("host", {"type": "string"})
    other_user = _at("mode", {"enum": [mode for mode in remotes.MODES if "sudo" in mode]})
    null = {"type": "null"}
    stays = {"host": null, "port": null, "options": {"enum": [None, {}]}}
    found["allOf"] = [
        {
            "if": has_hops,
            "then": {"properties": dict.fromkeys(short, null)},
            "else": {
                "if": is_sudo,
                "then": {"properties": stays},
                "else": has_host,
            },
        },
        {"if": other_user, "then": _at("user", _of(sudo["user"][0]))},
    ]
    return found


def _at(path: str, schema: Schema) -> Schema:
    """That the field is there, and what it is."""
    for name in reversed(path.split(".")):
        schema = {"type": "object", "properties": {name: schema}, "required": [name]}
    return schema


def _not_at(path: str, schema: Schema) -> Schema:
    return {"not": _at(path, schema)}


def _contradictions() -> list[Schema]:
    """What is refused of fields that are right each by itself."""
    survives = _at("on_disconnect", {"const": "survive"})
    through_shell = {"anyOf": [_at("remote", {"type": "object"}), survives]}
    direct = _at("remote.supervise", {"const": False})
    to_file = _at("output.through", {"const": "file"})
    exportable = {"propertyNames": _EXPORTABLE}
    return [
        {"if": through_shell, "then": _not_at("output.through", {"const": "file"})},
        {
            "if": through_shell,
            "then": {"properties": {"program": {"properties": {"env": exportable}}}},
        },
        {"if": direct, "then": _not_at("on_disconnect", {"const": "survive"})},
        {"if": direct, "then": _not_at("remote.share", {"const": True})},
        {"if": survives, "then": _not_at("remote.hops", _dies_with_client())},
        {"if": direct, "then": _not_at("stop.to", {"const": "program"})},
        {"if": to_file, "then": _not_at("output.max_bytes", {"type": "number"})},
        {"if": to_file, "then": _not_at("output.on_full", {"const": "stop"})},
        {"if": to_file, "then": _not_at("output.timeline", {"const": True})},
        {"if": to_file, "then": _not_at("timeouts.idle", {"type": "number"})},
        {
            "if": _at("callback", {"type": "object"}),
            "then": {
                "oneOf": [
                    _at(f"callback.{name}", {"type": "string"}) for name in ("token", "token_file")
                ]
            },
        },
    ]


_BY_NAME: dict[str, Schema] = {
    "checks.boolean": {"type": "boolean"},
    "checks.text": _TEXT,
    "checks.strings": {"type": "array", "items": _PASSABLE, "minItems": 1},
    "checks.argv": {"type": "array", "prefixItems": [_TEXT], "items": _PASSABLE, "minItems": 1},
    "checks.object_of_strings": {
        "type": "object",
        "propertyNames": _PASSABLE,
        "additionalProperties": _PASSABLE,
    },
    "spec.env": {"type": "object", "propertyNames": _VARIABLE, "additionalProperties": _PASSABLE},
    "spec.inherit_env": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": _VARIABLE}]},
    "spec.stdin": {"anyOf": [{"type": ["string", "null"]}, _at("file", _TEXT)]},
    "spec.umask": {
        "type": "string",
        "pattern": "^0?[0-7]{1,3}$",
        "maxLength": 4,
        "not": {"pattern": r"\n"},
    },
    "spec.rlimits": {
        "type": "object",
        "propertyNames": {"enum": list(specs.RLIMITS)},
        "additionalProperties": {
            "anyOf": [_LIMIT, {"type": "array", "items": _LIMIT, "minItems": 2, "maxItems": 2}]
        },
    },
    "spec.signal_name": _signal(),
    "spec.id": _ID,
    "spec.url": {
        "type": "string",
        "pattern": r"^https://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/|$)",
        "not": {"pattern": r"[^!-~]|[?#\\]"},
    },
    "spec.token": {"type": "string", "minLength": 1, "not": {"pattern": "[^!-~]"}},
    "kinds.name": _name(),
    "kinds.host": _name(_NO_WORD.replace("[", "[@", 1)),
    "kinds.port": {"type": "integer", "minimum": 1, "maximum": 65_535},
    "kinds.options": {
        "type": ["object", "null"],
        "propertyNames": {"minLength": 1, "not": {"pattern": "[^A-Za-z0-9]"}},
        "additionalProperties": {"anyOf": [_ONE_LINE, {"type": "array", "items": _ONE_LINE}]},
    },
    "engines.gpus": {"anyOf": [_name(), {"type": "integer", "minimum": 1, "maximum": 10**10}]},
    "engines.image": _name(r"[\x00- \x7f-\xa0]"),
    "engines.directory": {"type": "string", "pattern": r"^/[^\x00]*$"},
    "engines.options": {
        "type": ["object", "null"],
        "propertyNames": {
            "pattern": "^[A-Za-z0-9]",
            "not": {"anyOf": [{"pattern": "[^A-Za-z0-9-]"}, {"enum": list(engines.OURS)}]},
        },
        "additionalProperties": {"anyOf": [_WORD, {"type": "array", "items": _WORD}]},
    },
}
_BY_NAME["spec.stdin"]["anyOf"][1]["additionalProperties"] = False
_BY_NAME["spec.remote"] = _remote()
