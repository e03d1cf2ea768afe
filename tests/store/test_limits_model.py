"""Random histories of queues with limits: no limit is exceeded, and nothing waits that could go.

`SQLA_DURABLE_EXAMPLES=2000` executes more histories.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from random import Random

import pytest
from sqlalchemy import Engine, create_engine

from tests.store.crowds import Crowd

EXAMPLES = os.environ.get("SQLA_DURABLE_EXAMPLES")


@pytest.fixture
def planned_once(database_url: str) -> Generator[Engine]:
    """Plans its statements once for each connection: that takes ten times as long as to execute a claim."""
    given = {"prepare_threshold": 0, "options": "-c plan_cache_mode=force_generic_plan"}
    engine = create_engine(database_url, connect_args=given)
    yield engine
    engine.dispose()


# behaviour: Q2 Q3 Q5
def test_no_history_exceeds_a_limit_or_leaves_anything_waiting(planned_once: Engine, thorough: bool) -> None:
    histories = int(EXAMPLES or (150 if thorough else 8))
    claims = taken = 0
    for seed in range(histories):
        crowd = Crowd(planned_once, Random(seed))
        try:
            crowd.live(60, first=2 * seed)
            crowd.finish_all()
        except BaseException as error:
            error.add_note(f"the history of seed {seed}")
            raise
        finally:
            crowd.close()
        claims += crowd.claims
        taken += crowd.taken
    assert claims > 10 * histories
    assert taken > 20 * histories
