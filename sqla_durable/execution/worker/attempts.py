"""Executes claimed workflows, each as a task, and knows which are running."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from sqla_durable.definitions.database_errors import is_about_data
from sqla_durable.definitions.failure import Failure
from sqla_durable.definitions.log import Log, joined, one_line
from sqla_durable.definitions.redaction import message_of
from sqla_durable.definitions.registry import Registry, WorkflowDefinition
from sqla_durable.errors import HistoryMismatchError
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.runtimes import LoopRuntime, Surroundings, ThreadRuntime
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import run_blocking
from sqla_durable.operations.workflow import run_workflow
from sqla_durable.runtime.tasks import AttemptTask
from sqla_durable.store import Claimed, Completion, Fence, Park, attempts, workers
from sqla_durable.unwinding import AttemptLost, ContinuedAsNew, Released, Suspended

log = Log("sqla_durable.worker")
finished = Log("sqla_durable.finished")
finished.setLevel(logging.WARNING)  # turned on by its level

_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between looks at a row that somebody holds
_LOOK_EVERY = 0.05
_MOST_TOLD = 1_000  # steps that a heartbeat names
_HELD_BACK = 60.0  # seconds until a strict workflow whose history does not fit is tried again
_CLEANING = 10.0  # seconds until what was cancelled, and has not ended, is cancelled again
_CANCELLED_GRACE = 2.0  # seconds for async attempts to be released after they were cancelled


@dataclass(slots=True)
class Running:
    """An attempt and the task that executes it.

    Attributes:
        is_lost: whether the tables no longer give it to this worker.
        undisturbed_until: until when what was cancelled has time to clean up.
    """

    attempt: Attempt
    task: asyncio.Task[None]
    is_lost: bool = False
    undisturbed_until: float = float("-inf")


class Attempts:
    """The workflows that this worker is executing, at most `concurrency` of them.

    Attributes:
        isolation: keeps a row that makes the worker's statements fail from the other workflows.
    """

    def __init__(
        self,
        registry: Registry,
        surroundings: Surroundings,
        database: Database,
        *,
        concurrency: int,
        max_attempts: int,
    ) -> None:
        self._registry = registry
        self._surroundings = surroundings
        self._database = database
        self._concurrency = concurrency
        self._max_attempts = max_attempts
        self.isolation = Isolation(database)
        self._running: dict[Fence, Running] = {}
        self._freed = asyncio.Event()

    @property
    def free(self) -> int:
        """How many more workflows can be executed now."""
        return self._concurrency - len(self._running)

    async def slot(self) -> None:
        """Wait until another workflow can be executed."""
        while self.is_full():
            self._freed.clear()
            self._suspend_some()
            await self._freed.wait()

    def is_full(self) -> bool:
        """Return whether another workflow would have to wait for a slot."""
        return self.free <= 0

    def _suspend_some(self) -> None:
        """Let half of what waits in memory be suspended, the oldest first."""
        listening = [each.attempt for each in self._running.values() if each.attempt.has_listeners]
        for each in listening[: (len(listening) + 1) // 2]:
            each.wake_listeners()

    @property
    def fences(self) -> list[Fence]:
        """The attempts that are running here; of one workflow there may be two, one of which has lost it."""
        return list(self._running)

    def steps_longer_than(self, seconds: float) -> dict[str, dict[str, tuple[int, float]]]:
        """Return what is being executed for longer than that, by workflow and step; of very many steps, some."""
        found: dict[str, dict[str, tuple[int, float]]] = {}
        left = _MOST_TOLD
        for each in self._running.values():
            executed = each.attempt.executing_steps().items()
            steps = {key: (tries.count, tries.age_of_try) for key, tries in executed if tries.age_of_try > seconds}
            steps = dict(islice(steps.items(), left))
            left -= len(steps)
            if steps:
                found[str(each.attempt.workflow_id)] = steps
        return found

    def begin(self, claimed: Iterable[Claimed]) -> None:
        """Begin to execute what was claimed."""
        for each in claimed:
            attempt = Attempt(each)
            attempt.arrivals = self._surroundings.arrivals
            attempt.is_slot_wanted = self.is_full
            task = AttemptTask(self._execute(attempt), attempt, name=each.name)
            self._running[attempt.fence] = Running(attempt, task)

    def drop(self, lost: Iterable[Fence]) -> None:
        """End the attempts that the tables no longer give to this worker, as far as they have not ended."""
        for fence in lost:
            running = self._running.get(fence)
            if running is not None and not running.attempt.is_suspended:
                if not running.attempt.is_stopped:
                    log.warning(
                        "workflow %s is no longer this worker's, taken over or cancelled: its attempt ends",
                        fence.workflow_id,
                    )
                running.attempt.stop(partial(AttemptLost, fence.workflow_id))
                running.is_lost = True
                self._cancel_once(running)

    async def hand_back(self, *, grace: float) -> None:
        """Let every attempt end at its next operation; after `grace` seconds, end those that are still in a step.

        Those that cannot be ended, in a thread or shielded from cancellation, can commit nothing more.
        """
        for each in self._running.values():
            each.attempt.stop(Released)
        in_threads = self._surroundings.left_to_themselves
        await self._wait_for([*(each.task for each in self._running.values()), *in_threads], grace)
        left = list(self._running.values())
        for each in left:
            self._cancel(each)
        sync = [each for each in left if not self._definition(each.attempt).is_async]
        if sync:
            log.warning("%d sync workflows are still in a step; they are released", len(sync))
            await self._release([each.attempt.fence for each in sync])
        await self._wait_for([each.task for each in left if each not in sync], _CANCELLED_GRACE)

    def cancel(self) -> int:
        """Cancel what is still there, and return how many attempts that is, and steps that were left to themselves."""
        for each in self._running.values():
            each.task.cancel()
        return len(self._running) + len(self._surroundings.left_to_themselves)

    async def _wait_for(self, tasks: list[asyncio.Future[Any]], seconds: float) -> None:
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def _cancel_once(self, running: Running) -> None:
        """End an async attempt, and not what it does in the end; one that swallows this is told again after a while."""
        now = time.monotonic()
        if now >= running.undisturbed_until:
            running.undisturbed_until = now + _CLEANING
            self._cancel(running)

    def _cancel(self, running: Running) -> None:
        """End an async attempt at once; a thread ends at its next operation."""
        if self._definition(running.attempt).is_async:
            running.task.cancel()

    def _definition(self, attempt: Attempt) -> WorkflowDefinition:
        return self._registry.workflow(attempt.name)

    async def _execute(self, attempt: Attempt) -> None:
        try:
            await self._to_its_end(attempt)
        except AttemptLost:
            log.info("workflow %s: was cancelled, or taken over, in attempt %d", attempt.workflow_id, attempt.number)
            if not self._running[attempt.fence].is_lost:
                await self._abandon_if_owned(attempt)
        except (Released, asyncio.CancelledError) as signal:
            if not self._running[attempt.fence].is_lost:
                await self._release_or_count(attempt, signal)
        except Suspended as signal:
            await self._suspended(attempt, signal)
        except HistoryMismatchError as error:
            log.error("%s", joined(str(error)))
            await self._hold_back(attempt)
        except BaseException as error:
            log.exception("workflow %s: its attempt %d broke", attempt.workflow_id, attempt.number)
            await self._abandon(attempt, error)
        finally:
            self._running.pop(attempt.fence, None)
            self._freed.set()

    async def _to_its_end(self, attempt: Attempt) -> None:
        definition = self._definition(attempt)
        if not definition.is_async:
            runtime = ThreadRuntime(attempt, self._surroundings)
            _tell(attempt, await self._surroundings.in_thread(lambda: _blocking(runtime, definition)))
            return
        on_loop = LoopRuntime(attempt, self._surroundings)
        try:
            _tell(attempt, await run_workflow(on_loop, definition, lambda given: on_loop.body(definition, given)))
        except (Released, asyncio.CancelledError) as signal:
            while isinstance(signal, Released) and attempt.is_executing:  # noqa: ASYNC110 (threads set no asyncio.Event)
                await asyncio.sleep(_LOOK_EVERY)  # steps beside the one that has ended, in threads too
            await on_loop.flush()
            raise
        except HistoryMismatchError:
            await on_loop.flush()
            raise
        finally:
            on_loop.leave()

    async def _release_or_count(self, attempt: Attempt, signal: BaseException) -> None:
        """Release a workflow because the worker stops; without that, count a crash, or it would be claimed at once."""
        await asyncio.sleep(0)  # at the end of asyncio.run() all tasks are cancelled, and this one before the worker's
        if self._surroundings.stopping.is_set():
            await self._release([attempt.fence])
        else:
            log.error("workflow %s: its attempt %d ended by itself: %r", attempt.workflow_id, attempt.number, signal)
            await self._abandon(attempt, signal)

    async def _suspended(self, attempt: Attempt, signal: Suspended) -> None:
        if isinstance(signal, ContinuedAsNew):
            self._surroundings.writer.on_asked()
        log.debug("workflow %s %s is suspended in attempt %d", attempt.name, attempt.workflow_id, attempt.number)
        if not attempt.suspended_by_engine:
            await self._abandon_if_owned(attempt)

    async def _release(self, fences: list[Fence]) -> None:
        """Hand workflows back; those whose rows somebody holds for long are reclaimed when this worker has left."""
        for pause in (*_PAUSES, None):
            fences = await self.release(fences)
            if not fences or pause is None:
                break
            await asyncio.sleep(pause)
        for each in fences:
            log.warning("workflow %s is not handed back: another transaction holds its row", each.workflow_id)

    async def release(self, fences: Sequence[Fence]) -> list[Fence]:
        """Release workflows whose rows nobody else holds; return the attempts that still own theirs."""
        by_id = {each.workflow_id: each for each in fences}

        async def of_some(ids: Sequence[UUID]) -> list[Fence]:
            statement = partial(attempts.release_unlocked, fences=[by_id[each] for each in ids])
            return await persistently(self._database, statement, what="release")

        return [*chain(*await self.isolation.each(list(by_id), of_some, what="release"))]

    async def _hold_back(self, attempt: Attempt) -> None:
        """Park a workflow until another deploy may fit its history: not a crash, or a bad deploy would fail it."""
        park = Park(attempt.fence, _HELD_BACK)

        def suspend(connection: Connection) -> bool:
            fences = [attempt.fence]
            return not attempts.write_batch(connection, [], [park]).ends or not attempts.still_owned(connection, fences)

        await self._until_written(attempt.fence, suspend, what="hold back")

    async def _abandon_if_owned(self, attempt: Attempt) -> None:
        """Count an attempt that ended itself, by a step that cancels its own workflow for example, as a crash."""
        if self._surroundings.stopping.is_set():
            return  # the writer refuses everything then, and what is left is handed back
        look = partial(attempts.still_owned, fences=[attempt.fence])
        if await persistently(self._database, look, what="abandon"):
            await self._abandon(attempt, AttemptLost("it lost its workflow, and nobody has taken it"))

    async def _abandon(self, attempt: Attempt, error: BaseException) -> None:
        reason = one_line(f"the engine broke with {type(error).__name__}: {message_of(error)}")
        await self._count(attempt.fence, reason)

    async def count_unread(self, fence: Fence, reason: str) -> None:
        """Count a crash of a claimed workflow whose history cannot be read."""
        log.error("workflow %s: its history cannot be read when it is claimed: %s", fence.workflow_id, reason)
        await self._count(fence, one_line(f"its history could not be read: {reason}"))

    async def _count(self, fence: Fence, reason: str) -> None:
        abandon = partial(workers.abandon_attempt, fence=fence, reason=reason, max_attempts=self._max_attempts)
        await self._until_written(fence, abandon, what="abandon")

    async def _until_written(self, fence: Fence, write: Callable[[Connection], bool], *, what: str) -> None:
        """Write how an attempt ended, however long somebody holds the row: else it would be released uncounted."""
        for number, pause in enumerate(chain(_PAUSES, repeat(_PAUSES[-1]))):
            try:
                written = await persistently(self._database, write, what=what)
            except Exception as error:
                if not is_about_data(error):
                    raise
                return await self.isolation.condemn(fence.workflow_id, error, what=what)
            if written or self._surroundings.stopping.is_set():
                return None
            if number == len(_PAUSES):
                log.warning("workflow %s: %s waits for a transaction that holds its row", fence.workflow_id, what)
            await asyncio.sleep(pause)


def _tell(attempt: Attempt, completion: Completion) -> None:
    failure = None if completion.error is None else Failure.from_text(completion.error)
    if failure is None:
        tell = finished.info if finished.isEnabledFor(logging.INFO) else log.debug
        tell("workflow %s %s succeeded in attempt %d", attempt.name, attempt.workflow_id, attempt.number)
    else:
        where = attempt.name, attempt.workflow_id, attempt.number
        log.warning("workflow %s %s failed in attempt %d: %s: %s", *where, failure.type, failure.message)


def _blocking(runtime: ThreadRuntime, definition: WorkflowDefinition) -> Completion:
    try:
        return run_blocking(run_workflow(runtime, definition, lambda given: runtime.body(definition, given)))
    except (Released, HistoryMismatchError):
        runtime.flush()
        raise
