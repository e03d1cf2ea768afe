"""A small shop, as a real application would be written with sqla-durable.

`models` its tables · `invoices` what comes in · `importer` turns that into orders and starts their workflows ·
`orders`, `returns` the workflows · `rules` what an order must be · `payments` the client of an external service.
`demo` runs all of it and kills its workers. Start a worker with `python -m sqla_durable worker shop:durable`.
"""

from shop.database import durable
from shop.orders import call_off, fulfil
from shop.returns import take_back

__all__ = ["call_off", "durable", "fulfil", "take_back"]
