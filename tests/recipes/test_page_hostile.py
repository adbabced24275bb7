"""Hostile requests to the page: foreign pages, names of other files, routes that gradio has and the page needs not.

And visitors who stop or begin anew at any moment.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from anyglot_lm.serve.app import Service
from anyglot_lm.serve.gate import sweep, temporary_folder
from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.talk import Given
from anyglot_lm.unified import UnifiedModel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="no gradio: pip install 'anyglot[web]'"
)
API = "/gradio_api"
PASSWD = "/etc/passwd"
BASIC = ("any", "right")
CHAT = {"messages": [{"role": "user", "content": "two"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(serving: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    limits = {"max_body": 2**20, "max_kept": 2**22, "body_timeout": 2.0}
    with serving(key="right", examples=[], hosts=["Model.example"], limits=limits) as running:
        yield running


def alive(server: Any) -> None:
    chat = httpx.post(
        f"{server.url}/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer right"}, timeout=30
    )
    assert chat.status_code == 200 and server.service.batcher.open == 0
    assert server.metric("anyglot_errors_total") == 0


def ask(server: Any, path: str, method: str = "GET", **more: Any) -> httpx.Response:
    return httpx.request(method, f"{server.url}{path}", timeout=30, **({"auth": BASIC} | more))


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/x.js", f"{API}/upload", f"{API}/queue/join", f"{API}/file={PASSWD}"]
)
def test_the_key_is_the_password(server: Any, path: str) -> None:
    for auth in (None, ("right", ""), ("any", "wrong"), ("", "")):
        for method in ("GET", "POST"):
            response = ask(server, path, method, auth=auth)
            assert response.status_code == 401 and response.headers["www-authenticate"] == 'Basic realm="Anyglot"'
    assert ask(server, path, auth=None, headers={"Authorization": "Basic !"}).status_code == 401
    assert ask(server, path).status_code not in (401, 403)


def test_the_api_wants_its_header(server: Any) -> None:
    response = ask(server, "/v1/models")
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert ask(server, "/v1/nothing", auth=None, headers={"Authorization": "Bearer right"}).status_code == 404
    alive(server)


@pytest.mark.parametrize("path", ["/", f"{API}/upload", "/v1/chat/completions"])
def test_foreign_pages(server: Any, path: str) -> None:
    port = server.url.rpartition(":")[2]
    key = {} if path != "/v1/chat/completions" else {"auth": None, "headers": {"Authorization": "Bearer right"}}

    def status(method: str = "POST", **headers: str) -> int:
        more = {name.title(): value for name, value in headers.items()}
        return ask(server, path, method, **(key | {"headers": key.get("headers", {}) | more})).status_code

    for origin in ("null", "http://evil.example", "http://localhost", "http://127.0.0.1:1", f"http://127.0.0.1:{port}0",
                   f"http://127.0.0.1:{port}.evil.example", f"http://evil.example/127.0.0.1:{port}", "x"):  # fmt: skip
        assert status(origin=origin) == 403, origin
    own = f"127.0.0.1:{port}"
    assert status(origin=f"http://{own}") not in (401, 403)
    assert status(origin="http://localhost:80", host="localhost:80") not in (401, 403)
    assert status(origin="https://model.example", host="model.example") not in (401, 403)
    for host in (f"evil.example:{port}", "evil.example", f"localhost.evil.example:{port}", "127.0.0.1.evil.example",
                 "[", "model.example.evil"):  # fmt: skip
        assert status(origin=f"http://{host}", host=host) == 403, host  # a name of theirs that leads here
        if path != "/v1/chat/completions":
            assert status("GET", host=host) == 403, host  # of the same origin, browsers name none
    alive(server)


@pytest.mark.parametrize(
    "path",
    ["/login", "/monitoring", "/svelte/x.js", "/robots.txt", "/etc/passwd", "/assets/../../../../../../etc/passwd",
     "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2f..%2f..%2f..%2fetc/passwd",
     *(f"{API}/{name}" for name in (
         f"file={PASSWD}", "file=pyproject.toml", "file=http://127.0.0.1:1/", "file=https://example.com/x.png", "file=",
         f"file/{PASSWD}", "proxy=http://127.0.0.1:1/", "info", "openapi.json", "app_id", "user", "token", "runs",
         "startup-events", "vibe-code/", "dev/reload", "deep_link", "mcp", "component_server", "run/say",
         "stream/x/x/0/playlist.m3u8", "custom_component/x/server/x/x.py", "process_recording", "call/say/x"))],
)  # fmt: skip
def test_closed_routes(server: Any, path: str) -> None:
    for method in ("GET", "POST"):
        response = ask(server, path, method)
        assert response.status_code in (401, 403, 404, 405), (method, response.status_code, response.text[:200])
        assert "root:" not in response.text
    alive(server)


def sent(server: Any, content: bytes = b"hello", name: str = "x.wav") -> httpx.Response:
    return ask(server, f"{API}/upload", "POST", files={"files": (name, content)})


def test_events_name_no_other_file(server: Any) -> None:
    (own,) = sent(server).json()
    folder = str(Path(own).parent)
    for path in (PASSWD, "http://127.0.0.1:1/x.wav", "https://example.com/x.wav", f"{folder}/../../../etc/passwd",
                 "pyproject.toml", "", None, 5, ["/etc/passwd"], f"{own}\0", "file:///etc/passwd"):  # fmt: skip
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = {"data": [None, {"text": "", "files": [file]}], "fn_index": 0, "session_hash": "x"}
        response = ask(server, f"{API}/queue/join", "POST", json=event)
        assert response.status_code == 400 and "was not sent" in response.json()["error"]["message"], path
    for body in (b"", b"{", b"\xff", b"[" * 100_000, json.dumps({"data": []}).encode()):
        response = ask(server, f"{API}/queue/join", "POST", content=body, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500
    for route in ("queue/join", "cancel", "reset"):
        for body, words in (
            (b"{", "not JSON"),
            (b"[" * 20 + b"]" * 20, "deep"),
            (b"[" + b"0," * 200_000 + b"0]", "values"),
        ):
            response = ask(server, f"{API}/{route}", "POST", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400 and words in response.json()["error"]["message"]
    alive(server)


def test_uploads_without_a_length_and_slow_ones(server: Any) -> None:
    def body(pieces: int, seconds: float) -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.wav"\r\n\r\n'
        for _ in range(pieces):
            time.sleep(seconds)
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in (f"{API}/upload", f"{API}/queue/join"):
        for pieces, seconds, status in ((40, 0.0, 413), (4, 1.0, 408)):
            try:
                response = ask(server, path, "POST", content=body(pieces, seconds), headers=headers)
                assert response.status_code == status and set(response.json()) == {"error"}
            except httpx.WriteError:  # cut off before all was sent
                assert status == 413
    sweep(temporary_folder(), 0.0)
    assert not [path for path in temporary_folder().rglob("*") if path.is_file()]
    alive(server)


def test_files_of_visitors(server: Any) -> None:
    (path,) = sent(server, b"hello", "../../../x.wav").json()
    folder = next(parent for parent in Path(path).parents if parent.name.startswith("anyglot-page-"))
    assert folder.stat().st_mode & 0o777 == 0o700
    response = ask(server, f"{API}/file={path}")
    assert response.status_code == 200 and response.content == b"hello"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert ask(server, f"{API}/file={path}", auth=None).status_code == 401
    (page,) = sent(server, b"<script>alert(1)</script>", "x.html").json()
    response = ask(server, f"{API}/file={page}")
    assert response.headers["content-disposition"].startswith("attachment")
    assert sent(server, bytes(2**20 + 1)).status_code == 413
    many = [sent(server, bytes([i]) * 400_000).status_code for i in range(14)]
    assert many[0] == 200 and many[-1] == 503
    alive(server)


def test_old_files_are_swept(tmp_path: Path) -> None:
    for name in ("a/old.wav", "a/young.wav", "b/old.wav", "old"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for path in (*tmp_path.rglob("old*"), tmp_path / "b"):
        os.utime(path, (0, 0))
    sweep(tmp_path, 900)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.wav"))] == ["a/young.wav"]
    assert not (tmp_path / "old").exists()
    sweep(tmp_path, 0)
    assert not list(tmp_path.rglob("*.wav"))
    sweep(tmp_path, 0)  # a folder is as old as the last change in it
    assert not list(tmp_path.iterdir())


def test_files_are_gone_when_the_server_stops(serving: Callable[..., AbstractContextManager[Any]]) -> None:
    with serving(examples=[]) as server:
        (path,) = sent(server).json()
        assert Path(path).read_bytes() == b"hello"
    assert not Path(path).exists()


def test_metrics_name_one_page(server: Any) -> None:
    ask(server, "/")
    ask(server, f"{API}/file=/tmp/{'x' * 50}")
    labels = {
        sample.labels["path"]
        for family in server.service.metrics.registry.collect()
        for sample in family.samples
        if "path" in sample.labels
    }
    assert "page" in labels and not any("gradio" in label or "x" * 50 in label for label in labels)
    assert server.metric("anyglot_requests_total", path="page", status="200") > 0


def test_no_page(serving: Callable[..., AbstractContextManager[Any]]) -> None:
    with serving() as server:
        for path in ("/", "/config", f"{API}/upload"):
            assert httpx.get(f"{server.url}{path}").status_code == 404


HOW = (0, 0, 0)
"""Temperature, seed, most ids."""


@asynccontextmanager
async def page_of(model: UnifiedModel) -> AsyncIterator[Any]:
    """A page on this event loop, without a browser."""
    from anyglot_lm.serve.page import Page

    service = Service(model, "tiny", Limits(), 0.0)
    service.batcher.start()
    try:
        yield Page(service, [])
    finally:
        await service.batcher.stop()
        service.pool.shutdown()


def seen(page: Any, look: dict[Any, Any]) -> tuple[int, bool]:
    """Messages in the chat, and whether an answer can be stopped."""
    return len(look[page.look["chat"]]), look[page.look["stop"]].interactive


def test_a_new_conversation_while_an_answer_is_written(tiny_model: UnifiedModel) -> None:
    from anyglot_lm.serve.page import Visit

    async def run() -> None:
        async with page_of(tiny_model) as page:
            visit, kinds = Visit(), [names[0] for names in page.kinds.values()]
            looks = page.say(visit, {"text": "two"}, ["image", "music"], *HOW, *kinds)
            assert [seen(page, await anext(looks)) for _ in range(2)] == [(2, True)] * 2
            await page.clear(visit)
            assert [seen(page, look) async for look in looks] == [(0, False)]  # gradio shows the last one once more
            assert page.service.batcher.open == 0 and visit.messages == []

    asyncio.run(run())


@pytest.mark.parametrize("at", ["take", "part", "turn"])
def test_stop_before_the_answer_begins(tiny_model: UnifiedModel, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyglot_lm.serve.page import Visit

    async def run() -> None:
        async with page_of(tiny_model) as page:
            visit, service = Visit(), page.service
            real = service.theirs

            async def given() -> list[Given]:
                if at == "take":
                    visit.conversation.stop()
                return [Given("text", "two")]

            async def theirs(function: Any, *arguments: Any) -> Any:
                found = await real(function, *arguments)
                if at == "part" or function == service.prepare.turn:
                    visit.conversation.stop()
                return found

            monkeypatch.setattr(service, "theirs", theirs)
            looks = [look async for look in page._talk(visit, given, ["image"], HOW, "two")]
            (asked, answer), box = visit.messages, looks[-1][page.look["box"]]
            assert asked["content"] == [("text", "two")] and "Stopped." in answer["content"][-1][1]
            assert box.value["text"] == "two" and box.interactive  # to send once more
            assert service.batcher.open == 0 and service.batcher._inbox.empty()
            assert service.metrics.registry.get_sample_value("anyglot_errors_total") == 0

    asyncio.run(run())


def test_what_is_shown_of_a_visit_is_bounded(tiny_model: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyglot_lm.serve import page as pages

    async def run() -> None:
        async with page_of(tiny_model) as page:
            visit, refused = pages.Visit(), pages.Visit()

            async def say(visit: Any, *given: Given) -> None:
                async def take() -> list[Given]:
                    return list(given)

                async for _ in page._talk(visit, take, ["image"], HOW, ""):
                    pass

            picture = Given("image", torch.rand(3, 64, 64))
            await say(visit, picture)
            size = sum(len(content) for message in visit.messages for _, content in message["content"])
            monkeypatch.setattr(pages, "MAX_SHOWN", 3 * size)
            for i in range(4):
                await say(visit, Given("text", str(i)), picture)
            assert 2 <= len(visit.messages) // 2 <= 3 and visit.messages[-2]["content"][0] == ("text", "3")
            assert [message["role"] for message in visit.messages[:2]] == ["user", "assistant"]
            monkeypatch.setattr(pages, "MAX_SHOWN", 1)
            await say(visit, picture)
            assert len(visit.messages) == 2  # the last turn stays
            await say(refused, Given("text", "two"), *[picture] * 60)
            (asked, answer) = refused.messages
            assert asked["content"] == [("text", "two")] and "shorten the conversation" in answer["content"][-1][1]

    asyncio.run(run())
