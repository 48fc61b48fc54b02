from datetime import datetime, timezone

import pytest

from chaperone import errors
from chaperone.agent import wire
from chaperone.model.events import Changed, Ended, Lost, Output, Shrank, Started, status_view

RAW = {"run_id": "r", "state": "running"}
WHEN = datetime(2026, 11, 26, 4, 9, 21, 123000, tzinfo=timezone.utc)
EVENTS = [
    Started(run_id="r", key="ab"),
    Output(run_id="r", stream="stdout", offset=3, data=b"h\xc3\xa4\n"),
    Output(run_id="r", stream="stderr", offset=0, data=b"\xff\x00\xc3", time=WHEN),
    Shrank(run_id="r", stream="stdout", offset=9, size=1),
    Changed(run_id="r", status=status_view(RAW)),
    Ended(run_id="r", status=status_view(RAW)),
    Ended(run_id="r", status=None),
    Lost(run_id="r", status=status_view(RAW)),
]


@pytest.mark.once
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_is_the_same_after_its_line(event):
    assert wire.event_from(wire.event_text(event)) == event


@pytest.mark.once
@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"event": "boiled", "run_id": "r"}',
        '{"event": "output", "run_id": "r", "stream": "stdout", "offset": -1, "text": ""}',
        '{"event": "output", "run_id": "r", "stream": "stdout", "offset": 0, "base64": "!"}',
        '{"event": "started", "run_id": 7, "key": "k"}',
        '{"event": "ended", "run_id": "r"}',
        '{"event": "ended", "run_id": "r", "status": 3}',
        '{"event": "lost", "run_id": "r", "status": null}',
        '{"event": "changed", "run_id": "r", "status": "running"}',
    ],
)
def test_line_that_is_no_event_is_refused(line):
    with pytest.raises(errors.AgentError, match=r"^unable to follow: want an event, got "):
        wire.event_from(line)


@pytest.mark.once
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.SpecError("unable to start a run: x"), 422),
        (errors.NoRunError("unable to find run 'x': y", 2), 404),
        (errors.RunExistsError("unable to start run 'x': y", 17), 409),
        (errors.BusyError("unable to delete run 'x': y"), 503),
        (errors.SpoolError("unable to read: y", 5), 500),
        (errors.SpoolError("unable to write: y", 28), 507),
        (errors.ChaperoneError("unable to start a chaperone: y"), 500),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_error_is_the_same_after_its_answer(error, status):
    made = wire.error_from(wire.error_object(error), wire.error_status(error))
    assert wire.error_status(error) == status
    assert (type(made), str(made)) == (type(error), str(error))
    assert getattr(made, "errno", None) == getattr(error, "errno", None)


@pytest.mark.once
@pytest.mark.parametrize("value", [None, [], {}, {"error": 7}, {"error": {"kind": "SpecError"}}])
def test_answer_that_is_no_error_object_is_the_agents_fault(value):
    made = wire.error_from(value, 500)
    assert type(made) is errors.AgentError
    assert str(made) == "unable to ask the agent: it answered with HTTP status 500"
