"""What tests of an application need: the crash at every point, a clock, and the next deploy on today's histories.

Needs no test framework: `crash_everywhere` is an ordinary function that raises an `AssertionError`, `replay` one that
gives a report; `advance` lets workflows wait for two weeks in an instant.
"""

from sqla_durable.testing.clock import advance
from sqla_durable.testing.errors import CrashTestError, CrashTimeoutError
from sqla_durable.testing.everywhere import CrashReport, crash_everywhere
from sqla_durable.testing.points import CrashPoint, Moment
from sqla_durable.testing.replays import History, ReplayReport, export, replay
from sqla_durable.testing.states import CrashDifference, EndState

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
