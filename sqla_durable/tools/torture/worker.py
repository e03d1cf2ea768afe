"""A worker of the bank as a process of its own: `python -m sqla_durable.tools.torture.worker --url ... --name ...`.

Its connections are checked by nobody before they are used (no `pool_pre_ping`): whatever becomes of them, the engine
meets it in the middle of its work.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable.execution.worker import Worker
from sqla_durable.tools.torture import bank
from sqla_durable.tools.torture.settings import CONCURRENCY, GRACE, LEASE, MAX_ATTEMPTS, OUTSIDE, POLL, POOL


def main() -> None:
    """Run one worker until SIGTERM."""
    given = _arguments()
    signal.signal(signal.SIGTERM, _leave)  # until the worker itself listens
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(threadName)s %(message)s")
    bank.introduce(given.name)
    connect: dict[str, Any] = {"application_name": given.name, "connect_timeout": 5}
    if given.guarded:
        connect["options"] = f"-c idle_in_transaction_session_timeout={LEASE * 1000:.0f}"
    settings: dict[str, Any] = {"max_overflow": 0, "connect_args": connect, "pool_timeout": 300}
    engine = create_engine(given.url, pool_size=POOL, **settings)
    async_engine = create_async_engine(given.url, pool_size=POOL, **settings)
    outside = create_engine(given.url, pool_size=OUTSIDE, isolation_level="AUTOCOMMIT", **settings)
    async_outside: AsyncEngine = create_async_engine(
        given.url, pool_size=OUTSIDE, isolation_level="AUTOCOMMIT", **settings
    )
    bank.outside.configure(bind=outside)
    bank.async_outside.configure(bind=async_outside)
    Worker(
        bank.durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(async_engine),
        concurrency=CONCURRENCY,
        lease=timedelta(seconds=LEASE),
        poll_interval=timedelta(seconds=POLL),
        grace=timedelta(seconds=GRACE),
        max_attempts=MAX_ATTEMPTS,
        name=given.name,
    ).run()


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sqla_durable.tools.torture.worker", description=__doc__)
    parser.add_argument("--url", required=True, help="the database, by way of this worker's own proxy")
    parser.add_argument("--name", required=True, help="its name, in the worker table and as application_name")
    parser.add_argument("--guarded", action="store_true", help="let the server end transactions idle for a lease")
    return parser.parse_args()


if __name__ == "__main__":
    main()
