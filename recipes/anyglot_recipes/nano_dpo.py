"""The `nano_dpo` recipe: a model of nanoworld learns to prefer right answers over slightly wrong ones.

scenes -> pairs -> DPO -> the preference on held-out pairs and the benchmark, each before and after. A training pair is
the best and the worst of several answers of the model itself, as the checkers see them (`candidates`), or the right
answer and that to a scene which differs in one thing's colour, size, shape or place; held-out pairs are always of the
latter kind. Every stage continues where it was killed (see `chain.py`); the training is `dpo.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_lm.chat import answered
from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import TEXT
from anyglot_lm.parts import VOCABULARY_FILE
from anyglot_lm.segments import Sample
from anyglot_lm.shards import ShardReader, ShardWriter
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import Run, encode_audio, encode_images, seed_of
from anyglot_recipes.dpo import score_pairs
from anyglot_recipes.nano import ASSISTANT_VOICE, IMAGE_SIZE, make_items, test_items
from anyglot_recipes.shipped import NANO
from anyglot_recipes.stage_cli import as_arguments, check_whole_names, run_stage
from anyglot_recipes.tasks import PAIRS, Item, prompt, sample, split_task
from anyglot_recipes.train import CONFIGS
from anyglot_synth.nanoworld import melody
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import describe, edit
from anyglot_synth.nanoworld.scene import HELD_OUT, Scene, Split
from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir
from anyglot_tokenizers.errors import CodesError, ManifestError
from anyglot_tokenizers.files import atomic_write


@dataclass
class NanoDPOConfig:
    """The nano_dpo recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        model: folder of a model of nanoworld, default the shipped one.
        tasks: ordered pairs of media such as "text->image", or all twelve.
        scenes: training scenes; each gives a pair of every task.
        candidates: answers of the model to each prompt, at temperature 1, of which the best and the worst make a pair
            where their scores differ; 0 makes pairs of right and altered answers.
        held_out: held-out scenes, whose pairs are never trained on.
        workers: processes that make media.
        dpo: settings of the stage, over those of configs/dpo.yaml, as `{"model.lr": 0.0001}`.
        n: other held-out scenes, for the benchmark before and after; 0 skips it.
    """

    run_dir: str = "runs/nano_dpo"
    seed: int = 0
    model: str = str(NANO)
    tasks: list[str] = field(default_factory=lambda: list(PAIRS))
    scenes: int = 200
    candidates: int = 0
    held_out: int = 40
    workers: int = 2
    dpo: dict[str, Any] = field(default_factory=dict)
    n: int = 60


def nano_dpo(config: NanoDPOConfig) -> dict[str, Any] | None:
    """Train and grade.

    Returns:
        "before" and "after", the benchmark's means over the twelve pairs of media; "preference" of held-out pairs:
        "before" and "after", the share whose preferred answer is the likelier one, "accuracy", the share where it
        gained on the other, "margin", by how many nats, and "pairs", their number; "rows", the same by task; "model".
        None on every process but the first of several.
    """
    unknown = [task for task in config.tasks if task not in PAIRS]
    if unknown or not config.tasks or min(config.scenes, config.held_out) < 1:
        raise ManifestError(
            f"nano_dpo: tasks {unknown or config.tasks}, scenes {config.scenes}, held_out {config.held_out}; give "
            f"tasks among {', '.join(PAIRS)}, and at least one scene of each kind"
        )
    if config.candidates < 0 or config.candidates == 1:
        raise ManifestError(
            f"nano_dpo: candidates {config.candidates}; a pair needs 2 answers or more, 0 alters right ones"
        )
    check_whole_names(config.dpo, "dpo")
    settings = {k: v for k, v in vars(config).items() if k not in ("run_dir", "n")}
    run = Run(config.run_dir, settings)
    train = run.once("pairs", lambda folder: _make_pairs(folder, run, config, "train", config.scenes))
    held_out = run.once("held_out", lambda folder: _make_pairs(folder, run, config, "test", config.held_out))
    after = run.dir / "dpo" / "model"
    if not (after / VOCABULARY_FILE).exists():  # the last to come
        data = {"data.shards": [str(train)], "data.val_shards": [str(held_out)], "data.seed": config.seed}
        given = {"run_dir": run.dir / "dpo", "model.start": config.model, **data, **config.dpo}
        if run_stage("dpo", [f"--config={CONFIGS / 'dpo.yaml'}", *as_arguments(given)], "nano_dpo") is None:
            return None
    folders = {"before": Path(config.model), "after": after}
    preference, rows = _preference(folders, held_out)
    report: dict[str, Any] = {"before": None, "after": None, "preference": preference, "rows": rows}
    if config.n:
        for name, folder in folders.items():
            graded = _grade(run, name, folder, config)
            report[name] = graded["mean"]
            for row in graded["rows"]:
                rows.setdefault(row["task"], {})[f"score_{name}"] = row["score"]
    report["rows"] = [{"task": task, **row} for task, row in rows.items()]
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    run.say(
        f"preferred answer the likelier one: {preference['before']:.3f} of held-out pairs before, "
        f"{preference['after']:.3f} after; benchmark {report['before']} before, {report['after']} after"
    )
    return {**report, "model": str(after)}


def wrong_items(
    items: Sequence[Item], model: UnifiedModel, modalities: set[str], seed: int, workers: int
) -> list[Item]:
    """For every item one of a scene in which one thing has another colour, size, shape or place.

    `modalities` are made anew (speech as the assistant's "reply"); all other media stay those of the right scene.
    """
    rng = np.random.default_rng([seed, 79])
    scenes = [_altered(item.scene, rng) for item in items]
    codes: dict[str, list[np.ndarray]] = {}
    if "image" in modalities:
        pictures = np.stack([draw(scene, rng, IMAGE_SIZE) for scene in scenes])
        codes["image"] = encode_images(model.tokenizers["image"], pictures)
    if "speech" in modalities:
        cache = SpeechCache(default_cache_dir(), workers)
        said = [cache.say(describe(scene, rng, style="spoken"), ASSISTANT_VOICE) for scene in scenes]
        codes["reply"] = encode_audio(model.tokenizers["speech"], said)
    if "music" in modalities:
        codes["music"] = encode_audio(model.tokenizers["music"], [melody.render(scene, rng) for scene in scenes])
    return [
        replace(item, scene=scene, codes={**item.codes, **{name: made[i] for name, made in codes.items()}}, seen={})
        for i, (item, scene) in enumerate(zip(items, scenes, strict=True))
    ]


def _altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene after an edit that leaves the number of things, and of those held out from training.

    Otherwise the wrong answer to a held-out scene would mostly be one that training knew, and likelier for that.
    """
    while True:
        altered = edit(scene, rng)[1]
        if len(altered) == len(scene) and _unseen(altered) == _unseen(scene):
            return altered


def _unseen(scene: Scene) -> int:
    return sum(thing.triple in HELD_OUT for thing in scene.things)


def preference_pairs(
    items: Sequence[Item], wrong: Sequence[Item], tasks: Sequence[str], seed: int
) -> Iterator[tuple[str, Sample, Sample]]:
    """(task, right answer, wrong answer) of every item and task: one prompt, and texts in one wording."""
    for i, (item, other) in enumerate(zip(items, wrong, strict=True)):
        for task in tasks:
            right, altered = (sample(x, task, np.random.default_rng([seed, 80, i])) for x in (item, other))
            asked = [s for s in right.segments if s.role == "user"]
            yield task, right, Sample([*asked, *(s for s in altered.segments if s.role == "assistant")])


def sampled_pairs(
    items: Sequence[Item], model: UnifiedModel, tasks: Sequence[str], seed: int, candidates: int
) -> Iterator[tuple[str, Sample, Sample]]:
    """(task, best answer, worst answer) of `candidates` sampled ones, where the checkers tell them apart."""
    from anyglot_recipes.evaluate import Checkers, grade, request

    checkers = Checkers()
    sampling = {name: Sampling() for name in (TEXT, *model.vocabulary.modalities)}
    for t, task in enumerate(tasks):
        prompts = [prompt(item, task, np.random.default_rng([seed, 80, i])) for i, item in enumerate(items)]
        repeated = [asked for asked in prompts for _ in range(candidates)]
        answers = model.respond(repeated, request(task), sampling, seed=seed_of(seed, "sampled", t))
        graded = grade([item for item in items for _ in range(candidates)], task, answers, checkers)
        for i, asked in enumerate(prompts):
            ranked = sorted(graded[i * candidates : (i + 1) * candidates], key=lambda answer: -answer.score)
            if ranked[0].score > ranked[-1].score:
                best, worst = (map(answered, ranked[place].outputs) for place in (0, -1))
                yield task, Sample([*asked.segments, *best]), Sample([*asked.segments, *worst])


def _make_pairs(folder: Path, run: Run, config: NanoDPOConfig, split: Split, num: int) -> None:
    model = UnifiedModel.from_pretrained(config.model)
    cache, seed = SpeechCache(default_cache_dir(), config.workers), seed_of(config.seed, "dpo", split) % 2**31
    items = make_items(split, num, seed, dict(model.tokenizers), cache, config.workers)
    if split == "train" and config.candidates:
        pairs = sampled_pairs(items, model, config.tasks, seed, config.candidates)
    else:
        wrong = wrong_items(items, model, {split_task(task)[1][0] for task in config.tasks}, seed, config.workers)
        pairs = preference_pairs(items, wrong, config.tasks, seed)
    written = left_out = 0
    with ShardWriter(folder, model.vocabulary, model.template, text=model.text) as writer:
        for task, *pair in pairs:
            try:
                both = [model.template.render(answer, model.vocabulary, model.text) for answer in pair]
            except CodesError:  # a medium longer than the vocabulary allows
                left_out += 1
                continue
            for (ids, loss), answer in zip(both, pair, strict=True):
                writer.add(ids, loss, task, answer)
            written += 1
        if not written:
            raise ManifestError(
                f"nano_dpo: no pairs ({left_out} are too long for the model, and of other prompts no two answers have "
                "different scores); raise scenes or candidates"
            )
    run.say(f"{folder.name.removesuffix('.tmp')}: {written} pairs, {left_out} left out for their length")


def _preference(folders: dict[str, Path], held_out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The preference of held-out pairs, over all and by task."""
    before_P2, after_P2 = (score_pairs(folder, held_out).numpy() for folder in folders.values())
    reader = ShardReader(held_out)
    task_P = np.asarray(reader.tasks)[::2]
    gained_P = (after_P2 - before_P2) @ [1, -1]

    def summary(chosen: Any) -> dict[str, Any]:
        return {
            "pairs": len(gained_P[chosen]),
            "before": round(float((before_P2[chosen, 0] > before_P2[chosen, 1]).mean()), 4),
            "after": round(float((after_P2[chosen, 0] > after_P2[chosen, 1]).mean()), 4),
            "accuracy": round(float((gained_P[chosen] > 0).mean()), 4),
            "margin": round(float(gained_P[chosen].mean()), 4),
        }

    return summary(slice(None)), {reader.task_names[t]: summary(task_P == t) for t in np.unique(task_P).tolist()}


def _grade(run: Run, name: str, folder: Path, config: NanoDPOConfig) -> dict[str, Any]:
    """The benchmark's report of a model, kept in the run folder."""
    from anyglot_recipes.evaluate import evaluate

    def make(out: Path) -> None:
        model = UnifiedModel.from_pretrained(folder)
        items = test_items(model, config.n, config.seed)
        (out / "report.json").write_text(json.dumps(evaluate(model, items, tasks=PAIRS, progress=run.say), indent=1))

    report: dict[str, Any] = json.loads((run.once(f"benchmark/{name}-{config.n}", make) / "report.json").read_text())
    return report
