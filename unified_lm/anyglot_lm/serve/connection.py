"""Connections: uvicorn with deadlines against clients that are slow on purpose.

uvicorn times idle connections, but waits for ever once a first byte of a head has come ("slow loris"), and for clients
that never read. Here a connection has one timer: while no request is being answered, it runs until the head of the
next one is whole, however its bytes trickle; while the client does not read, it runs until it does. Connections beyond
the limit are answered by 503, beyond twice the limit cut. Bodies have a deadline in `guard.py`. This file knows nothing
of models.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.refusal import Refusal
from anyglot_tokenizers.errors import AnyglotError

MAX_HEAD = 32 * 1024
"""Bytes of a request's head."""


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol with the deadlines of `limits`."""

    class Impatient(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        unread = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm(limits.header_timeout)
            if len(self.connections) > 2 * limits.max_connections:
                transport.abort()
            elif len(self.connections) > limits.max_connections:
                self.app = crowded

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answering() and not self.flow.write_paused:
                self._disarm()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._answering():
                self._arm(limits.header_timeout)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread = self.transport.get_write_buffer_size()
            self._arm(limits.write_timeout)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._answering():
                self._disarm()

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _arm(self, seconds: float) -> None:
            self._disarm()
            self.timer = self.loop.call_later(seconds, self._late)

        def _disarm(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _late(self) -> None:
            unread = self.transport.get_write_buffer_size()
            if unread and unread != self.unread:  # the client reads, slowly
                self.unread = unread
                self._arm(limits.write_timeout)
            else:
                self.transport.abort()

    return Impatient


async def crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """What answers on connections beyond the limit."""
    headers = {"Retry-After": "1", "Connection": "close"}
    await Refusal(503, "too many connections to this server; try again", headers=headers).response()(
        scope, receive, send
    )


class Server(uvicorn.Server):
    """uvicorn, which first says that it stops: an application may hold connections open that only it can end."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops."""
        self.on_stop()
        await super().shutdown(sockets)


def make_server(app: Any, limits: Limits) -> Server:
    """A server of `build_app`'s application; `run(sockets=[listen(...)])` starts it."""
    config = uvicorn.Config(
        app,
        http=protocol(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=limits.stop_timeout,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    return Server(config, app.state.stop)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `AnyglotError` where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise AnyglotError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error
