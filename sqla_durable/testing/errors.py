"""The errors of the crash test.

```
AssertionError
└── CrashDifference           a crash changed how a workflow ends (in `states`)
DurableError
└── CrashTestError            the test cannot be carried out as it was given
    └── CrashTimeoutError         (also TimeoutError) a workflow did not end in time
```
"""

from __future__ import annotations

from sqla_durable.errors import DurableError


class CrashTestError(DurableError):
    """The test cannot be carried out as it was given: its message says what to change."""


class CrashTimeoutError(CrashTestError, TimeoutError):
    """A workflow did not end in time, undisturbed or after its takeover."""
