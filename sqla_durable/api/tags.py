"""Tags that a workflow sets while it is executed; those of a start are among its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from sqlalchemy.orm import Session

from sqla_durable.api.calls import Call, encode, publication
from sqla_durable.api.options import check_tags
from sqla_durable.api.sessions import AnySession
from sqla_durable.errors import ArgumentError
from sqla_durable.operations.runtime import Runtime
from sqla_durable.runtime.context import Context
from sqla_durable.store import Checkpoint, Connectable, Origin, tags


@dataclass(frozen=True, slots=True)
class _NewTags:
    """Tags to be merged, as JSON text; null removes one."""

    text: str

    def record(self, connectable: Connectable, checkpoint: Checkpoint) -> None:
        tags.record(connectable, checkpoint, tags=self.text)

    def write(self, connectable: Connectable, origin: Origin) -> None:
        tags.merge(connectable, origin, tags=self.text)

    async def write_at_once(self, runtime: Runtime, origin: Origin) -> None:
        await runtime.recorder.execute(partial(self.write, origin=origin))


def set_tags(tags: Mapping[str, str | None], *, session: Session | None = None) -> None:
    """Merge tags into those of the workflow: in its code, or in one of its steps.

    ```python
    @durable.workflow
    def checkout(order_id: int) -> None:
        set_tags({"region": region_of(order_id), "urgent": None})
        ...
    ```

    In a workflow's own code it is an operation of its own, carried out exactly once, committed when it returns. In a
    transactional step pass the step's session: then it commits with the step. In a plain step it is committed when it
    returns, whatever becomes of the step. Each is refused to an attempt that no longer owns its workflow; the
    workflow's row is locked while it is written, with a session until the step commits. Outside a workflow nothing
    happens. A rewind leaves the tags as they are.

    Args:
        tags: texts by name; None removes the tag of that name.
        session: that of the transactional step.

    Raises:
        ArgumentError: this is no mapping of at most 100 names to texts, or one of them is blank.
        UsageError: a session is passed where there is none of the workflow's, or is missing in a transactional step; or
            this is a task or thread that is no branch of the workflow.
        UsageError: the code is `async def`.
    """
    set_tags_call(tags, session).outcome()


def set_tags_call(tags: Mapping[str, str | None], session: AnySession | None) -> Call[None]:
    """Return the call of `set_tags`."""
    if not isinstance(tags, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"tags={tags!r} is no mapping of names to texts, or to None, which removes a tag.")
    check_tags({name: "removed" if value is None else value for name, value in tags.items()})

    def encoded(context: Context) -> _NewTags:
        return _NewTags(encode(dict(tags), what="tags", limit=context.limit))

    return publication("set_tags", "set_tags", encoded, session=session)
