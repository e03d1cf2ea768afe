"""Durable workflows and queues as a SQLAlchemy extension: PostgreSQL is the orchestrator.

The records `Workflow`, `Step` and `Queue` are ORM models in your own database (with `models.Worker`, the record of a
worker's lease); `Durable` makes functions durable; `Worker` and `Executor` execute them. Functions for `async def` code
are in `sqla_durable.asyncio`, and what operators do is in `manage`.

A name is imported when it is first used, so that `import sqla_durable` itself imports nothing. What type checkers read
is `__init__.pyi`; tests/test_exports.py proves that both say the same.
"""

from importlib import import_module as _import_module

_NAMES = {
    "api.blobs": "BlobReader BlobWriter create_blob open_blob",
    "api.callbacks": "Callback complete_callback create_callback fail_callback heartbeat_callback",
    "api.children": "Child as_completed map_children start_child wait_first",
    "api.durable": "Durable",
    "api.events": "get_event set_event wait_event",
    "api.parallel": "parallel",
    "api.polling": "Handle",
    "api.replay": "current_time deprecate_patch new_uuid patched random_number sleep sleep_until step_scope",
    "api.saga": "Saga",
    "api.signals": "send_signal start_with_signal wait_signal",
    "api.steps": "RunningStep StepFunction TransactionalStep heartbeat run_step running_steps",
    "api.streams": "StreamEntry close_stream read_stream write_stream",
    "api.update_requests": "UpdateRequest wait_update",
    "api.tags": "set_tags",
    "api.updates": "UpdateHandle send_update start_with_update update_handle",
    "api.options": "StartOptions",
    "api.workflows": "BoundWorkflow WorkflowFunction start_many",
    "definitions.blobs": "Blob",
    "definitions.failure": "is_recorded_error",
    "definitions.interceptors": "Execution Interceptor Start StepExecution",
    "definitions.payloads": "Encryption PayloadCodec Zstandard",
    "definitions.schedules": "Tick",
    "execution.executor": "Executor",
    "execution.worker.worker": "Worker",
    "models": "Event Queue Schedule Signal Step StreamItem Workflow metadata storage",
    "models.base": "StepStatus WorkflowStatus",
    "runtime.context": "WorkflowLogFilter current current_step",
}
_MODULES = ("errors", "manage", "migrations", "models", "unwinding")
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_MODULE_OF, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll] (the .pyi is read instead)


def __getattr__(name: str) -> object:
    """Import a name when it is first used; the version is that of the installed package."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("sqla-durable")
    elif name in _MODULES:
        return _import_module(f"sqla_durable.{name}")
    elif name in _MODULE_OF:
        value = getattr(_import_module(f"sqla_durable.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
