"""Tools for the tests of an application: crashes at every point, moving the time, and replays of recorded histories.

No test framework is needed: `crash_everywhere` is a function that raises an `AssertionError`, `replay` returns a
report, and `advance` lets workflows that wait for two weeks go on at once.

A name is imported when it is first used, so that pytest can load `plugin` at its start and import no database for that.
"""

from importlib import import_module as _import_module

_NAMES = {
    "crash_points": "CrashPoint Moment",
    "crashes": "CrashReport crash_everywhere",
    "databases": "advance",
    "end_states": "CrashDifference CrashTestError CrashTimeoutError EndState",
    "replays": "History ReplayReport export replay",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll] (the .pyi is read instead)


def __getattr__(name: str) -> object:
    """Import a name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
