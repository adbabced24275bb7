"""Emoji named by SmolLM2, for the `field` recipe: words that no training caption has need a model that knows words.

A language model from nothing never met "octopus"; SmolLM2 knows what it is. It comes in twice. What its middle layer
and its rows make of the training captions is the space in which `LookVQ` looks for the caption of a picture (one space
for both, as in DeViSE, Frome et al. 2013; the image codes that AnyGPT reads are aligned with words, too: SEED, Ge et
al., arXiv 2307.08041). It says which training captions are nearest, and SmolLM2 learns with LoRA to write the caption
of something that is like these. Held-out pictures have no part in either. Nothing is measured here.

Shapes: n pictures, C different captions, K codes a picture, T ids, D width of the backbone, E directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_lm.adapter import SMOLLM2, Backbone
from anyglot_lm.backbone import load_backbone
from anyglot_lm.hf_text import HFTextTokenizer
from anyglot_lm.parts import VOCABULARY_FILE
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import Run, write_shards
from anyglot_recipes.expand import expand
from anyglot_recipes.field_meaning import to_tensor, vary_images
from anyglot_recipes.stage_cli import as_arguments, run_stage
from anyglot_recipes.train import CONFIGS
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.look import LookVQ
from anyglot_tokenizers.tokenizer import seeded

if TYPE_CHECKING:
    from anyglot_recipes.field import Picture

PROMPT = "The emoji shows:"
DIRECTIONS = 128
"""Of what is made of captions."""
VARIANTS = 16
"""Versions of a picture that is read, the original among them."""
FOLDS = 10
"""Parts of the captions, each of which is given the codes of a tokenizer that learnt from the others."""
PLACES = 8
"""Captions that a picture is said to be like."""
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


def fit_codes(tokenizer: LookVQ, pictures: Sequence[Picture], vector_CE: Tensor, seed: int) -> list[np.ndarray]:
    """Teach codes the captions of pictures, and give the codes `[K, 1, 1]` of `VARIANTS` versions of each picture.

    These are of a tokenizer that learnt from other captions only, as it is for a picture whose caption is new.

    Args:
        tokenizer: to teach.
        pictures: of the training split.
        vector_CE: of each of their different captions, sorted.
        seed: of the versions.
    """
    x_nCHW = to_tensor(pictures)
    name_n = torch.from_numpy(np.unique([picture.word for picture in pictures], return_inverse=True)[1])
    still_n = torch.zeros(len(pictures), dtype=torch.bool)  # none is mirrored: arrows, letters, flags
    with seeded(seed):
        versions = [x_nCHW, *(vary_images(x_nCHW, still_n) for _ in range(VARIANTS - 1))]
    found: dict[int, np.ndarray] = {}
    for fold in range(min(FOLDS, len(vector_CE))):
        mine = (name_n % FOLDS == fold).nonzero().flatten()
        others_n = name_n % FOLDS != fold
        tokenizer.fit(x_nCHW[others_n], name_n[others_n], vector_CE)
        for version, x in enumerate(versions):
            for i, codes in zip(mine.tolist(), tokenizer.encode(x[mine]).codes.numpy(), strict=True):
                found[version * len(pictures) + i] = codes
    tokenizer.fit(x_nCHW, name_n, vector_CE)
    return [found[i] for i in range(len(found))]


@torch.no_grad()
def start_as_words(model: UnifiedModel, captions: Sequence[str]) -> None:
    """Start the rows of the codes of `seen` as the mean rows of the captions that they stand for, in place.

    Captions are in the order of the codebook; a tied head has the rows, too.
    """
    rows_VD = model.model.get_input_embeddings().weight
    block = model.vocabulary.block("seen")
    assert len(captions) == block.codebook_size
    words_CD = torch.stack([rows_VD[model.text.encode(f" {caption}")].mean(0) for caption in captions])
    for k in range(block.num_quantizers):
        first = block.first_id + k * block.codebook_size
        rows_VD[first : first + len(captions)] = words_CD


def train_namer(
    run: Run,
    pictures: Sequence[Picture],
    lora: Mapping[str, Any],
    seed: int,
    backbone: Backbone = SMOLLM2,
) -> Path:
    """A language model with codes of pictures as `seen`, taught to write the captions of `pictures`: its folder.

    Everything is below `captions` of the run; what is done is not done again.

    Args:
        run: the run.
        pictures: of the training split.
        lora: settings over those of configs/align.yaml, as `{"trainer.max_steps": 120}`.
        seed: of all randomness.
        backbone: the language model.

    Raises:
        CheckpointError: the backbone is not installed.
        ManifestError: there are too few captions.
    """
    place, gguf_file = backbone.place()
    captions = sorted({picture.word for picture in pictures})
    if len(captions) < 2 * PLACES:
        raise ManifestError(
            f"emoji of {len(captions)} captions; to name others needs {2 * PLACES}: leave out `captions`"
        )

    def make_start(folder: Path) -> None:
        """The model that training starts from, and what it reads."""
        seen = LookVQ(num_quantizers=PLACES)
        shown = fit_codes(seen, pictures, directions(readings(captions, backbone)), seed)
        block = {"grid": (1, 1), "num_quantizers": seen.spec.num_quantizers, "pattern": "frame_major"}
        how: dict[str, Any] = {"gguf_file": gguf_file, "init": "mean", "head_noise": 1.0, "seed": seed}
        model = expand(place, {"seen": seen}, {"seen": block}, **how)
        start_as_words(model, captions)
        model.save_pretrained(folder / "model")
        samples = (
            Sample([Segment("seen", code, "user"), Segment("text", picture.word, "assistant")])
            for picture, code in zip(list(pictures) * VARIANTS, shown, strict=True)
        )
        asked = (("emoji->text", sample) for sample in samples)
        skipped = write_shards(folder / "shards", asked, model.vocabulary, model.text, LONGEST, model.template)
        run.say(f"{skipped} captions longer than {LONGEST} ids left out")

    start = run.once("captions/start", make_start)
    folder = run.dir / "captions" / "lora"
    if not (folder / "model" / VOCABULARY_FILE).exists():  # the last to come
        mine = {"run_dir": folder, "model.start": start / "model", "data.shards": [str(start / "shards")]}
        given = {**lora, **mine, "data.seed": seed}
        report = run_stage("stage", [f"--config={CONFIGS / 'align'}.yaml", *as_arguments(given)], "captions")
        assert report is not None
        run.say(f"captions: final training loss {report['loss']:.4f}")
    return folder / "model"
