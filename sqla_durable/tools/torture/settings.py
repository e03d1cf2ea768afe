"""What a worker of the torture is given: short leases, and connections enough."""

from __future__ import annotations

CONCURRENCY = 12
LEASE, POLL, GRACE = 1.5, 0.1, 10.0
MAX_ATTEMPTS = 32_767
"""So many: here workers die all the time, and no workflow is to fail for it."""

POOL, OUTSIDE = 8, 3
CONNECTIONS = 2 * (POOL + OUTSIDE)
"""How many connections a worker opens at most."""
