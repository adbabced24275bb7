"""The server with OpenAI's own client: every route, what is said is what the library says, rows share the engine."""

from __future__ import annotations

import base64
import io
import threading
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch

from anyglot_lm.engine import Sampling, generate
from anyglot_lm.grammar import Request
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.serve import answers
from anyglot_lm.serve.answers import base64_of, pcm16, png, sound_bytes
from anyglot_lm.serve.batcher import Work
from anyglot_lm.serve.limits import Limits
from anyglot_lm.serve.prepare import Preparer
from anyglot_lm.serve.protocol import ChatRequest, Sound, fit
from anyglot_lm.unified import UnifiedModel
from anyglot_tokenizers.media import MediaBytes, read_audio, read_image

ASKED: Any = [{"role": "user", "content": "a red circle"}]
LONG: Any = {"order": ["speech", "image"] * 8}


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return client_of(server)


def client_of(server: Any, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30)


def alone(model: UnifiedModel, *order: str, seed: int = 0, temperature: float = 0.0, said: Any = None) -> Any:
    """What the library answers."""
    sample = Sample(said or [Segment("text", "a red circle", "user")])
    request = Request(order=order, max_ids=900, max_length={"text": 256})
    how = dict.fromkeys(("text", *model.vocabulary.modalities), Sampling(temperature))
    return model.respond([sample], request, how, seed)[0]


def test_an_answer_in_all_modalities_is_that_of_the_library(client: openai.OpenAI, tiny_model: UnifiedModel) -> None:
    order = ("text", "image", "speech", "music")
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, seed=3, temperature=1, extra_body={"order": order}
    )
    text, image, speech, music = alone(tiny_model, *order, seed=3, temperature=1.0)
    message: Any = answer.choices[0].message
    assert message.content == text.text and message.order == list(order)
    assert message.images[0]["image_url"]["url"] == f"data:image/png;base64,{base64_of(png(image.media))}"
    assert message.audio.data == base64_of(sound_bytes(speech.media, 16000, "wav"))
    assert message.audio.transcript == text.text and message.audio.sample_rate == 16000
    assert [a["modality"] for a in message.audios] == ["speech", "music"]
    assert message.audios[1]["data"] == base64_of(sound_bytes(music.media, 16000, "wav"))
    used: Any = answer.usage
    assert used.prompt_tokens_details.text_tokens == used.prompt_tokens
    written = used.completion_tokens_details
    assert written.image_tokens == 18 and written.audio_tokens == written.speech_tokens + written.music_tokens
    assert written.text_tokens + written.image_tokens + written.audio_tokens == used.completion_tokens
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens


def test_names_of_openai(client: openai.OpenAI) -> None:
    asked: Any = ["text", "audio", "image"]
    audio: Any = {"voice": "alloy", "format": "flac"}
    answer = client.chat.completions.create(model="tiny", messages=ASKED, modalities=asked, audio=audio, max_tokens=90)
    message: Any = answer.choices[0].message
    assert message.order == ["text", "speech", "image"]
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
    assert rate == 16000 and len(sound) % 1280 == 0
    picture = base64.b64decode(message.images[0]["image_url"]["url"].partition(",")[2])
    assert read_image(MediaBytes("picture", picture)).shape == (3, 64, 64)


def test_media_come_in(client: openai.OpenAI, tiny_model: UnifiedModel) -> None:
    image, sound = torch.rand(3, 64, 64), torch.rand(1, 16000) * 0.1
    file = sound_bytes(sound, 16000, "wav")
    heard = read_audio(MediaBytes("sound", file), sample_rate=16000)
    seen = read_image(MediaBytes("picture", png(image)))
    parts: Any = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(png(image))}"}},
        {"type": "text", "text": "two"},
        {"type": "input_audio", "input_audio": {"data": base64_of(file), "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": base64_of(file), "format": "wav", "modality": "music"}},
    ]
    messages: Any = [
        {"role": "system", "content": "two"},
        {"role": "user", "content": "make the square blue"},
        {"role": "assistant", "content": [parts[0]]},
        {"role": "user", "content": parts},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, seed=5, temperature=1)
    codes = {m: tiny_model.encode_media(m, [v])[0].numpy() for m, v in zip(
        ("image", "speech", "music"), (seen, heard, heard), strict=True)}  # fmt: skip
    said = [
        Segment("text", "two\nmake the square blue", "user"),
        Segment("image", codes["image"], "assistant"),
        Segment("image", codes["image"], "user"),
        Segment("text", "two", "user"),
        Segment("speech", codes["speech"], "user"),
        Segment("music", codes["music"], "user"),
    ]
    assert answer.choices[0].message.content == alone(tiny_model, "text", seed=5, temperature=1.0, said=said)[0].text
    used: Any = answer.usage
    assert used.prompt_tokens_details.image_tokens == 36 and used.prompt_tokens_details.audio_tokens > 4


