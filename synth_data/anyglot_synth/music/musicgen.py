"""`MusicGen`: music by transformers' `MusicgenForConditionalGeneration` (Copet et al. 2023), from a folder or the hub.

Published weights are CC-BY-NC-4.0 (the code that runs them here is not): say so in `licence`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.dialogue import MUSIC, Json
from anyglot_synth.weights import weights_identity


class MusicGen(Backend):
    """See the module. Style: `seconds` of one request.

    Args:
        model: folder with safetensors, or hub name.
        revision: of a hub name, a commit.
        seconds: of music.
        guidance: weight of the description (classifier-free), 1 for none.
        temperature: of the sampling.
        top_k: likeliest codes that are drawn from.
        device: of torch.
        licence: SPDX name for what the weights make.
    """

    modality = MUSIC
    name = "musicgen"

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        seconds: float = 5.0,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 250,
        device: str = "cpu",
        licence: str = "unknown",
    ) -> None:
        if seconds <= 0 or guidance < 1 or temperature <= 0 or top_k < 1:
            raise BackendError(
                f"musicgen: seconds {seconds}, guidance {guidance}, temperature {temperature}, top_k {top_k}: use "
                f"seconds "
                "and temperature above 0, guidance and top_k of 1 or more"
            )
        self.model, self.revision, self.seconds, self.guidance = os.fspath(model), revision, seconds, guidance
        self.temperature, self.top_k, self.device, self.licence = temperature, top_k, device, licence
        self._loaded: tuple[Any, Any] | None = None
        self._weights: str | None = None

    def identity(self) -> Json:
        """Versions, weights and settings."""
        import transformers

        if self._weights is None:
            self._weights = weights_identity(self.model, self.revision)
        settings = [self.seconds, self.guidance, self.temperature, self.top_k]
        versions = [transformers.__version__, torch.__version__]
        device = self.device.split(":")[0]
        return {"engine": self.name, "versions": versions, "weights": self._weights, "is": settings, "device": device}

    def setup(self) -> None:
        """Loads the model."""
        if self._loaded is not None:
            return
        try:
            from transformers import AutoTokenizer, MusicgenForConditionalGeneration

            source: Any = {"revision": self.revision} if self.revision else {}
            tokenizer = AutoTokenizer.from_pretrained(self.model, **source)
            model, report = MusicgenForConditionalGeneration.from_pretrained(
                self.model, use_safetensors=True, output_loading_info=True, **source
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise BackendError(
                f"{self.model}: MusicGen does not load ({error}); give a folder with safetensors, or install "
                f"transformers"
            ) from error
        if report["missing_keys"]:
            raise BackendError(
                f"{self.model}: weights are missing ({sorted(report['missing_keys'])[0]}, ...); copy it again"
            )
        self._loaded = model.eval().to(self.device), tokenizer

    @torch.inference_mode()
    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """Music of a description, at the rate of the model's codec."""
        self.setup()
        assert self._loaded is not None
        model, tokenizer = self._loaded
        codec = model.config.audio_encoder
        frames = max(1, round(float(style.get("seconds", self.seconds)) * codec.frame_rate))
        limit = model.config.decoder.max_position_embeddings
        # The delay pattern takes a place more for each codebook.
        if frames + model.config.decoder.num_codebooks + 1 > limit:
            raise BackendError(f"musicgen: {frames / codec.frame_rate:g} s is too long for {self.model}; ask for less")
        given = tokenizer([text], return_tensors="pt").to(self.device)
        cuda = [torch.device(self.device)] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            audio = model.generate(
                **{key: given[key] for key in ("input_ids", "attention_mask")},
                do_sample=True,
                guidance_scale=self.guidance,
                temperature=self.temperature,
                top_k=self.top_k,
                max_new_tokens=frames,
            )
        sound = audio[0].float().mean(dim=0).cpu().numpy()  # [C, T]
        if not np.isfinite(sound).all():
            raise BackendError(f"musicgen: no finite sound for {text[:80]!r}; try float32 or other weights")
        return Made(np.clip(sound, -1, 1).astype(np.float32), int(codec.sampling_rate))
