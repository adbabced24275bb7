"""`Gate`: what stands between the guard and gradio, and `Fork`, which tells the page's paths from the API's.

gradio has many routes, and does much that a small page needs not: it fetches URLs for browsers, and serves whatever
lies in its folders. Here only the paths that the page uses are open; files are those that visitors sent, below one
private folder and up to a size; what a browser says may name no other file and no URL; and each response forbids the
browser to load anything from elsewhere, or to show the page inside another.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.protocol import levels, read_json
from anyglot_lm.serve.refusal import Refusal

PATHS = frozenset({"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"})
PREFIXES = ("/assets/", "/static/", "/gradio_api/")
JOIN, UPLOAD, FILE = "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file="
EVENTS = (JOIN, "/gradio_api/cancel", "/gradio_api/reset")
OPEN = (*EVENTS, "/gradio_api/queue/data", UPLOAD, "/gradio_api/upload_progress")
HEADERS = {
    "Content-Security-Policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def is_page_path(path: str) -> bool:
    """Whether a path is of the page."""
    return path in PATHS or path.startswith(PREFIXES)


@cache
def temporary_folder() -> Path:
    """The one folder of this process for files that visitors send, only its user's; gone when the process ends.

    gradio learns of it, and that it shall not call home, from the environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="anyglot-page-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return folder


def sweep(folder: Path, seconds: float) -> None:
    """Removes what has lain in a folder for so long: uploads that broke off, too, of which gradio knows nothing."""
    before = time.time() - seconds
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        with suppress(OSError):  # gone already, or a folder that is not empty
            if path.lstat().st_mtime <= before:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


class Fork:
    """ASGI middleware: requests of the page's paths go to the page, all else on.

    Args:
        app: for all else.
        page: the page.
    """

    def __init__(self, app: ASGIApp, *, page: ASGIApp) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        page = scope["type"] == "http" and is_page_path(scope["path"])
        await (self.page if page else self.app)(scope, receive, send)


class Gate:
    """Lets through what the page needs.

    Args:
        app: gradio.
        folder: where files of visitors are.
        limits: of bytes of them, and of what events hold.
    """

    def __init__(self, app: ASGIApp, folder: Path, limits: Limits) -> None:
        self.app, self.folder, self.limits = app, folder, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request of the page. Raises `Refusal`."""
        path = scope["path"]
        if path.startswith(FILE):
            if not self._is_sent(path.removeprefix(FILE)):
                raise Refusal(404, "no such file")
        elif path.startswith("/gradio_api/") and path not in OPEN and not path.startswith("/gradio_api/heartbeat/"):
            raise Refusal(404, "Not Found")
        if path == UPLOAD and self._kept() > self.limits.max_kept:
            raise Refusal(503, "too many files are kept for visitors; try again later", headers={"Retry-After": "60"})
        if path in EVENTS and scope["method"] == "POST":
            receive = await self._checked(receive)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, marked)

    async def _checked(self, receive: Receive) -> Receive:
        """Reads the body of an event; the same body once more for gradio."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await asyncio.to_thread(self._check, body)
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return again

    def _check(self, body: bytearray) -> None:
        for level in levels(read_json(body, self.limits)):
            for value in level:
                if isinstance(value, dict) and not ("path" not in value or self._is_sent(value["path"])):
                    raise Refusal(400, "the event names a file that was not sent to this page")

    def _is_sent(self, path: Any) -> bool:
        """Whether a path is one below the folder, and no detour leads out of it."""
        return isinstance(path, str) and "\0" not in path and Path(os.path.realpath(path)).is_relative_to(self.folder)

    def _kept(self) -> int:
        total = 0
        for file in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # too old, and deleted just now
                total += file.stat().st_size
        return total
