"""What recipes share: stages that survive a kill, tokenizer training, shards, and the language model's training.

A recipe is a chain of stages in one run folder. A stage's result appears under its final name only when it is whole, so
a stage whose result exists is skipped and a killed recipe continues where it was; training stages also keep a
checkpoint and continue bit for bit. `Run` holds the folder and refuses one that was started with other settings.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anyglot_lm.hf_text import AnyText
from anyglot_lm.history import check_rates
from anyglot_lm.patterns import pattern
from anyglot_lm.segments import CHAT, Sample, Template
from anyglot_lm.trained import trained_weights
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_lm.weighting import SpanWeights
from anyglot_tokenizers import load
from anyglot_tokenizers.errors import CheckpointError, ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.precision import resolve_precision
from anyglot_tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LM_STATE = Path("training") / "lm" / "last.ckpt"
"""Where a run keeps the state of its language model's training."""


@dataclass
class TokenizerConfig:
    """How one tokenizer is built and trained.

    Args:
        tokenizer: its class as module:Class; by default `ImageVQ` for images, else `AudioCodec`.
        model: arguments of that class.
        num: training examples made for it.
        max_steps: optimizer steps.
        batch_size: items per step.
        lr: peak learning rate.
        crop_seconds: audio only, length of training crops.
        precision: "32-true", "bf16-mixed" or "auto"; the quantizer is float32 in any case.
    """

    tokenizer: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    num: int = 3000
    max_steps: int = 1000
    batch_size: int = 32
    lr: float = 2e-3
    crop_seconds: float = 1.6
    precision: str = "auto"


@dataclass
class BlockConfig:
    """How the language model writes one modality.

    Args:
        num_quantizers: codebooks it writes, of those the tokenizer has.
        pattern: order of the codes in an answer.
        input_pattern: order of the codes in a prompt, default the same.
        max_frames: longest answer, for media of variable length.
    """

    num_quantizers: int = 1
    pattern: str = "frame_major"
    input_pattern: str | None = None
    max_frames: int | None = None


@dataclass
class LMConfig:
    """How the language model is built and trained.

    Args:
        blocks: modality -> how it is written.
        text_vocab_size: ids of the sentencepiece model, 258 at least.
        hidden_size: width.
        num_layers: decoder layers.
        num_heads: attention heads.
        tied: one matrix for input rows and output head.
        qk_norm: normalise queries and keys.
        codebook_rows: start the input rows of codes from their codebook entries, else at random (for `tied: false`).
        factored: rows of codes are sums of a row for each digit and of their entry's projection (`factored.py`). Like
            `codebook_rows` for new models only.
        seq_len: ids per pack; longer documents are left out (and counted).
        condition_dropout: share of documents without their prompt, for classifier-free guidance.
        batch_size: packs per step.
        max_steps: optimizer steps.
        lr: peak learning rate.
        rows_lr: that of the rows of ids, default `lr`; 0 leaves those of a model that is trained on as they are.
        warmup_steps: linear warm-up.
        cooldown: share of the run, at its end, in which the rate falls.
        weight_decay: of hidden matrices.
        muon: Muon for hidden matrices, else AdamW.
        sliced: softmax over the grammar's legal slice, else over the whole vocabulary.
        modality_weights: relative factor of the loss by modality.
        z_loss: factor of logsumexp².
        history_noise: share of the codes of answers, by modality, that half of the documents read back as others: what
            is asked for then counts for more than what was said so far (`history.py`).
        compile: torch.compile the decoder (needs a C++ compiler; falls back to eager without one).
        precision: "32-true", "bf16-mixed", or "auto": bf16-mixed where the hardware computes it natively.
        checkpoint_every: steps between checkpoints, a multiple of log_every.
        log_every: steps between log lines.
        num_workers: loader processes.
    """

    blocks: dict[str, BlockConfig] = field(default_factory=dict)
    text_vocab_size: int = 384
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    tied: bool = True
    qk_norm: bool = False
    codebook_rows: bool = False
    factored: bool = False
    seq_len: int = 384
    condition_dropout: float = 0.0
    batch_size: int = 16
    max_steps: int = 2000
    lr: float = 4e-3
    rows_lr: float | None = None
    warmup_steps: int = 100
    cooldown: float = 0.6
    weight_decay: float = 0.05
    muon: bool = True
    sliced: bool = True
    modality_weights: dict[str, float] = field(default_factory=dict)
    z_loss: float = 0.0
    history_noise: dict[str, float] = field(default_factory=dict)
    compile: bool = True
    precision: str = "auto"
    checkpoint_every: int = 200
    log_every: int = 50
    num_workers: int = 0


