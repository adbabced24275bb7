"""The page of `anyglot serve` in a browser: pictures and sounds go in and come out, nothing leaves the machine."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from anyglot_lm.serve.page import in_the_box
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import gallery
from anyglot_recipes.serve_examples import cards, examples
from anyglot_recipes.shipped import NANO
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import parse, question, same_answer
from anyglot_synth.nanoworld.scene import Scene, Thing, sample_scene, score
from anyglot_synth.nanoworld.voices import VOICES, SpeechCache, Voice, installed_voices
from anyglot_tokenizers.errors import MediaError

WAIT = 60_000
"""Milliseconds for anything at all."""
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio: pip install 'anyglot[web]'"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="no playwright: pip install 'anyglot[dev]'"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def nano() -> UnifiedModel:
    return UnifiedModel.from_pretrained(NANO)


@pytest.fixture(scope="module")
def url(nano: UnifiedModel, serving: Callable[..., AbstractContextManager[Any]]) -> Iterator[str]:
    """A server of the shipped model."""
    with serving(nano, name="nano", examples=examples(nano), cards=cards(nano)) as running:
        yield running.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # it beeps
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", *microphone]
        )
        yield chromium
        chromium.close()


WHOLE = """before => {
    const answers = document.querySelectorAll("#ag-chat .bot"), last = answers[answers.length - 1];
    return answers.length > before && document.querySelector("#ag-stop[disabled]")
        && !last.querySelector(".ag-wait, .ag-progress");
}"""
"""Whether there is one more answer, and nothing is being written. A quick answer is never seen half written."""


class Visitor:
    """A page in the browser, and what went wrong there."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.page = page = self.context.new_page()
        self.before = 0  # answers when the last message was sent
        self.errors: list[str] = []
        self.abroad: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda asked: self._watch(asked.url, url))
        page.goto(url)
        page.wait_for_selector("#ag-box textarea", timeout=WAIT)

    def _watch(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.abroad.append(asked)

    def order(self, *names: str) -> None:
        """Chooses what the answer shall be."""
        page = self.page
        while page.locator("#ag-order .token-remove").count():
            page.locator("#ag-order .token-remove").first.click()
        for name in names:
            page.locator("#ag-order input").click()
            page.get_by_role("option", name=name, exact=True).click()
        page.keyboard.press("Escape")

    def send(self, text: str = "", file: tuple[str, str, bytes] | None = None) -> None:
        """Says something."""
        page = self.page
        if file is not None:
            name, kind, content = file
            page.locator("#ag-box input[type=file]").set_input_files(
                {"name": name, "mimeType": kind, "buffer": content}
            )
            page.wait_for_selector("#ag-box .thumbnail-item", timeout=WAIT)
        page.locator("#ag-box textarea").fill(text)
        self.before = page.locator("#ag-chat .bot").count()
        page.locator("#ag-box .submit-button").click()

    def answer(self) -> Any:
        """The last answer, once it is whole."""
        self.page.wait_for_function(WHOLE, arg=self.before, timeout=WAIT)
        return self.page.locator("#ag-chat .bot").last

    def new(self) -> None:
        """Begins a new conversation."""
        self.page.locator("#ag-new").click()
        self.page.wait_for_selector("#ag-panel .ag-nothing", timeout=WAIT)
        assert self.page.locator("#ag-chat .bot, #ag-chat .user").count() == 0

    def played(self) -> Any:
        """The last answer, once its sound has begun to play by itself. One that was answered before plays no more."""
        answer = self.answer()
        self.page.wait_for_function("() => [...document.querySelectorAll('#ag-chat audio')].at(-1).currentTime > 0.2")
        playing = self.page.locator("#ag-chat audio").evaluate_all("all => all.filter(e => !e.paused).length")
        assert playing == 1 and answer.locator("audio").count() == 1
        return answer

    def note(self, words: str) -> None:
        """Waits until the last answer is a note."""
        self.page.wait_for_selector(f"#ag-chat .ag-note:has-text('{words}')", timeout=WAIT)
        self.page.wait_for_selector("#ag-stop[disabled]", timeout=WAIT)

    def shot(self, folder: Path, name: str) -> None:
        self.page.screenshot(path=folder / f"{name}.png", full_page=True)

    def close(self) -> None:
        self.context.close()
        assert self.errors == [] and self.abroad == []


@pytest.fixture
def visitor(browser: Any, url: str) -> Iterator[Visitor]:
    found = Visitor(browser, url)
    yield found
    found.close()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("ANYGLOT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scene(seed: int) -> Scene:
    return sample_scene(np.random.default_rng(seed), "train")


def png(drawn: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw(drawn)).save(file, format="PNG")
    return file.getvalue()


def spans(visitor: Visitor, title: str) -> list[str]:
    """Kinds of the boxes of the prompt or the answer."""
    section = visitor.page.locator("#ag-panel section", has=visitor.page.locator(f"h4:has-text('{title}')"))
    return [box.get_attribute("data-kind") or "" for box in section.locator("details").all()]


def test_a_picture_is_described_and_spoken(visitor: Visitor, nano: UnifiedModel, shots: Path) -> None:
    page, drawn = visitor.page, scene(1)
    assert page.locator("#ag-examples button").count() == 6
    block = nano.vocabulary.block("image")
    assert block.length is not None
    visitor.order("text")
    visitor.send(file=("scene.png", "image/png", png(drawn)))
    answer = visitor.answer()
    shown = page.locator("#ag-chat .user img.ag-picture").first
    assert shown.bounding_box()["width"] == 256 and shown.evaluate("e => e.naturalWidth") == 64
    said = answer.locator(".ag-text").inner_text()
    assert score(drawn, parse(said)) > 0.5, said
    assert spans(visitor, "Prompt") == ["control", "image", "control"]
    assert spans(visitor, "Answer") == ["text", "control"]
    assert said in page.locator("#ag-panel details[data-kind=text]").inner_text()
    visitor.new()
    visitor.order("speech")
    visitor.send(file=("scene.png", "image/png", png(drawn)))
    audio = visitor.answer().locator("audio")
    heard = audio.evaluate("""async e => {
        const bytes = new Uint8Array(await (await fetch(e.src)).arrayBuffer());
        e.muted = true;
        await e.play();
        const playing = !e.paused;
        e.pause();
        let text = "";
        for (const byte of bytes) text += String.fromCharCode(byte);
        return {bytes: btoa(text), ready: e.readyState, seconds: e.duration, playing};
    }""")
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(heard["bytes"])))
    assert heard["playing"] and heard["ready"] >= 2 and heard["seconds"] == pytest.approx(len(sound) / rate, abs=0.05)
    assert len(sound) > rate / 2 and np.abs(sound).max() > 0.05
    assert spans(visitor, "Prompt") == ["control", "image", "control"]
    assert spans(visitor, "Answer") == ["speech", "control"]
    box = page.locator("#ag-panel details[data-kind=image]")
    assert f"{block.length + 2} ids" in box.inner_text()
    box.locator("summary").click()
    assert re.search(rf"\b{block.start_id}( \d+){{47}} … and {block.length + 2 - 48} more", box.inner_text())
    visitor.shot(shots, "serve-page")


