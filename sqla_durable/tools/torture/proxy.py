"""A proxy in front of the server's socket, one for each worker: cuts, delays, swallows and refuses connections.

The server asks for no password at its socket, so a proxy is a socket too, in a directory that only this user can
enter: through a TCP port every user of the machine would be a superuser of the server.
All proxies run on one event loop in a thread of their own; their methods may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

_CHUNK = 65_536
_TIMEOUT = 30.0
_RETRY_AFTER = 0.01


class Proxies:
    """The proxies of one server, and the event loop that they run on.

    ```python
    with Proxies(socket) as proxies:
        proxy = proxies.open()
        ...  # connect with host=proxies.directory, port=proxy.port
        proxy.cut()
    ```

    Args:
        server: the path of the server's Unix socket.

    Attributes:
        directory: where the sockets of the proxies are while the block lasts.
    """

    directory: Path

    def __init__(self, server: Path) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torture proxies", daemon=True)
        self._proxies: list[Proxy] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="sqla-durable-proxies-"))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._proxies:
            each.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def open(self) -> Proxy:
        """Return a new proxy that listens on a socket of its own."""
        proxy = Proxy(self._loop, self._server, directory=self.directory, port=next(self._numbers))
        proxy.listen()
        self._proxies.append(proxy)
        return proxy


class Proxy:
    """One socket through which the server is reached.

    Attributes:
        directory: where its socket is.
        port: the number in the socket's name, which libpq calls a port.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, server: Path, *, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self._loop = loop
        self._server = server
        self._listening: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._delay = 0.0
        self._forwarding = asyncio.Event()
        self._forwarding.set()

    @property
    def path(self) -> Path:
        """Its socket, also while it refuses connections."""
        return self.directory / f".s.PGSQL.{self.port}"

    def listen(self) -> None:
        """Accept connections."""
        self._call(self._listen())

    def refuse(self) -> None:
        """Reset all connections and accept no new ones until `listen`."""
        self._call(self._refuse())

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        self._call(self._cut())

    def delay(self, seconds: float) -> None:
        """Delay every packet by this many seconds from now on, in both directions."""
        self._call(self._set_delay(seconds))

    def swallow(self) -> None:
        """Keep connections open, accept new ones, and forward nothing, not even their ends, until `restore`."""
        self._call(self._swallow())

    def restore(self) -> None:
        """Reset all connections, and forward everything again."""
        self._call(self._restore())

    def close(self) -> None:
        """Reset all connections and stop listening, for good."""
        self._call(self._refuse())

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def _call(self, change: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(change, self._loop).result(_TIMEOUT)

    async def _listen(self) -> None:
        if self._listening is None:
            self.path.unlink(missing_ok=True)  # left by a socket that no longer listens
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(str(self.path))
            self._listening.listen()
            self._listening.setblocking(False)
            self._loop.add_reader(self._listening, self._accept, self._listening)

    def _accept(self, listening: socket.socket) -> None:
        """Accept one connection; not by asyncio's server, which leaks what it accepts while it is being closed."""
        try:
            client, _ = listening.accept()
        except OSError:
            return
        task = self._loop.create_task(self._serve(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refuse(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        await self._cut()

    async def _cut(self) -> None:
        open_tasks = set(self._tasks)
        while open_tasks:  # repeated for a connection that was accepted and whose task has not begun
            for each in self._connections:
                each.reset()
            _, open_tasks = await asyncio.wait(open_tasks, timeout=_RETRY_AFTER)

    async def _set_delay(self, seconds: float) -> None:
        self._delay = seconds

    async def _swallow(self) -> None:
        self._forwarding.clear()

    async def _restore(self) -> None:
        await self._cut()
        self._forwarding.set()

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            await connection.run(self._forward(reader, connection))
        finally:
            self._connections.discard(connection)

    async def _forward(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        """Forward bytes in both directions until either side ends."""
        if not self._forwarding.is_set():
            await asyncio.Event().wait()  # until it is reset: nothing is answered
        try:
            from_server, to_server = await asyncio.open_unix_connection(self._server)
        except OSError:
            return  # no server: the client's connection is reset
        connection.add(to_server)
        ways = [self._pump(reader, to_server), self._pump(from_server, connection.client)]
        tasks = [asyncio.ensure_future(each) for each in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK):
                if not self._forwarding.is_set():
                    continue
                if self._delay:
                    await asyncio.sleep(self._delay)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        if not self._forwarding.is_set():
            await asyncio.Event().wait()  # the other side does not see the end


class _Connection:
    """The connection of a client, and the connection to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self._writers = [client]
        self._task: asyncio.Future[None] | None = None

    def add(self, writer: asyncio.StreamWriter) -> None:
        """Close this writer too when the connection ends."""
        self._writers.append(writer)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run until done or reset, then close both sides at once."""
        self._task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([self._task])
        finally:
            self._task.cancel()
            for each in self._writers:
                each.transport.abort()

    def reset(self) -> None:
        """End the connection now, whatever is being forwarded."""
        if self._task is not None:
            self._task.cancel()