class Run:
    """A run folder: `say` logs with the elapsed time, `once` skips what is done.

    Raises:
        ManifestError: the folder was started with other settings.
    """

    def __init__(self, run_dir: str | Path, settings: dict[str, Any]) -> None:
        self.dir = Path(run_dir)
        self.started = time.perf_counter()
        now = _without_machine(json.loads(json.dumps(settings, default=_plain)))
        path = self.dir / "settings.json"
        try:
            changed = _differences(json.loads(path.read_text()), now) if path.exists() else []
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: cannot be read ({error}); choose another --run_dir") from error
        if changed:
            raise ManifestError(
                f"{path}: this run was started with other settings ({', '.join(changed)}); "
                "give them back, or choose another --run_dir"
            )
        self.dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(now, sort_keys=True, indent=1))

    def say(self, message: str) -> None:
        minutes, seconds = divmod(time.perf_counter() - self.started, 60)
        print(f"[{int(minutes):3d}:{int(seconds):02d}] {message}", file=sys.stderr, flush=True)

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder `name`, made by `make(temporary folder)` unless it is there."""
        final = self.dir / name
        if final.exists():
            self.say(f"{name}: done before")
            return final
        temporary = final.with_name(final.name + ".tmp")
        for left in (temporary, *final.parent.glob(f".{temporary.name}.*")):  # of a run that was killed
            if left.exists():
                shutil.rmtree(left)
        temporary.mkdir(parents=True)
        before = time.perf_counter()
        make(temporary)
        temporary.rename(final)
        self.say(f"{name}: done in {time.perf_counter() - before:.0f} s")
        return final


def check_lm(config: LMConfig, *, new: bool = True, modalities: Sequence[str] = ()) -> None:
    """Refuse settings that would only fail after hours of earlier stages, or that only a `new` model reads.

    With `modalities` given, those are all that blocks may be of.

    Raises ManifestError.
    """
    if config.log_every < 1 or config.checkpoint_every < 1 or config.checkpoint_every % config.log_every:
        raise ManifestError(
            f"lm.checkpoint_every {config.checkpoint_every} is no positive multiple of lm.log_every {config.log_every}"
        )
    if config.num_heads < 1 or config.hidden_size % (2 * config.num_heads):
        raise ManifestError(
            f"lm.hidden_size {config.hidden_size} must be a multiple of 2 x lm.num_heads ({config.num_heads})"
        )
    if config.factored and config.codebook_rows:
        raise ManifestError("lm.factored makes rows that know their codebooks; leave lm.codebook_rows out")
    if not new and (config.factored or config.codebook_rows):
        raise ManifestError(
            "lm.factored and lm.codebook_rows start the rows of a new model; one that is trained on keeps its own: "
            "leave them out"
        )
    if not 0 <= config.condition_dropout < 1:
        raise ManifestError(f"lm.condition_dropout {config.condition_dropout} must be a share below 1")
    if config.rows_lr is not None and not config.rows_lr >= 0:
        raise ManifestError(f"lm.rows_lr {config.rows_lr} must be 0 or more")
    if not (config.lr > 0 and 0 <= config.cooldown <= 1):
        raise ManifestError(f"lm.lr {config.lr} must be positive, and lm.cooldown {config.cooldown} a share")
    if config.text_vocab_size < 258:  # bytes, the unknown id and a character
        raise ManifestError(f"lm.text_vocab_size {config.text_vocab_size} must be 258 at least")
    resolve_precision(config.precision)
    unknown = sorted(config.blocks.keys() - set(modalities))
    if modalities and unknown:
        raise ManifestError(f"lm.blocks: no modality {', '.join(unknown)}; there are {', '.join(modalities)}")
    if config.blocks:  # a given model has its own
        check_rates(config.history_noise, list(config.blocks))
        SpanWeights(["text", *_class_names(config.blocks)], config.modality_weights)
    if min(config.max_steps, config.batch_size, config.seq_len, config.num_layers) < 1:
        raise ManifestError("lm.max_steps, lm.batch_size, lm.seq_len and lm.num_layers must be positive")


def _class_names(blocks: Mapping[str, BlockConfig]) -> Iterator[str]:
    """Names that factors of the loss may have. Raises ManifestError for a pattern that there is not."""
    for name, how in blocks.items():
        pattern(how.pattern), pattern(how.input_pattern or how.pattern)
        books = range(how.num_quantizers)
        yield from [f"{name}/{book}" for book in books] if len(books) > 1 else [name]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def _without_machine(settings: Any) -> Any:
    """Settings without those that depend on the machine and cannot change the result (numbers of processes, paths),
    and without `history_noise` and `rows_lr` where there are none, which runs of before do not know."""
    if not isinstance(settings, dict):
        return settings
    left_out = {"workers", "num_workers", "root"}
    left_out |= {name for name in ("history_noise", "rows_lr") if settings.get(name) in ({}, None)}
    return {k: _without_machine(v) for k, v in settings.items() if k not in left_out}


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        nothing = "nothing"
        return [
            d
            for k in keys
            for d in _differences(old.get(k, nothing), new.get(k, nothing), f"{prefix}.{k}" if prefix else k)
        ]
    return [] if old == new else [f"{prefix}: {old} then, {new} now"]


def seed_of(*parts: Any) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def train_tokenizer(run: Run, name: str, config: TokenizerConfig, data: Callable[[], Any], seed: int) -> Tokenizer:
    """Train `image`, `speech` or `music` on `data()` and store it (float16) as `tokenizers/NAME` of the run.

    Args:
        run: the run.
        name: modality.
        config: model and schedule.
        data: called when training is needed: uint8 array [N, H, W, 3], or a list of float32 arrays.
        seed: of weights and batches.

    Returns:
        The stored tokenizer, read back: what made the codes is what is on disk.
    """
    from anyglot_tokenizers.train import fit_tokenizer

    def make(folder: Path) -> None:
        trained = fit_tokenizer(
            new_tokenizer(name, config, seed),
            data(),
            run_dir=run.dir / "training" / name,
            max_steps=config.max_steps,
            batch_size=config.batch_size,
            lr=config.lr,
            seed=seed,
            precision=config.precision,
            crop_seconds=config.crop_seconds,
            foreground_weight=20.0,  # scenes and emoji are mostly background
        )
        trained.save_pretrained(folder, dtype=torch.float16)

    return load(run.once(f"tokenizers/{name}", make))


def new_tokenizer(name: str, config: TokenizerConfig, seed: int) -> Tokenizer:
    """What `train_tokenizer` trains. Raises ManifestError for settings that cannot be."""
    resolve_precision(config.precision)
    named = config.tokenizer or f"anyglot_tokenizers.{'image:ImageVQ' if name == 'image' else 'audio:AudioCodec'}"
    own = {} if name == "image" else {"modality": name}
    return build_tokenizer(named, {"seed": seed, **own, **config.model}, f"{name}.")


def build_tokenizer(named: str, options: Mapping[str, Any], where: str = "") -> Tokenizer:
    """A new tokenizer of the class `module:Class`.

    Raises:
        ManifestError: no such class, or options it does not have; `where` begins the names of the settings.
    """
    module, _, name = named.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ManifestError(
            f"{where}tokenizer: {error}; give module:Class, such as anyglot_tokenizers.image:ImageVQ"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Tokenizer)) or inspect.isabstract(found):
        raise ManifestError(f"{where}tokenizer: {named} is no tokenizer")
    try:
        tokenizer: Tokenizer = found(**options)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ManifestError(f"{where}model: {error}; its keys are the arguments of {named}") from error
    return tokenizer


@torch.inference_mode()
def encode_audio(tokenizer: Tokenizer, audio: Sequence[np.ndarray], batch: int = 32) -> list[np.ndarray]:
    """Codes int64[K, T_i] of each mono clip, encoded in batches of like length."""
    codes: list[np.ndarray] = [np.empty((0, 0))] * len(audio)
    order = sorted(range(len(audio)), key=lambda i: len(audio[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        lengths = torch.tensor([len(audio[i]) for i in chosen])
        padded = torch.zeros(len(chosen), 1, int(lengths.max()))
        for row, i in enumerate(chosen):
            padded[row, 0, : len(audio[i])] = torch.from_numpy(audio[i])
        encoded = tokenizer.encode(padded, lengths)
        for row, i in enumerate(chosen):
            codes[i] = encoded.item(row).numpy()
    return codes


@torch.inference_mode()
def encode_images(tokenizer: Tokenizer, images: np.ndarray, batch: int = 128) -> list[np.ndarray]:
    """Codes int64[K, h, w] of uint8 images [N, H, W, 3]."""
    codes: list[np.ndarray] = []
    for part in torch.from_numpy(images).split(batch):
        codes += list(tokenizer.encode(part.permute(0, 3, 1, 2).float() / 255).codes.numpy())
    return codes


def build_vocabulary(
    text: AnyText,
    tokenizers: dict[str, Tokenizer],
    config: LMConfig,
    grid: tuple[int, int] | Mapping[str, tuple[int, int]],
) -> Vocabulary:
    """The vocabulary of a run: one block per tokenizer. `grid` is the fixed grid of image codes, or one by modality."""
    grids = grid if isinstance(grid, Mapping) else {"image": grid}
    return Vocabulary.build(text.size, *lm_blocks(tokenizers, config, grids), text_fingerprint=text.fingerprint)


def lm_blocks(
    tokenizers: Mapping[str, Tokenizer], config: LMConfig, grids: Mapping[str, tuple[int, int]]
) -> list[BlockSpec]:
    """How `config` writes each tokenizer's codes. Raises ManifestError for more quantizers than a tokenizer has."""
    specs = []
    for modality, tokenizer in tokenizers.items():
        how = config.blocks.get(modality, BlockConfig())
        specs.append(
            BlockSpec.from_code_spec(
                tokenizer.spec,
                num_quantizers=how.num_quantizers,
                pattern=how.pattern,
                input_pattern=how.input_pattern,
                grid=grids.get(modality),
                max_frames=how.max_frames,
            )
        )
    return specs


