"""The catalogue of published tokenizers: what exists, what it gives, and the licence of its weights.

A table without code that runs models: `load` reads it to find the class for a publisher's folder and the licence of a
hub id; `anyglot tokenizer list` prints it. Figures are the publishers'.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from anyglot_tokenizers.errors import LicenseWarning

UNKNOWN = "unknown"

MODEL_TYPES = {
    "encodec": "anyglot_tokenizers.encodec:Encodec",
    "dac": "anyglot_tokenizers.dac:Dac",
    "mimi": "anyglot_tokenizers.mimi:Mimi",
    "xcodec": "anyglot_tokenizers.xcodec:XCodec",
    "emu3": "anyglot_tokenizers.hf_image:Emu3Image",
    "janus": "anyglot_tokenizers.hf_image:JanusImage",
    "chameleon": "anyglot_tokenizers.hf_image:ChameleonImage",
    "emu3_vqgan": "anyglot_tokenizers.hf_image:Emu3Image",  # the tokenizer alone
    "janus_vqgan": "anyglot_tokenizers.hf_image:JanusImage",
    "chameleon_vqgan": "anyglot_tokenizers.hf_image:ChameleonImage",
}
"""`model_type` of a transformers config.json -> the class that reads it."""

CONFIG_KEYS = {
    "vq_strides": "anyglot_tokenizers.snac:Snac",
    "semantic_dimension": "anyglot_tokenizers.speechtokenizer:SpeechTokenizer",
    "encoder_ch_mult": "anyglot_tokenizers.vqgan:VQGAN",
    "ddconfig": "anyglot_tokenizers.vqgan:VQGAN",
}
"""A key that only the config.json of this class has, for publishers who give no `model_type`."""


def home_of(entries: Mapping[str, object]) -> str | None:
    """`module:class` that reads a publisher's config.json, None where it is none that is known."""
    if "model_type" in entries:
        return MODEL_TYPES.get(str(entries["model_type"]))
    return next((home for key, home in CONFIG_KEYS.items() if key in entries), None)


@dataclass(frozen=True)
class Entry:
    """A published tokenizer.

    Attributes:
        name: short name.
        hub_id: `owner/name` on the Hugging Face hub, or "" where it is published elsewhere.
        home: `module:class` that runs it.
        modality: of its media.
        sample_rate: Hz, or None.
        frame_rate: codes per second of each quantizer, or None.
        num_quantizers: codebooks.
        codebook_size: entries of each.
        license: of the weights; "unknown" where the publisher does not say.
        note: one line.
        convert: kind for `anyglot tokenizer convert`, where only a pickled checkpoint is published.
        file: that checkpoint, below the hub id.
    """

    name: str
    hub_id: str
    home: str
    modality: str
    sample_rate: int | None
    frame_rate: float | None
    num_quantizers: int
    codebook_size: int
    license: str
    note: str = ""
    convert: str = ""
    file: str = ""

    @property
    def bitrate(self) -> float | None:
        """Bits per second over all quantizers (audio only)."""
        return self.frame_rate and self.frame_rate * self.num_quantizers * math.log2(self.codebook_size)


