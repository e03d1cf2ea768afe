"""What each durable operation means, once for sync and async code.

The operations are coroutines that wait only through a `Runtime`. A blocking runtime's coroutines never suspend, so
sync code drives an operation to its end with `run_blocking`; async code awaits it. Nothing here knows asyncio.
"""
