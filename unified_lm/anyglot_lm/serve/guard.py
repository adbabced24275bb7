"""`Guard`: what every request passes first and last: its key, its size, its time, and what is left of a defect.

ASGI middleware around the routes. A body is measured as it arrives, whatever its head says. Errors leave here as one
JSON object; a defect is logged, and the client learns only that there was one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Collection
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.metrics import Metrics
from anyglot_lm.serve.refusal import OURS, Refusal, error_object

log = logging.getLogger("anyglot.serve")
OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""
GONE = 499
"""The status, in metrics, of requests whose client left."""


class Guard:
    """The middleware.

    Args:
        app: what it guards.
        limits: bounds of bodies.
        key: that clients must send as `Authorization: Bearer KEY`, or None.
        metrics: where requests are counted.
        paths: those that metrics name; others are "other".
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, key: str | None, metrics: Metrics, paths: Collection[str]
    ) -> None:
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, frozenset(paths)
        self.key = None if key is None else key.encode()
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, body, silent = time.perf_counter(), 0, _Body(self, receive), True
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def watched(message: Message) -> None:
            nonlocal status, silent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif silent and message.get("body"):
                silent = False
                self.metrics.first.labels(path).observe(time.perf_counter() - began)
            await send(message)

        try:
            _check_origin(scope)
            self._check_key(scope)
            self._check_length(scope)
            await self.app(scope, body.receive, watched)
        except Refusal as refusal:
            if status:
                raise
            await refusal.response()(scope, receive, watched)
        except ClientDisconnect:
            status = GONE
        except Exception:
            self.metrics.errors.inc()
            log.exception("a defect while answering %s %s", scope["method"], path)
            if status:  # half an answer is out: all that is left is to break it off
                raise
            await JSONResponse(error_object(500, OURS), 500)(scope, receive, watched)
        finally:
            self.buffered -= body.size
            self.metrics.requests.labels(path, str(status or GONE)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _check_key(self, scope: Scope) -> None:
        if self.key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        good = hmac.compare_digest(given.strip(), self.key)
        if not good or scheme.lower() != b"bearer":
            raise Refusal(
                401,
                "wrong or missing API key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, scope: Scope) -> None:
        stated = _header(scope, b"content-length")
        if stated.isdigit() and int(stated[:20]) > self.limits.max_body:
            raise too_large(self.limits.max_body)


class _Body:
    """Measures a body while it arrives."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.guard, self.inner = guard, receive
        self.size, self.whole = 0, False
        self.deadline = asyncio.get_running_loop().time() + guard.limits.body_timeout

    async def receive(self) -> Any:
        """The next message of ASGI. Raises `Refusal` for a body that is too large or too slow."""
        if self.whole:  # what comes now is that the client leaves
            return await self.inner()
        limits = self.guard.limits
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.inner()
        except TimeoutError:
            raise Refusal(
                408, f"the request was not there after {limits.body_timeout:g} s; send it faster, or less of it"
            ) from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            self.size += count
            self.guard.buffered += count
            self.whole = not message.get("more_body", False)
            if self.size > limits.max_body:
                raise too_large(limits.max_body)
            if self.guard.buffered > limits.max_buffered:
                raise Refusal(503, "too much is being sent to this server; try again", headers={"Retry-After": "1"})
        return message


def _check_origin(scope: Scope) -> None:
    """Browsers say where a page that sends something is from; no page is meant to use this server."""
    if _header(scope, b"origin"):
        raise Refusal(403, "web pages are not served; let a server of yours ask in their place")


def too_large(most: int) -> Refusal:
    """A body beyond `most` bytes."""
    return Refusal(413, f"the request has more than {most} bytes; send less", code="request_too_large")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
