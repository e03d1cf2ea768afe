"""The client of the payment service: an external system, so whatever it does cannot be rolled back.

Each request carries the idempotency key of the step that makes it. The service does the same thing once, however
often it is asked: after an answer that was lost, and after a worker that died in the middle of the call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPException
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from shop.settings import payments_url
from sqla_durable import current_step

TIMEOUT = 5.0


class PaymentUnavailable(Exception):
    """The service did not answer, so nobody knows whether it did what was asked: ask again."""


class PaymentRefused(Exception):
    """The service refuses; asking again does not help."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the service answers: its own reference of the booking."""

    reference: str
    pence: int


def book(kind: Literal["charges", "refunds"], number: str, pence: int) -> Receipt:
    """Charge or refund an order. Call it in a step.

    Raises:
        PaymentUnavailable: it may have been booked or not.
        PaymentRefused: it was not.
    """
    return _ask(kind, {"order": number, "pence": pence})


def void(number: str) -> Receipt:
    """Give back what was charged for an order, which may be nothing, and let nothing be charged for it any more.

    So it does not matter whether a charge was made, is being made, or is still to come from a worker that was slow.

    Raises:
        PaymentUnavailable: it may have been done or not.
    """
    return _ask("voids", {"order": number})


def _ask(path: str, body: dict[str, str | int]) -> Receipt:
    request = Request(
        f"{payments_url()}/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": _idempotency_key()},
    )
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            return Receipt(**json.load(response))
    except HTTPError as error:
        with error:
            kind_of_error = PaymentUnavailable if error.code >= 500 else PaymentRefused
            raise kind_of_error(f"{error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise PaymentUnavailable(f"no answer: {error!r}") from error


def _idempotency_key() -> str:
    return current_step().idempotency_key
