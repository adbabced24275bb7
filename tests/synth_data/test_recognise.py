"""Recognisers as they are: pocketsphinx in its three modes, nanoworld's, tiny models of transformers, a real server."""

from __future__ import annotations

import email
import email.policy
import importlib.util
import io
import itertools
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile
import torch

from anyglot_synth.backends import BackendError
from anyglot_synth.nanoworld.voices import SpeechCache
from anyglot_synth.recognise import (
    RECOGNISERS,
    Float32,
    NanoworldRecogniser,
    OpenAIRecogniser,
    Recogniser,
    SphinxRecogniser,
    at_rate,
    make_recogniser,
    pieces,
)
from anyglot_synth.recognise_hf import HFRecogniser
from anyglot_synth.scoring import word_errors
from anyglot_tokenizers.errors import AnyglotError, MediaError

needs_flite = pytest.mark.skipif(not shutil.which("flite"), reason="flite is not here")
needs_sphinx = pytest.mark.skipif(not importlib.util.find_spec("pocketsphinx"), reason="pocketsphinx is not installed")
RATE = 16_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SpeechCache:
    return SpeechCache(tmp_path_factory.mktemp("speech"))


def test_names_and_their_errors() -> None:
    assert set(RECOGNISERS) == {"sphinx", "nanoworld", "hf", "openai"}
    assert all(issubclass(RECOGNISERS[name], Recogniser) for name in RECOGNISERS)
    assert isinstance(make_recogniser({"engine": "sphinx", "words": ["yes", "no"]}), SphinxRecogniser)
    with pytest.raises(AnyglotError, match="no recogniser 'whisper'; use one of: sphinx, nanoworld, hf, openai"):
        make_recogniser("whisper")
    with pytest.raises(AnyglotError, match="not both"):
        SphinxRecogniser(words=["a"], grammar="#JSGF V1.0;")


# --- the interface ---


def test_long_sounds_are_cut_where_it_is_quiet() -> None:
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, 25 * RATE).astype(np.float32)
    for second in (8, 9.5, 17):
        audio[int(second * RATE) : int((second + 0.2) * RATE)] = 0
    found = pieces(audio, RATE, 10.0)
    assert np.array_equal(np.concatenate(found), audio)
    assert [len(piece) <= 10 * RATE for piece in found] == [True] * len(found)
    ends = np.cumsum([len(piece) for piece in found])[:-1] / RATE
    assert len(ends) == 2 and all(any(s <= end <= s + 0.2 for s in (8, 9.5, 17)) for end in ends)


def test_sounds_are_checked_and_resampled() -> None:
    assert len(at_rate(np.zeros(24_000), 24_000, RATE)) == RATE
    for bad, problem in ((np.zeros((2, 5)), "shape"), (np.array([np.nan]), "NaN"), (np.zeros(40_000), "lasts")):
        with pytest.raises(MediaError, match=problem):
            at_rate(bad, 10, RATE, 3)


class Lengths(Recogniser):
    """Hears how many samples a sound has."""

    name = "lengths"
    piece_seconds = 2.0

    def identity(self) -> dict[str, Any]:
        return {}

    def hear(self, audios: Any) -> list[str]:
        return [str(len(audio)) for audio in audios]


