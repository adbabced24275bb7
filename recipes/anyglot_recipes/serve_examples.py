"""What visitors of `anyglot serve` can try with the shipped model: scenes of nanoworld, drawn and played here.

Only models with the shipped model's vocabulary (and so its tokenizers and words) get examples; others get none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from anyglot_lm.serve.talk import Example, Given
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import describe, edit
from anyglot_synth.nanoworld.melody import render
from anyglot_synth.nanoworld.scene import Scene, sample_scene

SHIPPED = Path(__file__).parent / "weights" / "nano"
SEEDS = (13, 18, 4, 14, 21, 39)
"""Of scenes like those that the model was trained on."""


def examples(model: UnifiedModel) -> list[Example]:
    """Examples for a model; none unless they fit it."""
    if model.vocabulary.fingerprint != Vocabulary.load(SHIPPED / "vocabulary.json").fingerprint:
        return []
    drawn, said, seen, hummed, played, changed = (sample_scene(np.random.default_rng(seed)) for seed in SEEDS)
    change, _ = edit(changed, np.random.default_rng(SEEDS[-1]))
    return [
        Example("Draw a sentence", (Given("text", describe(drawn)),), ("image",)),
        Example("Say a sentence", (Given("text", describe(said)),), ("speech",)),
        Example("Describe a picture", (_picture(seen),), ("text",)),
        Example("Hum a picture", (_picture(hummed),), ("music",)),
        Example("Draw a melody", (_melody(played),), ("image",)),
        Example("Change a picture", (Given("text", change), _picture(changed)), ("image",)),
    ]


def _picture(scene: Scene) -> Given:
    return Given("image", torch.from_numpy(draw(scene)).permute(2, 0, 1) / 255)


def _melody(scene: Scene) -> Given:
    return Given("music", torch.from_numpy(render(scene))[None])
