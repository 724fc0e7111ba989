"""What every request passes before a route sees it, and what every answer carries. Plain ASGI.

Without a key the server trusts whoever reaches it, and on the loopback that includes every page in a browser of this
machine. So the Host header must be a name of this machine (a page that rebinds its own name to 127.0.0.1 sends its own
name), and what changes something must not come from another origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import Settings

OPEN = frozenset({"/", "/health", "/health/live", "/docs", "/openapi.json"})
"""What needs no key: it holds nothing of anybody. The page's files neither, below /page/."""
UPLOADS = frozenset({"/v1/videos", "/v1/ground"})
"""What limits its body itself, while it is written to disk."""
BODY_BYTES = 2**18
REST_BYTES, REST_S = 2**23, 2.0
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
CACHEABLE = ("/page/",)


class Guard:
    """Middleware: key, host, origin, size of bodies, headers of answers, counts of requests."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._active = 0
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, sent, more = 500, False, scope["path"] in UPLOADS
        method = _method(scope)
        if method == "HEAD" and not scope["path"].endswith("/events"):
            scope = {**scope, "method": "GET"}  # what is asked for by HEAD is sent without its body by uvicorn

        async def counted() -> Message:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status, sent = message["status"], True
                if status >= 400 and scope["method"] == "POST":
                    await _take_rest(counted, lambda: more)
                headers = [header for header in message.get("headers", []) if header[0].lower() != b"server"]
                if not any(name.lower() == b"cache-control" for name, _ in headers):
                    cache = b"no-cache" if scope["path"].startswith(CACHEABLE) else b"no-store"
                    headers.append((b"cache-control", cache))
                message = {**message, "headers": [*headers, *HEADERS]}
            await send(message)

        try:
            self._active += 1
            self._check(scope)
            await self._app(scope, await self._limited(scope, counted), sending)
        except ApiError as refusal:
            if sent:
                raise
            await _answer(refusal, sending)
            self._metrics.refused.labels(refusal.code).inc()
        finally:
            self._active -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(method, route, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        if self._active > self._settings.max_connections:
            raise ApiError(503, "connections", "This server has too many clients now.", retry_after_s=5)
        if self._key is not None:
            if path not in OPEN and not path.startswith("/page/") and not self._has_key(headers):
                raise ApiError(
                    401, "key", "This needs the server's API key: send `Authorization: Bearer KEY` or `X-API-Key: KEY`."
                )
        elif not self._settings.insecure and _host(headers.get("host", b"")) not in self._settings.known_hosts:
            raise ApiError(
                400, "host", "The request's Host is no name of this server; its operator can add it with --allow-host."
            )
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            origin = headers.get("origin", b"").decode("latin-1")
            if origin and urlsplit(origin).netloc.lower() != headers.get("host", b"").decode("latin-1").lower():
                raise ApiError(403, "origin", "Pages of other origins may not use this server.")

    def _has_key(self, headers: dict[str, bytes]) -> bool:
        """Compare in a time that does not depend on how much of a key is right."""
        assert self._key is not None
        scheme, _, bearer = headers.get("authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get("x-api-key", b"").strip()
        return hmac.compare_digest(_digest(given), self._key)

    async def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Read a small body here, within its limit, and hand it on; uploads limit theirs themselves."""
        if scope["path"] in UPLOADS or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        body, more = b"", True
        while more:
            try:
                message = await asyncio.wait_for(receive(), self._settings.idle_s)
            except asyncio.TimeoutError:
                raise ApiError(408, "slow", f"Nothing came for {self._settings.idle_s:g} s.") from None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > BODY_BYTES:
                raise ApiError(413, "body", f"The body is larger than {BODY_BYTES} bytes.")
        read = False

        async def receiving() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        return receiving


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host(value: bytes) -> str:
    """Return a Host header without its port."""
    host = value.decode("latin-1").lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"


async def _take_rest(receive: Receive, more: Callable[[], bool]) -> None:
    """Read on for a while where an upload is refused early: clients that still send would not read the answer."""
    taken, end = 0, time.monotonic() + REST_S
    with contextlib.suppress(asyncio.TimeoutError):
        while more() and taken < REST_BYTES and time.monotonic() < end:
            message = await asyncio.wait_for(receive(), max(0.01, end - time.monotonic()))
            taken += len(message.get("body", b""))


async def _answer(refusal: ApiError, send: Any) -> None:
    body = json.dumps(refusal.to_json()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
