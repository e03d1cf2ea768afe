"""What the shop reads from its environment."""

from __future__ import annotations

import os
import sys

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError


def database_url() -> URL:
    """Give `DATABASE_URL`, whatever its prefix, with the driver psycopg.

    Raises:
        SystemExit: it is not a URL. The message does not show it: it may hold a password.
    """
    try:
        url = make_url(os.environ.get("DATABASE_URL", "postgresql:///shop"))
    except (ArgumentError, ValueError):  # ValueError: the port is not a number
        sys.exit("shop: DATABASE_URL cannot be read: write postgresql://user:password@host:5432/name.")
    return url.set(drivername="postgresql+psycopg")


def payments_url() -> str:
    """Give the address of the payment service."""
    return os.environ.get("PAYMENTS_URL", "http://127.0.0.1:8700")
