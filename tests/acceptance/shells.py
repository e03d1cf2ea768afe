"""The ways to run a workflow, behind one face: executors, joined executors, and workers, sync and async."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import Engine, NullPool, create_engine, make_url, null, select
from sqlalchemy import update as updating
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    BoundWorkflow,
    Executor,
    UpdateHandle,
    Worker,
    Workflow,
    WorkflowFunction,
    WorkflowStatus,
    complete_callback,
    send_signal,
    send_update,
    start_many,
)
from sqla_durable.asyncio import AsyncExecutor, AsyncUpdateHandle, AsyncWorkflowFunction
from tests.acceptance.application import AnyWorkflow, Application, Form
from tests.support.databases import translated

P = ParamSpec("P")
R = TypeVar("R")
AnyUpdate: TypeAlias = UpdateHandle[Any] | AsyncUpdateHandle[Any]

PATIENCE = timedelta(seconds=60)
POLL = timedelta(seconds=0.1)
"""Hints wake workers sooner; twenty polls a second would be a tenth of a processor for each worker."""


class Client(ABC):
    """The caller's own session and transaction."""

    @abstractmethod
    def start(self, workflow: AnyWorkflow[P, Any], *args: P.args, **kwargs: P.kwargs) -> Workflow: ...

    @abstractmethod
    def start_many(self, bound: Iterable[BoundWorkflow]) -> list[UUID]: ...

    @abstractmethod
    def signal(self, workflows: Any, name: str, payload: object = None, *, key: str | None = None) -> None: ...

    @abstractmethod
    def update(self, workflow: Any, name: str, payload: object = None, **options: Any) -> AnyUpdate: ...

    @abstractmethod
    def complete_callback(self, token: str, value: object = None) -> None: ...

    @abstractmethod
    def add(self, *instances: object) -> None: ...

    @abstractmethod
    def flush(self) -> None: ...

    @abstractmethod
    def commit(self) -> None: ...

    @abstractmethod
    def rollback(self) -> None: ...


