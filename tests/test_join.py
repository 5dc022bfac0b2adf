"""Joined connections: bytes pass unchanged, slow readers hold the sender up, ends are passed on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from typing import Iterator

import pytest

import envkernel


class Hop:
    """A `relay` between two socket pairs, served by a thread of its own; near and far are its outer ends."""

    def __init__(self) -> None:
        self.near, self.left = socket.socketpair()
        self.right, self.far = socket.socketpair()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self.thread.start()
        assert self.ready.wait(5)

    async def serve(self) -> None:
        for sock in (self.left, self.right):
            sock.setblocking(False)
        self.ready.set()
        await envkernel.relay(self.left, self.right)

    def has_ended(self) -> bool:
        self.thread.join(5)
        return not self.thread.is_alive()


@pytest.fixture
def hop() -> Iterator[Hop]:
    between = Hop()
    with contextlib.closing(between.near), contextlib.closing(between.far):
        yield between


def read_all(sock: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        parts.append(sock.recv(min(count, 1 << 16)))
        if not parts[-1]:
            break
        count -= len(parts[-1])
    return b"".join(parts)


def test_bytes_pass_unchanged_both_ways(hop: Hop) -> None:
    data = random.Random(1).randbytes(5_000_000)
    for source, target in ((hop.near, hop.far), (hop.far, hop.near)):
        sender = threading.Thread(target=source.sendall, args=(data,))
        sender.start()
        assert read_all(target, len(data)) == data
        sender.join()
    hop.near.close()
    assert hop.far.recv(1) == b""
    hop.far.close()
    assert hop.has_ended()


def test_slow_reader_holds_the_sender_up(hop: Hop) -> None:
    hop.near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        hop.near.sendall(bytes(50_000_000))
    hop.far.close()
    hop.near.close()
    assert hop.has_ended()


def test_what_was_sent_before_the_end_arrives(hop: Hop, caplog: pytest.LogCaptureFixture) -> None:
    hop.near.sendall(b"question")
    assert read_all(hop.far, 8) == b"question"
    hop.far.sendall(b"answer")
    hop.far.close()
    assert read_all(hop.near, 7) == b"answer"
    assert hop.near.recv(1) == b""
    assert hop.has_ended()
    assert not caplog.records, "asyncio misses no method of its protocols"