@pytest.mark.parametrize("form", ["pcm16", "wav"])
def test_a_stream_says_what_a_whole_answer_says(client: openai.OpenAI, tiny_model: UnifiedModel, form: Any) -> None:
    order = ("text", "speech", "image", "music")
    common: Any = {"model": "tiny", "messages": ASKED, "seed": 1, "temperature": 1, "extra_body": {"order": order}}
    chunks: Any = list(
        client.chat.completions.create(
            **common,
            stream=True,
            n=2,
            audio={"voice": "alloy", "format": form},
            stream_options={"include_usage": True},
        )
    )
    whole: Any = client.chat.completions.create(**common, n=2, audio={"voice": "alloy", "format": form})
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        deltas = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert deltas[0].role == "assistant"
        assert "".join(d.content or "" for d in deltas) == choice.message.content
        assert [d.images for d in deltas if hasattr(d, "images")] == [choice.message.images]
        sounds: dict[str, bytes] = {}
        for delta in deltas:
            if delta.audio is not None:
                sounds[delta.audio.id] = sounds.get(delta.audio.id, b"") + base64.b64decode(delta.audio.data or "")
        for streamed, sound in zip(sounds.values(), choice.message.audios, strict=True):
            head = 44 if form == "wav" else 0
            a, b = (np.frombuffer(x[head:], "<i2").astype(int) for x in (streamed, base64.b64decode(sound["data"])))
            assert a.shape == b.shape and np.abs(a - b).max() <= 1
        finishes = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert finishes[-1] == choice.finish_reason and set(finishes[:-1]) == {None}


def test_speech_and_transcription(client: openai.OpenAI, tiny_model: UnifiedModel) -> None:
    (spoken,) = alone(tiny_model, "speech")
    pcm = client.audio.speech.create(model="tiny", voice="alloy", input="a red circle", response_format="pcm").content
    assert np.abs(np.frombuffer(pcm, "<i2").astype(int) - np.frombuffer(pcm16(spoken.media), "<i2")).max() <= 1
    for form in ("wav", "flac"):
        answer = client.audio.speech.create(model="tiny", voice="x", input="a red circle", response_format=form)  # type: ignore[arg-type]
        again = read_audio(MediaBytes(form, answer.content), sample_rate=16000)
        torch.testing.assert_close(again, spoken.media.clamp(-1, 1), rtol=0, atol=1e-4)
        assert answer.response.headers["content-type"] == f"audio/{form}"
    song = client.audio.speech.create(
        model="tiny", voice="x", input="a red circle", response_format="pcm", extra_body={"modality": "music"}
    )
    assert np.abs(np.frombuffer(song.content, "<i2").astype(int)).max() > 0
    file = ("../../etc/passwd", sound_bytes(spoken.media, 16000, "wav"))
    whole = client.audio.transcriptions.create(model="tiny", file=file, temperature=1, extra_body={"seed": 2})
    plain: Any = client.audio.transcriptions.create(
        model="tiny", file=file, temperature=1, response_format="text", extra_body={"seed": 2}
    )
    assert plain == whole.text + "\n"


def test_pictures(client: openai.OpenAI, tiny_model: UnifiedModel) -> None:
    answer = client.images.generate(model="tiny", prompt="a red circle", size="64x64")  # type: ignore[arg-type]
    (image,) = alone(tiny_model, "image")
    assert answer.data and [d.b64_json for d in answer.data] == [base64_of(png(image.media))]
    assert answer.usage and answer.usage.output_tokens == 19
    several = client.images.generate(model="tiny", prompt="a red circle", n=3)
    assert several.data and len({d.b64_json for d in several.data}) == 3


def test_lengths(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(model="tiny", messages=ASKED, temperature=1, max_tokens=5)
    assert short.choices[0].finish_reason == "length"
    assert short.usage and short.usage.completion_tokens <= 5
    with pytest.raises(openai.BadRequestError, match="max_tokens is 5; image has 19 ids at least"):
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=5, extra_body={"order": ["image"]})
    with pytest.raises(openai.BadRequestError, match="room for 1024; shorten the conversation") as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "xyz" * 1000}])
    assert error.value.code == "context_length_exceeded"


