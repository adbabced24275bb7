"""A writer behind HTTP: a server of this test that answers, stumbles and misbehaves over real sockets; and our own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from anyglot_synth.anyinstruct_parse import read_topics
from anyglot_synth.llm import CachedWriter, Request, WriterError, ask_all, build_writer
from anyglot_synth.openai_writer import OpenAIWriter

ROOT = Path(__file__).resolve().parents[2]


class Server(ThreadingHTTPServer):
    """Plays a list of (status, headers, body) answers, then answers well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str], bytes]] = []
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.slow = 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        text = f"You said: {body['messages'][-1]['content']}. Done."
        good = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        status, headers, answer = self.server.script.pop(0) if self.server.script else (200, {}, good)
        if status == 0:  # hangs up
            self.connection.close()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for at in range(0, len(answer), 1 + len(answer) // 10):
                self.wfile.write(answer[at : at + 1 + len(answer) // 10])
                self.wfile.flush()
                time.sleep(self.server.slow / 10)
        except OSError:
            self.close_connection = True  # the client left


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(5)


def ask(text: str, seed: int = 1, **fields: Any) -> Request:
    return Request((("system", "be kind"), ("user", text)), seed, **fields)


def writer(server: Server, **settings: Any) -> OpenAIWriter:
    return OpenAIWriter("tiny", server.url, **{"wait_s": 0.01, "timeout_s": 5.0, **settings})


def test_a_request_goes_out_whole(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    made = writer(server, api_key_env="MY_KEY", extra={"top_p": 0.9})
    request = ask("hello", 2**40 + 3, max_tokens=7, temperature=0.5, stop=("Done", "#"), prefix="You")
    assert made.complete_all([request])[0].startswith("You said: hello")
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "tiny" and body["max_tokens"] == 7 and body["temperature"] == 0.5 and body["top_p"] == 0.9
    assert body["stop"] == ["Done", "#"] and 0 <= body["seed"] < 2**31
    assert body["messages"][0] == {"role": "system", "content": "be kind"}
    assert body["messages"][1]["content"].endswith("Begin your answer with exactly these words: You")
    assert "secret" not in json.dumps(made.identity())


def test_answers_end_before_a_stop_whatever_the_server_does(server: Server) -> None:
    made = writer(server, send_stop=False)
    assert made.complete_all([ask("hello", stop=(". Done",))]) == ["You said: hello"]
    assert "stop" not in server.seen[0][2] and "Authorization" not in server.seen[0][1]


def test_busy_servers_are_asked_again(server: Server) -> None:
    busy = (503, {}, b"{}")
    server.script = [busy, (0, {}, b""), (429, {"Retry-After": "0"}, b"later")]
    assert writer(server, tries=4).complete_all([ask("hi")]) == ["You said: hi. Done."]
    assert len(server.seen) == 4
    server.script = [busy] * 3
    with pytest.raises(WriterError, match="status 503.*3 times") as error:
        writer(server, tries=3).complete_all([ask("hi")])
    assert error.value.retryable


def test_retry_after_is_waited_for(server: Server) -> None:
    server.script = [(429, {"Retry-After": "1"}, b"")]
    start = time.monotonic()
    writer(server).complete_all([ask("hi")])
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_wrong_requests_are_not_repeated(server: Server, status: int) -> None:
    server.script = [(status, {}, b'{"error": {"message": "no such model"}}')]
    with pytest.raises(WriterError, match=f"status {status}: .*no such model") as error:
        writer(server).complete_all([ask("hi")])
    assert not error.value.retryable and len(server.seen) == 1


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.script = [(307, {"Location": f"{server.url}/elsewhere"}, b"")]
    with pytest.raises(WriterError, match="status 307"):
        writer(server).complete_all([ask("hi")])
    assert len(server.seen) == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}'])
def test_what_is_no_chat_completion_is_refused(server: Server, body: bytes) -> None:
    server.script = [(200, {}, body)]
    with pytest.raises(WriterError, match="not a chat completion"):
        writer(server).complete_all([ask("hi")])


def test_answers_have_limits_of_size_and_time(server: Server) -> None:
    server.script = [(200, {}, b" " * 5000)]
    with pytest.raises(WriterError, match="more than 1000 bytes"):
        writer(server, max_bytes=1000).complete_all([ask("hi")])
    server.slow = 2.0  # trickles: no single read takes long
    start = time.monotonic()
    with pytest.raises(WriterError, match="more than 0.5 s"):
        writer(server, timeout_s=0.5, tries=1).complete_all([ask("hi")])
    assert time.monotonic() - start < 1.5


def test_nobody_there() -> None:
    with pytest.raises(WriterError, match="no answer.*2 times") as error:
        OpenAIWriter("tiny", "http://127.0.0.1:9/v1", tries=2, wait_s=0).complete_all([ask("hi")])
    assert error.value.retryable


def test_many_at_once_stay_in_order(server: Server) -> None:
    server.slow = 0.2
    texts = [f"number {i}" for i in range(16)]
    start = time.monotonic()
    answers = writer(server, batch_size=16).complete_all([ask(text) for text in texts])
    assert answers == [f"You said: {text}. Done." for text in texts]
    assert time.monotonic() - start < 16 * 0.2 / 2


def test_answers_are_kept(server: Server, tmp_path: Path) -> None:
    cached = CachedWriter(writer(server), tmp_path)
    assert cached.complete_all([ask("a"), ask("b")]) == cached.complete_all([ask("a"), ask("b")])
    assert len(server.seen) == 2


def test_a_model_that_says_nothing_is_asked_again(server: Server) -> None:
    server.script = [(200, {}, b'{"choices": [{"message": {"content": null}}]}')]
    (asked,) = ask_all(writer(server), [ask("so\n1. a red barn in the snow")], lambda _, text: read_topics(text))
    assert [(no.reason, no.text) for no in asked.refused] == [("no-list", "")] and len(server.seen) == 2
    assert asked.value is not None


def test_what_a_batch_that_breaks_off_was_answered_is_kept(server: Server, tmp_path: Path) -> None:
    cached, texts = CachedWriter(writer(server, batch_size=4), tmp_path), ["a", "b", "c", "d"]
    server.script = [(200, {}, b"<html>")]
    with pytest.raises(WriterError, match="not a chat completion"):
        cached.complete_all([ask(text) for text in texts])
    assert len(server.seen) == 4 and len(list(tmp_path.rglob("*.json"))) == 3
    assert cached.complete_all([ask(text) for text in texts]) == [f"You said: {text}. Done." for text in texts]
    assert len(server.seen) == 5 and cached.asked == 5


def test_settings() -> None:
    with pytest.raises(WriterError, match="the URL 'file:///etc' of a server"):
        build_writer({"engine": "openai", "model": "x", "base_url": "file:///etc"})
    with pytest.raises(WriterError, match="attempts"):
        OpenAIWriter("x", "http://x", tries=0)


def test_no_secret_is_taken_into_what_is_written_down() -> None:
    with pytest.raises(WriterError) as caught:
        OpenAIWriter("x", "https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)
    for extra in (
        {"api_key": "k"},
        {"extra_headers": {"X": "k"}},
        {"a": [{"Authorization": "Bearer k"}]},
        {"token": 1},
        *({name: "k"} for name in ("hf_token", "Session-Token", "auth", "bearer", "cookie", "key", "passwd")),
    ):
        with pytest.raises(WriterError, match="extra holds .* give a key by api_key_env"):
            OpenAIWriter("x", "https://host/v1", extra=extra)
    fields = {"max_completion_tokens": 5, "stop_token_ids": [1], "chat_template_kwargs": {"enable_thinking": False}}
    assert OpenAIWriter("x", "https://host/v1", extra=fields).identity()["extra"] == fields


@pytest.mark.slow
def test_our_own_server() -> None:
    """`anyglot serve` with the shipped model writes about what it is asked in its world."""
    nano = ROOT / "recipes" / "anyglot_recipes" / "weights" / "nano"
    command = [sys.executable, "-m", "anyglot_recipes.cli", "serve", "--model", str(nano), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"anyglot: nano on (http://\S+/v1)", line) for line in process.stderr)))
        made = OpenAIWriter("nano", found.group(1), send_stop=False)
        request = Request((("user", "a small red circle at the top left"),), 1, 32, 0.5)
        answers = made.complete_all([request, request])
        assert answers[0] == answers[1]
        with pytest.raises(WriterError, match="status 400.*stop"):
            OpenAIWriter("nano", found.group(1)).complete_all([Request((("user", "x"),), 1, 8, stop=("y",))])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
