"""OpenTelemetry for workflows: `Telemetry`, an interceptor with spans and metrics, and `observe`, the gauges.

Both need the extra: `pip install 'sqla-durable[telemetry]'`. A name is imported when it is first used, so that what
needs no OpenTelemetry, the command `sqla-durable metrics`, works without it.
"""

from importlib import import_module as _import_module

_MODULE_OF = {"Telemetry": "interceptor", "observe": "observing"}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll] (the .pyi is read instead)


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(_import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise ImportError(
            f"{__name__}.{name} needs OpenTelemetry: pip install 'sqla-durable[telemetry]' opentelemetry-sdk."
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
