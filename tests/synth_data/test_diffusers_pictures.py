"""Text-to-image by diffusers, with a whole tiny pipeline of random weights saved and loaded as published ones are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.backends import BackendError
from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.illustrate import IllustrateStage
from anyglot_synth.pictures.diffusion import DiffusersPictures
from anyglot_synth.stages import Item
from anyglot_synth.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, [], model_max_length=16)
    size = len(tokenizer)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet, "scheduler": DDIMScheduler()}
    made = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


def test_pictures_of_a_saved_pipeline(pipeline: Path, tmp_path: Path) -> None:
    backend = DiffusersPictures(pipeline, size=[24, 16], steps=2, licence="CC0-1.0")
    made = backend.make("a red cat", {}, 1)
    assert made.array.shape == (16, 24, 3) and made.array.dtype == np.uint8 and made.array.std() > 0
    assert np.array_equal(backend.make("a red cat", {}, 1).array, made.array), "a seed gives one picture"
    assert not np.array_equal(backend.make("a red cat", {}, 2).array, made.array)
    assert not np.array_equal(backend.make("a dog", {}, 1).array, made.array)
    assert backend.make("a red cat", {"height": 32}, 1).array.shape == (32, 24, 3)
    with pytest.raises(BackendError, match="no picture of 'a red cat'"):
        backend.make("a red cat", {"height": 33}, 1)

    item = Item(0, Dialogue((Turn("user", (Part("image", "a red cat"),)),), "test"))
    stage = IllustrateStage({"engine": "diffusers", "model": str(pipeline), "size": 16, "steps": 1})
    media = stage(item, Store(tmp_path)).dialogue.turns[0].parts[0].media
    assert media and media.size == (16, 16) and media.origin["backend"]["engine"] == "diffusers"
    assert len(media.origin["backend"]["weights"]) == 64


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the pipeline does not load"):
        DiffusersPictures(tmp_path).setup()
    with pytest.raises(BackendError, match="size 3"):
        DiffusersPictures(tmp_path, size=3)
    with pytest.raises(BackendError, match="dtype 'int8'"):
        DiffusersPictures(tmp_path, dtype="int8")
