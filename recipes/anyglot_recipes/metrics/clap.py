"""CLAP of transformers as a joint space of sounds and texts.

A sound longer than the model hears (10 s) is cut into parts of that length, and its vector is the mean of theirs, made
of length 1 again: the checkpoint's own way is a random part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_recipes.metrics.published import load_model, opened, text_vectors, unit


class Clap:
    """A CLAP checkpoint.

    Args:
        name: a local folder or a hub id, such as laion/larger_clap_music; weights are safetensors.
        device: where it runs.

    Raises:
        AnyglotError: there is no such checkpoint, or it is not CLAP.
    """

    sample_rate: int | None

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        import transformers

        self.model = load_model(name, "clap", device)
        self.tokenizer = opened(name, "clap", lambda: transformers.AutoTokenizer.from_pretrained(name))
        self.extractor = opened(name, "clap", lambda: transformers.AutoFeatureExtractor.from_pretrained(name))
        self.name, self.device = name, device
        self.sample_rate = int(self.extractor.sampling_rate)
        self.longest = int(self.extractor.nb_max_samples)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 `[N, D]`."""
        positions = int(self.model.config.text_config.max_position_embeddings) - 2  # RoBERTa counts from 2
        return text_vectors(self.model, self.tokenizer, texts, positions)

    @torch.inference_mode()
    def media(self, media: Sequence[Tensor]) -> Tensor:
        """Unit vectors float32 `[N, D]` of sounds float32 `[C, samples]` at `sample_rate`, of any lengths."""
        return torch.stack([self._sound(np.asarray(audio.mean(0), np.float32)) for audio in media])

    def _sound(self, mono_S: np.ndarray) -> Tensor:
        parts = [mono_S[start : start + self.longest] for start in range(0, len(mono_S), self.longest)]
        found = []
        for part in parts:  # one at a time: in a batch, models with fusion draw one at random to fuse
            inputs = self.extractor(part, sampling_rate=self.sample_rate, return_tensors="pt").to(self.device)
            output = self.model.get_audio_features(**inputs)
            found.append(unit(output)[0])
        return F.normalize(torch.stack(found).mean(0), dim=0)
