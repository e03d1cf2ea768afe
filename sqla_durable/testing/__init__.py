"""What tests of an application need: the crash at every point, to prove that its workflows survive, and a clock.

Needs no test framework: `crash_everywhere` is an ordinary function that raises an `AssertionError`; `advance` lets
workflows wait for two weeks in an instant.
"""

from sqla_durable.testing.clock import advance
from sqla_durable.testing.errors import CrashTestError, CrashTimeoutError
from sqla_durable.testing.everywhere import CrashReport, crash_everywhere
from sqla_durable.testing.points import CrashPoint, Moment
from sqla_durable.testing.states import CrashDifference, EndState

__all__ = [
    "CrashDifference",
    "CrashPoint",
    "CrashReport",
    "CrashTestError",
    "CrashTimeoutError",
    "EndState",
    "Moment",
    "advance",
    "crash_everywhere",
]
