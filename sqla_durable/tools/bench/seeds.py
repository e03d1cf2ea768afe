"""Fills the tables of a place by one statement, as no application can: many rows, with what a past would have left."""

from __future__ import annotations

from sqla_durable.tools.bench.place import Place

# Ids in the order of time, as uuid7 makes them, and older than any that it makes today.
_ID = "('{prefix}' || lpad(to_hex(number), 28, '0'))::uuid"
_NUMBERS = "generate_series(1, :count) AS number"
_PENDING = f"""
INSERT INTO {{schema}}.workflow (id, name, input, created_at, enqueued_at)
SELECT {_ID.format(prefix="0190")}, 'one_step', jsonb_build_object('number', number), moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - (:count - number) * interval '1 ms' AS moment) AS enqueued
"""  # noqa: S608 (all of it is written here)
_FINISHED = f"""
INSERT INTO {{schema}}.workflow
    (id, name, status, input, output, token, worker_id, created_at, enqueued_at, started_at, finished_at)
SELECT {_ID.format(prefix="0180")}, 'one_step', 'succeeded', jsonb_build_object('number', number),
    to_jsonb(number + 1), {_ID.format(prefix="0181")}, {_ID.format(prefix="0182")}, moment, moment, moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - interval '1 day' AS moment) AS past
"""  # noqa: S608 (the same)
_STEPS = f"""
INSERT INTO {{schema}}.step (workflow_id, key, name, position, status, output, attempt, started_at, finished_at)
SELECT {_ID.format(prefix="0180")}, 'increment', 'increment', 1, 'succeeded', to_jsonb(number + 1), 1, moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - interval '1 day' AS moment) AS past
"""  # noqa: S608 (the same)
_TIDY = "VACUUM (ANALYZE) {schema}.workflow", "VACUUM (ANALYZE) {schema}.step"


def pending(place: Place, count: int) -> None:
    """Insert pending workflows of one step."""
    place.do(_PENDING, count=count)
    place.do(*_TIDY)


def finished(place: Place, count: int) -> None:
    """Insert workflows that have succeeded, with their checkpoints."""
    place.do("ALTER TABLE {schema}.workflow DISABLE TRIGGER workflow_new_check")  # a new row is never finished
    place.do(_FINISHED, _STEPS, count=count)
    place.do("ALTER TABLE {schema}.workflow ENABLE TRIGGER workflow_new_check", *_TIDY)
