"""What visitors of `anyglot serve` can try with the shipped model: scenes of nanoworld, drawn, spoken and played here.

Two cards, to speak and see and hear the answer, and to draw and hear a tune; and examples. Only models with the
shipped model's vocabulary (and so its tokenizers and words) get them; others get none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anyglot_lm.serve.cards import Card, Sketch
from anyglot_lm.serve.talk import Example, Given
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes.shipped import NANO
from anyglot_synth.nanoworld.draw import BACKGROUND, CENTERS, PALETTE, SIZE, draw, mask
from anyglot_synth.nanoworld.language import describe, edit, thing_words
from anyglot_synth.nanoworld.melody import render
from anyglot_synth.nanoworld.scene import COLUMNS, MAX_THINGS, ROWS, SHAPES, SIZES, Scene, sample_scene
from anyglot_synth.nanoworld.voices import SAMPLE_RATE, SILENCE_DB, VOICES, SpeechCache, finish, installed_voices
from anyglot_tokenizers.errors import MediaError

SEEDS = (13, 18, 4, 14, 21, 39)
"""Of scenes like those that the model was trained on."""
SPOKEN_SEEDS, DRAWN_SEEDS = (25, 21), (2, 17)
HOP = SAMPLE_RATE // 200
VISITOR_VOICE = VOICES[2]
"""A man's; the model answers with a woman's."""
QUIET_DB = (SILENCE_DB, -30.0)
"""Between these, below the loudest moment of a recording, ends what is no speech: twice its noise."""


def examples(model: UnifiedModel) -> list[Example]:
    """Examples for a model; none unless they fit it."""
    if not _is_shipped(model):
        return []
    drawn, said, seen, hummed, played, changed = map(_scene, SEEDS)
    change, _ = edit(changed, np.random.default_rng(SEEDS[-1]))
    return [
        Example("Draw a sentence", (Given("text", describe(drawn)),), ("image",)),
        Example("Say a sentence", (Given("text", describe(said)),), ("speech",)),
        Example("Describe a picture", (_picture(seen),), ("text",)),
        Example("Hum a picture", (_picture(hummed),), ("music",)),
        Example("Draw a melody", (_melody(played),), ("image",)),
        Example("Change a picture", (Given("text", change), _picture(changed)), ("image",)),
    ]


def cards(model: UnifiedModel) -> list[Card]:
    """Cards for a model; none unless they fit it. Spoken examples need an engine that speaks (flite or espeak-ng)."""
    if not _is_shipped(model):
        return []
    seen, heard = ("image", "speech"), ("music",)
    spoken = [describe(_scene(seed), style="spoken") for seed in SPOKEN_SEEDS] if installed_voices() else []
    return [
        Card(
            "Speak: see the picture, hear the answer",
            "Record “large blue square, top left”, or any shapes, colors and places. The model learnt from synthetic "
            "voices; yours may be misheard.",
            "speech",
            seen,
            examples=tuple(Example(f"“{said}”", (_spoken(said),), seen) for said in spoken),
            tidy=_tidy,
        ),
        Card(
            "Draw: hear the tune",
            "Choose a shape and a color and put them on the board, three at most. Shape is instrument, color is scale.",
            "image",
            heard,
            action="Play it",
            examples=tuple(Example(_title(scene), (_picture(scene),), heard) for scene in map(_scene, DRAWN_SEEDS)),
            sketch=Sketch(
                SIZE,
                BACKGROUND,
                PALETTE,
                {f"{size} {shape}": mask(shape, size).tolist() for size in SIZES for shape in SHAPES},
                _places(ROWS),
                _places(COLUMNS),
                MAX_THINGS,
            ),
        ),
    ]


def _is_shipped(model: UnifiedModel) -> bool:
    return model.vocabulary.fingerprint == Vocabulary.load(NANO / "vocabulary.json").fingerprint


def _scene(seed: int) -> Scene:
    return sample_scene(np.random.default_rng(seed))


def _places(names: tuple[str, ...]) -> dict[str, int]:
    return {name: int(center) for name, center in zip(names, CENTERS, strict=True)}


def _title(scene: Scene) -> str:
    return " + ".join(thing_words(thing) for thing in scene.things)


def _spoken(text: str) -> Given:
    return Given("speech", torch.from_numpy(SpeechCache().say(text, VISITOR_VOICE))[None])


def _tidy(sound: Tensor) -> Tensor:
    """A recording `[1, samples]` as clips are: without silence before and after, and as loud."""
    frames = sound[0, : sound.shape[1] // HOP * HOP].reshape(-1, HOP)
    level = frames.square().mean(1).sqrt().clamp_min(1e-6).log10() * 20 if len(frames) else torch.zeros(1)
    noise = float(level.quantile(0.1) - level.max()) + 6
    found = finish(sound[0].numpy(), SAMPLE_RATE, min(max(noise, QUIET_DB[0]), QUIET_DB[1]))
    if not len(found):
        raise MediaError("the recording", "is silent", "check the microphone, and speak")
    return torch.from_numpy(found.astype(np.float32) / 32768)[None]


def _picture(scene: Scene) -> Given:
    return Given("image", torch.from_numpy(draw(scene)).permute(2, 0, 1) / 255)


def _melody(scene: Scene) -> Given:
    return Given("music", torch.from_numpy(render(scene))[None])
