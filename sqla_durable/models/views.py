"""The views: what operators and dashboards ask, as SQL that stays as it is. See docs/sql.md for what each costs."""

from __future__ import annotations

VIEWS: dict[str, str] = {
    "workflow_overview": """
SELECT w.id, w.name, w.status, w.queue, w.priority, w.by, w.key, w.tags, w.schedule, w.parent_id, w.forked_from,
  w.version, w.attempt, w.crashes, w.cancellation,
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
SELECT w.name AS workflow, s.name AS step, pg_catalog.date_trunc('hour', s.finished_at, 'UTC') AS hour,
  count(*) AS calls, count(*) FILTER (WHERE s.status = 'failed') AS failed, CAST(sum(s.tries) AS bigint) AS tries,
  percentile_cont(CAST(0.5 AS double precision)) WITHIN GROUP (ORDER BY s.finished_at - s.started_at) AS p50,
  percentile_cont(CAST(0.95 AS double precision)) WITHIN GROUP (ORDER BY s.finished_at - s.started_at) AS p95,
  max(s.finished_at - s.started_at) AS longest
FROM {schema}.step AS s JOIN {schema}.workflow AS w ON w.id = s.workflow_id
WHERE s.status IN ('succeeded', 'failed') AND NOT pg_catalog.starts_with(s.key, '#')
  AND s.error -> text 'cancelled' IS NULL AND (w.forked_from IS NULL OR s.finished_at >= w.created_at)
GROUP BY w.name, s.name, pg_catalog.date_trunc('hour', s.finished_at, 'UTC')""",
    "failure_groups": """
SELECT g.workflow, g.step, g.error_type, g.workflows, g.first_at, g.last_at, g.last_id,
  l.error ->> text 'message' AS last_message
FROM (
  SELECT w.name AS workflow, f.name AS step, w.error ->> text 'type' AS error_type, count(*) AS workflows,
    min(w.finished_at) AS first_at, max(w.finished_at) AS last_at,
    (pg_catalog.array_agg(w.id ORDER BY w.finished_at DESC, w.id DESC))[1] AS last_id
  FROM {schema}.workflow AS w LEFT JOIN LATERAL (
    SELECT s.name FROM {schema}.step AS s
    WHERE s.workflow_id = w.id AND s.status = 'failed' AND (
      (s.error ->> text 'type' = w.error ->> text 'type'
        AND s.error ->> text 'message' IS NOT DISTINCT FROM w.error ->> text 'message')
      OR pg_catalog.strpos(w.error ->> text 'traceback', nullif(s.error ->> text 'message', text '')) > 0
    )
    ORDER BY s.position DESC LIMIT 1
  ) AS f ON true
  WHERE w.status = 'failed' GROUP BY w.name, f.name, w.error ->> text 'type'
) AS g JOIN {schema}.workflow AS l ON l.id = g.last_id""",
    "waiting_for": """
SELECT w.id AS workflow_id, w.name AS workflow, w.queue, e.kind,
  pg_catalog.replace(pg_catalog.replace(pg_catalog.replace(e.what, '%23', '#'), '%2F', '/'), '%25', '%') AS what,
  e.step, e.child_id, e.since, e.until
FROM {schema}.workflow AS w CROSS JOIN LATERAL (
  SELECT
    CASE WHEN s.status = 'retrying' THEN 'retry' WHEN s.name = 'sleep' THEN 'timer'
      WHEN pg_catalog.starts_with(s.name, 'signal:') THEN 'signal'
      WHEN pg_catalog.starts_with(s.name, 'update:') THEN 'update'
      WHEN pg_catalog.starts_with(s.name, 'wait_event(') THEN 'event' ELSE 'children' END AS kind,
    CASE WHEN s.status = 'retrying' THEN s.name
      WHEN pg_catalog.starts_with(s.name, 'wait_event(')
        THEN pg_catalog.substr(s.name, 12, pg_catalog.length(s.name) - 12)
      WHEN pg_catalog.strpos(s.name, ':') > 0 THEN pg_catalog.substr(s.name, pg_catalog.strpos(s.name, ':') + 1)
      END AS what,
    s.key AS step, CAST(NULL AS uuid) AS child_id,
    CASE s.status WHEN 'retrying' THEN s.finished_at ELSE s.started_at END AS since, s.wake_at AS until
  FROM {schema}.step AS s WHERE s.workflow_id = w.id AND s.status IN ('waiting', 'retrying')
  UNION ALL
  SELECT 'child', c.name, NULL, c.id, c.created_at, NULL
  FROM pg_catalog.jsonb_array_elements(w.awaits) AS a
    CROSS JOIN LATERAL pg_catalog.jsonb_array_elements_text(a.value -> text 'children') AS k
    CROSS JOIN LATERAL (
      SELECT o.id, o.name, o.created_at FROM {schema}.workflow AS o
      WHERE o.id = CAST(k.value AS uuid) AND o.finished_at IS NULL OFFSET 0
    ) AS c
  UNION ALL
  SELECT 'callback', s.key, s.key, NULL, s.started_at,
    CASE WHEN 'number' IN (pg_catalog.jsonb_typeof(s.output -> text 'timeout'),
      pg_catalog.jsonb_typeof(s.output -> text 'heartbeat')) THEN w.wake_at END
  FROM pg_catalog.jsonb_array_elements(w.awaits) AS a
    JOIN {schema}.step AS s ON s.workflow_id = w.id AND s.name = 'create_callback'
      AND s.output ->> text 'signal' = a.value ->> text 'signal'
  UNION ALL
  SELECT
    CASE WHEN w.started_at IS NULL THEN CASE WHEN w.wake_at IS NULL THEN 'deferred' ELSE 'delay' END
      WHEN w.crashes > 1 THEN 'crash' ELSE 'timer' END,
    NULL, NULL, NULL, CASE WHEN w.started_at IS NULL THEN w.created_at END, w.wake_at
  WHERE w.awaits IS NULL AND (w.started_at IS NULL OR NOT EXISTS (
    SELECT FROM {schema}.step AS s WHERE s.workflow_id = w.id AND s.status IN ('waiting', 'retrying')
  ))
) AS e
WHERE w.status = 'suspended'""",
    "worker_load": """
SELECT l.id, l.name, l.queues, l.versions, l.slots, l.started_at, l.heartbeat_at, l.lease_expires_at,
  l.lease_expires_at > pg_catalog.statement_timestamp() AS is_alive, r.executing, r.oldest_started_at
FROM {schema}.worker AS l CROSS JOIN LATERAL (
  SELECT count(*) AS executing, min(w.started_at) AS oldest_started_at
  FROM {schema}.workflow AS w WHERE w.worker_id = l.id AND w.status = 'running'
) AS r""",
}
"""Their queries by name, with `{schema}` where the schema's name belongs. A view has the rights of its reader."""


def create_views(quoted: str) -> list[str]:
    """Return the statements that create them in a schema, whose name is quoted."""
    invoker = "WITH (security_invoker = true)"
    return [f"CREATE VIEW {quoted}.{name} {invoker} AS {query.format(schema=quoted)}" for name, query in VIEWS.items()]


def drop_views(quoted: str) -> list[str]:
    """Return the statements that drop them, where they are there."""
    return [f"DROP VIEW IF EXISTS {quoted}.{name}" for name in VIEWS]
