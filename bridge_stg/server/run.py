"""Binding, serving, and ending in order: what the command `serve` calls."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.server.app import create_app
from bridge_stg.server.service import Service
from bridge_stg.server.settings import Settings

CLOSING_S = 5.0
"""What connections may take behind the drain of the jobs."""


class Server(uvicorn.Server):
    """Uvicorn that tells the service at once that it is to end: streams would keep connections open for ever."""

    def __init__(self, service: Service, *, ready: Callable[[], Any] | None = None) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=2 * settings.max_connections,  # a hard stop; `Guard` refuses before, in words
                timeout_graceful_shutdown=int(settings.drain_s + CLOSING_S),
            )
        )
        self.service = service
        self._ready = ready
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._ready is not None and self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End on SIGINT and SIGTERM; a second one does not wait for running jobs, a third one for nothing."""
        if self._signals == 2:
            logging.getLogger("uvicorn.error").disabled = True  # it would show where everything was cut off
            self.force_exit = True
        elif self._signals == 1:
            self._soon(self.service.hurry)
        self._signals += 1
        self.should_exit = True
        self.begin_stop()

    def begin_stop(self) -> None:
        """Let the service end its streams and jobs. From any thread or signal handler."""
        self._soon(self.service.begin_stop)

    def stop(self) -> None:
        """End in order; from any thread."""
        self.should_exit = True
        self.begin_stop()

    def _soon(self, work: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound but does not listen yet.

    Raises:
        BridgeError: the port is in use or not allowed, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise BridgeError(
            f"--host {host}: this is no address that can be listened on ({error.strerror or error})"
        ) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        reasons = {
            errno.EADDRINUSE: "it is in use; end what listens there, or choose another --port (0 takes a free one)",
            errno.EACCES: "ports below 1024 need rights that this user does not have; choose another --port",
            errno.EADDRNOTAVAIL: "this machine has no such address; give another --host",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise BridgeError(f"Cannot listen on port {port} of {host}: {reason}.") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address that a browser is given."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(bundle: Path, settings: Settings, *, say: Callable[[str], Any], live: dict[str, Any], **engine: Any) -> None:
    """Load a bundle and serve it until SIGINT or SIGTERM; nothing is left behind.

    Args:
        say: told the address when it can be reached.
        live: the fields of `LiveOptions`.
        engine: backend, variant, threads of `Grounder.load`.

    Raises:
        BridgeError: the bundle cannot be loaded, or the port not be listened on.
    """
    with bind(settings.host, settings.port) as bound, Grounder.load(bundle, **engine) as grounder:
        service = Service(grounder, settings, bundle=bundle.resolve().name, live_options=live)
        server = Server(service, ready=lambda: say(url_of(bound)))
        try:
            server.run(sockets=[bound])
        finally:
            service.abandon()