def test_why_an_answer_ended(client: openai.OpenAI, tiny_model: UnifiedModel) -> None:
    def why(order: list[str], **more: Any) -> str:
        asked: Any = {"model": "tiny", "messages": ASKED, "temperature": 1, "extra_body": {"order": order}, **more}
        return client.chat.completions.create(**asked).choices[0].finish_reason

    assert why(["image"], max_tokens=19) == "stop"  # a whole picture
    prompt = tiny_model.prompt(Sample([Segment("text", "a red circle", "user")]))
    found = {}
    for fewest in (1, 60):
        asked = Request(order=("text", "image"), max_ids=200, max_length={"text": 60}, min_text=fewest)
        for seed in range(8):
            (ids,) = generate(tiny_model.model, tiny_model.vocabulary, [prompt], asked, seed=seed)
            length = len(tiny_model.grammar.parse(ids)[0].content)
            found[length] = answers.finish(tiny_model, Work(prompt, asked, {}, [0]), ids)
    assert len(found) > 1 and found.pop(60) == "length" and set(found.values()) == {"stop"}


def test_an_answer_goes_back_as_it_came(client: openai.OpenAI, tiny_model: UnifiedModel) -> None:
    def ask(messages: Any, *order: str) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=messages, temperature=1, extra_body={"order": order}
        )

    first = ask(ASKED, "speech", "text", "image", "music").choices[0].message
    then: Any = {"role": "user", "content": "and a square", "name": "ann"}
    answer = ask([*ASKED, first, then], "text")
    sounds = [{"data": a["data"], "format": "wav", "modality": a["modality"]} for a in first.audios]
    speech, music = ({"type": "input_audio", "input_audio": sound} for sound in sounds)
    by_hand = [speech, {"type": "text", "text": first.content}, first.images[0], music]
    same = ask([*ASKED, {"role": "assistant", "content": by_hand}, then], "text")
    assert answer.choices[0].message.content == same.choices[0].message.content and answer.usage == same.usage
    for order in (["speech", "image"], ["music", "image", "speech", "image"], ["image", "speech"]):
        message = ask(ASKED, *order).choices[0].message.model_dump()
        parts = fit({"messages": [message]}, ChatRequest).messages[0].content
        assert [p.input_audio.modality if isinstance(p, Sound) else "image" for p in parts] == order
    only = ask(ASKED, "image").choices[0].message
    assert only.content is None
    assert ask([*ASKED, only, then], "text").usage.prompt_tokens_details.image_tokens == 18
    with pytest.raises(openai.BadRequestError, match="data"):
        ask(
            [*ASKED, {"role": "assistant", "order": ["speech"], "content": None, "audio": {"id": "audio-1"}}, then],
            "text",
        )
    for order in (5, ["text"] * 65):
        with pytest.raises(openai.BadRequestError, match="order"):
            ask([*ASKED, {"role": "assistant", "order": order, "content": "x"}, then], "text")
    for images in ([{"type": "input_audio"}], [{"type": "input_audio", "input_audio": 5}], ["x"], [[]]):
        with pytest.raises(openai.BadRequestError):
            ask([*ASKED, {"role": "assistant", "order": ["image"], "images": images, "content": None}, then], "text")


def test_what_asks_for_nothing_passes(client: openai.OpenAI) -> None:
    nothing: Any = {"tool_choice": "none", "response_format": {"type": "text"}, "metadata": {}, "service_tier": "auto"}
    assert client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=4, **nothing).choices
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        client.chat.completions.create(model="tiny", messages=ASKED, response_format={"type": "json_object"})


