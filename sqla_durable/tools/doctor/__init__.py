"""The examination of a database: what is wrong with our tables, their server, and what stands still in them."""

from sqla_durable.tools.doctor.examination import examine
from sqla_durable.tools.doctor.findings import Code, Examined, Finding, Severity

__all__ = ["Code", "Examined", "Finding", "Severity", "examine"]