def test_a_question_about_a_picture_is_answered(visitor: Visitor) -> None:
    drawn = scene(1)
    asked, answer = question(drawn, np.random.default_rng(0))
    visitor.order("text")
    visitor.send(asked, ("scene.png", "image/png", png(drawn)))
    assert same_answer(visitor.answer().locator(".ag-text").inner_text(), answer)


def test_what_is_asked_about_comes_before_the_question(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(scene(1)))
    said, chosen = {"text": " what is it? ", "files": [str(tmp_path / "a.png")]}, {"image": "image"}
    assert [given.modality for given in in_the_box(said, chosen)] == ["image", "text"]
    assert [given.modality for given in in_the_box(said, chosen, ["text", "speech"])] == ["image", "text"]
    assert [given.modality for given in in_the_box(said, chosen, ["image"])] == ["text", "image"]
    assert in_the_box({"text": " ", "files": None}, {}) == []


def test_examples_and_a_phone(browser: Any, url: str, shots: Path) -> None:
    visitor = Visitor(browser, url, color_scheme="dark")
    visitor.page.set_viewport_size({"width": 420, "height": 900})
    visitor.page.get_by_role("button", name="Change a picture").click()
    picture = visitor.answer().locator("img.ag-picture")
    assert picture.evaluate("e => [e.naturalWidth, e.naturalHeight]") == [64, 64]
    assert spans(visitor, "Prompt") == ["control", "text", "image", "control"]
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 420
    visitor.shot(shots, "serve-phone")
    visitor.close()