def test_pieces_go_back_to_their_sounds_and_silence_is_nothing() -> None:
    tone, silence = np.full(RATE, 0.5, np.float32), np.zeros(RATE, np.float32)
    long = np.concatenate([tone, silence[: RATE // 2], tone, silence[: RATE // 2], tone])
    assert sum(map(int, Lengths().transcribe([long], RATE)[0].split())) == len(long)
    assert Lengths().transcribe([silence, tone, np.zeros(0, np.float32), tone[:1600]], RATE) == [
        "",
        "16000",
        "",
        "1600",
    ]
    assert Lengths().transcribe([], RATE) == []


# --- pocketsphinx ---


@needs_sphinx
@needs_flite
def test_sphinx_hears_any_text_and_no_clip_depends_on_another(cache: SpeechCache) -> None:
    texts = ["please tell me about the history of this city", "the children want to play in the garden"]
    clips = [cache.clip(text, voice) for text, voice in zip(texts, ("rms", "slt"), strict=True)]
    recogniser = SphinxRecogniser()
    there = recogniser.transcribe(clips, RATE)
    assert [word_errors(text, heard).rate <= 0.25 for text, heard in zip(texts, there, strict=True)] == [True, True]
    assert recogniser.transcribe(clips[::-1], RATE) == there[::-1]


@needs_sphinx
@needs_flite
def test_sphinx_with_a_word_list_or_a_grammar(cache: SpeechCache, tmp_path: Path) -> None:
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    listed = tmp_path / "words.txt"
    listed.write_text("\n".join(digits), encoding="utf-8")
    recogniser = SphinxRecogniser(words=str(listed))
    assert recogniser.identity() == SphinxRecogniser(words=digits[::-1]).identity()
    texts = ["four nine two", "seven one", "eight", "three five six zero"]
    clips = [cache.clip(text, "rms") for text in texts]
    heard = recogniser.transcribe(clips, RATE)
    assert sum(word_errors(a, b).edits for a, b in zip(texts, heard, strict=True)) <= 1
    grammar = "#JSGF V1.0; grammar g; public <g> = (call | text) (my mother | the office);"
    clip = cache.clip("text the office", "slt")
    assert SphinxRecogniser(grammar=grammar).transcribe([clip], RATE) == ["text the office"]


@needs_sphinx
@needs_flite
def test_sphinx_aligns_words_and_phones(cache: SpeechCache) -> None:
    clip = cache.clip("the children want to play in the garden", "rms")
    recogniser = SphinxRecogniser()
    with pytest.raises(BackendError, match=r"call setup\(\) first"):
        recogniser.align(clip)
    recogniser.setup()
    words = recogniser.align(clip)
    heard = [word for word, _ in words if not word.startswith("<")]
    assert heard == recogniser.transcribe([clip], RATE)[0].split() and "children" in heard
    (children,) = [phones for word, phones in words if word == "children"]
    assert [phone for phone, _, _ in children] == ["CH", "IH", "L", "D", "R", "AH", "N"]
    times = [(start, frames) for _, phones in words for _, start, frames in phones]
    assert all(start + frames == after for (start, frames), (after, _) in itertools.pairwise(times))
    assert times[0][0] == 0 and abs(sum(times[-1]) - len(clip) / 160) < 5
    assert recogniser.align(np.zeros(0, np.float32)) == []
    assert recogniser.transcribe([clip], RATE)[0].split() == heard  # it still hears as before
    few = SphinxRecogniser(words=["children", "garden", "in", "play", "the", "to", "want"])
    few.setup()
    assert [word for word, _ in few.align(clip) if not word.startswith("<")] == heard


@needs_sphinx
def test_sphinx_mistakes_are_told() -> None:
    with pytest.raises(AnyglotError, match=r"no 'Rstlne', 'zzyx'; use lower-case"):
        SphinxRecogniser(words=["yes", "zzyx", "Rstlne"]).setup()
    with pytest.raises(AnyglotError, match="the grammar cannot be used"):
        SphinxRecogniser(grammar="#JSGF V1.0; grammar g; public <g> = (").setup()
    with pytest.raises(AnyglotError, match="cannot be read"):
        SphinxRecogniser(grammar="nowhere.jsgf")


def test_sphinx_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(BackendError, match="pip install pocketsphinx"):
        SphinxRecogniser().setup()


# --- nanoworld, and a server that serves it ---


@needs_flite
def test_nanoworld(cache: SpeechCache) -> None:
    clip = cache.clip("small red circle, top left", "awb")
    recogniser = NanoworldRecogniser()
    assert recogniser.transcribe([clip], RATE) == ["small red circle top left"]
    assert len(recogniser.identity()["sha256"]) == 64
    with pytest.raises(BackendError, match=r"nowhere/model\.safetensors"):
        NanoworldRecogniser("nowhere").identity()


class Server(BaseHTTPRequestHandler):
    """`/v1/audio/transcriptions` of nanoworld's recogniser; `fails` are statuses that come first."""

    recogniser: ClassVar[NanoworldRecogniser]
    asked: ClassVar[list[dict[str, Any]]] = []
    fails: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in form.iter_parts()  # type: ignore[attr-defined]
        }
        audio, rate = soundfile.read(io.BytesIO(fields.pop("file")), dtype="float32")
        self.asked.append({"path": self.path, "key": self.headers["Authorization"], **fields})
        status = self.fails.pop(0) if self.fails else 200
        answer = {"text": self.recogniser.transcribe([audio], rate)[0]} if status == 200 else {"error": "busy"}
        content = b"<html>" if status == 299 else json.dumps(answer).encode()
        self.send_response(200 if status == 299 else status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        return None


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    Server.recogniser = NanoworldRecogniser()
    Server.recogniser.setup()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_flite
def test_openai(url: str, cache: SpeechCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    recogniser = OpenAIRecogniser(url + "/", "nano-1", language="en", api_key_env="MY_KEY", tries=1)
    clips = [cache.clip("large blue square", "slt"), np.zeros(RATE, np.float32), cache.clip("small green cross", "rms")]
    assert recogniser.transcribe(clips, RATE) == ["large blue square", "", "small green cross"]
    last = Server.asked[-1]
    assert last["path"] == "/v1/audio/transcriptions" and last["key"] == "Bearer secret"
    assert (last["model"], last["language"]) == (b"nano-1", b"en")
    assert recogniser.identity() == {"engine": "openai", "url": url, "model": "nano-1", "language": "en"}
    for status, retryable in ((503, True), (429, True), (400, False), (299, False)):
        Server.fails.append(status)
        with pytest.raises(BackendError) as caught:
            recogniser.transcribe(clips[:1], RATE)
        assert caught.value.retryable is retryable
    Server.fails.append(503)
    again = OpenAIRecogniser(url, "nano-1", wait_s=0.01)
    assert again.transcribe(clips[:1], RATE) == ["large blue square"]
    for bad in ("ftp://host/v1", "http://me:hunter2@host/v1"):
        with pytest.raises(BackendError, match="give http") as caught:
            OpenAIRecogniser(bad, "m")
        assert "hunter2" not in str(caught.value)
    with pytest.raises(BackendError, match="see that the server runs") as caught:
        OpenAIRecogniser("http://127.0.0.1:9/v1", "m", tries=2, wait_s=0).transcribe(clips[:1], RATE)
    assert caught.value.retryable


# --- transformers: tiny random models, written and loaded as real ones are ---


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), word_delimiter_token="|")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    model.lm_head.weight.data *= 30
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("whisper")
    vocab = {token: i for i, token in enumerate(bytes_to_unicode().values())}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    special = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=32,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(special[0]), pad_token_id=end, bos_token_id=end,
        eos_token_id=end, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder)
    return folder


def noise(seconds: float, seed: int) -> Float32:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def test_hf_ctc_hears_what_the_model_says_and_padding_changes_nothing(ctc_folder: Path) -> None:
    from transformers import AutoModelForCTC, AutoProcessor

    clips = [noise(1.0, 0), noise(0.4, 1), noise(1.7, 2)]
    recogniser = HFRecogniser(str(ctc_folder))
    together = recogniser.transcribe(clips, RATE)
    assert together == [recogniser.transcribe([clip], RATE)[0] for clip in clips]
    processor, model = AutoProcessor.from_pretrained(ctc_folder), AutoModelForCTC.from_pretrained(ctc_folder).eval()
    with torch.inference_mode():
        inputs = processor(clips[2], sampling_rate=RATE, return_tensors="pt")
        expected = processor.batch_decode(model(**inputs).logits.argmax(-1))[0]
    assert together[2] == " ".join(expected.split()) != ""
    assert set(recogniser.identity()["sha256"]) >= {"config.json", "model.safetensors", "vocab.json"}


def test_hf_whisper_hears_all_of_a_long_sound(whisper_folder: Path) -> None:
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    recogniser = HFRecogniser(str(whisper_folder), batch_size=2)
    clips = [noise(1.0, 0), noise(2.0, 1), noise(0.5, 2)]
    together = recogniser.transcribe(clips, RATE)
    assert together == [recogniser.transcribe([clip], RATE)[0] for clip in clips]
    processor = AutoProcessor.from_pretrained(whisper_folder)
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()
    inputs = processor(clips[1], sampling_rate=RATE, return_tensors="pt")
    expected = processor.batch_decode(model.generate(**inputs, do_sample=False), skip_special_tokens=True)[0]
    assert together[1] == expected.strip() != ""
    long = np.concatenate([noise(27.0, 3), np.zeros(RATE // 2, np.float32), noise(27.0, 4)])
    heard = recogniser.hear(pieces(long, RATE, recogniser.piece_seconds))
    assert len(heard) == 2 and recogniser.transcribe([long], RATE) == [" ".join(part.strip() for part in heard)]


def test_hf_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(AnyglotError, match=r"no config\.json"):
        HFRecogniser("openai/whisper-tiny")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(BackendError, match="not a speech recogniser"):
        HFRecogniser(str(tmp_path)).transcribe([noise(0.5, 0)], RATE)
