"""How long tests take, measured: what begins first when processes share them.

Only the order matters. `pytest --junitxml` measures again; a file that is not here has short tests.
"""

from __future__ import annotations

SECONDS: dict[str, float] = {
    "store/test_state_machine.py": 55,
    "crash/test_kill.py": 32,
    "crash/test_outage.py": 19,
    "crash/test_everywhere.py": 18,
    "examples/test_demo.py": 13,
    "testing/test_plugin.py": 11,
    "cli/test_entry_file.py": 7,
    "crash/test_torture.py": 9,
    "testing/test_crashes.py": 5,
    "acceptance/test_deploy.py": 7,
    "acceptance/test_parallel_programs.py": 6,
    "crash/test_failover.py": 5,
    "crash/test_schedules.py": 5,
    "worker/test_fuzzed_rows.py": 5,
    "crash/test_exhaustion.py": 4,
    "crash/test_blackhole.py": 4,
    "crash/test_children.py": 4,
    "crash/test_connections.py": 4,
    "acceptance/test_approval.py": 4,
    "test_embedded.py": 3,
    "crash/test_poison.py": 3,
    "crash/test_tries.py": 3,
    "test_wheel.py": 2,
    "bench/test_workloads.py": 2,
    "acceptance/test_pgbouncer.py": 2,
    "store/test_growth.py": 2,
    "cli/test_processes.py": 2,
    "crash/test_freeze.py": 2,
    "acceptance/test_compensating_children.py": 2,
    "crash/test_sagas.py": 2,
    "worker/test_counts.py": 2,
    "acceptance/test_timers_beside_calls.py": 2,
    "store/test_continuations.py": 1,
    "migrations/test_repository.py": 1,
    "acceptance/test_loose_ends.py": 1,
    "examples/test_shop.py": 1,
    "store/test_horizon.py": 1,
    "acceptance/test_agent.py": 1,
    "crash/test_streams.py": 1,
    "worker/test_claims.py": 1,
    "acceptance/test_maps.py": 1,
    "cli/test_worker.py": 1,
    "acceptance/test_loop_timers.py": 1,
}
"""Seconds that a test of a file takes on average, for files where that is more than a second."""