CATALOG: tuple[Entry, ...] = (
    Entry(
        "emu3",
        "BAAI/Emu3-Gen-hf",
        "anyglot_tokenizers.hf_image:Emu3Image",
        "image",
        None,
        None,
        1,
        32768,
        "apache-2.0",
        "factor 8; the tokenizer out of the whole model",
    ),
    Entry(
        "emu3-chat",
        "BAAI/Emu3-Chat-hf",
        "anyglot_tokenizers.hf_image:Emu3Image",
        "image",
        None,
        None,
        1,
        32768,
        "apache-2.0",
        "the same tokenizer as emu3",
    ),
    Entry(
        "janus-pro-1b",
        "deepseek-community/Janus-Pro-1B",
        "anyglot_tokenizers.hf_image:JanusImage",
        "image",
        None,
        None,
        1,
        16384,
        "deepseek",
        "factor 16; the LlamaGen tokenizer of Janus",
    ),
    Entry(
        "janus-pro-7b",
        "deepseek-community/Janus-Pro-7B",
        "anyglot_tokenizers.hf_image:JanusImage",
        "image",
        None,
        None,
        1,
        16384,
        "deepseek",
        "factor 16",
    ),
    Entry(
        "chameleon",
        "facebook/chameleon-7b",
        "anyglot_tokenizers.hf_image:ChameleonImage",
        "image",
        None,
        None,
        1,
        8192,
        "chameleon-research-license",
        "factor 16; encode only; gated",
    ),
    Entry(
        "encodec-24khz",
        "facebook/encodec_24khz",
        "anyglot_tokenizers.encodec:Encodec",
        "speech",
        24000,
        75.0,
        32,
        1024,
        UNKNOWN,
        "any sound; causal, streams; the code is MIT, the publisher does not say it of these weights",
    ),
    Entry(
        "encodec-32khz",
        "facebook/encodec_32khz",
        "anyglot_tokenizers.encodec:Encodec",
        "music",
        32000,
        50.0,
        4,
        2048,
        "cc-by-nc-4.0",
        "of MusicGen, whose weights are CC-BY-NC; the card names no licence",
    ),
    Entry(
        "encodec-48khz",
        "facebook/encodec_48khz",
        "anyglot_tokenizers.encodec:Encodec",
        "music",
        48000,
        150.0,
        16,
        1024,
        "mit",
        "stereo; segments of 1 s, with their loudness in extras",
    ),
    Entry(
        "dac-16khz",
        "descript/dac_16khz",
        "anyglot_tokenizers.dac:Dac",
        "speech",
        16000,
        50.0,
        12,
        1024,
        "mit",
        "any sound",
    ),
    Entry(
        "dac-24khz",
        "descript/dac_24khz",
        "anyglot_tokenizers.dac:Dac",
        "speech",
        24000,
        75.0,
        32,
        1024,
        "mit",
        "any sound; 8 codebooks are 6 kbit/s",
    ),
    Entry(
        "dac-44khz",
        "descript/dac_44khz",
        "anyglot_tokenizers.dac:Dac",
        "music",
        44100,
        44100 / 512,
        9,
        1024,
        "mit",
        "any sound",
    ),
    Entry(
        "mimi",
        "kyutai/mimi",
        "anyglot_tokenizers.mimi:Mimi",
        "speech",
        24000,
        12.5,
        32,
        2048,
        "cc-by-4.0",
        "causal, streams; the first codebook is semantic; 8 codebooks are 1.1 kbit/s",
    ),
    Entry(
        "xcodec-hubert-librispeech",
        "hf-audio/xcodec-hubert-librispeech",
        "anyglot_tokenizers.xcodec:XCodec",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "HuBERT, LibriSpeech; the authors' repository has no licence",
    ),
    Entry(
        "xcodec-wavlm-mls",
        "hf-audio/xcodec-wavlm-mls",
        "anyglot_tokenizers.xcodec:XCodec",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "WavLM, MLS; the authors' repository has no licence",
    ),
    Entry(
        "xcodec-wavlm-more-data",
        "hf-audio/xcodec-wavlm-more-data",
        "anyglot_tokenizers.xcodec:XCodec",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "WavLM, MLS and more; the authors' repository has no licence",
    ),
    Entry(
        "xcodec-hubert-general",
        "hf-audio/xcodec-hubert-general",
        "anyglot_tokenizers.xcodec:XCodec",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "HuBERT, any sound; the authors' repository has no licence",
    ),
    Entry(
        "xcodec-hubert-general-balanced",
        "hf-audio/xcodec-hubert-general-balanced",
        "anyglot_tokenizers.xcodec:XCodec",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "HuBERT, any sound, balanced; the authors' repository has no licence",
    ),
    Entry(
        "snac-24khz",
        "hubertsiuzdak/snac_24khz",
        "anyglot_tokenizers.snac:Snac",
        "speech",
        24000,
        24000 / 2048,
        7,
        4096,
        "mit",
        "3 codebooks at 12, 23 and 47 Hz in 7 columns",
        "snac",
        "pytorch_model.bin",
    ),
    Entry(
        "snac-32khz",
        "hubertsiuzdak/snac_32khz",
        "anyglot_tokenizers.snac:Snac",
        "music",
        32000,
        32000 / 3072,
        15,
        4096,
        "mit",
        "4 codebooks at 10 to 83 Hz in 15 columns",
        "snac",
        "pytorch_model.bin",
    ),
    Entry(
        "snac-44khz",
        "hubertsiuzdak/snac_44khz",
        "anyglot_tokenizers.snac:Snac",
        "music",
        44100,
        44100 / 3072,
        15,
        4096,
        "mit",
        "4 codebooks at 14 to 115 Hz in 15 columns",
        "snac",
        "pytorch_model.bin",
    ),
    Entry(
        "speechtokenizer",
        "fnlp/SpeechTokenizer",
        "anyglot_tokenizers.speechtokenizer:SpeechTokenizer",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "first codebook semantic; code Apache-2.0",
        "speechtokenizer",
        "speechtokenizer_hubert_avg/SpeechTokenizer.pt",
    ),
    Entry(
        "speechtokenizer-snake",
        "fnlp/AnyGPT-speech-modules",
        "anyglot_tokenizers.speechtokenizer:SpeechTokenizer",
        "speech",
        16000,
        50.0,
        8,
        1024,
        UNKNOWN,
        "the one of AnyGPT; code Apache-2.0",
        "speechtokenizer",
        "speechtokenizer/ckpt.dev",
    ),
    Entry(
        "llamagen-vq16",
        "FoundationVision/LlamaGen",
        "anyglot_tokenizers.vqgan:VQGAN",
        "image",
        None,
        None,
        1,
        16384,
        "mit",
        "factor 16, ImageNet",
        "vqgan",
        "vq_ds16_c2i.pt",
    ),
    Entry(
        "llamagen-vq8",
        "FoundationVision/LlamaGen",
        "anyglot_tokenizers.vqgan:VQGAN",
        "image",
        None,
        None,
        1,
        16384,
        "mit",
        "factor 8, ImageNet",
        "vqgan",
        "vq_ds8_c2i.pt",
    ),
    Entry(
        "llamagen-vq16-t2i",
        "peizesun/llamagen_t2i",
        "anyglot_tokenizers.vqgan:VQGAN",
        "image",
        None,
        None,
        1,
        16384,
        "mit",
        "factor 16, LAION and more",
        "vqgan",
        "vq_ds16_t2i.pt",
    ),
    Entry(
        "taming-f16-1024",
        "",
        "anyglot_tokenizers.vqgan:VQGAN",
        "image",
        None,
        None,
        1,
        1024,
        "mit",
        "factor 16, ImageNet; last.ckpt linked in github.com/CompVis/taming-transformers",
        "vqgan",
    ),
    Entry(
        "taming-f16-16384",
        "",
        "anyglot_tokenizers.vqgan:VQGAN",
        "image",
        None,
        None,
        1,
        16384,
        "mit",
        "factor 16, ImageNet; last.ckpt linked in github.com/CompVis/taming-transformers",
        "vqgan",
    ),
    Entry(
        "taming-f8-16384",
        "",
        "anyglot_tokenizers.vqgan:VQGAN",
        "image",
        None,
        None,
        1,
        16384,
        "mit",
        "factor 8, OpenImages; vq-f8.zip linked in github.com/CompVis/taming-transformers",
        "vqgan",
    ),
)


