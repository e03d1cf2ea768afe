"""What tests of an application need to prove that its workflows survive: the crash at every point.

Needs no test framework: `crash_everywhere` is an ordinary function that raises an `AssertionError`.
"""

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
    "crash_everywhere",
]
