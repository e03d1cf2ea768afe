"""What tests of an application need to prove that its workflows survive: the crash at every point, and the next deploy.

Needs no test framework: `crash_everywhere` is an ordinary function that raises an `AssertionError`, and `replay` one
that gives a report.
"""

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
    "crash_everywhere",
    "export",
    "replay",
]
