"""What operators do with workflows: functions of the caller's session, in its transaction."""

from sqla_durable.management.forks import fork
from sqla_durable.management.selection import Selected, id_at
from sqla_durable.management.verbs import cancel, delete, resume, retry, rewind

__all__ = ["Selected", "cancel", "delete", "fork", "id_at", "resume", "retry", "rewind"]
