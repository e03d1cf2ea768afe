"""What type checkers read of `sqla_durable.testing`; `__init__.py` imports the same names when they are used."""

from sqla_durable.testing.crash_points import CrashPoint, Moment
from sqla_durable.testing.crashes import CrashReport, crash_everywhere
from sqla_durable.testing.databases import advance
from sqla_durable.testing.end_states import CrashDifference, CrashTestError, CrashTimeoutError, EndState
from sqla_durable.testing.replays import History, ReplayReport, export, replay

__all__ = [
    "CrashDifference",
    "CrashPoint",
    "CrashReport",
    "CrashTestError",
    "CrashTimeoutError",
    "EndState",
    "History",
    "Moment",
    "ReplayReport",
    "advance",
    "crash_everywhere",
    "export",
    "replay",
]
