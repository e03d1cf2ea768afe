"""The views: what operators and dashboards ask, as SQL that stays as it is. See docs/sql.md for what each costs."""

from __future__ import annotations

VIEWS: dict[str, str] = {
    "workflow_overview": """
SELECT w.id, w.name, w.status, w.queue, w.by, w.key, w.tags, w.schedule, w.parent_id, w.version, w.attempt,
  w.created_at, w.started_at, w.finished_at, w.wake_at, w.deadline_at,
  coalesce(w.started_at, w.finished_at, pg_catalog.statement_timestamp()) - w.created_at AS waited,
  coalesce(w.finished_at, pg_catalog.statement_timestamp()) - w.started_at AS took,
  l.name AS worker, w.error ->> text 'type' AS error_type, w.error ->> text 'message' AS error_message
FROM {schema}.workflow AS w LEFT JOIN {schema}.worker AS l ON l.id = w.worker_id AND w.status = 'running'""",
    "queue_depth": """
SELECT coalesce(n.queue, q.name) AS queue, coalesce(n.pending, 0) AS pending, n.pending_since,
  coalesce(n.running, 0) AS running, coalesce(n.delayed, 0) AS delayed, coalesce(n.suspended, 0) AS suspended,
  q.paused_at, q.concurrency, q.per_worker, q.per_key
FROM (
  SELECT queue, CAST(sum(pending) AS bigint) AS pending, min(since) AS pending_since,
    CAST(sum(running) AS bigint) AS running, CAST(sum(delayed) AS bigint) AS delayed,
    CAST(sum(suspended) AS bigint) AS suspended
  FROM (
    SELECT queue, count(*) AS pending, min(enqueued_at) AS since, 0 AS running, 0 AS delayed, 0 AS suspended
    FROM {schema}.workflow WHERE status = 'pending' GROUP BY queue
    UNION ALL
    SELECT queue, 0, NULL, count(*), 0, 0 FROM {schema}.workflow WHERE status = 'running' GROUP BY queue
    UNION ALL
    SELECT queue, 0, NULL, 0, count(*) FILTER (WHERE started_at IS NULL),
      count(*) FILTER (WHERE started_at IS NOT NULL)
    FROM {schema}.workflow WHERE status = 'suspended' GROUP BY queue
  ) AS counted GROUP BY queue
) AS n FULL JOIN {schema}.queue AS q ON q.name = n.queue""",
    "step_latency": """
SELECT w.name AS workflow, s.name AS step, pg_catalog.date_trunc('hour', s.finished_at) AS hour, count(*) AS calls,
  count(*) FILTER (WHERE s.status = 'failed') AS failed, CAST(sum(s.tries) AS bigint) AS tries,
  percentile_cont(0.5) WITHIN GROUP (ORDER BY s.finished_at - s.started_at) AS p50,
  percentile_cont(0.95) WITHIN GROUP (ORDER BY s.finished_at - s.started_at) AS p95,
  max(s.finished_at - s.started_at) AS longest
FROM {schema}.step AS s JOIN {schema}.workflow AS w ON w.id = s.workflow_id
WHERE s.status IN ('succeeded', 'failed') AND NOT pg_catalog.starts_with(s.key, '#')
GROUP BY w.name, s.name, pg_catalog.date_trunc('hour', s.finished_at)""",
    "failure_groups": """
SELECT w.name AS workflow, last.key AS step, w.error ->> text 'type' AS error_type, count(*) AS workflows,
  min(w.finished_at) AS first_at, max(w.finished_at) AS last_at,
  (pg_catalog.array_agg(w.id ORDER BY w.finished_at DESC))[1] AS last_id,
  (pg_catalog.array_agg(w.error ->> text 'message' ORDER BY w.finished_at DESC))[1] AS last_message
FROM {schema}.workflow AS w LEFT JOIN LATERAL (
  SELECT s.key FROM {schema}.step AS s WHERE s.workflow_id = w.id AND s.status = 'failed'
  ORDER BY s.position DESC LIMIT 1
) AS last ON true
WHERE w.status = 'failed' GROUP BY w.name, last.key, w.error ->> text 'type'""",
    "waiting_for": """
SELECT w.id AS workflow_id, w.name AS workflow, w.queue,
  CASE s.status WHEN 'retrying' THEN 'retry' ELSE 'wait' END AS kind,
  s.key AS what, CAST(NULL AS uuid) AS child_id, s.started_at AS since, s.wake_at AS until
FROM {schema}.workflow AS w JOIN {schema}.step AS s ON s.workflow_id = w.id AND s.status IN ('waiting', 'retrying')
WHERE w.status = 'suspended'
UNION ALL
SELECT w.id, w.name, w.queue, 'child', c.name, c.id, c.created_at, w.wake_at
FROM {schema}.workflow AS w CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(w.awaits) AS a
  CROSS JOIN LATERAL pg_catalog.jsonb_array_elements_text(a.value -> text 'children') AS k
  JOIN {schema}.workflow AS c ON c.id = CAST(k.value AS uuid) AND c.finished_at IS NULL
WHERE w.status = 'suspended' AND w.awaits IS NOT NULL
UNION ALL
SELECT w.id, w.name, w.queue, 'start', NULL, NULL, w.created_at, w.wake_at
FROM {schema}.workflow AS w WHERE w.status = 'suspended' AND w.started_at IS NULL""",
    "worker_load": """
SELECT l.id, l.name, l.queues, l.versions, l.slots, l.started_at, l.heartbeat_at, l.lease_expires_at,
  l.lease_expires_at > pg_catalog.statement_timestamp() AS is_alive, count(w.id) AS executing,
  min(w.started_at) AS oldest_started_at
FROM {schema}.worker AS l LEFT JOIN {schema}.workflow AS w ON w.worker_id = l.id AND w.status = 'running'
GROUP BY l.id""",
}
"""Their queries by name, with `{schema}` where the schema's name belongs. A view has the rights of its reader."""


def create_statements(quoted: str) -> list[str]:
    """Return the statements that create them in a schema, whose name is quoted."""
    invoker = "WITH (security_invoker = true)"
    return [f"CREATE VIEW {quoted}.{name} {invoker} AS {query.format(schema=quoted)}" for name, query in VIEWS.items()]


def drop_statements(quoted: str) -> list[str]:
    """Return the statements that drop them, where they are there."""
    return [f"DROP VIEW IF EXISTS {quoted}.{name}" for name in VIEWS]