class SyncClient(Client):
    """Over a `Session`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def start(self, workflow: AnyWorkflow[P, Any], *args: P.args, **kwargs: P.kwargs) -> Workflow:
        return workflow.start(self.session, *args, **kwargs)

    def start_many(self, bound: Iterable[BoundWorkflow]) -> list[UUID]:
        return start_many(self.session, bound)

    def signal(self, workflows: Any, name: str, payload: object = None, *, key: str | None = None) -> None:
        send_signal(self.session, workflows, name, payload, key=key)

    def update(self, workflow: Any, name: str, payload: object = None, **options: Any) -> UpdateHandle[Any]:
        return send_update(self.session, workflow, name, payload, **options)

    def complete_callback(self, token: str, value: object = None) -> None:
        complete_callback(self.session, token, value)

    def add(self, *instances: object) -> None:
        self.session.add_all(instances)

    def flush(self) -> None:
        self.session.flush()

    def commit(self) -> None:
        self.session.commit()

    def rollback(self) -> None:
        self.session.rollback()


class AsyncClient(Client):
    """Over an `AsyncSession`."""

    def __init__(self, session: AsyncSession, runner: asyncio.Runner) -> None:
        self.session = session
        self._runner = runner

    def start(self, workflow: AnyWorkflow[P, Any], *args: P.args, **kwargs: P.kwargs) -> Workflow:
        return self._runner.run(workflow.start(self.session, *args, **kwargs))

    def start_many(self, bound: Iterable[BoundWorkflow]) -> list[UUID]:
        return self._runner.run(aio.start_many(self.session, bound))

    def signal(self, workflows: Any, name: str, payload: object = None, *, key: str | None = None) -> None:
        self._runner.run(aio.send_signal(self.session, workflows, name, payload, key=key))

    def update(self, workflow: Any, name: str, payload: object = None, **options: Any) -> AsyncUpdateHandle[Any]:
        return self._runner.run(aio.send_update(self.session, workflow, name, payload, **options))

    def complete_callback(self, token: str, value: object = None) -> None:
        self._runner.run(aio.complete_callback(self.session, token, value))

    def add(self, *instances: object) -> None:
        self.session.add_all(instances)

    def flush(self) -> None:
        self._runner.run(self.session.flush())

    def commit(self) -> None:
        self._runner.run(self.session.commit())

    def rollback(self) -> None:
        self._runner.run(self.session.rollback())


class Shell(ABC):
    """One way to run workflows, with an application for a story to fill."""

    form: Form
    lease = timedelta(minutes=5)

    def __init__(self, url: str, schema: str) -> None:
        self.url, self.schema = url, schema
        self.app = Application(self.form)
        self.engine = _engine(url, schema)
        self.sessionmaker = sessionmaker(self.engine)

    @abstractmethod
    def client(self) -> Any:
        """Open a session of the caller's, as a context manager."""

    def run(self, workflow: AnyWorkflow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Start a workflow, bring it to its end, and give its result or raise its error."""
        return self.finish(workflow, self.begin(workflow, *args, **kwargs))

    def begin(self, workflow: AnyWorkflow[P, Any], *args: P.args, **kwargs: P.kwargs) -> UUID:
        """Start a workflow and commit that; give its id."""
        with self.client() as client:
            workflow_id = client.start(workflow, *args, **kwargs).id
            client.flush()
            client.commit()
        assert isinstance(workflow_id, UUID)
        return workflow_id

    @abstractmethod
    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        """Bring a committed workflow to its end, and give its result or raise its error."""

    @abstractmethod
    def result(self, workflow: AnyWorkflow[..., R], workflow_id: UUID, timeout: timedelta = PATIENCE) -> R:
        """Wait on a handle."""

    @contextmanager
    def background(self, **options: Any) -> Generator[Worker]:
        """A worker of this way's kind beside the story, in a thread with an event loop and engines of its own."""
        with Worker(self.app.durable, sessionmaker=self.sessionmaker, poll_interval=POLL, **options) as worker:
            yield worker

    @property
    def only(self) -> UUID:
        """The id of the only workflow there is."""
        with self.sessionmaker() as session:
            return session.scalars(select(Workflow.id)).one()

    def one(self, workflow_id: UUID) -> Workflow:
        """Read a record, with its steps."""
        with self.sessionmaker() as session:
            record = session.get_one(Workflow, workflow_id)
            assert record.steps is not None
            session.expunge_all()
            return record

    def set_isolation(self, level: str) -> None:
        """Let the engine of the application have another isolation level by default."""
        self.engine = self.engine.execution_options(isolation_level=level)
        self.sessionmaker = sessionmaker(self.engine)

    def crashed(self, workflow_id: UUID) -> None:
        """Bring a record back to where a dead worker's is after its reclaim: pending, with its checkpoints."""
        with self.sessionmaker.begin() as session:
            session.execute(
                updating(Workflow)
                .where(Workflow.id == workflow_id)
                .values(
                    status=WorkflowStatus.PENDING,
                    token=None,
                    worker_id=None,
                    output=null(),
                    error=None,
                    finished_at=None,
                    wake_at=None,
                    awaits=None,
                    attempt=Workflow.attempt + 1,
                ),
                execution_options={"synchronize_session": False},
            )

    def close(self) -> None:
        self.engine.dispose()


class SyncShell(Shell):
    """What sync shells share."""

    form = Form.SYNC

    @contextmanager
    def client(self) -> Generator[SyncClient]:
        with self.sessionmaker() as session:
            yield SyncClient(session)

    def result(self, workflow: AnyWorkflow[..., R], workflow_id: UUID, timeout: timedelta = PATIENCE) -> R:
        return workflow.handle(self.sessionmaker, workflow_id).result(timeout=timeout)


class AsyncShell(Shell):
    """What async shells share: an event loop and an async engine."""

    form = Form.ASYNC
    driver = "psycopg"

    def __init__(self, url: str, schema: str) -> None:
        super().__init__(url, schema)
        self.runner = asyncio.Runner()
        self.async_engine = _async_engine(url, schema, self.driver)
        self.async_sessionmaker = async_sessionmaker(self.async_engine)

    @contextmanager
    def client(self) -> Generator[AsyncClient]:
        session = self.async_sessionmaker()
        try:
            yield AsyncClient(session, self.runner)
        finally:
            self.runner.run(session.close())

    def result(self, workflow: AnyWorkflow[..., R], workflow_id: UUID, timeout: timedelta = PATIENCE) -> R:
        return self.runner.run(workflow.handle(self.async_sessionmaker, workflow_id).result(timeout=timeout))

    @contextmanager
    def background(self, **options: Any) -> Generator[Worker]:
        engine = _async_engine(self.url, self.schema, self.driver, poolclass=NullPool)
        with super().background(async_sessionmaker=async_sessionmaker(engine), **options) as worker:
            yield worker

    def set_isolation(self, level: str) -> None:
        super().set_isolation(level)
        self.async_engine = self.async_engine.execution_options(isolation_level=level)
        self.async_sessionmaker = async_sessionmaker(self.async_engine)

    def close(self) -> None:
        self.runner.run(self.async_engine.dispose())
        self.runner.close()
        super().close()


class ExecutorShell(SyncShell):
    """Executor(session): commits per step."""

    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        assert isinstance(workflow, WorkflowFunction)
        with self.sessionmaker() as session:
            return Executor(session, lease=self.lease).execute(workflow, workflow_id)


class JoinedShell(SyncShell):
    """Executor.joined(session): a savepoint per step, then the caller's commit."""

    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        assert isinstance(workflow, WorkflowFunction)
        with self.sessionmaker() as session:
            try:
                return Executor.joined(session).execute(workflow, workflow_id)
            finally:
                session.commit()


class WorkerShell(SyncShell):
    """A worker with `def` workflows on a sync engine."""

    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        with Worker(self.app.durable, sessionmaker=self.sessionmaker, poll_interval=POLL):
            return self.result(workflow, workflow_id)


class AsyncExecutorShell(AsyncShell):
    """AsyncExecutor(session)."""

    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        async def finish() -> R:
            assert isinstance(workflow, AsyncWorkflowFunction)
            async with self.async_sessionmaker() as session:
                return await AsyncExecutor(session, lease=self.lease).execute(workflow, workflow_id)

        return self.runner.run(finish())


class AsyncJoinedShell(AsyncShell):
    """AsyncExecutor.joined(session), then the caller's commit."""

    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        async def finish() -> R:
            assert isinstance(workflow, AsyncWorkflowFunction)
            async with self.async_sessionmaker() as session:
                try:
                    return await AsyncExecutor.joined(session).execute(workflow, workflow_id)
                finally:
                    await session.commit()

        return self.runner.run(finish())


class AsyncWorkerShell(AsyncShell):
    """A worker with `async def` workflows on an async engine."""

    def finish(self, workflow: AnyWorkflow[..., R], workflow_id: UUID) -> R:
        async def finish() -> R:
            async with self.worker():
                return await workflow.handle(self.async_sessionmaker, workflow_id).result(timeout=PATIENCE)

        return self.runner.run(finish())

    def worker(self) -> Worker:
        return Worker(self.app.durable, async_sessionmaker=self.async_sessionmaker, poll_interval=POLL)


class AsyncpgWorkerShell(AsyncWorkerShell):
    """The same over asyncpg."""

    driver = "asyncpg"


class MixedWorkerShell(AsyncWorkerShell):
    """`def` workflows in a worker whose own statements run on an async engine."""

    form = Form.SYNC

    def worker(self) -> Worker:
        return Worker(
            self.app.durable,
            sessionmaker=self.sessionmaker,
            async_sessionmaker=self.async_sessionmaker,
            poll_interval=POLL,
        )


SHELLS: dict[str, type[Shell]] = {
    "executor": ExecutorShell,
    "joined": JoinedShell,
    "worker": WorkerShell,
    "async-executor": AsyncExecutorShell,
    "async-joined": AsyncJoinedShell,
    "async-worker": AsyncWorkerShell,
    "asyncpg-worker": AsyncpgWorkerShell,
    "mixed-worker": MixedWorkerShell,
}


def _engine(url: str, schema: str) -> Engine:
    return translated(create_engine(url), schema)


def _async_engine(url: str, schema: str, driver: str, **options: Any) -> AsyncEngine:
    engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"), **options)
    return AsyncEngine(translated(engine.sync_engine, schema))
