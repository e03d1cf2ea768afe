"""What each durable operation means, once for sync and async code.

`attempt` with `branch`, `history` and `calls` is one attempt at a workflow · `workflow`, `step` with `transaction`,
`waiting`, `callback`, `children` and `publishing` are the operations · `outcome` is what they record.

The operations are coroutines that wait only through a `Runtime`. A blocking runtime's coroutines never suspend, so
sync code drives an operation to its end with `run_blocking`; async code awaits it. Only `shielding` knows asyncio.
"""
