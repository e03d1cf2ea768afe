"""Tools for the tests of an application: crashes at every point, moving the time, and replays of recorded histories.

No test framework is needed: `crash_everywhere` is a function that raises an `AssertionError`, `replay` returns a
report, and `advance` lets workflows that wait for two weeks go on at once.
"""

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