def write_shards(
    folder: Path,
    samples: Iterable[tuple[str, Sample]],
    vocabulary: Vocabulary,
    text: AnyText,
    seq_len: int,
    template: Template = CHAT,
) -> int:
    """Render (task, sample) pairs into one shard set in `folder`. Returns how many were left out for their length."""
    from anyglot_lm.shards import ShardWriter

    skipped = 0
    with ShardWriter(folder, vocabulary, template, text=text) as writer:
        for task, sample in samples:
            ids, loss = template.render(sample, vocabulary, text)
            if len(ids) > seq_len:
                skipped += 1
                continue
            writer.add(ids, loss, task, sample)
    return skipped


def train_lm(
    run: Run,
    config: LMConfig,
    shards: Sequence[Path],
    vocabulary: Vocabulary,
    text: AnyText,
    tokenizers: dict[str, Tokenizer],
    seed: int,
    weights: dict[str, float] | None = None,
    start: Callable[[], PreTrainedModel] | None = None,
    trained: Path | None = None,
    template: Template = CHAT,
) -> tuple[Path, float]:
    """Train a language model on the shards and store the unified model as `model` of the run.

    Args:
        run: the run.
        config: model and schedule.
        shards: shard folders.
        vocabulary: that made the shards.
        text: text tokenizer.
        tokenizers: media tokenizers by modality.
        seed: of weights and plan.
        weights: share of ids by task, default in proportion to what there is.
        start: makes the model to train, default a new Llama of the configured size.
        trained: another run's folder, whose training the new model's weights are taken from.
        template: that made the shards.

    Returns:
        The model folder and the last training loss, which the folder keeps in `training.json`.

    Raises:
        ManifestError: settings that cannot work (`check_lm`), or rows of codebooks where no tokenizer has one.
        CheckpointError: `trained` holds no training of such a model.
    """
    from anyglot_lm.data import TokenDataModule
    from anyglot_lm.factored import factor_rows, unfactor_rows
    from anyglot_lm.model import new_llama, start_from_codebooks
    from anyglot_lm.plan import build_plan
    from anyglot_lm.train import LitUnified, fit_lm
    from anyglot_lm.unified import UnifiedModel

    check_lm(config, new=start is None)
    entries = {name: t.codebooks for name, t in tokenizers.items() if t.codebooks is not None}
    if (config.factored or config.codebook_rows) and not entries:
        raise ManifestError("lm.factored and lm.codebook_rows need tokenizers with codebooks; leave them out")

    def new() -> PreTrainedModel:
        model = new_llama(
            vocabulary,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_length=max(1024, config.seq_len),
            tied=config.tied,
            qk_norm=config.qk_norm,
            seed=seed,
        )
        if config.codebook_rows:
            start_from_codebooks(model, vocabulary, entries, seed=seed)
        if config.factored:
            factors = {name: t.factors for name, t in tokenizers.items() if t.factors is not None}
            factor_rows(model, vocabulary, entries, factors, seed=seed)
        if trained is not None:
            take_weights(model, trained / LM_STATE)
        return model

    def make(folder: Path) -> None:
        plan = build_plan(
            list(shards),
            weights=weights,
            seq_len=config.seq_len,
            num_packs=config.max_steps * config.batch_size,
            seed=seed,
            condition_dropout=config.condition_dropout,
            path=run.dir / "plan",
            vocabulary=vocabulary,
            template=template,
        )
        run.say(plan.describe())
        module = LitUnified(
            (start or new)(),
            vocabulary,
            max_steps=config.max_steps,
            lr=config.lr,
            rows_lr=config.rows_lr,
            warmup_steps=config.warmup_steps,
            cooldown=config.cooldown,
            weight_decay=config.weight_decay,
            muon=config.muon,
            modality_weights=config.modality_weights,
            z_loss=config.z_loss,
            history_noise=config.history_noise,
            sliced=config.sliced,
            compile=config.compile and can_compile(run),
            log_every=config.log_every,
            seed=seed,
        )
        data = TokenDataModule(plan, batch_size=config.batch_size, num_workers=config.num_workers)
        loss = fit_lm(
            module,
            data,
            run_dir=run.dir / LM_STATE.parent,
            precision=resolve_precision(config.precision),
            checkpoint_every=config.checkpoint_every,
        )
        run.say(f"final training loss {loss!r}")
        model = unfactor_rows(module.model).bfloat16()
        UnifiedModel(model, vocabulary, template, text, tokenizers).save_pretrained(folder)
        (folder / "training.json").write_text(
            json.dumps({"loss": loss, "steps": config.max_steps, "plan": plan.fingerprint})
        )

    folder = run.once("model", make)
    return folder, json.loads((folder / "training.json").read_text())["loss"]


def take_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Give a model the weights that a training of one like it had at the end. Raises CheckpointError."""
    weights, _ = trained_weights(checkpoint)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"{checkpoint}: no training of such a model ({said}); give another run") from error


def can_compile(run: Run) -> bool:
    """Whether this machine has the C++ compiler that torch.compile needs; says so where it has none."""
    if shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"):
        return True
    run.say("no C++ compiler found: training without torch.compile (slower)")
    return False
