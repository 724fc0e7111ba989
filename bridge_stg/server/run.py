"""Bind, serve, and shut down gracefully: the function that the command `serve` calls."""

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
from bridge_stg.runtime.live.watch import LiveOptions
from bridge_stg.server.app import create_app
from bridge_stg.server.service import Service
from bridge_stg.server.settings import Settings

CLOSING_S = 5.0  # seconds that connections get after the jobs have ended
REASONS = {
    errno.EADDRINUSE: ("server.port_in_use", "end what listens there, or choose another --port (0 takes a free one)"),
    errno.EACCES: ("server.port_denied", "ports below 1024 need rights that this user lacks; choose another --port"),
    errno.EADDRNOTAVAIL: ("server.bad_address", "this machine has no such address; choose another --host"),
}


class Server(uvicorn.Server):
    """A Uvicorn server that stops the service first, whose streams would keep connections open forever."""

    def __init__(self, service: Service, *, ready: Callable[[], Any] | None = None) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,  # its records are written as all others are
                log_level="error",  # its warnings are of invalid requests
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=2 * settings.max_connections,  # a hard stop; `Guard` answers with an error before
                timeout_graceful_shutdown=int(settings.drain_s + CLOSING_S),
            )
        )
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # likewise
        self.service, self._ready, self._signals = service, ready, 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `ready`."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._ready is not None and self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop on SIGINT and SIGTERM; a second signal does not wait for running jobs, a third one exits immediately."""
        if self._signals == 2:
            logging.getLogger("uvicorn.error").disabled = True  # it would log every task that is cut off
            self.force_exit = True
        elif self._signals == 1:
            self.call_soon(self.service.scheduler.hurry)
        self._signals += 1
        self.stop()

    def stop(self) -> None:
        """Shut down gracefully. Can be called repeatedly, from any thread or signal handler."""
        self.should_exit = True
        self.call_soon(self.service.begin_stop)

    def call_soon(self, work: Callable[[], Any]) -> None:
        """Run a function in the server's event loop, if it still runs. May be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises BridgeError with a code of REASONS."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        message = f"--host {host}: is not an address to listen on ({error.strerror or error})"
        raise BridgeError("server.bad_address", message) from None
    family, kind, protocol, _, address = addresses[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        code, advice = REASONS.get(error.errno or 0, ("server.bad_address", "choose another --host or --port"))
        message = f"cannot listen on port {port} of {host} ({error.strerror or error}): {advice}"
        raise BridgeError(code, message) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket for a browser."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(bundle: Path, settings: Settings, *, say: Callable[[str], Any], live: dict[str, Any], **engine: Any) -> None:
    """Load a bundle, warm it up, and serve it until SIGINT or SIGTERM; no temporary file remains.

    Connections are refused before, and `say` is called with the URL once the server can be reached; `live` are the
    fields of `LiveOptions`, `engine` the options of `Grounder.load`. Raises BridgeError.
    """
    with bind(settings.host, settings.port) as bound, Grounder.load(bundle, **engine) as grounder:
        LiveOptions(**live).groups(grounder.spec)  # an option out of range fails now, not when a client watches
        grounder.warm_up()
        service = Service(grounder, settings, bundle=bundle.resolve().name, live_options=live)
        server = Server(service, ready=lambda: say(url_of(bound)))
        try:
            server.run(sockets=[bound])
        finally:
            service.abandon()
