"""Emoji named by SmolLM2, for the `field` recipe: words that no training caption has need a model that knows words.

A language model from nothing never met "octopus"; SmolLM2 knows what it is. It comes in twice. What its middle layer
and its rows make of the training captions is what the codes of `SeenVQ` learn to name (a picture and its word in one
space, as in DeViSE, Frome et al. 2013; the image codes that AnyGPT reads are aligned with words, too: SEED, Ge et al.,
arXiv 2307.08041). Then it learns with LoRA to write the caption after those codes. Held-out pictures have no part in
either. Nothing is measured here.

Shapes: n pictures, T ids, D width of the backbone, E directions, V different captions, C codes of all K codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_lm.adapter import SMOLLM2, Backbone
from anyglot_lm.backbone import load_backbone
from anyglot_lm.hf_text import HFTextTokenizer
from anyglot_lm.parts import VOCABULARY_FILE
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import Run, write_shards
from anyglot_recipes.expand import expand
from anyglot_recipes.field_meaning import fit, seen_variants, to_tensor, vary_images
from anyglot_recipes.stage_cli import as_arguments, run_stage
from anyglot_recipes.train import CONFIGS
from anyglot_tokenizers import load
from anyglot_tokenizers.meaning import SeenVQ
from anyglot_tokenizers.precision import native_bf16
from anyglot_tokenizers.tokenizer import seeded

if TYPE_CHECKING:
    from anyglot_recipes.field import Picture, ReaderConfig

PROMPT = "The emoji shows:"
DIRECTIONS = 64
"""Of what is made of captions (32 or 128 were about the same, docs/log.md)."""
VARIANTS = 16
"""Versions of a picture that is read, the original among them."""
SHARPNESS = 10.0
"""What the cosines of pictures and captions are multiplied by."""
HIDDEN = 0.5
"""Share of the pictures that a square hides a part of (random erasing, Zhong et al., arXiv 1708.04896)."""
RIDGE, STRESS = 10.0, 3.0
"""Of the rows that codes start with: how much little data is doubted, and how far they lie from their mean."""
LONGEST = 128
"""Ids of an emoji with its caption."""


@torch.inference_mode()
def readings(captions: Sequence[str], backbone: Backbone) -> Tensor:
    """What a language model makes of captions after `PROMPT`, float32 `[n, 2, D]`, means over their ids.

    First the hidden states of the middle layer, then the rows of the ids themselves.

    Raises CheckpointError where the backbone is not installed.
    """
    place, gguf_file = backbone.place()
    text = HFTextTokenizer.from_backbone(place, gguf_file=gguf_file)
    model = load_backbone(place, gguf_file=gguf_file)
    start = text.encode(PROMPT)
    found = []
    for first in range(0, len(captions), 64):
        said = [text.encode(f" {caption}") for caption in captions[first : first + 64]]
        size = max(map(len, said))
        ids_nT = torch.tensor([start + ids + [0] * (size - len(ids)) for ids in said])  # later ids change nothing
        layers = model.base_model(ids_nT, output_hidden_states=True, use_cache=False).hidden_states
        h_n2TD = torch.stack([layers[len(layers) // 2], layers[0]], 1)[:, :, len(start) :].float()
        found += [h_n2TD[row, :, : len(ids)].mean(1) for row, ids in enumerate(said)]
    return torch.stack(found)


def directions(readings_n2D: Tensor, count: int = DIRECTIONS) -> Tensor:
    """Unit vectors `[n, E]`: both readings, less their mean and of length 1, along their `count` strongest directions.

    Directions are scaled halfway to equal strength.
    """
    unit_nD = F.normalize(readings_n2D - readings_n2D.mean(0), dim=2).flatten(1).double()
    u_nE, deviation_E, _ = torch.linalg.svd(unit_nD, full_matrices=False)
    return F.normalize(u_nE[:, :count] * deviation_E[:count].sqrt(), dim=1).float()


def hide_squares(x_BCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """Put a square of random color and place, an eighth to less than a half a side, over `HIDDEN` of the pictures."""
    x_BCHW = x_BCHW.clone()
    side = x_BCHW.shape[-1]
    for x_CHW in x_BCHW:
        if rng.random() < HIDDEN:
            size, (y, x) = int(rng.integers(side // 8, side * 7 // 16)), rng.integers(0, side * 3 // 4, 2)
            x_CHW[:, y : y + size, x : x + size] = torch.from_numpy(rng.random((3, 1, 1), dtype=np.float32))
    return x_BCHW


def train_codes(
    tokenizer: SeenVQ, pictures: Sequence[Picture], target_nE: Tensor, steps: int, seed: int, batch_size: int, lr: float
) -> nn.Linear:
    """Train codes to tell a picture's caption among all of them, by cosine.

    Args:
        tokenizer: to train, with one place a picture; it is left in evaluation mode.
        pictures: of the training split.
        target_nE: unit vector of the caption of each.
        steps: optimizer steps.
        seed: of batches, augmentation and the head.
        batch_size: pictures per step.
        lr: peak learning rate.

    Returns:
        The head: targets, up to their length, of quantized latents.
    """
    x_nCHW = to_tensor(pictures)
    captions = [picture.word for picture in pictures]
    names = sorted(set(captions))
    caption_n = torch.tensor([names.index(caption) for caption in captions])
    target_VE = target_nE[[captions.index(name) for name in names]]
    rng = np.random.default_rng([seed, 23])
    with seeded(seed):
        head = nn.Linear(tokenizer.config["codebook_dim"], target_nE.shape[1])
        still = torch.zeros(batch_size, dtype=torch.bool)  # none is mirrored: arrows, letters, flags

        def loss_at(step: int) -> Tensor:
            chosen_B = torch.from_numpy(rng.integers(len(pictures), size=batch_size))
            x_BCHW = hide_squares(vary_images(x_nCHW[chosen_B], still), rng)
            with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
                z_BDhw = tokenizer.latents(x_BCHW)
            q_BDhw, commit = tokenizer.quantize(z_BDhw.float())
            cosine_BV = F.normalize(head(q_BDhw.flatten(1)), dim=1) @ target_VE.T
            return F.cross_entropy(SHARPNESS * cosine_BV, caption_n[chosen_B]) + commit

        fit(nn.ModuleList([tokenizer.train(), head]), loss_at, steps, lr)
    tokenizer.eval()
    return head.eval()


@torch.no_grad()
def start_as_words(model: UnifiedModel, codes_nK: np.ndarray, captions: Sequence[str]) -> None:
    """Start the rows of the codes of `seen` as the words that they stand beside, in place; a tied head has them, too.

    The mean row of a caption's ids is taken for a sum, over the codebooks, of a row for each code (ridge regression);
    a code's row is the mean of all captions and `STRESS` times its part.

    Args:
        model: whose rows of codes know nothing yet.
        codes_nK: int64 `[n, K]`, of the training pictures.
        captions: of these.
    """
    rows_VD = model.model.get_input_embeddings().weight
    words = {caption: rows_VD[model.text.encode(caption)].double().mean(0) for caption in set(captions)}
    caption_nD = torch.stack([words[caption] for caption in captions])
    block = model.vocabulary.block("seen")
    count = block.num_quantizers * block.codebook_size
    ids_nK = torch.from_numpy(codes_nK) + block.codebook_size * torch.arange(block.num_quantizers)
    present_nC = torch.zeros(len(captions), count, dtype=torch.double).scatter_(1, ids_nK, 1.0)
    mean_D = caption_nD.mean(0)
    square_CC = present_nC.T @ present_nC + RIDGE * torch.eye(count, dtype=torch.double)
    part_CD = torch.linalg.solve(square_CC, present_nC.T @ (caption_nD - mean_D))
    rows_VD[block.first_id : block.first_id + count] = (mean_D + STRESS * part_CD).to(rows_VD.dtype)


def train_namer(
    run: Run,
    pictures: Sequence[Picture],
    codes: ReaderConfig,
    lora: Mapping[str, Any],
    seed: int,
    backbone: Backbone = SMOLLM2,
) -> Path:
    """A language model with codes of pictures as `seen`, taught to write the captions of `pictures`: its folder.

    Everything is below `captions` of the run; what is done is not done again.

    Args:
        run: the run.
        pictures: of the training split.
        codes: the tokenizer, with one place a picture, and its training.
        lora: settings over those of configs/align.yaml, as `{"trainer.max_steps": 120}`.
        seed: of all randomness.
        backbone: the language model.

    Raises:
        CheckpointError: the backbone is not installed.
    """
    place, gguf_file = backbone.place()

    def make_codes(folder: Path) -> None:
        tokenizer = SeenVQ(**{"seed": seed, **codes.model})
        target_nE = directions(readings([picture.word for picture in pictures], backbone))
        train_codes(tokenizer, pictures, target_nE, codes.max_steps, seed, codes.batch_size, codes.lr)
        tokenizer.save_pretrained(folder, dtype=torch.float16)

    def make_start(folder: Path) -> None:
        """The model that training starts from, and what it reads."""
        seen = load(run.dir / "captions" / "seen")
        assert isinstance(seen, SeenVQ)
        block = {"grid": (1, 1), "num_quantizers": seen.spec.num_quantizers, "pattern": "frame_major"}
        how: dict[str, Any] = {"gguf_file": gguf_file, "init": "mean", "head_noise": 1.0, "seed": seed}
        model = expand(place, {"seen": seen}, {"seen": block}, **how)
        shown = list(seen_variants(seen, pictures, VARIANTS, seed))
        start_as_words(model, np.stack([code.ravel() for _, code in shown]), [picture.word for picture, _ in shown])
        model.save_pretrained(folder / "model")
        samples = (
            Sample([Segment("seen", code, "user"), Segment("text", picture.word, "assistant")])
            for picture, code in shown
        )
        asked = (("emoji->text", sample) for sample in samples)
        skipped = write_shards(folder / "shards", asked, model.vocabulary, model.text, LONGEST, model.template)
        run.say(f"{skipped} captions longer than {LONGEST} ids left out")

    run.once("captions/seen", make_codes)
    start = run.once("captions/start", make_start)
    folder = run.dir / "captions" / "lora"
    if not (folder / "model" / VOCABULARY_FILE).exists():  # the last to come
        mine = {"run_dir": folder, "model.start": start / "model", "data.shards": [str(start / "shards")]}
        given = {**lora, **mine, "data.seed": seed}
        report = run_stage("stage", [f"--config={CONFIGS / 'align'}.yaml", *as_arguments(given)], "captions")
        assert report is not None
        run.say(f"captions: final training loss {report['loss']:.4f}")
    return folder / "model"
