"""The one HTTP client, over real sockets: what it follows, how much it reads, to whom a key goes."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np
import pytest

from anyglot_synth.backends import BackendError
from anyglot_synth.http_client import HttpClient
from anyglot_synth.recognise import OpenAIRecogniser
from anyglot_synth.voices.openai import OpenAIVoice
from anyglot_synth.workers import Workers


class Handler(BaseHTTPRequestHandler):
    """`/redirect` leads to `/stolen`; `/bytes` answers without end; `/slow` fails with a body that trickles; `/echo`
    refuses and repeats the key, `/torn` in the place of a status.
    """

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def answer(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        kind = self.path.split("/")[1]
        if kind == "torn":
            self.wfile.write(f"{self.headers['Authorization']}\r\n".encode())
            self.close_connection = True
            return
        self.send_response({"echo": 401, "redirect": 302, "slow": 400}.get(kind, 200))
        if kind == "redirect":
            self.send_header("Location", "/stolen")
        self.end_headers()
        if kind == "echo":
            self.wfile.write(b"x" * 288 + f" {self.headers['Authorization']}".encode())
        try:
            for _ in range(10_000 if kind == "bytes" else 100 if kind == "slow" else 0):
                self.wfile.write(b"x" * (1 << 16) if kind == "bytes" else b"x")
                time.sleep(0.05 if kind == "slow" else 0)
        except OSError:
            self.close_connection = True  # the client left

    def log_message(self, *args: Any) -> None:
        return None


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.seen.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_redirect_does_not_carry_the_key_away(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    here = f"{url}/redirect"
    sound = OpenAIRecogniser(here, "m", api_key_env="MY_KEY")._ask
    voice = OpenAIVoice(here, "m", ["a"], api_key_env="MY_KEY")
    for ask in (lambda: sound(np.ones(800, np.float32)), lambda: voice.make("hello", {"voice": "a"}, 0)):
        Handler.seen.clear()
        with pytest.raises(BackendError, match="status 302"):
            ask()
        assert [key for _, key in Handler.seen] == ["Bearer secret"]
        assert not any(path.startswith("/stolen") for path, _ in Handler.seen)


def test_answers_are_bounded(url: str) -> None:
    with pytest.raises(BackendError, match="more than 1048576 bytes"):
        HttpClient(f"{url}/bytes").post("/x", b"")
    start = time.monotonic()
    with pytest.raises(BackendError, match="status 400: xx"):
        HttpClient(f"{url}/slow", timeout_s=0.3).post("/x", b"")
    assert time.monotonic() - start < 2


def test_a_key_goes_to_the_server_that_it_is_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("MY_KEY", " mine\n")
    HttpClient(url).post("/x", b"")
    HttpClient(url, "MY_KEY").post("/x", b"")
    assert [key for _, key in Handler.seen] == [None, "Bearer mine"]
    assert HttpClient("https://api.openai.com/v1").key() == "secret"
    for other in ("http://api.openai.com/v1", "https://api.openai.com.evil.org/v1", "https://host/api.openai.com"):
        assert HttpClient(other).key() is None
    for bad in ("", "a\nb", "schlüssel"):
        monkeypatch.setenv("MY_KEY", bad)
        with pytest.raises(BackendError, match="MY_KEY holds no key for http") as caught:
            HttpClient(url, "MY_KEY").post("/x", b"")
        assert not bad or bad not in str(caught.value)


def test_a_key_that_a_server_repeats_is_not_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2")
    for kind, told in (("echo", r"status 401: x+ Bearer \*\*\*"), ("torn", r"no answer \(.*Bearer \*\*\*")):
        with pytest.raises(BackendError, match=told) as caught:
            HttpClient(f"{url}/{kind}", "MY_KEY", attempts=1).post("/x", b"")
        assert "hun" not in str(caught.value)


def test_all_attempts_fit_into_the_time_for_an_item() -> None:
    item_s = inspect.signature(Workers).parameters["timeout"].default
    for client in (OpenAIVoice("http://h", "m", ["a"]).client, OpenAIRecogniser("http://h", "m").client):
        pauses = sum(1.5 * client.pause_s * 2**i for i in range(client.attempts - 1))
        assert client.attempts * client.timeout_s + pauses < item_s


def test_no_proxy_stands_between_this_machine_and_itself(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert HttpClient(url, attempts=1).post("/x", b"") == b""
    with pytest.raises(BackendError, match="no answer"):  # by the proxy, which is not there
        HttpClient("http://elsewhere.invalid", attempts=1).post("/x", b"")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "host",
        "file:///etc",
        "http://",
        "http://h:x/",
        "http://h:0",
        "http://[",
        "http://h/#a",
        "http://h/ x",
        "http://a..b/v1",
        f"http://{'a' * 64}/v1",
    ],
)
def test_urls_that_cannot_be(bad: str) -> None:
    with pytest.raises(BackendError, match=r"the URL '.*' of a server cannot be used"):
        HttpClient(bad)


def test_settings_that_cannot_be() -> None:
    for hidden in ("https://me:hunter2@host", "https://host?key=hunter2", "https://hunter2@host"):
        with pytest.raises(BackendError) as caught:
            HttpClient(hidden)
        assert "hunter2" not in str(caught.value)
    for settings in ({"timeout_s": 0}, {"attempts": 0}, {"pause_s": -1}, {"max_bytes": "many"}, {"timeout_s": True}):
        with pytest.raises(BackendError, match=f"{next(iter(settings))} for http://host is"):
            HttpClient("http://host", **settings)  # type: ignore[arg-type]
