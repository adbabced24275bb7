"""Networks that an evaluation can listen and look with, by name: recognisers, speaker encoders, image features.

Each is a plain callable, so anything else fits as well; these are the ones that the command line can name. All come
from local folders or the Hugging Face hub through transformers, except pocketsphinx, whose package holds its model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.metrics import mono, resample

RATE = 16000  # Hz, of all recognisers and speaker encoders here


def recogniser(name: str) -> Callable[[Tensor, int], str]:
    """Audio `[1, samples]` and its rate to text: `"sphinx"`, or a folder or hub id such as openai/whisper-tiny.

    Raises AnyglotError if the package or the model is missing.
    """
    if name == "sphinx":
        return _sphinx()
    pipeline = _transformers("pipeline")
    model = _opened(lambda: pipeline("automatic-speech-recognition", model=name), name)
    return lambda audio, rate: str(model(resample(mono(audio), rate, RATE))["text"])


def speaker_encoder(name: str) -> Callable[[Tensor, int], Tensor]:
    """Audio `[1, samples]` and its rate to a voice embedding `[D]`: a folder or hub id of an x-vector model, such as
    microsoft/wavlm-base-plus-sv.

    Raises AnyglotError if the package or the model is missing, or if the model was never trained to tell voices apart.
    """
    auto = _transformers("AutoModelForAudioXVector")
    model, info = _opened(lambda: auto.from_pretrained(name, output_loading_info=True), name)
    if any(key.startswith(("projector.", "tdnn.", "feature_extractor.")) for key in info["missing_keys"]):
        raise AnyglotError(f"{name}: has no weights of an x-vector head; name a model for speaker verification")
    model.eval()

    @torch.no_grad()
    def embed(audio: Tensor, rate: int) -> Tensor:
        wave = resample(mono(audio), rate, RATE)
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        embedding: Tensor = model(torch.from_numpy(wave)[None]).embeddings[0]
        return embedding

    return embed


def feature_network(name: str) -> nn.Module:
    """Images `[B, 3, H, W]` in [0, 1] to the feature maps of a vision backbone: a folder or hub id, such as
    microsoft/resnet-50. Raises AnyglotError if the package or the model is missing."""

    def opened() -> Any:
        config = _transformers("AutoConfig").from_pretrained(name)
        config.out_features = config.stage_names[1:]
        # AutoBackbone.from_pretrained takes local folders for names of timm, so only the class is its choice.
        return type(_transformers("AutoBackbone").from_config(config)).from_pretrained(name, config=config)

    return BackboneFeatures(_opened(opened, name))


class BackboneFeatures(nn.Module):
    """A transformers backbone on images in [0, 1], scaled by ImageNet's mean and deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        return list(self.backbone((images_B3HW - self.mean) / self.deviation).feature_maps)


def _sphinx() -> Callable[[Tensor, int], str]:
    try:
        from pocketsphinx import Decoder
    except ImportError as error:
        raise AnyglotError("pocketsphinx is not installed; pip install 'anyglot[judge]'") from error
    decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def hear(audio: Tensor, rate: int) -> str:
        wave = resample(mono(audio), rate, RATE)
        loudest = np.abs(wave).max(initial=0)
        if loudest < 1e-4:
            return ""
        decoder.start_utt()
        decoder.process_raw(np.round(wave * (0.5 / loudest) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else str(found.hypstr)

    return hear


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise AnyglotError("transformers is not installed; pip install 'anyglot[lm]'") from error
    return getattr(transformers, name)


def _opened(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise AnyglotError(f"{name}: cannot be loaded for this purpose ({error})") from error
