"""The two runtimes in which durable code is executed: blocking and asyncio, and the ambient context in both."""