def test_a_place_is_taken_until_media_are_made(
    serving: Callable[..., AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, real = threading.Event(), threading.Event(), answers.choice

    def slow(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return real(*given)

    monkeypatch.setattr(answers, "choice", slow)
    with serving() as server, ThreadPoolExecutor(1) as pool:
        batcher = server.service.batcher
        answer = pool.submit(
            client_of(server).chat.completions.create, model="tiny", messages=ASKED, extra_body={"order": ["image"]}
        )
        assert begun.wait(30) and batcher.open == 1 and batcher.in_flight == 0 and batcher.waiting == 1
        go_on.set()
        assert answer.result().choices
        server.until(lambda: batcher.open == 0)


def test_models_health_and_metrics(server: Any, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    client.images.generate(model="tiny", prompt="a red circle")
    page = httpx.get(f"{server.url}/metrics").text
    for line in (
        'anyglot_requests_total{path="/v1/images/generations",status="200"}',
        'anyglot_tokens_total{direction="answer",modality="image"}',
        'anyglot_request_seconds_bucket{le="0.5",path="/v1/images/generations"}',
        "anyglot_queue_length 0.0",
        "anyglot_rows_in_flight 0.0",
        "process_resident_memory_bytes",
    ):
        assert line in page


@pytest.mark.parametrize(
    "text", ["<image>", "</image> <speech>", "<|im_start|>system", "<s></s><pad>", "[user][assistant]", "\x00\u2581é"]
)
def test_no_text_becomes_a_control(client: openai.OpenAI, tiny_model: UnifiedModel, text: str) -> None:
    vocabulary, prepare = tiny_model.vocabulary, Preparer(tiny_model, Limits(), 0.0)
    asked = fit({"messages": [{"role": "user", "content": text}]}, ChatRequest)
    bos, user, *inside, assistant = prepare.chat(asked).prompt
    assert (bos, user, assistant) == tuple(vocabulary.controls[name] for name in ("bos", "user", "assistant"))
    assert max(inside) < vocabulary.text_size and tiny_model.text.decode(inside) == text
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=3)
    used: Any = answer.usage
    assert used.prompt_tokens_details.image_tokens == used.prompt_tokens_details.audio_tokens == 0


def test_rows_share_the_engine_and_keep_apart(server: Any, client: openai.OpenAI) -> None:
    def ask(i: int) -> Any:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"two {i}"}],
            seed=i,
            temperature=1,
            extra_body={"order": [("speech", "image", "text", "music")[i % 4], "image"]},
        )
        message: Any = answer.choices[0].message
        sound = None if message.audio is None else message.audio.data
        return message.content, message.images, sound

    each = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool, server.held() as engine:
        together = pool.map(ask, range(12))
        server.until(lambda: server.service.batcher.open == 12)
        engine.gate.set()
        assert list(together) == each and len({repr(answer) for answer in each}) == 12
        assert engine.most > 6


def test_a_full_queue_says_429(serving: Callable[..., AbstractContextManager[Any]]) -> None:
    with serving(limits={"rows": 1, "queue": 2}) as server, ThreadPoolExecutor(3) as pool:
        client = client_of(server)
        with server.held():
            waiting = [
                pool.submit(client.chat.completions.create, model="tiny", messages=ASKED, max_tokens=4, seed=i)
                for i in range(3)
            ]
            server.until(lambda: server.service.batcher.open == 3)
            with pytest.raises(openai.RateLimitError, match="all 3 places of this server are taken") as error:
                client.chat.completions.create(model="tiny", messages=ASKED)
            assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
            assert server.metric("anyglot_queue_length") == 3
        assert all(answer.result().choices for answer in waiting)
        assert server.service.batcher.open == 0 and server.metric("anyglot_queue_length") == 0
        assert server.metric("anyglot_requests_total", path="/v1/chat/completions", status="429") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(server: Any, stream: bool) -> None:
    before = server.metric("anyglot_cancelled_total")
    asked = {"messages": ASKED, "stream": stream, **LONG}
    with server.held() as engine:
        with pytest.raises(httpx.ReadTimeout):
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=0.5) as response:
                response.read()
        server.until(lambda: server.metric("anyglot_cancelled_total") == before + 1)
        engine.gate.set()
        server.until(lambda: server.metric("anyglot_rows_in_flight") == 0)
    assert server.service.batcher.open == 0
    if not stream:
        assert server.metric("anyglot_requests_total", path="/v1/chat/completions", status="499") >= 1
    assert client_of(server).chat.completions.create(model="tiny", messages=ASKED, max_tokens=4).choices


def test_a_defect_is_a_500_without_details(server: Any, client: openai.OpenAI, caplog: Any) -> None:
    engine, before = server.service.batcher.engine, server.metric("anyglot_errors_total")

    def broken(most: int) -> Any:
        raise RuntimeError("secret detail")

    engine._step = broken
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="tiny", messages=ASKED)
    assert "secret" not in str(error.value) and "its log says why" in str(error.value)
    assert "secret detail" in caplog.text and server.metric("anyglot_errors_total") == before + 1
    stream = client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
    with pytest.raises(openai.APIError, match="its log says why"):
        list(stream)
    del engine._step
    assert not engine.busy
    assert client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=4).choices


def test_keys(serving: Callable[..., AbstractContextManager[Any]]) -> None:
    with serving(key="right") as server:
        for key in ("wrong", "righ", "right2"):
            with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
                client_of(server, key).models.list()
        for headers in ({}, {"Authorization": "right"}, {"Authorization": "Basic right"}):
            assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 401
        assert [m.id for m in client_of(server, "right").models.list()] == ["tiny"]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_wav_heads_are_what_python_reads() -> None:
    content = sound_bytes(torch.zeros(1, 100), 8000, "wav")
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels(), file.getsampwidth()) == (100, 8000, 1, 2)
