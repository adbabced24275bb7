"""`anyglot serve` as a user starts it, with the shipped model: pictures and speech of what was asked, a clean end."""

from __future__ import annotations

import base64
import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from anyglot_synth.nanoworld.language import describe, parse
from anyglot_synth.nanoworld.scene import Scene, sample_scene, score
from anyglot_synth.nanoworld.see import see

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "recipes" / "anyglot_recipes" / "weights" / "nano"


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "anyglot_recipes.cli", "serve", "--model", str(NANO), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"anyglot: nano on (http://\S+/v1)", line):
            return process, found.group(1)
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process, found = start()
    try:
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None and process.stderr.read() == "anyglot: stopped\n"
    finally:
        process.kill()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng, "train") for _ in range(4)]


def test_the_page_stands_beside_it(url: str) -> None:
    pytest.importorskip("gradio")
    page = httpx.get(url.removesuffix("v1"))
    assert page.status_code == 200 and "Draw a sentence" in page.text  # an example for this model only


def test_pictures_of_texts(url: str, scenes: list[Scene]) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    scores = []
    for scene in scenes:
        answer = client.images.generate(model="nano", prompt=describe(scene))
        assert answer.data and answer.data[0].b64_json
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
        scores.append(score(scene, see(pixels / 255)))
    assert np.mean(scores) > 0.5


def test_speech_gives_its_words_back(url: str, scenes: list[Scene]) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    scores = []
    for scene in scenes:
        with client.audio.speech.with_streaming_response.create(
            model="nano", voice="default", input=describe(scene), response_format="wav"
        ) as spoken:
            sound = b"".join(spoken.iter_bytes())
        heard = client.audio.transcriptions.create(model="nano", file=("speech.wav", sound))
        scores.append(score(scene, parse(heard.text)))
    assert np.mean(scores) > 0.5
