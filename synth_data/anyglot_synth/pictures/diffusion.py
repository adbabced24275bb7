"""`DiffusersPictures`: text-to-image by any pipeline of diffusers, from a folder or the hub.

Weights come as safetensors only. Which pictures may be used, and for what, is said by the weights' licence: name it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from anyglot_synth.backends import Backend, BackendError, Made
from anyglot_synth.dialogue import IMAGE, Json
from anyglot_synth.weights import weights_identity


class DiffusersPictures(Backend):
    """See the module. Style: any argument of the pipeline, such as `negative_prompt`.

    Args:
        model: folder or hub name of a text-to-image pipeline.
        revision: of a hub name, a commit.
        size: (width, height) in pixels, or one side; None takes the pipeline's own.
        steps: of denoising; None takes the pipeline's own.
        guidance: weight of the description; None takes the pipeline's own.
        device: of torch.
        dtype: float32, bfloat16, float16.
        licence: SPDX name for what the weights make.
    """

    modality = IMAGE
    name = "diffusers"

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        size: int | list[int] | tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        licence: str = "unknown",
    ) -> None:
        sides = None if size is None else [size, size] if isinstance(size, int) else list(size)
        if sides is not None and (len(sides) != 2 or min(sides) < 8):
            raise BackendError(f"diffusers: size {size}; give a side or [width, height] in pixels")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise BackendError(f"diffusers: dtype {dtype!r}; use float32, bfloat16 or float16")
        self.model, self.revision, self.device, self.dtype = os.fspath(model), revision, device, dtype
        self.licence = licence
        settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        settings |= {} if sides is None else {"width": sides[0], "height": sides[1]}
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self._pipeline: Any = None
        self._weights: str | None = None

    def identity(self) -> Json:
        """Versions, weights and settings."""
        diffusers = _diffusers()
        if self._weights is None:
            self._weights = weights_identity(self.model, self.revision)
        return {
            "engine": self.name,
            "versions": [diffusers.__version__, torch.__version__],
            "weights": self._weights,
            "settings": self.settings,
            "device": self.device.split(":")[0],
            "dtype": self.dtype,
        }

    def setup(self) -> None:
        """Loads the pipeline."""
        if self._pipeline is not None:
            return
        diffusers = _diffusers()
        try:
            source: Any = {"revision": self.revision} if self.revision else {}
            pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
                self.model, torch_dtype=getattr(torch, self.dtype), use_safetensors=True, **source
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise BackendError(
                f"{self.model}: the pipeline does not load ({error}); give a folder of a text-to-image pipeline with "
                "safetensors"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(self.device)

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """A picture of a description."""
        self.setup()
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            made = self._pipeline(text, generator=generator, output_type="np", **{**self.settings, **style})
        except (TypeError, ValueError, RuntimeError) as error:
            raise BackendError(
                f"diffusers: no picture of {text[:80]!r} ({error}); check size, steps and style"
            ) from error
        pixels = made.images[0]  # [H, W, 3] in 0..1
        if not np.isfinite(pixels).all():
            raise BackendError(f"diffusers: no finite picture of {text[:80]!r}; try dtype float32")
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise BackendError("diffusers: the pipeline's own checker refused the picture", retryable=False)
        return Made(np.round(pixels * 255).astype(np.uint8))


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise BackendError(f"diffusers is not here ({error}); install it: pip install 'anyglot[pictures]'") from error
    return diffusers
