"""An auditor in the database: at the COMMIT of every checkpoint it looks whose the workflow is at that moment.

The primary key of checkpoints alone keeps a step from being applied twice; that nobody writes for a workflow which is
no longer his shows only here. Triggers, because this must be seen by somebody else than the engine, and deferred,
because ownership must hold until the commit and not only when it was checked.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

_STATEMENTS = (
    """
    CREATE TABLE torture_bank.trespass (
        workflow_id uuid NOT NULL, what text NOT NULL, noticed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    """
    CREATE FUNCTION torture_bank.audit_checkpoint() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        owner record;
    BEGIN
        SELECT attempt, status, worker.name INTO owner
        FROM durable.workflow LEFT JOIN durable.worker ON worker.id = worker_id WHERE workflow.id = NEW.workflow_id;
        IF owner.attempt <> NEW.attempt OR owner.status NOT IN ('running', 'succeeded')
            OR owner.name IS DISTINCT FROM current_setting('application_name')
        THEN
            INSERT INTO torture_bank.trespass (workflow_id, what) VALUES (NEW.workflow_id, format(
                '%s recorded %s in attempt %s; the workflow is %s in attempt %s of %s',
                current_setting('application_name'), NEW.key, NEW.attempt, owner.status, owner.attempt, owner.name
            ));
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER torture_audit AFTER INSERT ON durable.step DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION torture_bank.audit_checkpoint()
    """,
    """
    CREATE FUNCTION torture_bank.audit_outcome() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        owner text;
    BEGIN
        SELECT name INTO owner FROM durable.worker WHERE id = NEW.worker_id;
        IF owner IS DISTINCT FROM current_setting('application_name') THEN
            INSERT INTO torture_bank.trespass (workflow_id, what) VALUES (NEW.id, format(
                '%s finished the workflow in attempt %s of %s', current_setting('application_name'), NEW.attempt, owner
            ));
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER torture_audit AFTER UPDATE ON durable.workflow
    FOR EACH ROW WHEN (NEW.status = 'succeeded') EXECUTE FUNCTION torture_bank.audit_outcome()
    """,
)


def install(connection: Connection) -> None:
    """Install the auditor beside the bank's tables, in the caller's transaction."""
    for statement in _STATEMENTS:
        connection.execute(text(statement))
