"""The `nano_shots` recipe: what to say about a picture, told by examples alone.

A prompt is pictures with answers, and a last picture. Which attributes the answers name, and in which order, is a rule
that no word of the prompt says. scenes -> documents of pictures and answers -> training from a model of nanoworld ->
start and result, on held-out scenes, with several numbers of examples, for rules of the training and for rules that no
training document followed (there both attributes were named in the other order). Every stage continues where it was
killed (see `chain.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_lm.grammar import Request
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import LMConfig, Run, check_lm, seed_of, train_lm, write_shards
from anyglot_recipes.nano import pictures
from anyglot_recipes.shipped import NANO
from anyglot_recipes.shots import HELD_OUT, KINDS, RULES, Picture, Rule, document, say
from anyglot_synth.nanoworld.language import words
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write


@dataclass
class NanoShotsConfig:
    """The nano_shots recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        model: folder of a model of nanoworld, default the shipped one.
        pictures: training pictures of one thing; documents draw from them.
        documents: training documents.
        shots: numbers of examples that are graded; documents have one picture more than the largest.
        lm: schedule; its sizes and blocks are the model's own and not read.
        n: held-out pictures for each number of examples, of either group of rules.
    """

    run_dir: str = "runs/nano_shots"
    seed: int = 0
    model: str = str(NANO)
    pictures: int = 4000
    documents: int = 5000
    shots: list[int] = field(default_factory=lambda: [0, 1, 2, 4])
    lm: LMConfig = field(default_factory=LMConfig)
    n: int = 400


def nano_shots(config: NanoShotsConfig) -> dict[str, Any]:
    """Train and grade.

    Returns:
        "rows" with "model" ("before", "after"), "rules" ("seen", "held_out"), "shots", "n", "score" (the answer is
        right, word by word), "form" (its words are of the kinds that the rule names), "chance" (the true answer to
        another picture of the same rule); "guess": the score of one who sees all and draws one of the training's
        rules; "model".

    Raises:
        ManifestError: settings that cannot work.
    """
    if (
        min(config.n, config.documents) < 1
        or not 0 <= min(config.shots, default=-1) <= max(config.shots) < config.pictures
    ):
        raise ManifestError(
            f"nano_shots: n and documents must be positive, and shots {config.shots} numbers from 0 on, below the "
            f"{config.pictures} pictures"
        )
    check_lm(config.lm, new=False)
    start = UnifiedModel.from_pretrained(config.model)
    settings = {k: v for k, v in vars(config).items() if k not in ("run_dir", "n")}
    run = Run(config.run_dir, settings)
    pool = pictures("train", config.pictures, seed_of(config.seed, "shown") % 2**31, start.tokenizers["image"])

    def make_shards(folder: Path) -> None:
        rng = np.random.default_rng([config.seed, 82])
        rules = (RULES[int(rng.integers(len(RULES)))] for _ in range(config.documents))
        samples = (("few-shot:image->text", document(_draw(pool, max(config.shots) + 1, rng), rule)) for rule in rules)
        skipped = write_shards(
            folder, samples, start.vocabulary, start.text, config.lm.seq_len, template=start.template
        )
        run.say(f"{config.documents - skipped} documents, {skipped} longer than {config.lm.seq_len} ids left out")

    folder, _ = train_lm(
        run,
        config.lm,
        [run.once("shards", make_shards)],
        start.vocabulary,
        start.text,
        dict(start.tokenizers),
        config.seed,
        start=lambda: UnifiedModel.from_pretrained(config.model).model,
        template=start.template,
    )
    held_out = pictures("test", config.n, seed_of(config.seed, "shown, test") % 2**31, start.tokenizers["image"])
    rows = []
    for name, model in (("before", start), ("after", UnifiedModel.from_pretrained(folder))):
        for group, rules in (("seen", RULES), ("held_out", HELD_OUT)):
            for row in grade(model, held_out, pool, rules, config.shots, config.seed):
                rows.append({"model": name, "rules": group, **row})
                run.say(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    report = {"rows": rows, "guess": round(1 / len(RULES), 4), "model": str(folder)}
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def grade(
    model: UnifiedModel,
    queries: Sequence[Picture],
    pool: Sequence[Picture],
    rules: Sequence[Rule],
    shots: Sequence[int],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """A row for each number of examples. Query i is of rule i modulo their number; its examples are of `pool`."""
    from anyglot_recipes.evaluate import SAMPLING

    ruled = [(query, rules[i % len(rules)]) for i, query in enumerate(queries)]
    truths = [words(say(thing, rule)) for (thing, _), rule in ruled]
    alike = [(i, j) for i in range(len(ruled)) for j in range(len(ruled)) if i != j and ruled[i][1] == ruled[j][1]]
    chance = float(np.mean([truths[i] == truths[j] for i, j in alike])) if alike else 0.0
    for count in shots:
        rng = np.random.default_rng([seed, 84, count])
        prompts = [document([*_draw(pool, count, rng), query], rule) for query, rule in ruled]
        answers = model.respond(prompts, Request(order=("text",), max_ids=32), SAMPLING)
        said = [words(answer[0].text or "") for answer in answers]
        kinds = [[KINDS.get(word) for word in text] for text in said]
        wanted = [[KINDS[word] for word in truth] for truth in truths]
        yield {
            "shots": count,
            "n": len(ruled),
            "score": round(float(np.mean([a == b for a, b in zip(said, truths, strict=True)])), 4),
            "form": round(float(np.mean([a == b for a, b in zip(kinds, wanted, strict=True)])), 4),
            "chance": round(chance, 4),
        }


def _draw(pool: Sequence[Picture], count: int, rng: np.random.Generator) -> list[Picture]:
    return [pool[int(i)] for i in rng.choice(len(pool), size=count, replace=False)]
