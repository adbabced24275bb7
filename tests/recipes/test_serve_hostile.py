"""Hostile requests: each gets a 4xx and one clear line (or its connection is cut), and the server goes on."""

from __future__ import annotations

import asyncio
import base64
import gc
import http.client
import io
import json
import select
import socket
import struct
import threading
import time
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from anyglot_lm.serve.answers import usage
from anyglot_lm.serve.app import Service
from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.prepare import Preparer
from anyglot_lm.serve.refusal import Refusal
from anyglot_lm.unified import UnifiedModel

CHAT, SPEECH, IMAGES, HEAR = (
    f"/v1/{path}" for path in ("chat/completions", "audio/speech", "images/generations", "audio/transcriptions")
)
KEY = {"Authorization": "Bearer right"}
HI = [{"role": "user", "content": "two"}]
FILE = "file:///etc/passwd"
TRAVERSAL = "../../../../etc/passwd"


@pytest.fixture(scope="module")
def server(serving: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    limits = {"max_body": 2**20, "max_seconds": 5.0, "max_pixels": 10**6, "header_timeout": 1.0, "body_timeout": 1.0}
    with serving(key="right", limits=limits) as running:
        yield running


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def say(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def see(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    return say({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{b64(content)}"}})


def url(text: str) -> dict[str, Any]:
    return say({"type": "image_url", "image_url": {"url": text}})


def hear(content: bytes, **more: Any) -> dict[str, Any]:
    return say({"type": "input_audio", "input_audio": {"data": b64(content), "format": "wav", **more}})


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + pixels


def text_bomb() -> bytes:
    body = b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png(8, 8, bytes(200), bomb)


def wav(samples: Any, rate: int = 16000, **more: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | more))
    return file.getvalue()


def ten_hours() -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
    size = 36000 * 32000
    head = b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", size)
    return head + bytes(1000)


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(20_000_000))
    return file.getvalue()


def deep(levels: int) -> bytes:
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}"


GOOD = wav(np.zeros(1600))
CASES: dict[str, tuple[str, Any, str]] = {
    "base64 with a space": (CHAT, url("data:image/png;base64,AA AA"), "not base64"),
    "base64 cut": (CHAT, url("data:image/png;base64,AAA"), "not base64"),
    "base64 empty": (CHAT, url("data:image/png;base64,"), "is empty"),
    "sound that is not base64": (CHAT, say({"type": "input_audio", "input_audio": {"data": "é", "format": "wav"}}),
                                 "not base64"),
    "no base64 at all": (CHAT, url("data:image/png,abc"), "opens no other URL"),
    "a file": (CHAT, url(FILE), "opens no other URL"),
    "a path": (CHAT, url(TRAVERSAL), "opens no other URL"),
    "a URL of the machine": (CHAT, url("http://127.0.0.1:22/"), "opens no other URL"),
    "metadata of a cloud": (CHAT, url("http://169.254.169.254/latest/meta-data/"), "opens no other URL"),
    "another scheme": (CHAT, url("ftp://x/y.png"), "opens no other URL"),
    "text as a picture": (CHAT, url("data:text/plain;base64,AAAA"), "opens no other URL"),
    "zip as a picture": (CHAT, see(zip_bomb()), "is no picture"),
    "zip as a sound": (CHAT, hear(zip_bomb()), "is no sound"),
    "SVG": (CHAT, see(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "is no picture"),
    "picture of 2.5 gigapixels": (CHAT, see(png(50_000, 50_000, bytes(100))), "more than 1000000 pixels"),
    "picture just too large": (CHAT, see(png(1001, 1000, bytes(100))), "more than 1000000 pixels"),
    "truncated picture": (CHAT, see(png(64, 64, bytes(64 * 193))[:60]), "damaged"),
    "picture without pixels": (CHAT, see(png(64, 64, b"")), "damaged"),
    "text bomb in a picture": (CHAT, see(text_bomb()), "damaged"),
    "header only": (CHAT, see(b"\x89PNG\r\n\x1a\n"), "not a picture"),
    "sound of ten hours": (CHAT, hear(ten_hours()), "truncated"),
    "compressed silence": (CHAT, hear(wav(np.zeros(16000 * 60), format="FLAC")), "longer than 5 s"),
    "NaN in a sound": (CHAT, hear(wav(np.full(1600, np.nan), subtype="FLOAT")), "NaN"),
    "sound of 40 MHz": (CHAT, hear(GOOD[:24] + struct.pack("<I", 40_000_000) + GOOD[28:]), "at most"),
    "nine channels": (CHAT, hear(wav(np.zeros((100, 9)))), "9 channels"),
    "truncated sound": (CHAT, hear(GOOD[:400]), "truncated"),
    "empty sound": (CHAT, hear(wav(np.zeros(0))), "no samples"),
    "noise as MP3": (CHAT, hear(b"\xff\xfb" + bytes(range(256)) * 4, format="mp3"), "sound"),
    "sound in an unknown format": (CHAT, hear(GOOD, format="midi"), "format"),
    "sound as a picture": (CHAT, hear(GOOD, modality="image"), "no sound"),
    "sound of an unknown modality": (CHAT, hear(GOOD, modality=TRAVERSAL), "this model has"),
    "invalid UTF-8": (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "not JSON"),
    "lone surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
    "deep JSON": (CHAT, deep(30), "nested more than 16 deep"),
    "very deep JSON": (CHAT, deep(50_000), "not JSON"),
    "a million commas": (CHAT, b"[" + b"0," * 200_000 + b"0]", "values"),
    "no JSON": (CHAT, b"hello", "not JSON"),
    "no body": (CHAT, b"", "not JSON"),
    "a list": (CHAT, [], "the body"),
    "a number": (CHAT, b"1", "the body"),
    "NaN": (CHAT, b'{"messages": [{"role": "user", "content": "two"}], "temperature": NaN}', "not JSON"),
    "Infinity": (CHAT, b'{"messages": [{"role": "user", "content": "two"}], "temperature": Infinity}', "not JSON"),
    "1e999": (CHAT, b'{"messages": [{"role": "user", "content": "two"}], "temperature": 1e999}', "temperature"),
    "no messages": (CHAT, {}, "messages"),
    "empty messages": (CHAT, {"messages": []}, "messages"),
    "messages of another type": (CHAT, {"messages": "hello"}, "messages"),
    "empty content": (CHAT, {"messages": [{"role": "user", "content": ""}]}, "empty text"),
    "no parts": (CHAT, say(), "content"),
    "content of another type": (CHAT, {"messages": [{"role": "user", "content": 5}]}, "content"),
    "part of an unknown type": (CHAT, say({"type": "video_url", "video_url": {"url": "x"}}), "video_url"),
    "part without its content": (CHAT, say({"type": "text"}), "text"),
    "unknown role": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    "role that is a path": (CHAT, {"messages": [{"role": TRAVERSAL, "content": "x"}]}, "role"),
    "assistant has the last word": (CHAT, {"messages": [*HI, {"role": "assistant", "content": "x"}]}, "last message"),
    "late system message": (CHAT, {"messages": [*HI, {"role": "system", "content": "x"}, *HI]}, "comes first"),
    "too many messages": (CHAT, {"messages": HI * 1001}, "at most 64"),
    "too many parts": (CHAT, say(*[{"type": "text", "text": "x"}] * 100), "at most 64"),
    "too much text": (CHAT, say({"type": "text", "text": "x" * 200_000}), "characters"),
    "more text than the model reads": (CHAT, say({"type": "text", "text": "xyz" * 5000}), "ids"),
    "huge n": (CHAT, {"messages": HI, "n": 10**9}, "at most 8"),
    "n of 400 digits": (CHAT, b'{"messages": [], "n": 1' + b"0" * 400 + b"}", "n"),
    "a number for a switch": (CHAT, {"messages": HI, "store": 0}, "store"),
    "a switch for a number": (CHAT, {"messages": HI, "frequency_penalty": False}, "frequency_penalty"),
    "n is 0": (CHAT, {"messages": HI, "n": 0}, "n:"),
    "negative max_tokens": (CHAT, {"messages": HI, "max_tokens": -1}, "max_tokens"),
    "huge max_tokens": (CHAT, {"messages": HI, "max_tokens": 10**8}, "max_tokens"),
    "two max_tokens": (CHAT, {"messages": HI, "max_tokens": 5, "max_completion_tokens": 6}, "give one"),
    "max_tokens as a string": (CHAT, {"messages": HI, "max_tokens": "5"}, "max_tokens"),
    "true as a number": (CHAT, {"messages": HI, "max_tokens": True}, "max_tokens"),
    "hot": (CHAT, {"messages": HI, "temperature": 1e10}, "temperature"),
    "negative temperature": (CHAT, {"messages": HI, "temperature": -1}, "temperature"),
    "top_p of 0": (CHAT, {"messages": HI, "top_p": 0}, "top_p"),
    "huge seed": (CHAT, {"messages": HI, "seed": 2**70}, "seed"),
    "unknown modality": (CHAT, {"messages": HI, "modalities": ["smell"]}, "this model has"),
    "modality that is a path": (CHAT, {"messages": HI, "modalities": [TRAVERSAL]}, "this model has"),
    "control as a modality": (CHAT, {"messages": HI, "order": ["<image>"]}, "this model has"),
    "modality of another type": (CHAT, {"messages": HI, "modalities": {"text": 1}}, "modalities"),
    "empty order": (CHAT, {"messages": HI, "order": []}, "order"),
    "order against modalities": (CHAT, {"messages": HI, "order": ["image"], "modalities": ["text"]}, "different"),
    "two texts": (CHAT, {"messages": HI, "order": ["text", "text"]}, "two texts"),
    "endless order": (CHAT, {"messages": HI, "order": ["image"] * 1000}, "order"),
    "stop": (CHAT, {"messages": HI, "stop": "x"}, "stop is not supported"),
    "tools": (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools is not supported"),
    "unknown entry": (CHAT, {"messages": HI, "__class__": "x"}, "not supported"),
    "name of 100 kB": (CHAT, {"messages": HI, "x" * 100_000: 1}, "not supported"),
    "stream as a string": (CHAT, {"messages": HI, "stream": "yes"}, "stream"),
    "stream of FLAC": (CHAT, {"messages": HI, "stream": True, "audio": {"format": "flac"}}, "flac"),
    "voice that is a path": (CHAT, {"messages": HI, "audio": {"voice": TRAVERSAL}}, "voice"),
    "model that is a path": (CHAT, {"messages": HI, "model": TRAVERSAL}, "no model"),
    "model that is a file": (CHAT, {"messages": HI, "model": FILE}, "no model"),
    "nothing to say": (SPEECH, {"input": "", "voice": "x"}, "input"),
    "speech in MP3": (SPEECH, {"input": "two", "response_format": "mp3"}, "response_format"),
    "speech in a file": (SPEECH, {"input": "two", "response_format": FILE}, "response_format"),
    "voice in a file": (SPEECH, {"input": "two", "voice": FILE}, "voice"),
    "fast speech": (SPEECH, {"input": "two", "speed": 4}, "speed is not supported"),
    "speech that is a picture": (SPEECH, {"input": "two", "modality": "image"}, "ask for a sound"),
    "book": (SPEECH, {"input": "x" * 150_000}, "characters"),
    "no prompt": (IMAGES, {}, "prompt"),
    "picture of another size": (IMAGES, {"prompt": "two", "size": "4096x4096"}, "64x64"),
    "size that is none": (IMAGES, {"prompt": "two", "size": "-1x99999999999"}, "size"),
    "pictures by URL": (IMAGES, {"prompt": "two", "response_format": "url"}, "response_format"),
    "too many pictures": (IMAGES, {"prompt": "two", "n": 99}, "at most 8"),
}  # fmt: skip


def check(response: httpx.Response, *words: str) -> None:
    """A 4xx with OpenAI's error object, one line long."""
    assert 400 <= response.status_code < 500, response.text[:300]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert 5 < len(message) <= 400 and message.isprintable() and "Traceback" not in message
    assert not any(word in message for word in ("site-packages", "pydantic", "root:x"))
    assert all(word in message for word in words), message


def alive(server: Any) -> None:
    response = httpx.post(f"{server.url}{CHAT}", json={"messages": HI, "max_tokens": 2}, headers=KEY, timeout=20)
    assert response.status_code == 200 and server.service.batcher.open == 0
    assert server.metric("anyglot_errors_total") == 0


@pytest.mark.parametrize("name", CASES)
def test_hostile_json(server: Any, name: str) -> None:
    path, content, words = CASES[name]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    began = time.monotonic()
    response = httpx.post(
        f"{server.url}{path}", content=body, headers=KEY | {"Content-Type": "application/json"}, timeout=20
    )
    check(response, words)
    assert time.monotonic() - began < 5
    alive(server)


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"data": {"model": "tiny"}, "files": {"other": b"x"}}, "no file"),
    "file that is text": ({"files": {"file": ("x.wav", b"hello")}}, "is no sound"),
    "empty file": ({"files": {"file": ("x.wav", b"")}}, "no sound"),
    "ten hours": ({"files": {"file": ("x.wav", ten_hours())}}, "truncated"),
    "picture": ({"files": {"file": (TRAVERSAL, png(8, 8, bytes(200)))}}, "is no sound"),
    "two files": ({"files": [("file", ("a", GOOD)), ("file", ("b", GOOD))]}, "Too many files"),
    "many fields": ({"files": {"file": GOOD}, "data": {f"f{i}": "x" for i in range(100)}}, "Too many fields"),
    "long field": ({"files": {"file": GOOD}, "data": {"prompt": "x" * 10_000}}, "maximum size"),
    "unknown format": ({"files": {"file": GOOD}, "data": {"response_format": "srt"}}, "response_format"),
    "temperature": ({"files": {"file": GOOD}, "data": {"temperature": "nan"}}, "temperature"),
    "model": ({"files": {"file": GOOD}, "data": {"model": FILE}}, "no model"),
    "modality": ({"files": {"file": GOOD}, "data": {"modality": "image"}}, "give a sound"),
    "prompt": ({"files": {"file": GOOD}, "data": {"prompt": "x"}}, "prompt is not supported"),
    "no form": ({"json": {"file": FILE}}, "multipart/form-data"),
}


@pytest.mark.parametrize("name", FORMS)
def test_hostile_forms(server: Any, name: str) -> None:
    content, words = FORMS[name]
    check(httpx.post(f"{server.url}{HEAR}", headers=KEY, timeout=20, **content), words)
    alive(server)


def test_hostile_heads(server: Any) -> None:
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for method, path, headers, status in (
        ("POST", CHAT, {"Authorization": "Bearer wrong"}, 401),
        ("POST", CHAT, {"Authorization": "Bearer"}, 401),
        ("POST", CHAT, {"Authorization": "\xff"}, 401),
        ("POST", CHAT, KEY | {"Origin": "http://localhost"}, 403),
        ("GET", CHAT, KEY, 405),
        ("DELETE", "/v1/models", KEY, 405),
        ("GET", "/nothing", KEY, 404),
        ("GET", "/v1/models/%2e%2e/%2e%2e/etc/passwd", KEY, 404),
        ("GET", f"/v1/models/{FILE}", KEY, 404),
        ("POST", CHAT, KEY | form, 415),
        ("POST", HEAR, KEY | broken, 400),
        ("POST", HEAR, KEY | {"Content-Type": "multipart/form-data"}, 400),
    ):
        encoded = {key: value.encode("latin-1") for key, value in headers.items()}
        response = httpx.request(method, f"{server.url}{path}", headers=encoded, content=b"no form", timeout=20)
        assert response.status_code == status
        check(response)
    alive(server)


def raw(server: Any, head: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)
    connection.sendall(head.encode())
    return connection


def whole_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body: the head may come long before the body."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def test_a_hundred_megabytes_with_a_length(server: Any) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    with raw(server, f"{head}Content-Type: application/json\r\nContent-Length: 104857600\r\n\r\n") as connection:
        status, answer = whole_answer(connection)
    assert status == 413 and b"more than 1048576 bytes" in answer
    alive(server)


def test_a_hundred_megabytes_without_a_length(server: Any) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece, sent = b"10000\r\n" + b" " * 65536 + b"\r\n", 0
    with raw(server, head) as connection:
        while sent < 100 * 2**20 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(piece)
            sent += 65536
        status, answer = whole_answer(connection)
    assert status == 413 and b"more than 1048576 bytes" in answer
    assert sent < 20 * 2**20
    alive(server)


def test_slow_bodies_get_408(server: Any) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    with raw(server, f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n") as connection:
        assert drip(connection, b" ", 5).startswith(b"HTTP/1.1 408")
    alive(server)


def test_slow_heads_are_cut_off(server: Any) -> None:
    with raw(server, "POST /v1/models HTTP/1.1\r\nX: ") as connection:
        assert drip(connection, b"x", 4) == b""
    with raw(server, "") as connection:
        assert drip(connection, b"", 4) == b""
    alive(server)


def drip(connection: socket.socket, byte: bytes, seconds: float) -> bytes:
    """Sends a byte now and then; what comes back first, b"" where the connection is cut."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([connection], [], [], 0.1)[0]:
            try:
                return connection.recv(65536)
            except ConnectionResetError:
                return b""
        try:
            connection.sendall(byte)
        except (BrokenPipeError, ConnectionResetError):
            return b""
    raise AssertionError("the server waited for ever")


def test_broken_http(server: Any) -> None:
    for head in (
        "\x00\x01\x02\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        f"GET / HTTP/1.1\r\nX: {'x' * 10**6}",
    ):
        with raw(server, "") as connection:
            try:
                connection.sendall(head.encode())
                answer = connection.recv(65536)
            except (BrokenPipeError, ConnectionResetError):
                answer = b"HTTP/1.1 400"
        assert answer.startswith(b"HTTP/1.1 40"), head[:40]
    alive(server)


def test_too_many_connections(serving: Callable[..., AbstractContextManager[Any]]) -> None:
    with serving(limits={"max_connections": 2}) as server:
        held = [raw(server, "") for _ in range(2)]
        time.sleep(0.2)
        response = httpx.get(f"{server.url}/health")
        assert response.status_code == 503 and response.json()["error"]["message"].startswith("too many connections")
        more = [raw(server, "") for _ in range(2)]
        time.sleep(0.2)
        with raw(server, "") as connection:
            assert drip(connection, b"", 2) == b""
        for connection in (*held, *more):
            connection.close()
        server.until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


def test_clients_that_never_read_are_cut_off(serving: Callable[..., AbstractContextManager[Any]]) -> None:
    asked = json.dumps({"messages": HI, "order": ["music"] * 8, "n": 8, "stream": True}).encode()
    with serving(limits={"write_timeout": 0.5}) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(address)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + asked)
            server.until(lambda: server.service.batcher.open > 0)
            server.until(lambda: server.metric("anyglot_requests_total", path=CHAT, status="200") == 1, 20)
            assert server.service.batcher.open == 0
            received = b""
            try:
                while piece := connection.recv(65536):
                    received += piece
            except ConnectionResetError:
                pass
            assert b"200 OK" in received and b"[DONE]" not in received


def test_what_nobody_waits_for_is_let_go_while_workers_are_busy() -> None:
    class Body(bytearray):
        pass

    async def leave(pool: ThreadPoolExecutor) -> weakref.ref[Body]:
        service: Any = SimpleNamespace(pool=pool)
        body = Body(8)
        kept = weakref.ref(body)
        waiting = asyncio.ensure_future(Service.aside(service, len, body))
        del body
        await asyncio.sleep(0.01)
        assert kept() is not None
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del waiting
        gc.collect()
        return kept

    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait, 60)
        try:
            assert asyncio.run(leave(pool))() is None
        finally:
            release.set()


def test_more_answers_than_places_can_never_be_given(tiny_model: UnifiedModel) -> None:
    preparer = Preparer(tiny_model, Limits(rows=2, queue=1, max_n=8), 1.0)
    preparer.check_n(3)
    with pytest.raises(Refusal, match="n is 4; at most 3"):
        preparer.check_n(4)


def test_sums_of_usage_are_of_all_pictures(field_model: UnifiedModel) -> None:
    found = usage(field_model, {"text": 2, "seen": 16, "image": 64}, {"text": 1})["prompt_tokens_details"]
    assert (found["seen_tokens"], found["image_tokens"], found["text_tokens"]) == (16, 80, 2)
