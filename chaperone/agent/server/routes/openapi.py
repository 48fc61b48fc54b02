"""
The OpenAPI document of an agent: what each route takes and answers.

Knows: OpenAPI 3.1, the form of requests and answers.  Must not know: how a route is answered.
A test compares it with the routes both ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.responses import Response

from .... import __version__
from ....model import schema
from ....model import status as statuses
from ....spool import format
from ... import wire
from ..application import Asked, Route
from ..exchange import answer

JSON = "application/json"
BYTES = "application/octet-stream"

Schema = dict[str, Any]


def _object(required: Iterable[str] = (), **properties: Schema) -> Schema:
    """An object without other properties, as all that a request has."""
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": [*required]} if required else found


def _ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _null_or(of: Schema) -> Schema:
    return {"anyOf": [of, {"type": "null"}]}


def _content(found: Schema, kind: str = JSON) -> Schema:
    return {"content": {kind: {"schema": found}}}


def _query(name: str, found: Schema, does: str) -> Schema:
    return {"name": name, "in": "query", "schema": found, "description": does}


def _header(name: str, found: Schema, does: str) -> Schema:
    return {"name": name, "in": "header", "schema": found, "description": does}


TEXT: Schema = {"type": "string"}
SIZE: Schema = {"type": "integer", "minimum": 0}
RUN_ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
KEY: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
STATUS = _ref("schemas", "Status")
FREE: Schema = {"type": "object"}
IF_MATCH = _header("If-Match", TEXT, "The key of the run, in quotes: another run is 412.")
RANGE = _header("Range", TEXT, "One range, `bytes=N-` or `bytes=N-M`.")
OFFSET = {wire.OFFSET: {"schema": SIZE, "description": "The size that the receiver has."}}
ENTITY = {"ETag": {"schema": TEXT, "description": "The key of the run, in quotes."}}
STATE = {"enum": ["live", "ended", "all", *statuses.STATES]}
_STREAM_HEADERS = {**ENTITY, "Accept-Ranges": {"schema": TEXT}}
_PART = {**ENTITY, "Content-Range": {"schema": TEXT}}


def _bytes(headers: Schema, does: str) -> Schema:
    return {"description": does, "headers": headers, **_content({}, BYTES)}


def _done(does: str, found: Schema | None = None, headers: Schema | None = None) -> Schema:
    head = {"headers": headers} if headers else {}
    return {"description": does, **head, **({} if found is None else _content(found))}


def _body(found: Schema, kind: str = JSON) -> Schema:
    return {"requestBody": {"required": True, **_content(found, kind)}}


START = _object(
    ("spec", "key"),
    spec=_ref("schemas", "Spec"),
    key=KEY,
    warm={"type": "boolean", "default": True},
    env=_null_or({"type": "object", "additionalProperties": TEXT}),
    cwd=_null_or(TEXT),
)
STARTED = _object(("run_id", "key"), run_id=RUN_ID, key=KEY)
EVENTS = _object(
    cursor=_null_or(FREE),
    runs=_null_or(_list(TEXT)),
    streams=_list({"enum": [*format.STREAMS]}),
)
PAGE = {"runs": _list(STATUS), "next": _null_or(RUN_ID), "collected": SIZE}
COLLECTED = {"collected": _list(RUN_ID), "waiting": _list(RUN_ID)}
RUN = "/{spool}/runs/{run_id}"
RECEIVE = "/{spool}/receive/{run_id}"

# Of each route what it takes beyond its path, and its answers beyond the errors of all routes.
OPERATIONS: dict[tuple[str, str], Schema] = {
    ("GET", ""): {"responses": {"200": _done("What the agent is", FREE)}},
    ("GET", "/openapi.json"): {"responses": {"200": _done("This document", FREE)}},
    ("PUT", RUN): {
        **_body(START),
        "responses": {
            "200": _done("It was started by an earlier request with this key", STARTED),
            "201": _done("Its run directory exists; the program starts soon", STARTED),
            "409": _ref("responses", "Error"),
            "507": _ref("responses", "Error"),
        },
    },
    ("GET", "/{spool}/runs"): {
        "parameters": [
            _query("state", STATE, "By default the live and the uncollected runs."),
            _query("label", TEXT, "NAME or NAME=VALUE."),
            _query("host", TEXT, "Where the program is; `here` is the host of the agent."),
            _query("after", TEXT, "The `next` of the page before."),
            _query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "By default 100."),
            _query(
                "collected",
                TEXT,
                "Count the collected runs whose ids begin with one of these prefixes, which commas"
                " separate; with an empty one all.",
            ),
        ],
        "responses": {"200": _done("A page", {**FREE, "properties": PAGE})},
    },
    ("GET", RUN): {
        "parameters": [
            _query(
                "wait",
                {"type": "number", "minimum": 0, "maximum": 60},
                "Answer when the run has ended, or after so many seconds.",
            )
        ],
        "responses": {"200": _done("The status", STATUS)},
    },
    ("GET", f"{RUN}/spec"): {"responses": {"200": _done("The spec, without secrets", FREE)}},
    ("GET", f"{RUN}/{{stream}}"): {
        "parameters": [
            {
                **_query("follow", {}, "Go on until the run has ended; for stdout and stderr."),
                "allowEmptyValue": True,
            },
            RANGE,
            IF_MATCH,
        ],
        "responses": {
            "200": _bytes(_STREAM_HEADERS, "All bytes"),
            "206": _bytes(_PART, "The bytes of the range"),
            "412": _ref("responses", "Error"),
            "416": _ref("responses", "Error"),
        },
    },
    ("GET", "/{spool}/cursor"): {"responses": {"200": _done("The cursor", FREE)}},
    ("POST", "/{spool}/events"): {
        **_body(EVENTS),
        "responses": {
            "200": {"description": "A line for each event", **_content(TEXT, wire.EVENTS)}
        },
    },
    ("POST", f"{RUN}/control"): {
        **_body(TEXT, "text/plain"),
        "responses": {"200": _done("The status at that moment", STATUS)},
    },
    ("POST", "/{spool}/lease"): {
        **_body(_object(runs=_null_or(_list(RUN_ID)))),
        "responses": {"204": _done("They are renewed")},
    },
    ("POST", "/{spool}/collect"): {
        **_body(_object(("runs",), runs={"type": "object", "additionalProperties": _null_or(KEY)})),
        "responses": {"200": _done("What is done", {**FREE, "properties": COLLECTED})},
    },
    ("DELETE", RUN): {
        "parameters": [IF_MATCH],
        "responses": {
            "204": _done("It is deleted"),
            "409": _ref("responses", "Error"),
            "412": _ref("responses", "Error"),
        },
    },
    # -- of `serve --receive`
    ("PUT", RECEIVE): {
        "requestBody": {"required": False, **_content(_object(key=_null_or(KEY)))},
        "responses": {"200": _done("Where its agent posts, and its token", FREE)},
    },
    ("POST", f"{RECEIVE}/output/{{stream}}"): {
        **_body({}, BYTES),
        "parameters": [_header(wire.OFFSET, SIZE, "Of the first byte."), IF_MATCH],
        "responses": {
            "204": _done("They are written", headers=OFFSET),
            "409": {"description": "Bytes before them are missing", "headers": OFFSET},
            "410": _ref("responses", "Error"),
        },
    },
    ("POST", f"{RECEIVE}/completed"): {
        **_body(FREE),
        "responses": {
            "204": _done("All of the run is on the disk"),
            "409": _ref("responses", "Error"),
            "410": _ref("responses", "Error"),
        },
    },
    ("GET", f"{RECEIVE}/requests"): {
        "parameters": [_query("after", SIZE, "The number of the last request that was taken.")],
        "responses": {"200": _done("Requests, as soon as there are any", FREE)},
    },
}

_PATH = {
    "spool": RUN_ID,
    "run_id": RUN_ID,
    "stream": {"enum": [*format.STREAMS, format.LOG, format.TIMELINE]},
}
# What any route may answer.
_ERRORS = ("400", "401", "403", "404", "408", "413", "415", "422", "500", "503")


def document(routes: Iterable[Route]) -> Schema:
    """
    The document of some routes.

    Raises:
        KeyError: If a route is not described.
    """
    paths: dict[str, Schema] = {}
    for route in routes:
        found = OPERATIONS[route.method, route.path]
        named = [name for name in _PATH if f"{{{name}}}" in route.path]
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": _PATH[name]} for name in named
        ]
        errors = {code: _ref("responses", "Error") for code in _ERRORS}
        operation = {
            "summary": route.does,
            "description": f"Needs a token with the right {route.right}."
            if route.right
            else "Needs the token of the run.",
            **found,
            "parameters": [*parameters, *found.get("parameters", ())],
            "responses": {**found["responses"], **errors},
        }
        paths.setdefault(f"{wire.API}{route.path}", {})[route.method.lower()] = operation
    spec = {name: part for name, part in schema.of_spec().items() if name != "$schema"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "An agent of chaperone", "version": __version__},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {"Error": _done("An error", _ref("schemas", "Error"))},
            "schemas": {
                "Spec": spec,
                "Status": {**FREE, "required": ["run_id", "state"]},
                "Error": _object(
                    ("error",),
                    error=_object(
                        ("kind", "message", "errno"),
                        kind=TEXT,
                        message=TEXT,
                        errno=_null_or({"type": "integer"}),
                    ),
                ),
            },
        },
    }


def route(others: Iterable[Route]) -> Route:
    """The route of the document, which describes the other routes and itself."""

    async def described(asked: Asked) -> Response:
        return answer(document(all_routes))

    found = Route(
        method="GET",
        path="/openapi.json",
        right="look",
        answer=described,
        does="The OpenAPI document",
    )
    all_routes = [*others, found]
    return found
