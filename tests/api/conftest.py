"""Fixtures of the tests of hints: engines that are made as a test wants them, and are disposed of."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine

from tests.api.notifying import Make
from tests.support.databases import translated


@pytest.fixture
def make(direct_url: str) -> Generator[Make]:
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(create_engine(direct_url, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


@pytest.fixture
def own(make: Make, durable_schema: str) -> Engine:
    return translated(make(), durable_schema)
