"""Executes claimed workflows, each as a task, and records how their attempts end."""

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
from sqla_durable.errors import HistoryMismatchError, PayloadKeyError
from sqla_durable.execution.worker.database import persistently
from sqla_durable.execution.worker.hints import Wakeup
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.limited_queues import LimitedQueues
from sqla_durable.execution.worker.recorder import Resources, WorkerRecorder
from sqla_durable.execution.worker.settings import (
    CANCELLED_GRACE,
    CLEANUP_TIME,
    EXECUTING_CHECK,
    MISMATCH_PAUSE,
    ROW_PAUSES,
)
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import Runtime, run_blocking
from sqla_durable.operations.workflow import execute_workflow, record_completion
from sqla_durable.runtime.context import ATTEMPT
from sqla_durable.runtime.runtimes import AsyncRuntime, BlockingRuntime
from sqla_durable.runtime.tasks import AttemptTask
from sqla_durable.store import Claimed, Completion, Fence, Suspend, attempts, workers
from sqla_durable.unwinding import AttemptLost, ContinuedAsNew, Released, Suspended, Unwound

log = Log("sqla_durable.worker")
finished = Log("sqla_durable.finished")
if finished.logger.level == logging.NOTSET:  # the application may have turned it on before this is imported
    finished.setLevel(logging.WARNING)

_MOST_STEPS = 1_000  # that a heartbeat names


@dataclass(slots=True)
class Running:
    """An attempt and the task that executes it.

    Attributes:
        has_slot: whether it has a slot; most outcomes are recorded without one.
        is_lost: whether its workflow no longer belongs to this worker.
        cleans_up_until: until when an attempt that was cancelled has time to clean up.
    """

    attempt: Attempt
    task: asyncio.Task[None]
    has_slot: bool = True
    is_lost: bool = False
    cleans_up_until: float = float("-inf")


