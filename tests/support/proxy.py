"""A proxy in front of the server: cut, it refuses; silent, it takes what is sent and forwards nothing.

It is a socket in a directory of this user's alone: behind it is a superuser who needs no password.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path

from sqlalchemy import URL, make_url

_PORT = 5432


class Way:
    """Whether bytes pass; each connection keeps the way that was there when it was made.

    Attributes:
        passable: set while bytes are forwarded.
    """

    def __init__(self) -> None:
        self.passable = threading.Event()
        self.passable.set()


class Proxy:
    """Forwards to the server of a URL, from a socket of its own.

    Attributes:
        url: the database's URL through the proxy.
    """

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._way = Way()
        self._directory = Path(tempfile.mkdtemp(prefix="sqla-durable-proxy-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self.open()
        self.url: str = at_socket(make_url(url), self._directory, _PORT).render_as_string(hide_password=False)

    def lead_to(self, url: str) -> None:
        """Forward new connections to the server of this URL; those that there are stay where they are."""
        target = make_url(url)
        self._path = f"{target.query.get('host', target.host)}"
        self._port = target.port or 5432

    def open(self) -> None:
        """Listen, at the same path as before."""
        path = self._directory / f".s.PGSQL.{_PORT}"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.end_connections()

    def end_connections(self) -> None:
        """End all connections; new ones are accepted."""
        for each in self._open:
            with _ignored():
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def silence(self) -> None:
        """Accept connections and bytes from now on, and forward nothing."""
        self._way.passable.clear()

    def resume(self) -> None:
        """Forward what has gathered, and what comes."""
        self._way.passable.set()

    def forget(self) -> None:
        """Leave the connections that there are in silence for ever; new ones are forwarded.

        As a firewall does that has lost its table of connections, or a server whose machine is gone.
        """
        self._way.passable.clear()
        self._way = Way()

    def _accept(self, listener: socket.socket) -> None:
        with _ignored():
            while True:
                self._begin(listener.accept()[0])

    def _begin(self, client: socket.socket) -> None:
        try:
            server = self._connect()
        except OSError:
            client.close()
            return
        self._open += [client, server]
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=_forward, args=(source, sink, self._way), daemon=True).start()

    def _connect(self) -> socket.socket:
        if not self._path.startswith("/"):
            return socket.create_connection((self._path, self._port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{self._path}/.s.PGSQL.{self._port}")
        return server


def at_socket(url: URL, directory: Path, port: int) -> URL:
    """Return a database's URL with the socket of this directory and number instead of its server."""
    query = {"host": str(directory)}
    return URL.create(url.drivername, url.username, url.password, port=port, database=url.database, query=query)


def _ignored() -> suppress:
    return suppress(OSError)


def _forward(source: socket.socket, sink: socket.socket, way: Way) -> None:
    with _ignored():
        while data := source.recv(65_536):
            way.passable.wait()
            sink.sendall(data)
    for each in (source, sink):
        with _ignored():
            each.shutdown(socket.SHUT_RDWR)
        each.close()
