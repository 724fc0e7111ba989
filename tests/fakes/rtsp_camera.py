"""Fake camera on loopback: the part of RTSP (RFC 2326) that players need, with MPEG-TS in RTP on one connection."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TS_PACKETS, TS_BYTES = 7, 188
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
HEADERS = {
    "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
    "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n",
    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
    "PLAY": "Session: 1\r\n",
}


def answer(request: str) -> str:
    """Return the response to one request."""
    method = request.split(" ", 1)[0]
    number = re.search(r"CSeq: *(\d+)", request)
    assert number is not None
    body = SDP if method == "DESCRIBE" else ""
    return f"RTSP/1.0 200 OK\r\nCSeq: {number[1]}\r\n{HEADERS.get(method, '')}\r\n{body}"


def play(connection: socket.socket, stream: bytes, pace_s: float) -> None:
    """Send a transport stream in RTP packets (RFC 2250) on channel 0 of the connection."""
    size = TS_PACKETS * TS_BYTES
    for number, start in enumerate(range(0, len(stream), size)):
        payload = stream[start : start + size]
        rtp = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 900, 1) + payload
        connection.sendall(struct.pack(">cBH", b"$", 0, len(rtp)) + rtp)
        time.sleep(pace_s)


@contextmanager
def camera(stream: bytes, *, hang: bool = False, pace_s: float = 0.001) -> Iterator[str]:
    """Provide the address of a camera that sends a transport stream once, then disconnects or stops sending."""
    listener, done = socket.create_server(("127.0.0.1", 0)), threading.Event()
    listener.settimeout(20)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            waiting = b""
            while not done.is_set():
                received = connection.recv(65536)
                if not received:
                    return
                waiting += received
                while b"\r\n\r\n" in waiting:
                    request, _, waiting = waiting.partition(b"\r\n\r\n")
                    text = request.decode()
                    connection.sendall(answer(text).encode())
                    if text.startswith("PLAY"):
                        play(connection, stream, pace_s)
                        if hang:
                            done.wait(20)
                        return

    def guarded() -> None:
        try:
            serve()
        except OSError:  # the player disconnected
            return

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield f"rtsp://me:secret@127.0.0.1:{listener.getsockname()[1]}/stream"
    finally:
        done.set()
        thread.join(5)
        listener.close()
