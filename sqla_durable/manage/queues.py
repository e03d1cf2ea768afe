"""Make, change, pause and resume queues and their keys, in the caller's transaction.

A queue's settings are deleted with its record, `session.delete(queue)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

from sqlalchemy.orm import Session

import sqla_durable.api.hints as hints
import sqla_durable.api.sessions as sessions
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.queues import QueueKeywords, QueueOptions, require_queue_name
from sqla_durable.models import Queue, QueueKey
from sqla_durable.store import queues


def put_queue(session: Session, name: str, **options: Unpack[QueueKeywords]) -> Queue:
    """Make the row of a queue, or change its settings, in the caller's transaction; return its record.

    ```python
    manage.put_queue(session, "mail", concurrency=10, key_rate=(100, timedelta(minutes=1)))
    ```

    Never commits; locks the queue's row. From the caller's commit on running workers obey the settings. What is left
    out has no limit; a pause stays, and so do the weights if none are passed. See `Durable.queue` for the settings.

    Raises:
        ArgumentError: a setting is wrong, or contradicts another.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    wanted = QueueOptions(**options)
    _change(session, name, partial(queues.put, name=name, options=wanted), verb="put_queue")
    return session.get_one(Queue, name)


def pause_queue(session: Session, name: str) -> None:
    """Pause a queue: from the caller's commit on nothing of it is claimed. What runs goes on.

    Never commits; locks the queue's row, which is made if there is none.

    Raises:
        ArgumentError: the name is blank, or cannot be stored.
        SchemaError, SessionError: as for `put_queue`.
    """
    _change(session, name, partial(queues.pause, name=name), verb="pause_queue")


def resume_queue(session: Session, name: str) -> None:
    """Let a paused queue go on. Never commits; locks the queue's row.

    Raises:
        ArgumentError: the name is blank, or cannot be stored.
        SchemaError, SessionError: as for `put_queue`.
    """
    _change(session, name, partial(queues.resume, name=name), verb="resume_queue")


def pause_key(session: Session, name: str, by: str) -> None:
    """Pause one key of a queue. What runs goes on, and so do the other keys, which take turns meanwhile.

    Never commits; locks the row of the key. That and the row of the queue are made if there are none.

    Raises:
        ArgumentError: the name or the key is blank, or cannot be stored.
        SchemaError, SessionError: as for `put_queue`.
    """
    require_text(by, what="key")
    _change(session, name, partial(queues.pause_key, name=name, by=by), verb="pause_key")


def resume_key(session: Session, name: str, by: str) -> None:
    """Let a paused key of a queue go on. Never commits; locks the row of the key.

    Raises:
        ArgumentError: the name of the queue is blank, or cannot be stored.
        SchemaError, SessionError: as for `put_queue`.
    """
    _change(session, name, partial(queues.resume_key, name=name, by=by), verb="resume_key")


def _change(session: Session, name: str, change: Callable[[Session], Any], *, verb: str) -> None:
    require_queue_name(name)

    def apply(session: Session) -> None:
        session.flush()
        change(session)
        for each in session.identity_map.values():
            if isinstance(each, (Queue, QueueKey)):
                session.expire(each)
        hints.announce(session, hints.EVERYWHERE)

    sessions.write(session, apply, name=f"manage.{verb}", rights="operator")
