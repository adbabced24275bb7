"""A whole unified model that was never trained: every part is there, and small."""

from __future__ import annotations

import pytest

from anyglot_lm.model import new_llama
from anyglot_lm.segments import Template
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.audio import AudioCodec
from anyglot_tokenizers.image import ImageVQ
from anyglot_tokenizers.tokenizer import Tokenizer

SAYINGS = ["a large red circle at the top left", "make the square blue", "what color is it?", "two"]


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