def test_draw_and_hear_the_tune(visitor: Visitor, shots: Path) -> None:
    page, things = visitor.page, [("small green cross", "middle left"), ("large white triangle", "bottom right")]
    assert page.locator(".ag-go").is_disabled()
    for said, place in [("large red circle", "top left"), ("small blue square", "top left"), *things]:
        size, color, shape = said.split()
        page.locator(f"[data-stamp='{size} {shape}']").click()
        page.locator(f"[data-color={color}]").click()
        page.locator(f"[data-place='{place}']").click()
    page.locator("[data-place='bottom center']").click()  # a fourth: the first goes
    page.locator("[data-place='bottom center']").click()  # the same once more: gone
    page.locator("[data-place='top left']").click()
    visitor.before = 0
    page.locator(".ag-go").click()
    visitor.played()
    assert spans(visitor, "Prompt") == ["control", "image", "control"]
    assert spans(visitor, "Answer") == ["music", "control"]
    seen = page.locator("#ag-chat .user img").get_attribute("src").partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(seen))).convert("RGB")).astype(int)
    drawn = [("small green cross", "middle left"), ("large white triangle", "bottom right"),
             ("large white triangle", "top left")]  # fmt: skip
    wanted = Scene(tuple(Thing(s.split()[2], s.split()[1], s.split()[0], *place.split()) for s, place in drawn))
    assert np.abs(pixels - draw(wanted)).max() <= 1
    visitor.shot(shots, "serve-drawn")
    page.locator(".ag-clear").click()
    assert page.locator(".ag-go").is_disabled()


@pytest.mark.skipif(not installed_voices(), reason="no speech engine: apt-get install flite")
def test_speak_and_see_and_hear_the_answer(browser: Any, url: str, shots: Path) -> None:
    visitor = Visitor(browser, url, permissions=["microphone"])
    page = visitor.page
    page.get_by_role("button", name="“large red circle, bottom center”").click()
    assert visitor.played().locator("img.ag-picture").count() == 1
    visitor.before = 0
    page.locator("#ag-cards .record-button").click()
    page.wait_for_timeout(1500)
    page.locator("#ag-cards .stop-button").first.click()
    page.wait_for_selector("#ag-stop:not([disabled])", timeout=WAIT)
    assert visitor.played().locator("img.ag-picture").count() == 1
    assert page.locator("#ag-chat .bot").count() == 1  # a conversation of its own
    assert spans(visitor, "Prompt") == ["control", "speech", "control"]
    assert spans(visitor, "Answer") == ["image", "speech", "control"]
    assert page.locator("#ag-cards .record-button").is_visible()  # ready for another one
    visitor.shot(shots, "serve-spoken")
    visitor.close()


@pytest.mark.skipif(not installed_voices(), reason="no speech engine: apt-get install flite")
@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.name)
def test_a_recording_becomes_like_a_clip(nano: UnifiedModel, voice: Voice) -> None:
    tidy, clip = cards(nano)[0].tidy, SpeechCache().say("small white square, top left", voice)
    assert tidy is not None
    noise = np.random.default_rng(0).normal(0, 0.0003, len(clip) + 30_000)
    recorded = np.pad(0.2 * clip, (20_000, 10_000)) + noise
    (found,) = tidy(torch.from_numpy(recorded.astype(np.float32))[None]).numpy()
    assert abs(len(found) - len(clip)) < 3_200  # 0.2 s: a soft start may drown
    assert np.sqrt((found**2).mean()) == pytest.approx(np.sqrt((clip**2).mean()), rel=0.1)
    for nothing in (torch.zeros(1, 16_000), torch.zeros(1, 9)):
        with pytest.raises(MediaError, match="is silent"):
            tidy(nothing)


