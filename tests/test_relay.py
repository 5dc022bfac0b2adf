"""The relay's pump: bytes pass unchanged, slow readers hold the sender up, ends are passed on."""

from __future__ import annotations

import random
import socket
import threading
from typing import Any

import pytest

import envkernel


class Hop:
    """A `Pair` between two socket pairs, served by a thread of its own."""

    def __init__(self) -> None:
        self.near, left = socket.socketpair()
        right, self.far = socket.socketpair()
        self.loop = envkernel.Loop()
        self.pair = envkernel.Pair(self.loop, left, right, self.loop.stop)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()


def read_all(sock: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        parts.append(sock.recv(min(count, 1 << 16)))
        if not parts[-1]:
            break
        count -= len(parts[-1])
    return b"".join(parts)


def test_bytes_pass_unchanged_both_ways() -> None:
    hop = Hop()
    data = random.Random(1).randbytes(5_000_000)
    for source, target in ((hop.near, hop.far), (hop.far, hop.near)):
        sender = threading.Thread(target=source.sendall, args=(data,))
        sender.start()
        assert read_all(target, len(data)) == data
        sender.join()
    hop.near.close()
    assert hop.far.recv(1) == b""
    hop.far.close()
    hop.thread.join(5)
    assert not hop.thread.is_alive()
    assert not hop.loop.calls


def test_slow_reader_holds_the_sender_up() -> None:
    hop = Hop()
    hop.near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        hop.near.sendall(bytes(50_000_000))
    assert sum(len(rest) for rest in hop.pair.rest.values()) <= envkernel.BUFFER
    hop.near.close()
    hop.far.close()
    hop.thread.join(5)
    assert not hop.thread.is_alive()


def test_half_close_is_passed_on_and_answers_still_come() -> None:
    hop = Hop()
    hop.near.sendall(b"question")
    hop.near.shutdown(socket.SHUT_WR)
    assert read_all(hop.far, 9) == b"question"
    hop.far.sendall(b"answer")
    hop.far.close()
    assert read_all(hop.near, 7) == b"answer"
    hop.near.close()
    hop.thread.join(5)
    assert not hop.thread.is_alive()


def connection(ports: list[int]) -> dict[str, Any]:
    names = [name + "_port" for name in envkernel.STREAMS]
    return {"ip": "127.0.0.1", "transport": "tcp", **dict(zip(names, ports))}


def free_ports(count: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def test_clients_are_held_until_the_kernel_is_there() -> None:
    ports = free_ports(5)
    loop = envkernel.Loop()
    joined: list[tuple[int, Any]] = []

    def connect(number: int, client: Any) -> None:
        joined.append((number, client))
        if len(joined) == 2:
            loop.stop()

    relay = envkernel.Relay(loop, connection(ports), connect)
    patient = socket.create_connection(("127.0.0.1", ports[3]))
    hasty = socket.create_connection(("127.0.0.1", ports[0]))
    loop.after(0.1, loop.stop)
    loop.run()
    hasty.close()
    loop.after(0.1, loop.stop)
    loop.run()
    assert joined == []
    relay.ready()
    later = socket.create_connection(("127.0.0.1", ports[1]))
    loop.run()
    assert [number for number, _ in joined] == [3, 1]
    relay.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]))
    for sock in (patient, later, *(client for _, client in joined)):
        sock.close()


def test_port_that_is_taken_is_an_error_with_a_hint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [*free_ports(4), taken.getsockname()[1]]
        with pytest.raises(envkernel.UserError, match="can't be opened") as caught:
            envkernel.Relay(envkernel.Loop(), connection(ports), lambda number, client: None)
    assert "ss -ltnp" in caught.value.hint
