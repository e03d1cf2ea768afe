"""What type checkers read of `sqla_durable.telemetry`; `__init__.py` imports the same names when they are used."""

from sqla_durable.telemetry.interceptor import Telemetry
from sqla_durable.telemetry.observing import observe

__all__ = ["Telemetry", "observe"]
