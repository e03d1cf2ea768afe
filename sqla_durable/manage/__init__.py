"""What operators do with workflows, in the caller's transaction: `from sqla_durable import manage`.

Cancel, resume, retry, rewind, change, fork and delete them, by record, by id or by a `select()`; see docs/managing.md.
A name is imported when it is first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqla_durable.manage.explaining import explain_pending
    from sqla_durable.manage.forks import fork
    from sqla_durable.manage.queues import pause_key, pause_queue, put_queue, resume_key, resume_queue
    from sqla_durable.manage.retention import drop_retention, put_retention
    from sqla_durable.manage.schedules import (
        Backfill,
        backfill_schedule,
        next_ticks,
        pause_schedule,
        put_schedule,
        resume_schedule,
        run_schedule,
    )
    from sqla_durable.manage.verbs import cancel, change, delete, id_at, resume, retry, rewind

_NAMES = {
    "explaining": "explain_pending",
    "forks": "fork",
    "queues": "pause_key pause_queue put_queue resume_key resume_queue",
    "retention": "drop_retention put_retention",
    "schedules": "Backfill backfill_schedule next_ticks pause_schedule put_schedule resume_schedule run_schedule",
    "verbs": "cancel change delete id_at resume retry rewind",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Backfill",
    "backfill_schedule",
    "cancel",
    "change",
    "delete",
    "drop_retention",
    "explain_pending",
    "fork",
    "id_at",
    "next_ticks",
    "pause_key",
    "pause_queue",
    "pause_schedule",
    "put_queue",
    "put_retention",
    "put_schedule",
    "resume",
    "resume_key",
    "resume_queue",
    "resume_schedule",
    "retry",
    "rewind",
    "run_schedule",
]


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
