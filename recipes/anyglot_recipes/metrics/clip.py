"""CLIP of transformers as a joint space of pictures and texts.

Pictures go through the checkpoint's own processor in Pillow (no torchvision); texts are cut to what the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyglot_recipes.metrics.published import BATCH, load_model, opened, text_vectors, unit


class Clip:
    """A CLIP checkpoint.

    Args:
        name: a local folder or a hub id, such as openai/clip-vit-base-patch32; weights are safetensors.
        prefix: stands before every text, as CLIPScore wants (Hessel et al. 2021).
        device: where it runs.

    Raises:
        AnyglotError: there is no such checkpoint, or it is not CLIP.
    """

    sample_rate: int | None = None

    def __init__(self, name: str, *, prefix: str = "A photo depicts ", device: str | torch.device = "cpu") -> None:
        import transformers

        auto = transformers.AutoImageProcessor
        self.model = load_model(name, "clip", device)
        self.tokenizer = opened(name, "clip", lambda: transformers.AutoTokenizer.from_pretrained(name))
        self.processor = opened(name, "clip", lambda: auto.from_pretrained(name, backend="pil"))
        self.name, self.prefix, self.device = name, prefix, device
        self.longest = int(self.model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 `[N, D]` of `prefix` and text."""
        return text_vectors(self.model, self.tokenizer, [self.prefix + text for text in texts], self.longest)

    @torch.inference_mode()
    def media(self, media: Sequence[Tensor]) -> Tensor:
        """Unit vectors float32 `[N, D]` of pictures float32 `[3, H, W]` in [0, 1], of any sizes."""
        found = []
        for start in range(0, len(media), BATCH):
            batch = [(image.clamp(0, 1) * 255).round().byte() for image in media[start : start + BATCH]]
            images = [image.permute(1, 2, 0).numpy() for image in batch]
            inputs = self.processor(images=images, input_data_format="channels_last", return_tensors="pt")
            output = self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device))
            found.append(unit(output))
        return torch.cat(found)
