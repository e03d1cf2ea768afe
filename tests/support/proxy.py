"""A TCP proxy in front of the server: cut, it refuses; silent, it takes what is sent and forwards nothing."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from sqlalchemy import make_url


class Way:
    """Whether bytes pass; each connection keeps the way that was there when it was made.

    Attributes:
        passable: set while bytes are forwarded.
    """

    def __init__(self) -> None:
        self.passable = threading.Event()
        self.passable.set()


class Proxy:
    """Forwards TCP to the server of a URL, from a port of its own.

    Attributes:
        url: the database's URL through the proxy.
    """

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self.lead_to(url)
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._way = Way()
        self.open()
        self.url: str = target.set(host="127.0.0.1", port=self.port, query={}).render_as_string(hide_password=False)

    def lead_to(self, url: str) -> None:
        """Forward new connections to the server of this URL; those that there are stay where they are."""
        target = make_url(url)
        self._path = f"{target.query.get('host', target.host)}"
        self._port = target.port or 5432

    def open(self) -> None:
        """Listen, at the same port as before."""
        listener = socket.create_server(("127.0.0.1", getattr(self, "port", 0)))
        self.port: int = listener.getsockname()[1]
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
