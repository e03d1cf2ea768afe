"""How an error becomes a message and an exit code.

Exit codes: 0 done, 1 failed, 2 the command line is wrong, 130 interrupted. Those of `doctor`, which has done what it
does: 0 nothing is wrong, 3 the worst finding is a warning, 4 it is an error.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from sqla_durable.errors import ArgumentError, DurableError

DONE, FAILED, WRONG_COMMAND, INTERRUPTED = 0, 1, 2, 130
FOUND_WARNINGS, FOUND_ERRORS = 3, 4


class CommandError(DurableError):
    """The command line is wrong, for example a name or a URL; the message is all that its user sees."""


def fail(error: Exception) -> NoReturn:
    """Print one paragraph to stderr and exit; raise an error that is not one of a command.

    The message of a database's error is the driver's, without the statement and its parameters, which may hold secrets.
    """
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from sqla_durable.definitions.database_errors import is_outage
    from sqla_durable.definitions.log import one_line
    from sqla_durable.definitions.redaction import driver_message, message_of, notes_of

    match error:
        case CommandError() | ArgumentError():
            message, code = str(error), WRONG_COMMAND
        case DurableError():
            message, code = str(error), FAILED
        case SQLAlchemyError():
            reason = driver_message(error.orig) if isinstance(error, DBAPIError) and error.orig else message_of(error)
            what = "the database cannot be reached" if is_outage(error) else "the database refused"
            message, code = ". ".join([f"{what}: {reason}", *notes_of(error)]), FAILED
        case _:
            raise error
    paragraph = one_line(" ".join(message.split()), limit=10_000)
    print(f"sqla-durable: {paragraph}", file=sys.stderr)
    sys.exit(code)
