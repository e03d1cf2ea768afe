"""The payment service: another company's system, in a process of its own, with a ledger of its own.

`python -m shop.payment_service` prints its address and serves until SIGTERM. It remembers idempotency keys: the same
request under a known key is answered with the first booking, a different one is refused. Now and then it fails, as
such systems do: before it books (503), or after, so that the answer is lost. What is voided is given back, and cannot
be charged afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class Booking:
    """One movement of money."""

    kind: str
    order: str
    pence: int
    reference: str


class Ledger:
    """All bookings by their idempotency keys, and how often what happened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bookings: dict[str, Booking] = {}
        self._voided: set[str] = set()
        self.counts = Counter[str]()

    def take(self, kind: str, key: str, asked: dict[str, Any]) -> Booking | None:
        """Do what a request asks for, once for each key; None: it is refused."""
        if kind == "voids":
            return self.void(key, asked["order"])
        return self.book(kind, key, asked["order"], asked["pence"])

    def book(self, kind: str, key: str, order: str, pence: int) -> Booking | None:
        """Book, or give what was booked under the key; None if that was something else, or the order is voided."""
        with self._lock:
            if key not in self._bookings and kind == "charges" and order in self._voided:
                return None
            booking = self._once(kind, key, order, pence)
            return booking if (booking.kind, booking.order, booking.pence) == (kind, order, pence) else None

    def void(self, key: str, order: str) -> Booking:
        """Give back what was charged for an order, and charge nothing for it from now on."""
        with self._lock:
            self._voided.add(order)
            of_order = [each for each in self._bookings.values() if each.order == order]
            pence = sum(each.pence for each in of_order if each.kind == "charges")
            return self._once("refunds" if pence else "voids", key, order, pence)

    def _once(self, kind: str, key: str, order: str, pence: int) -> Booking:
        if (known := self._bookings.get(key)) is not None:
            self.counts["repeated"] += 1
            return known
        booking = Booking(kind, order, pence, f"{kind[:2]}_{len(self._bookings) + 1:05}")
        return self._bookings.setdefault(key, booking)

    def as_json(self) -> dict[str, Any]:
        """Give everything."""
        with self._lock:
            return {"bookings": [asdict(each) for each in self._bookings.values()], "counts": dict(self.counts)}


class Service(ThreadingHTTPServer):
    """Serves one ledger; a share `unreliability` of requests fails before booking, and as many after."""

    request_queue_size = 128

    def __init__(self, port: int, *, unreliability: float, seed: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.ledger = Ledger()
        self._unreliability = unreliability
        self._random = random.Random(seed)

    def fails(self) -> bool:
        """Throw the dice."""
        return self._random.random() < self._unreliability


class Handler(BaseHTTPRequestHandler):
    """`POST /charges`, `POST /refunds`, `POST /voids`, `GET /ledger`."""

    @property
    def service(self) -> Service:
        assert isinstance(self.server, Service)
        return self.server

    def do_GET(self) -> None:
        if self.path == "/ledger":
            self._answer(200, self.service.ledger.as_json())
        else:
            self._answer(404, {"error": "there is only /ledger"})

    def do_POST(self) -> None:
        ledger, kind, key = self.service.ledger, self.path.strip("/"), self.headers.get("Idempotency-Key")
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        ledger.counts["requests"] += 1
        if kind not in ("charges", "refunds", "voids") or not key:
            self._answer(400, {"error": "POST to /charges, /refunds or /voids, with an Idempotency-Key"})
        elif self.service.fails():
            ledger.counts["unavailable"] += 1
            self._answer(503, {"error": "come back later"})
        elif (booking := ledger.take(kind, key, asked)) is None:
            self._answer(409, {"error": "this key was used for another request, or the order is voided"})
        elif self.service.fails():
            ledger.counts["answers lost"] += 1
            self.close_connection = True  # booked, and not a byte of answer
        else:
            self._answer(200, {"reference": booking.reference, "pence": booking.pence})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class calls it so)
        """Be quiet."""

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        with suppress(ConnectionError):  # who asked was killed meanwhile
            self.end_headers()
            self.wfile.write(text)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="shop.payment_service", description="A payment service that fails at times.")
    parser.add_argument("--port", type=int, default=8700, help="0 lets the system choose")
    parser.add_argument("--unreliability", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with Service(options.port, unreliability=options.unreliability, seed=options.seed) as service:

        def stop(_number: int, _frame: FrameType | None) -> None:
            threading.Thread(target=service.shutdown).start()  # shutdown waits for the loop that this interrupts

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print(f"http://127.0.0.1:{service.server_port}", flush=True)
        service.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
