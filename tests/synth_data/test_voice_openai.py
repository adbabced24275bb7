"""Speech from a server: a real one over a socket, ours as users start it, and ones that misbehave."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from anyglot_synth.backends import BackendError
from anyglot_synth.voices import backend
from anyglot_synth.voices.openai import OpenAIVoice

ROOT = Path(__file__).resolve().parents[2]
TEXT = "a large red circle at the left"


def wav(seconds: float = 1.0, rate: int = 24_000) -> bytes:
    file = io.BytesIO()
    sf.write(file, 0.3 * np.sin(np.arange(round(seconds * rate)) * 0.05), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


class Server:
    """An HTTP server whose answers are `answer(handler, body, count)`."""

    def __init__(self, answer: Callable[[Any, dict[str, Any], int], None]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append({"path": self.path, **body})
                server.headers.append(self.headers)
                answer(self, body, len(server.asked))

            def reply(self, status: int, content: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                return None

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign] # clients that leave are expected here
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Any, dict[str, Any], int], None]], Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[Any, dict[str, Any], int], None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def voices(server: Server | str, **settings: Any) -> OpenAIVoice:
    url = server if isinstance(server, str) else server.url
    return OpenAIVoice(url, "tts", ["alloy"], **{"pause_s": 0.01, "timeout_s": 5.0, **settings})


def test_what_is_asked_and_what_comes_back(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda handler, body, count: handler.reply(200, wav()))
    monkeypatch.setenv("MY_KEY", "secret")
    engine = voices(server, api_key_env="MY_KEY", seed=True)
    engine.setup()
    made = engine.make(TEXT, {"voice": "alloy", "rate": 1.25}, 2**40 + 3)
    assert made.sample_rate == 24_000 and len(made.array) == 24_000 and made.array.dtype == np.float32
    expected = {"path": "/v1/audio/speech", "model": "tts", "input": TEXT, "voice": "alloy", "response_format": "wav"}
    assert server.asked == [{**expected, "speed": 1.25, "seed": 3}]
    assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in str(engine.identity())
    voices(server).make(TEXT, {"voice": "alloy"}, 1)
    assert server.asked[1] == expected and server.headers[1]["Authorization"] is None


def test_busy_servers_are_asked_again(serve: Any) -> None:
    def answer(handler: Any, body: Any, count: int) -> None:
        if count == 1:
            handler.reply(429, b'{"error": {"message": "slow down"}}', Retry_After="0.3")
        elif count == 2:
            handler.reply(503, b"soon")
        elif count == 3:
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.reply(200, wav())

    server = serve(answer)
    start = time.monotonic()
    assert len(voices(server).make(TEXT, {"voice": "alloy"}, 0).array) == 24_000
    assert len(server.asked) == 4 and time.monotonic() - start > 0.3


@pytest.mark.parametrize(
    "status, content, problem, retryable, asked",
    [
        (400, b'{"error": {"message": "no such voice"}}', "status 400: no such voice", False, 1),
        (404, b"<html>not here</html>", "status 404: <html>not here", False, 1),
        (429, b'{"error": "later"}', "status 429: later, 3 times", True, 3),
        (500, b"", "status 500", True, 3),
        (200, b'{"error": "but 200"}', "no WAV file", True, 1),
        (200, wav(0.5)[:30], "no WAV file", True, 1),
        (200, b"x" * 3_000_000, "more than 2000000 bytes", False, 1),
        (200, wav(40, 8_000), "40 s of sound for 30 characters", True, 1),
    ],
)
def test_answers_that_are_no_speech(
    serve: Any, status: int, content: bytes, problem: str, retryable: bool, asked: int
) -> None:
    server = serve(lambda handler, body, count: handler.reply(status, content))
    with pytest.raises(BackendError, match=problem) as caught:
        voices(server, retries=2, max_bytes=2_000_000).make(TEXT, {"voice": "alloy"}, 0)
    assert caught.value.retryable is retryable and len(server.asked) == asked and "\n" not in str(caught.value)


def test_what_unpacks_to_far_more_than_an_utterance_is_not_unpacked(serve: Any) -> None:
    file = io.BytesIO()
    sf.write(file, np.zeros(3_000_000), 24_000, format="FLAC", subtype="PCM_16")
    assert len(file.getvalue()) < 200_000
    server = serve(lambda handler, body, count: handler.reply(200, file.getvalue()))
    with pytest.raises(BackendError, match="3000000 samples: that is no utterance"):
        voices(server, max_bytes=2_000_000).make(TEXT, {"voice": "alloy"}, 0)


def test_servers_that_hang_or_break_off(serve: Any) -> None:
    def hang(handler: Any, body: Any, count: int) -> None:
        time.sleep(3)

    def trickle(handler: Any, body: Any, count: int) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for _ in range(60):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)

    def break_off(handler: Any, body: Any, count: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "50000")
        handler.end_headers()
        handler.wfile.write(wav()[:2000])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    for answer, problem in ((hang, "no answer .timed out"), (trickle, "more than 0.15 s"), (break_off, "missing")):
        start = time.monotonic()
        with pytest.raises(BackendError, match=problem) as caught:
            voices(serve(answer), retries=1, timeout_s=0.15).make(TEXT, {"voice": "alloy"}, 0)
        assert caught.value.retryable and time.monotonic() - start < 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BackendError, match="no answer.*see that the server runs") as caught:
        voices(f"http://127.0.0.1:{port}/v1", retries=1).make(TEXT, {"voice": "alloy"}, 0)
    assert caught.value.retryable


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("localhost:8000", "file:///etc/passwd", "http://me:key@host/v1", "http://host/v1?key=1", ""):
        with pytest.raises(BackendError, match="give http"):
            voices(url)
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(BackendError, match="NO_KEY holds no key"):
        voices("http://localhost/v1", api_key_env="NO_KEY").setup()
    engine = backend("openai", url="http://localhost/v1/", model="tts", voices=["a", "b"], language="de")
    assert engine.styles() == [{"voice": "a", "language": "de"}, {"voice": "b", "language": "de"}]
    assert engine.identity() == {"engine": "openai", "url": "http://localhost/v1", "model": "tts", "version": ""}


@pytest.mark.slow
def test_our_own_server_as_users_start_it() -> None:
    nano = ROOT / "recipes" / "anyglot_recipes" / "weights" / "nano"
    command = [sys.executable, "-m", "anyglot_recipes.cli", "serve", "--model", str(nano), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = None
        while found is None and (line := process.stderr.readline()):
            found = re.search(r"(http://\S+/v1)", line)
        assert found is not None
        engine = OpenAIVoice(found.group(1), "nano", ["any"], seed=True)
        made = engine.make(TEXT, {"voice": "any"}, 1)
        assert made.sample_rate == 16_000 and 0.5 < len(made.array) / 16_000 < 10
        assert np.array_equal(made.array, engine.make(TEXT, {"voice": "any"}, 1).array)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