class Attempts:
    """The workflows that this worker is executing, each in one of its slots."""

    def __init__(
        self,
        registry: Registry,
        resources: Resources,
        isolation: Isolation,
        limited: LimitedQueues,
        maintenance: Wakeup,
        *,
        max_attempts: int,
    ) -> None:
        self._registry = registry
        self._resources = resources
        self._database = resources.database
        self._slots = resources.slots
        self._isolation = isolation
        self._limited = limited
        self._maintenance = maintenance
        self._max_attempts = max_attempts
        self._running: dict[Fence, Running] = {}

    async def slot(self) -> None:
        """Wait until another workflow can be executed."""
        while self._slots.free <= 0:
            self._suspend_some()
            await self._slots.next_release()

    def _suspend_some(self) -> None:
        """Wake half of what waits in memory, the oldest first, so that it is suspended."""
        listening = [each.attempt for each in self._running.values() if each.attempt.has_listeners]
        for each in listening[: (len(listening) + 1) // 2]:
            each.wake_listeners()

    @property
    def fences(self) -> list[Fence]:
        """The attempts that are running here; of one workflow there may be two, one of which has lost it."""
        return list(self._running)

    def steps_longer_than(self, seconds: float) -> dict[str, dict[str, tuple[int, float]]]:
        """Return the steps that have been executed for longer than `seconds`, by workflow and key; a limited number."""
        found: dict[str, dict[str, tuple[int, float]]] = {}
        most = _MOST_STEPS
        for each in self._running.values():
            executed = each.attempt.executing_steps().items()
            steps = {key: (tries.count, tries.age_of_try) for key, tries in executed if tries.age_of_try > seconds}
            steps = dict(islice(steps.items(), most))
            most -= len(steps)
            if steps:
                found[str(each.attempt.workflow_id)] = steps
        return found

    def begin(self, claimed: Iterable[Claimed]) -> None:
        """Begin to execute what was claimed."""
        for each in claimed:
            attempt = Attempt(each, wakers=self._resources.wakers)
            task = AttemptTask(self._execute(attempt), attempt, name=each.name)
            self._running[attempt.fence] = Running(attempt, task)
            self._slots.take()

    def drop(self, lost: Iterable[Fence]) -> None:
        """End the attempts whose workflows no longer belong to this worker, as far as they have not ended."""
        for fence in lost:
            running = self._running.get(fence)
            if running is not None and not running.attempt.is_suspended:
                if not running.attempt.is_stopped:
                    log.warning(
                        "workflow %s: its attempt ends, because the workflow was cancelled or reclaimed",
                        fence.workflow_id,
                    )
                running.attempt.stop(partial(AttemptLost, fence.workflow_id))
                running.is_lost = True
                self._cancel_once(running)

    async def release_all(self, *, grace: float) -> None:
        """Stop every attempt at its next operation; after `grace` seconds, cancel those that are still in a step.

        Those that cannot be cancelled, in a thread or shielded, can commit nothing more.
        """
        for each in self._running.values():
            each.attempt.stop(Released)
        tasks = (each.task for each in self._running.values())
        await self._wait_for([*tasks, *self._resources.detached], grace)
        remaining = list(self._running.values())
        for each in remaining:
            self._cancel(each)
        sync = [each for each in remaining if not self._definition(each.attempt).is_async]
        if sync:
            log.warning("%d def workflows are still in a step, in threads; they are released", len(sync))
            await self._release([each.attempt.fence for each in sync])
        await self._wait_for([each.task for each in remaining if each not in sync], CANCELLED_GRACE)

    def cancel(self) -> int:
        """Cancel what is still there, and return how many attempts that is, and detached steps."""
        for each in self._running.values():
            each.task.cancel()
        return len(self._running) + len(self._resources.detached)

    async def _wait_for(self, tasks: list[asyncio.Future[Any]], seconds: float) -> None:
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def _cancel_once(self, running: Running) -> None:
        """End an async attempt, and not its cleanup; one that swallows this is cancelled again after a while."""
        now = time.monotonic()
        if now >= running.cleans_up_until:
            running.cleans_up_until = now + CLEANUP_TIME
            self._cancel(running)

    def _cancel(self, running: Running) -> None:
        """End an async attempt at once; a thread ends at its next operation."""
        if self._definition(running.attempt).is_async:
            running.task.cancel()

    def _definition(self, attempt: Attempt) -> WorkflowDefinition:
        return self._registry.workflow(attempt.name)

    async def _execute(self, attempt: Attempt) -> None:
        ATTEMPT.set(attempt)  # of this task
        try:
            if self._resources.stopping.is_set():  # the claim came while the worker was stopping
                raise Released
            await self._to_its_end(attempt)
        except AttemptLost:
            log.info("workflow %s: was cancelled, or reclaimed, in attempt %d", attempt.workflow_id, attempt.number)
            if not self._running[attempt.fence].is_lost:
                await self._abandon_if_owned(attempt)
        except (Released, asyncio.CancelledError) as ending:
            if not self._running[attempt.fence].is_lost:
                await self._release_or_count(attempt, ending)
        except Suspended as ending:
            await self._suspended(attempt, ending)
        except HistoryMismatchError as error:
            log.error("%s", joined(str(error)))
            await self._suspend_for_deploy(attempt)
        except BaseException as ending:
            broken = ending.error if isinstance(ending, Unwound) else ending
            if isinstance(broken, PayloadKeyError):
                log.error("%s", joined(str(broken)))
                await self._suspend_for_deploy(attempt)
                return
            log.error("workflow %s: its attempt %d broke", attempt.workflow_id, attempt.number, exc_info=broken)
            await self._abandon(attempt, broken)
        finally:
            self._release_slot(self._running.pop(attempt.fence))
            if attempt.fence in self._limited.queue_of:  # a call for each attempt costs those of other queues
                self._limited.end(attempt.fence)

    @property
    def _outcomes_waiting(self) -> int:
        """How many attempts wait, without a slot, for the commit of their outcomes."""
        return len(self._running) - self._slots.taken

    def _release_slot(self, running: Running) -> None:
        """Let another workflow be claimed, and executed while the outcome of this one is committed."""
        if running.has_slot:
            running.has_slot = False
            self._slots.release()

    async def _to_its_end(self, attempt: Attempt) -> None:
        definition = self._definition(attempt)
        recorder = WorkerRecorder.for_loop(attempt, self._resources)
        runtime: Runtime
        if definition.is_async:
            runtime = AsyncRuntime(attempt, recorder, threads=self._resources.threads)
            executing = execute_workflow(runtime, definition)
        else:
            runtime = BlockingRuntime(attempt, recorder.fork())
            executing = self._in_thread(runtime, definition, recorder)
        try:
            executed = await executing
            if self._outcomes_waiting < self._slots.count:  # else all that is pending would be executed, none committed
                self._release_slot(self._running[attempt.fence])
            completion = await record_completion(recorder, executed)
        except (Released, asyncio.CancelledError) as ending:
            while isinstance(ending, Released) and attempt.is_executing:  # noqa: ASYNC110 (threads set no asyncio.Event)
                await asyncio.sleep(EXECUTING_CHECK)  # steps beside the one that has ended, in threads too
            await recorder.flush()
            raise
        except (AttemptLost, Suspended, GeneratorExit):
            raise
        except BaseException:  # what it has recorded is not to be executed again
            await recorder.flush()
            raise
        finally:
            runtime.close()
        _log_end(attempt, completion)

    async def _in_thread(
        self, runtime: Runtime, definition: WorkflowDefinition, recorder: WorkerRecorder
    ) -> Completion:
        """Execute a workflow in a thread, which is free again before the outcome is recorded from here."""
        try:
            return await self._resources.in_thread(lambda: run_blocking(execute_workflow(runtime, definition)))
        finally:
            recorder.follow(runtime.recorder)

    async def _release_or_count(self, attempt: Attempt, ending: BaseException) -> None:
        """Release a workflow because the worker stops; without that, count a crash, or it would be claimed at once."""
        await asyncio.sleep(0)  # at the end of asyncio.run() all tasks are cancelled, and this one before the worker's
        if self._resources.stopping.is_set():
            await self._release([attempt.fence])
        else:
            log.error("workflow %s: its attempt %d ended by itself: %r", attempt.workflow_id, attempt.number, ending)
            await self._abandon(attempt, ending)

    async def _suspended(self, attempt: Attempt, ending: Suspended) -> None:
        if isinstance(ending, ContinuedAsNew):
            self._maintenance.set()
        log.debug("workflow %s %s is suspended in attempt %d", attempt.name, attempt.workflow_id, attempt.number)
        if not attempt.suspended_by_engine:
            await self._abandon_if_owned(attempt)

    async def _release(self, fences: list[Fence]) -> None:
        """Release workflows; those whose rows are locked for long are reclaimed when this worker has left."""
        for pause in (*ROW_PAUSES, None):
            fences = await self.release(fences)
            if not fences or pause is None:
                break
            await asyncio.sleep(pause)
        for each in fences:
            log.warning("workflow %s is not released: another transaction holds its row", each.workflow_id)

    async def release(self, fences: Sequence[Fence]) -> list[Fence]:
        """Release workflows whose rows nobody else holds; return the attempts that still own theirs."""
        by_id = {each.workflow_id: each for each in fences}

        async def of_some(ids: Sequence[UUID]) -> list[Fence]:
            statement = partial(attempts.release_unlocked, fences=[by_id[each] for each in ids])
            return await persistently(self._database, statement, what="release")

        return [*chain(*await self._isolation.each(list(by_id), of_some, what="release"))]

    async def _suspend_for_deploy(self, attempt: Attempt) -> None:
        """Suspend a workflow until a deploy may fit its history: not a crash, or a bad deploy would fail it."""
        suspension = Suspend(attempt.fence, MISMATCH_PAUSE)

        def suspend(connection: Connection) -> bool:
            fences = [attempt.fence]
            return not attempts.write_batch(connection, [], [suspension]).ends or not attempts.still_owned(
                connection, fences
            )

        await self._until_written(attempt.fence, suspend, what="suspend")

    async def _abandon_if_owned(self, attempt: Attempt) -> None:
        """Count an attempt that ended itself, by a step that cancels its own workflow for example, as a crash."""
        if self._resources.stopping.is_set():
            return  # the writer refuses everything then, and what is left is released
        still_owned = partial(attempts.still_owned, fences=[attempt.fence])
        if await persistently(self._database, still_owned, what="abandon"):
            await self._abandon(attempt, AttemptLost("it lost its workflow, which nobody has reclaimed"))

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
        for number, pause in enumerate(chain(ROW_PAUSES, repeat(ROW_PAUSES[-1]))):
            try:
                written = await persistently(self._database, write, what=what)
            except Exception as error:
                if not is_about_data(error):
                    raise
                return await self._isolation.condemn(fence.workflow_id, error, what=what)
            if written or self._resources.stopping.is_set():
                return None
            if number == len(ROW_PAUSES):
                log.warning("workflow %s: %s waits for a transaction that holds its row", fence.workflow_id, what)
            await asyncio.sleep(pause)


def _log_end(attempt: Attempt, completion: Completion) -> None:
    failure = None if completion.error is None else Failure.from_text(completion.error)
    if failure is None:
        write = finished.info if finished.isEnabledFor(logging.INFO) else log.debug
        write("workflow %s %s succeeded in attempt %d", attempt.name, attempt.workflow_id, attempt.number)
    else:
        where = attempt.name, attempt.workflow_id, attempt.number
        log.warning("workflow %s %s failed in attempt %d: %s: %s", *where, failure.type, failure.message)
