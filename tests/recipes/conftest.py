"""A whole unified model that was never trained: every part is there, and small. And servers of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anyglot_lm.model import new_llama
from anyglot_lm.segments import Template
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_recipes.chain import BlockConfig, LMConfig, build_vocabulary
from anyglot_recipes.field import WORDS
from anyglot_tokenizers.audio import AudioCodec
from anyglot_tokenizers.image import ImageVQ
from anyglot_tokenizers.meaning import HeardVQ, SeenVQ
from anyglot_tokenizers.media import write_image
from anyglot_tokenizers.tokenizer import Tokenizer

SAYINGS = ["a large red circle at the top left", "make the square blue", "what color is it?", "two"]

SAID = ["a large red circle at the top left", "make the square blue", "the user asks the assistant"]
BACKBONE_ROWS = 448


def _codec(modality: str) -> AudioCodec:
    return AudioCodec(
        modality=modality,
        n_fft=640,
        hop=160,
        stride=8,
        num_mels=16,
        dim=16,
        encoder_depth=1,
        decoder_depth=1,
        num_quantizers=2,
        codebook_size=16,
        codebook_dim=8,
    ).eval()


@pytest.fixture(scope="session")
def tiny_model() -> UnifiedModel:
    """Pictures of 64 x 64 pixels, speech and music at 12.5 frames a second."""
    text = TextTokenizer.train(SAYINGS, vocab_size=300)
    image = ImageVQ(channels=(8,), patch=16, downsample_factor=16, num_quantizers=2, codebook_size=16, codebook_dim=8)
    tokenizers: dict[str, Tokenizer] = {"image": image.eval(), "speech": _codec("speech"), "music": _codec("music")}
    blocks = [BlockSpec.from_code_spec(image.spec, num_quantizers=1, pattern="raster", grid=(4, 4))]
    blocks += [
        BlockSpec.from_code_spec(tokenizers[m].spec, num_quantizers=1, max_frames=40) for m in ("speech", "music")
    ]
    vocabulary = Vocabulary.build(text.size, *blocks, text_fingerprint=text.fingerprint)
    llama = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2, max_length=1024)
    return UnifiedModel(llama, vocabulary, Template(), text, tokenizers)


@pytest.fixture(scope="module")
def field_model(tiny_model: UnifiedModel) -> UnifiedModel:
    """It reads and writes everything that the field trial asks for; of music one codebook, read as it is written."""
    text = TextTokenizer.train([f"{verb} {word}" for verb in ("say", "sign", "play") for word in WORDS], vocab_size=300)
    readers = {"heard": HeardVQ(dim=64, depth=1, channels=8).eval(), "seen": SeenVQ().eval()}
    tokenizers: dict[str, Tokenizer] = {**readers, **tiny_model.tokenizers}
    blocks = {name: BlockConfig(num_quantizers=1) for name in tokenizers}
    blocks["speech"] = BlockConfig(num_quantizers=1, max_frames=10)
    blocks["music"] = BlockConfig(num_quantizers=1, max_frames=40)
    grids = {name: (64 // tokenizers[name].spec.downsample_factor,) * 2 for name in ("seen", "image")}
    vocabulary = build_vocabulary(text, tokenizers, LMConfig(blocks=blocks), grids)
    torch.manual_seed(0)
    llama = new_llama(vocabulary, hidden_size=32, num_layers=1, num_heads=2, max_length=512)
    return UnifiedModel(llama, vocabulary, Template(), text, tokenizers)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama that was never trained, with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("backbone")
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(SAID * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=BACKBONE_ROWS,  # more than the tokenizer has: padded
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=640,
        bos_token_id=raw.token_to_id("<|im_start|>"),
        eos_token_id=raw.token_to_id("<|im_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def prepare_photos(tiny_model: UnifiedModel, tmp_path: Path) -> list[str]:
    """The words of `anyglot prepare` for five photos, named by their folders, into `out`."""
    tiny_model.save_pretrained(tmp_path / "model")
    for i, name in enumerate(("red", "red", "blue", "blue", "green")):
        place = tmp_path / "photos" / name / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_image(place, torch.full((3, 64, 64), i / 5))
    return ["prepare", str(tmp_path / "photos"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    service: Any

    def metric(self, name: str, **labels: str) -> float:
        found = self.service.metrics.registry.get_sample_value(name, labels)
        return 0.0 if found is None else found

    def until(self, good: Callable[[], bool], seconds: float = 10.0) -> None:
        """Waits for something to become true."""
        end = time.monotonic() + seconds
        while not good():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    @contextmanager
    def held(self) -> Iterator[Any]:
        """The engine, whose steps wait until the context ends or its gate is opened; `most` rows were in one step."""
        engine, gate = self.service.batcher.engine, threading.Event()
        step = engine.step

        def late() -> Any:
            assert gate.wait(30)
            rows = step()
            engine.most = max(engine.most, len(rows))
            return rows

        engine.step, engine.gate, engine.most = late, gate, 0
        try:
            yield engine
        finally:
            del engine.step
            gate.set()


@contextmanager
def run_server(model: UnifiedModel, *, name: str = "tiny", **options: Any) -> Iterator[Running]:
    from anyglot_lm.serve.app import build_app
    from anyglot_lm.serve.connection import listen, make_server
    from anyglot_lm.serve.limits import Limits

    limits = Limits(**{"stop_timeout": 2, **options.pop("limits", {})})
    app = build_app(model, name=name, limits=limits, **options)
    socket = listen("127.0.0.1", 0)
    port, server = socket.getsockname()[1], make_server(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    running = Running(f"http://127.0.0.1:{port}", app.state.service)
    try:
        running.until(lambda: server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not running.service.batcher.alive


@pytest.fixture(scope="session")
def serving(tiny_model: UnifiedModel) -> Callable[..., AbstractContextManager[Running]]:
    """Starts servers, of the tiny model unless another is given: a context for each."""
    return lambda model=tiny_model, **options: run_server(model, **options)


@pytest.fixture(scope="module")
def server(serving: Callable[..., AbstractContextManager[Running]]) -> Iterator[Running]:
    """One with the usual limits."""
    with serving() as running:
        yield running
