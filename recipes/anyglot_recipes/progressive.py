"""The `progressive` recipe: music for a model trained without it, with replay of the old directions and without.

shards -> language model of text, image and speech -> its vocabulary with music -> two runs of the stage `add-modality`
that differ in nothing but replay -> old and new directions before and after. It trains no tokenizer: those of a model
folder are used. The run goes on where it was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_lm.hf_text import load_text
from anyglot_lm.parts import VOCABULARY_FILE
from anyglot_lm.segments import Sample
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import (
    BlockConfig,
    LMConfig,
    Run,
    build_vocabulary,
    can_compile,
    check_lm,
    seed_of,
    train_lm,
    write_shards,
)
from anyglot_recipes.expand import add_modalities, block_specs, open_tokenizers
from anyglot_recipes.nano import IMAGE_SIZE, WorldConfig, make_items
from anyglot_recipes.shipped import NANO
from anyglot_recipes.stage_cli import as_arguments, check_whole_names, run_stage
from anyglot_recipes.tasks import MODALITIES, PAIRS, Item, sample, split_task
from anyglot_recipes.train import CONFIGS
from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write

ADDED = "music"
NEW = tuple(task for task in PAIRS if ADDED in (*split_task(task)[0], *split_task(task)[1]))
OLD = tuple(task for task in PAIRS if task not in NEW)


@dataclass
class ProgressiveConfig:
    """The progressive recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        source: model folder whose text tokenizer and media tokenizers are used; its weights are not.
        world: how much of nanoworld is made; `num_chunks`, `chunk` and `workers` are read.
        lm: the first model, trained without music, and how all modalities are written.
        stage: settings of the added stage, over those of configs/add-modality.yaml and the packs of `lm`, as
            `{"model.lr": 0.002}`.
        replay_share: share of the ids that old directions get in the run with replay.
        n: held-out scenes of the evaluation.
    """

    run_dir: str = "runs/progressive"
    seed: int = 0
    source: str = str(NANO)
    world: WorldConfig = field(default_factory=WorldConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    stage: dict[str, Any] = field(default_factory=dict)
    replay_share: float = 0.4
    n: int = 100


def progressive(config: ProgressiveConfig) -> dict[str, Any]:
    """Train the model, add music twice, and grade.

    Returns:
        Mean scores of the "old" directions ("before", "with_replay", "without_replay") and of the "new" ones, "lost"
        of the old ones in points of 100, and the benchmark's "rows".

    Raises:
        ManifestError: settings that cannot work, or a source that lacks a tokenizer.
    """
    lm, world = config.lm, config.world
    check_lm(lm, modalities=MODALITIES[1:])
    check_whole_names(config.stage, "stage")
    if not 0 < config.replay_share < 1 or config.n < 1:
        raise ManifestError(
            f"progressive: replay_share {config.replay_share} must lie between 0 and 1, and n {config.n} be positive"
        )
    run = Run(config.run_dir, {k: v for k, v in vars(config).items() if k not in ("run_dir", "n")})
    text, tokenizers = load_text(config.source), open_tokenizers([str(Path(config.source) / "tokenizers")])
    missing = [m for m in MODALITIES if m != "text" and m not in tokenizers]
    if missing:
        raise ManifestError(f"{config.source}: has no tokenizer for {', '.join(missing)}; give another --source")
    known = {m: tokenizers[m] for m in MODALITIES if m not in ("text", ADDED)}
    added = {ADDED: tokenizers[ADDED]}
    how = {k: v for k, v in asdict(lm.blocks.get(ADDED, BlockConfig())).items() if v is not None}
    side = IMAGE_SIZE // known["image"].spec.downsample_factor
    vocabulary = build_vocabulary(text, known, lm, (side, side))
    extended = vocabulary.extended(*block_specs(added, {ADDED: how}))
    cache = SpeechCache(default_cache_dir(), world.workers)

    def make_shards(folder: Path, index: int) -> None:
        seed = seed_of(config.seed, "chunk", index) % 2**31
        items = make_items("train", world.chunk, seed, tokenizers, cache, world.workers)
        for name, tasks, ids in (("old", OLD, vocabulary), ("new", NEW, extended)):
            skipped = write_shards(folder / name, _samples(items, tasks, seed), ids, text, lm.seq_len)
            run.say(f"{name} shard {index}: {skipped} samples longer than {lm.seq_len} ids left out")

    shards = [
        run.once(f"shards/{i:05d}", lambda folder, i=i: make_shards(folder, i))  # type: ignore[misc]
        for i in range(world.num_chunks)
    ]
    models = {"before": train_lm(run, lm, [path / "old" for path in shards], vocabulary, text, known, config.seed)[0]}

    def make_start(folder: Path) -> None:
        model = UnifiedModel.from_pretrained(models["before"])
        add_modalities(model, added, {ADDED: how}, seed=config.seed).save_pretrained(folder)

    start = run.once("start", make_start)
    for name, share in (("with_replay", config.replay_share), ("without_replay", 0.0)):
        models[name] = run.dir / name / "model"
        if not (models[name] / VOCABULARY_FILE).exists():  # the last to come
            given = {
                "run_dir": run.dir / name,
                "model.start": start,
                "model.compile": lm.compile and can_compile(run),
                "data.seed": config.seed,
                "data.shards": [str(path / "new") for path in shards],
                "data.replay": [str(path / "old") for path in shards] if share else [],
                "data.replay_share": share,
                "data.seq_len": lm.seq_len,
                "data.batch_size": lm.batch_size,
                "data.packs_per_step": lm.batch_size,
                **config.stage,
            }
            run_stage("stage", [f"--config={CONFIGS / 'add-modality.yaml'}", *as_arguments(given)], name)
            run.say(f"{name}: trained")
    items = make_items("test", config.n, seed_of(config.seed, "test") % 2**31, tokenizers, cache, 1)
    report = _grade(run, models, items)
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def _samples(items: list[Item], tasks: Sequence[str], seed: int) -> Iterator[tuple[str, Sample]]:
    rng = np.random.default_rng([seed, 78])
    for item in items:
        for task in tasks:
            yield task, sample(item, task, rng)


def _grade(run: Run, models: dict[str, Path], items: list[Item]) -> dict[str, Any]:
    """The report: every model on the old directions, those that know music on the new ones too."""
    from anyglot_recipes.evaluate import Checkers, evaluate

    checkers = Checkers()
    report: dict[str, Any] = {"old": {}, "new": {}, "lost": {}, "rows": {}}
    for name, folder in models.items():
        model = UnifiedModel.from_pretrained(folder)
        run.say(f"{name}:")
        for part, tasks in (("old", OLD), ("new", NEW)):
            if part == "new" and ADDED not in model.vocabulary.modalities:
                continue
            graded = evaluate(model, items, tasks=tasks, checkers=checkers, progress=run.say)
            report[part][name] = graded["mean"]
            report["rows"].setdefault(name, []).extend(graded["rows"])
    for name in ("with_replay", "without_replay"):
        report["lost"][name] = round(100 * (report["old"]["before"] - report["old"][name]), 2)
        run.say(f"{name}: the old directions lost {report['lost'][name]} points")
    return report
