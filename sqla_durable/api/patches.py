"""`patched` and `deprecate_patch`: two ways in one workflow function, for what runs already and for what comes."""

from __future__ import annotations

from sqla_durable.definitions.checks import fault_in
from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.operations.workflow import patched as record_patch
from sqla_durable.runtime.context import active


def patched(patch_id: str) -> bool:
    """Tell whether the workflow goes the new way of a change: one that had passed this point before does not.

    ```python
    @durable.workflow
    def checkout(order_id: int) -> str:
        reserve(order_id)
        if patched("check fraud"):
            check_fraud(order_id)
        return charge(order_id)
    ```

    The answer is the same on every replay, and wherever the workflow asks again for the same id. True is recorded: it
    is durable before the next step of the workflow is executed, and costs a checkpoint without a commit of its own.

    False where an earlier attempt has recorded a step that this one has not visited yet. So it is False, and the old
    way is taken, also where that step is one that today's code does not visit any more, and in parallel branches
    where it is one of another branch. A step that was being executed for the first time when its worker died has
    recorded nothing: what came before it decides.

    Args:
        patch_id: what the change is called in this workflow. In a loop, with the round in it where each is to decide
            for itself: `patched(f"check fraud {round}")`.

    Returns:
        True where no workflow is being executed: a plain call goes the new way.

    Raises:
        ArgumentError: the id is not a text, is blank, or cannot be stored.
        UsageError: it was called in a step, which is not replayed, or in another task or thread than the workflow.
    """
    fault = fault_in(patch_id)
    if fault is not None:
        raise ArgumentError(f"patched({patch_id!r}): the id {fault}. Give a text that is not blank.")
    context = active()
    if context is None:
        return True
    if context.step is not None:
        raise UsageError(
            f"patched({patch_id!r}) was called in step {context.step.position.shown!r}, which is not replayed: call it "
            "in the workflow, and pass the answer to the step."
        )
    context.attempt.branches.require_here(f"patched({patch_id!r})", workflow=context.attempt.name)
    is_new, marker = record_patch(context.attempt, patch_id)
    if marker is not None:
        context.runtime.recorder.note(marker)
    return is_new


def deprecate_patch(patch_id: str) -> None:
    """Mark where a `patched` was whose old way is gone, because no workflow is left that goes it.

    New workflows go on recording that they went the new way: so they survive while workers are still there that ask
    `patched`, and a deploy that is taken back. When none of these is left, the call can be deleted too.

    Args:
        patch_id: the id of the patch.

    Raises:
        ArgumentError, UsageError: as `patched`.
    """
    patched(patch_id)