def test_a_story_of_the_demo_plays(browser: Any, tmp_path: Path) -> None:
    for name in ("said", "answered"):
        soundfile.write(tmp_path / f"{name}.wav", np.full(8000, 0.1), 16000)
    sounds = "".join(f"<audio src='{name}.wav'></audio>" for name in ("said", "answered"))
    story = f"<div class='sample'>{sounds}<button onclick='play(this)'>Play</button></div>"
    (tmp_path / "index.html").write_text(gallery.page("title", "intro", "", [], [story]))
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    ended = "() => [...document.querySelectorAll('audio')].map(e => e.ended)"
    assert page.evaluate(ended) == [False, False]
    page.get_by_role("button").click()
    page.wait_for_function(f"() => ({ended})()[0]", timeout=WAIT)
    page.wait_for_function(f"() => ({ended})()[1]", timeout=WAIT)
    page.close()


@pytest.fixture(scope="module")
def tiny(serving: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """A server with a key, of a model that knows nothing."""
    with serving(key="right", examples=[], limits={"rows": 1, "queue": 1, "max_pixels": 10**6}) as running:
        yield running


@pytest.fixture
def guest(browser: Any, tiny: Any) -> Iterator[Visitor]:
    """Who knows the key."""
    found = Visitor(browser, tiny.url, http_credentials={"username": "any", "password": "right"})
    yield found
    found.close()
    tiny.until(lambda: tiny.service.batcher.open == 0)


@contextmanager
def slow(server: Any) -> Iterator[None]:
    """Steps of the engine take a tenth of a second."""
    engine = server.service.batcher.engine
    step = engine.step

    def late() -> Any:
        time.sleep(0.1)
        return step()

    engine.step = late
    yield
    del engine.step


def test_stop_ends_the_rows(guest: Visitor, tiny: Any) -> None:
    guest.order("image", "music")
    cancelled = tiny.metric("anyglot_cancelled_total")
    with slow(tiny):
        guest.send("two")
        guest.page.wait_for_selector("#ag-chat .ag-progress", timeout=WAIT)
        assert tiny.service.batcher.in_flight == 1
        guest.page.locator("#ag-stop").click()
        guest.note("Stopped.")
        tiny.until(lambda: tiny.service.batcher.in_flight == 0)
    assert tiny.service.batcher.open == 0 and tiny.metric("anyglot_cancelled_total") == cancelled + 1
    guest.new()
    guest.send("two")
    assert guest.answer().locator("img, audio").count() == 2


def test_leaving_ends_the_rows(browser: Any, tiny: Any) -> None:
    visitor = Visitor(browser, tiny.url, http_credentials={"username": "any", "password": "right"})
    visitor.order("image", "music")
    cancelled = tiny.metric("anyglot_cancelled_total")
    with slow(tiny):
        visitor.send("two")
        tiny.until(lambda: tiny.service.batcher.in_flight == 1)
        visitor.close()
        tiny.until(lambda: tiny.metric("anyglot_cancelled_total") == cancelled + 1)
    assert tiny.service.batcher.open == 0


def test_mistakes_are_one_line(guest: Visitor, tiny: Any) -> None:
    with tiny.service.batcher.take(2):
        guest.send("<b>two</b>")
        guest.note("All 2 places of this server are taken; try again in")
    assert guest.page.locator("#ag-box textarea").input_value() == "<b>two</b>"  # to send once more
    assert guest.page.locator("#ag-chat .user .ag-text").last.inner_text() == "<b>two</b>"
    file = io.BytesIO()
    Image.new("RGB", (1001, 1000)).save(file, format="PNG")
    guest.send(file=("large.png", "image/png", file.getvalue()))
    guest.note("more than 1000000 pixels")
    guest.send(file=("no.wav", "audio/wav", b"hello"))
    guest.note("is no sound")
    guest.send("two")
    guest.answer()
    assert "two" in guest.page.locator("#ag-panel details[data-kind=text]").first.inner_text()


def test_a_server_stops_though_a_page_is_open(
    browser: Any, serving: Callable[..., AbstractContextManager[Any]]
) -> None:
    with serving(examples=[], limits={"stop_timeout": 30}) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#ag-box textarea", timeout=WAIT)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    context.close()
