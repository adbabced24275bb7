"""The field model learns from its own answers: of several to a word, the one that it reads best as that word.

A word is one of some seventy ids of a photo's document, and most of what is learnt there is what hands look like; so a
single drawing may be of another digit, where the best of eight hardly ever is. What `candidates.best_of` takes is
trained on beside what was recorded, as in ReST (arXiv 2308.08998) and RAFT (arXiv 2304.06767), with the model's own
reading for a reward: no judge is asked, and nothing that is held out is met. This file makes answers and trains on
them; what they are worth is measured by `field_eval.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import LMConfig, Run, check_lm, seed_of, train_lm, write_shards
from anyglot_tokenizers.errors import ManifestError

OWN = ", own"
"""Ends the names of tasks whose answers are the model's."""


@dataclass
class PracticeConfig:
    """How the model learns from its own answers.

    Args:
        num: answers to each word in each medium, each the best of eight; 0 for no practice.
        share: of the weight of a task, what goes to the model's answers.
        max_steps: optimizer steps.
        lr: peak learning rate.
    """

    num: int = 0
    share: float = 0.5
    max_steps: int = 300
    lr: float = 1e-3

    def check(self, lm: LMConfig) -> None:
        """Raises `ManifestError`: settings that cannot be, for a model trained by `lm`."""
        if self.num < 0 or not 0 < self.share < 1:
            raise ManifestError(
                f"practice.num {self.num} must be 0 or more, and practice.share {self.share} between 0 and 1"
            )
        check_lm(self.settings(lm), new=False)

    def settings(self, lm: LMConfig) -> LMConfig:
        """Those of the language model's second training."""
        warmup = min(lm.warmup_steps, max(self.max_steps // 5, 1))
        again = replace(lm, max_steps=self.max_steps, lr=self.lr, warmup_steps=warmup)
        return replace(again, codebook_rows=False, factored=False)  # of new rows


def practise(
    run: Run, config: PracticeConfig, lm: LMConfig, folder: Path, shards: Path, weights: dict[str, float], seed: int
) -> Path:
    """The model of `folder` trained on; returns the new model folder, `practice/model` of the run.

    Args:
        run: the run; what it is made with are its settings.
        config: how.
        lm: settings of the model's first training.
        folder: the model.
        shards: what it was trained on.
        weights: share of ids by task there.
        seed: of answers and plan.
    """
    part = Run(run.dir / "practice", {"practice": config, "lm": lm, "seed": seed})
    model = UnifiedModel.from_pretrained(folder)

    def make(target: Path) -> None:
        skipped = write_shards(
            target, answers(model, config.num, seed_of(seed, "practice")), model.vocabulary, model.text, lm.seq_len
        )
        run.say(f"practice: {skipped} answers longer than {lm.seq_len} ids left out")

    own = part.once("shards", make)
    trained, _ = train_lm(
        part,
        config.settings(lm),
        [shards, own],
        model.vocabulary,
        model.text,
        dict(model.tokenizers),
        seed,
        shared(weights, config.share),
        start=lambda: UnifiedModel.from_pretrained(folder).model,
    )
    return trained


def answers(model: UnifiedModel, num: int, seed: int) -> Iterator[tuple[str, Sample]]:
    """(task, sample): `num` answers to each word in each medium, as the benchmark asks for the best of several."""
    from anyglot_recipes.field import WORDS
    from anyglot_recipes.field_eval import WAYS, best_answers

    for modality, way in WAYS.items():
        words = [word for word in WORDS for _ in range(num)]
        asked = [way.ask(word) for word in words]
        best = best_answers(model, asked, modality, seed, words)
        for prompt, (output,) in zip(asked, best, strict=True):
            assert output.codes is not None
            answer = Segment(modality, output.codes.numpy(), "assistant")
            yield f"{way.task}{OWN}", Sample([prompt, answer])


def shared(weights: dict[str, float], share: float) -> dict[str, float]:
    """The weights of tasks, `share` of those with answers to words taken by the model's own."""
    from anyglot_recipes.field_eval import WAYS

    tasks = {way.task for way in WAYS.values()}
    kept = {task: weight * (1 - share) if task in tasks else weight for task, weight in weights.items()}
    return kept | {f"{task}{OWN}": weights[task] * share for task in tasks}
