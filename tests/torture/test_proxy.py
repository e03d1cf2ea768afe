"""The proxy, before an echo on a Unix socket: what it lets through, and what it does not."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from sqla_durable.tools.torture.proxy import Proxies, Proxy
from tests.store.races import wait_until


@pytest.fixture
def echo(tmp_path: Path) -> Generator[Path]:
    """A server that sends back what it gets."""
    path = tmp_path / "echo"
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        listening.listen()
        threading.Thread(target=serve, args=[listening], daemon=True).start()
        yield path
        listening.shutdown(socket.SHUT_RDWR)


def serve(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=send_back, args=[connection], daemon=True).start()


def send_back(connection: socket.socket) -> None:
    with closing(connection):
        while data := connection.recv(1000):
            connection.sendall(data)


@pytest.fixture
def proxy(echo: Path) -> Generator[Proxy]:
    with Proxies(echo) as proxies:
        yield proxies.open()


def connect(proxy: Proxy, *, timeout: float = 10.0) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout)
    try:
        connection.connect(str(proxy.path))
    except OSError:
        connection.close()
        raise
    return connection


def answer(connection: socket.socket, data: bytes = b"hello") -> bytes:
    connection.sendall(data)
    return connection.recv(1000)


def is_lost(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_bytes_pass_in_both_directions_and_ends_are_handed_on(proxy: Proxy) -> None:
    with closing(connect(proxy)) as connection:
        assert answer(connection) == b"hello"
        assert proxy.connections == 1
    wait_until(lambda: proxy.connections == 0, what="the end being handed on")


def test_cut_resets_what_is_open_and_accepts_what_is_new(proxy: Proxy) -> None:
    with closing(connect(proxy)) as one, closing(connect(proxy)) as other:
        assert (answer(one), answer(other)) == (b"hello", b"hello")
        proxy.cut()
        assert is_lost(one)
        assert is_lost(other)
    with closing(connect(proxy)) as connection:
        assert answer(connection) == b"hello"


def test_refusing_resets_and_lets_nobody_in_until_it_listens_again_at_the_same_path(proxy: Proxy) -> None:
    path = proxy.path
    with closing(connect(proxy)) as connection:
        assert answer(connection) == b"hello"
        proxy.refuse()
        assert is_lost(connection)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.listen()
    assert proxy.path == path
    with closing(connect(proxy)) as connection:
        assert answer(connection) == b"hello"


def test_delay_holds_every_packet_up(proxy: Proxy) -> None:
    with closing(connect(proxy)) as connection:
        answer(connection)
        proxy.delay(0.1)
        began = time.monotonic()
        assert answer(connection) == b"hello"
        assert time.monotonic() - began >= 0.2  # there and back
        proxy.delay(0.0)
        assert answer(connection) == b"hello"


def test_black_hole_answers_nothing_not_even_an_end_and_then_resets(proxy: Proxy) -> None:
    with closing(connect(proxy)) as before:
        answer(before)
        proxy.swallow()
        with closing(connect(proxy)) as since:
            for each in (before, since):
                each.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    answer(each)
                each.settimeout(10)
            proxy.restore()
            assert is_lost(before)
            assert is_lost(since)
    with closing(connect(proxy)) as connection:
        assert answer(connection) == b"hello"


def test_no_server_is_a_lost_connection(tmp_path: Path) -> None:
    with Proxies(tmp_path / "nobody") as proxies, closing(connect(proxies.open())) as connection:
        assert is_lost(connection)


def test_only_this_user_can_enter_the_directory_of_the_proxies_and_it_is_gone_afterwards(echo: Path) -> None:
    with Proxies(echo) as proxies:
        proxies.open()
        assert stat.S_IMODE(proxies.directory.stat().st_mode) == 0o700
    assert not proxies.directory.exists()
