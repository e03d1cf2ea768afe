"""How often the loops of a worker poll, pause and try again, in seconds unless it says otherwise."""

from __future__ import annotations

BEATS = 3
"""How often a worker beats in a lease."""

COMPARE_ALL_EVERY = 10
"""Beats, of which one looks for claimed workflows that this worker does not know of."""

HINT_SPACING = 0.01
"""Between two hints that the heartbeat follows: many cancels are one comparison."""

CLAIM_SPACING = 0.005
"""Between two hints that claims follow: many of them are one claim."""

CLAIM_PAUSES = (0.01, 0.05, 0.25)
"""Between claims after the last one that found something."""

SHORTEST_POLL = 0.01
"""Between two polls of the maintenance, however many timers there are."""

RECLAIM_EVERY = 10
"""Beats between two reclaims; what is seen to be abandoned is reclaimed at once."""

WARN_EVERY = 60.0
"""Between two warnings about what waits and is not claimed here."""

FORGET_EVERY = 3_600.0
"""Between two deletions of the rows of dead workers."""

RENOTIFY_EVERY = 60.0
"""Between two repairs of notices that are missing."""

ROW_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Between two tries to write a row that another transaction locks."""

EXECUTING_CHECK = 0.05
"""Between two checks whether a step in a thread has ended."""

MISMATCH_PAUSE = 60.0
"""Until a strict workflow whose history does not fit the code is tried again."""

CLEANUP_TIME = 10.0
"""Until an attempt that was cancelled, and has not ended, is cancelled again."""

CANCELLED_GRACE = 2.0
"""For async attempts to be released after they were cancelled."""

LAST_GRACE = 5.0
"""After the grace, in which the database must be reached to leave in good order."""