def license_of(hub_id: str) -> str:
    """Licence of the weights of a hub id, "unknown" for those not in the catalogue."""
    return next((entry.license for entry in CATALOG if entry.hub_id == hub_id), UNKNOWN)


def way_to_convert(hub_id: str) -> str:
    """How to get at the weights of a hub id that has a pickled checkpoint only, "" for all others."""
    found = [entry for entry in CATALOG if entry.hub_id == hub_id and entry.convert]
    files = " or ".join(entry.file for entry in found)
    if not found:
        return ""
    return (
        f"only a pickled checkpoint is published, {files}; if you trust it, download it with the config.json beside it "
        f"(where there is one) and run: anyglot tokenizer convert {found[0].file} --kind {found[0].convert} --out DIR"
    )


def is_commercial(license: str) -> bool:
    """Whether a licence is known and does not forbid commercial use; "other" says of none what it is."""
    words = re.findall("[a-z0-9]+", license.lower())
    forbidden = {"nc", "noncommercial", "research", "proprietary", "amlr"} & set(words)
    return not is_unknown(license) and not forbidden and "non-commercial" not in "-".join(words)


def is_unknown(license: str) -> bool:
    """Whether nobody says what a licence is."""
    return license.strip().lower() in ("", UNKNOWN, "other", "none", "unlicensed")


def warn_about(name: str, license: str) -> None:
    """Issue a LicenseWarning for weights that may not be used commercially, or whose licence is not known."""
    if not is_commercial(license):
        what = "is not known" if is_unknown(license) else f"is {license}: no commercial use"
        warnings.warn(f"{name}: the licence of these weights {what}", LicenseWarning, stacklevel=3)
