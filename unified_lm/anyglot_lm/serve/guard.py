"""`Guard`: what every request passes first and last: origin, key, size, time, and what is left of a defect.

ASGI middleware around the routes. A body is measured as it arrives, whatever its head says. Errors leave here as one
JSON object; a defect is logged, and the client learns only that there was one.
"""

from __future__ import annotations

import asyncio
import binascii
import hmac
import ipaddress
import logging
import time
from base64 import b64decode
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

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
        key: that clients must send as `Authorization: Bearer KEY`, or None. Browsers that ask for the page send it as
            the password of `Basic`.
        metrics: where requests are counted.
        paths: those that metrics name; others are "other".
        is_page: says which paths are of the page; metrics count them all as "page".
        hosts: names that browsers may call this server by, beside localhost and addresses.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        key: str | None,
        metrics: Metrics,
        paths: Collection[str],
        is_page: Callable[[str], bool] = lambda _: False,
        hosts: Collection[str] = (),
    ) -> None:
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, frozenset(paths)
        self.is_page, self.hosts = is_page, frozenset(host.lower() for host in hosts)
        self.key = None if key is None else key.encode()
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, body, silent = time.perf_counter(), 0, _Body(self, receive), True
        page = self.is_page(scope["path"])
        path = "page" if page else scope["path"] if scope["path"] in self.paths else "other"

        async def watched(message: Message) -> None:
            nonlocal status, silent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif silent and message.get("body"):
                silent = False
                self.metrics.first.labels(path).observe(time.perf_counter() - began)
            await send(message)

        try:
            self._check_origin(scope, page)
            self._check_key(scope, page)
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

    def _check_origin(self, scope: Scope, page: bool) -> None:
        """Browsers say which page sends something (`Origin`); only this server's own may.

        A foreign page can point a name of its own at this machine ("DNS rebinding") and so be of the same origin. It
        then calls this server by that name, which is none of ours. Names are therefore checked, addresses need not be.
        """
        origin, host = _header(scope, b"origin"), _header(scope, b"host").lower()
        if not origin and not page:
            return
        name = _name(host)
        if not (name == "localhost" or name.endswith(".localhost") or name in self.hosts or _is_address(name)):
            raise Refusal(
                403,
                f"this server is not called {name[:100]!r}; start it with --allow_host and the name if it should be",
            )
        if origin and origin.lower().partition(b"://")[2] != host:
            raise Refusal(403, "other web pages are not served; let a server of yours ask in their place")

    def _check_key(self, scope: Scope, page: bool) -> None:
        if self.key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        if page and scheme.lower() == b"basic":
            given = _password(given)
        elif scheme.lower() != b"bearer":
            given = b""
        if hmac.compare_digest(given.strip(), self.key):
            return
        if page:
            message, asked = "the API key is the password of this page; any name will do", 'Basic realm="Anyglot"'
        else:
            message, asked = "wrong or missing API key; send the header Authorization: Bearer KEY", "Bearer"
        raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": asked})

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


def _name(host: bytes) -> str:
    """The name or address in a Host header, without its port; "" where there is none."""
    try:
        return (urlsplit(b"//" + host).hostname or b"").decode("latin-1")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _password(given: bytes) -> bytes:
    """Of Basic credentials; b"" where they are none."""
    try:
        return b64decode(given.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def too_large(most: int) -> Refusal:
    """A body beyond `most` bytes."""
    return Refusal(413, f"the request has more than {most} bytes; send less", code="request_too_large")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
