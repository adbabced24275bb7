"""What a training run costs before it is started: parameters, memory per GPU, FLOPs per id, ids per second, days.

Closed formulas over the numbers of a decoder with SwiGLU layers, grouped-query attention and RMSNorm (Llama, Mistral,
Qwen2, Qwen3 as transformers has them); no model is built and nothing is measured. The tests hold them against real
models: parameters, gradients and optimizer states to the byte, activations against what autograd keeps.

    activations     Korthikanti et al. 2022 (arXiv 2205.05198), section 4, adapted: what autograd keeps of each layer of
                    transformers without fusion: RMSNorm in float32, flash attention (no T x T matrix), SwiGLU.
    FLOPs           2 per weight and id forward, 2 more backward for the input, 2 more for each weight that trains
                    (Kaplan et al. 2020, arXiv 2001.08361, appendix B of Chowdhery et al. 2022, arXiv 2204.02311);
                    causal attention counts the half that is computed.
    devices         dense bf16 matmul rate with float32 sums and memory, from the vendors' data sheets.

It does not know communication, the allocator's gaps or the CUDA context (a few GiB: leave a tenth of the memory free),
nor the time of data and optimizer: the MFU that you give stands for them. torch.compile keeps less than is said here.

D width, F feed-forward width, V vocabulary, T ids of a pack, r rank of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.optim import SMALLEST

if TYPE_CHECKING:
    from torch import nn

GIB = 2**30
PRESETS = ("full", "lora", "rows")
OPTIMIZERS = ("adamw", "muon")
LOSS_CHUNK = 2**28
"""Bytes of float32 logits that `loss.span_nll` holds at once on an accelerator."""


@dataclass(frozen=True)
class Device:
    """bf16 dense FLOP/s with float32 sums, memory in GiB, and the data sheet that says so."""

    flops: float
    memory: float
    source: str


DEVICES = {
    "h100": Device(989.4e12, 80, "NVIDIA H100 SXM data sheet: 1,979 TFLOP/s with sparsity, half of it dense"),
    "h200": Device(989.4e12, 141, "NVIDIA H200 SXM data sheet: 1,979 TFLOP/s with sparsity, half of it dense"),
    "a100": Device(312e12, 80, "NVIDIA A100 80 GB SXM data sheet: 312 TFLOP/s dense"),
    "4090": Device(165.2e12, 24, "NVIDIA Ada GPU architecture paper, RTX 4090: 165.2 TFLOP/s dense, float32 sums"),
}


@dataclass(frozen=True)
class Precision:
    """Bytes per number: stored weights, gradients, optimizer states, matmuls, and the residual stream."""

    weights: int
    grads: int
    states: int
    compute: int
    residual: int

    @property
    def mixed(self) -> bool:
        """Weights are kept finer than matmuls take them: autocast makes a copy of every matmul's operands."""
        return self.weights > self.compute


PRECISIONS = {
    "32-true": Precision(4, 4, 4, 4, 4),
    "bf16-mixed": Precision(4, 4, 4, 2, 4),
    "bf16-true": Precision(2, 2, 2, 2, 2),
}


@dataclass(frozen=True)
class Backbone:
    """The numbers of a decoder that its cost depends on. `vocab_size` are the rows of the model as it is."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Backbone:
        """Of a transformers config or its dictionary (`config.json`).

        Raises:
            ManifestError: another architecture, or a number is missing.
        """
        content: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        kind = content.get("model_type")
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise ManifestError(f"model_type {kind!r}: costs are known for llama, mistral, qwen2 and qwen3 only")
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in names:
            value = content.get(name)
            if not isinstance(value, int) or value < 1:
                raise ManifestError(f"config: {name} is {value!r}, must be a whole number above 0; write it there")
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads = (content[name] for name in names)
        bias = bool(content.get("attention_bias", False)) if kind in ("llama", "qwen3") else kind == "qwen2"
        return cls(
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            content.get("num_key_value_heads") or num_heads,
            content.get("head_dim") or hidden_size // num_heads,
            tied=bool(content.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
            qkv_bias=bias,
            o_bias=bias and kind != "qwen2",
            mlp_bias=bool(content.get("mlp_bias", False)) if kind == "llama" else False,
        )

    @property
    def q_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, as of all value heads."""
        return self.num_kv_heads * self.head_dim

    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the seven linear maps of one layer: q, k, v, o, gate, up, down."""
        width, inner = self.hidden_size, self.intermediate_size
        attention = [(width, self.q_size), (width, self.kv_size), (width, self.kv_size), (self.q_size, width)]
        return [*attention, (width, inner), (width, inner), (inner, width)]

    def vectors(self) -> list[int]:
        """Sizes of the norms and biases of one layer."""
        sizes = [self.hidden_size, self.hidden_size]
        sizes += [self.head_dim] * 2 * self.qk_norm + [self.q_size, self.kv_size, self.kv_size] * self.qkv_bias
        return (
            sizes + [self.hidden_size] * self.o_bias + [*[self.intermediate_size] * 2, self.hidden_size] * self.mlp_bias
        )

    def row_matrices(self) -> int:
        """Matrices with one row per id: input rows and head, or one for both."""
        return 1 if self.tied else 2

    def layer_weights(self) -> int:
        """Parameters of the linear maps of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices())

    def parameters(self, vocab_size: int | None = None) -> int:
        """Parameters of the whole model, with `vocab_size` rows."""
        rows = (vocab_size or self.vocab_size) * self.hidden_size * self.row_matrices()
        return rows + self.num_layers * (self.layer_weights() + sum(self.vectors())) + self.hidden_size

    def lora_parameters(self, rank: int) -> int:
        """Parameters of adapters of `rank` on every linear map."""
        return self.num_layers * sum(rank * (inputs + outputs) for inputs, outputs in self.matrices())


BACKBONES = {
    "smollm2-135m": Backbone(49152, 576, 1536, 30, 9, 3, 64, tied=True),
    "qwen3-0.6b": Backbone(151936, 1024, 3072, 28, 16, 8, 128, tied=True, qk_norm=True),
    "llama-1.3b": Backbone(32000, 2048, 5504, 24, 16, 16, 128, tied=False),
    "llama-7b": Backbone(32000, 4096, 11008, 32, 32, 32, 128, tied=False),
}
"""From the config.json of HuggingFaceTB/SmolLM2-135M, Qwen/Qwen3-0.6B, princeton-nlp/Sheared-LLaMA-1.3B, Llama 2 7B."""


def flops_per_id(
    model_or_config: Any,
    seq_len: float,
    trained: str | None = None,
    *,
    new_rows: int = 0,
    lora_rank: int = 16,
    head_rows: float | None = None,
    checkpointing: bool = False,
) -> float:
    """FLOPs of one training step per id: forward, backward and, with `checkpointing`, the second forward of the layers.

    Args:
        model_or_config: a `Backbone`, a transformers config or its dictionary; or a causal LM of any architecture,
            whose matrices are then counted one by one (LoRA, split rows and frozen parts as they are).
        seq_len: ids that see each other. Of packed documents of lengths n: sum(n²) / sum(n).
        trained: "full" (default), "lora" or "rows" (see `estimate`); for a model None means what `requires_grad` says.
        new_rows: trained rows of the head, for "lora" and "rows".
        lora_rank: for "lora".
        head_rows: rows of the head that an id is multiplied with on average: all of them by default, the width of the
            slice in a sliced softmax.
        checkpointing: count the second forward too. Leave it out for the MFU as papers give it.
    """
    from torch import nn

    if isinstance(model_or_config, nn.Module) and trained is None:
        config: Any = model_or_config.config
        heads = config.num_hidden_layers * config.num_attention_heads
        heads_size = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        layers, layers_trained, head, head_trained = _weights_of(model_or_config)
        if head_rows is not None:
            share = head_rows * config.hidden_size / head
            head, head_trained = head * share, head_trained * share
    else:
        source = model_or_config.config if isinstance(model_or_config, nn.Module) else model_or_config
        backbone = source if isinstance(source, Backbone) else Backbone.from_config(source)
        width, heads_size = backbone.hidden_size, backbone.q_size * backbone.num_layers
        layers = float(backbone.num_layers * backbone.layer_weights())
        head = (backbone.vocab_size if head_rows is None else head_rows) * width
        head_trained = head if trained in (None, "full") else min(head, new_rows * width)
        layers_trained = layers if trained in (None, "full") else 0.0
        if trained == "lora":
            layers_trained = float(backbone.lora_parameters(lora_rank))
            layers += layers_trained
    attention = 2.0 * seq_len * heads_size  # q k' and p v, half of them behind the mask
    forward = 2.0 * layers + attention
    backward = 2.0 * (layers + layers_trained) + 2.0 * attention
    return forward * (2 if checkpointing else 1) + backward + 4.0 * head + 2.0 * head_trained


def _weights_of(model: nn.Module) -> tuple[float, float, float, float]:
    """Weights of the layers' matrices, those of them that train, weights of the head's matrix, those that train."""
    import torch

    from anyglot_lm.tuning import output_rows

    inputs: Any = model.get_input_embeddings()  # type: ignore[operator]
    outputs: Any = model.get_output_embeddings()  # type: ignore[operator]
    rows = {id(p) for end in (inputs, outputs) for p in end.parameters()}
    layers = [p for p in model.parameters() if p.ndim == 2 and id(p) not in rows]
    with torch.enable_grad():  # a made matrix has a gradient as a whole
        found = output_rows(model)  # type: ignore[arg-type]
    head = found if isinstance(found, tuple) else (found,)
    sums = [
        sum(p.numel() for p in ps if p.requires_grad or not only) for ps in (layers, head) for only in (False, True)
    ]
    return float(sums[0]), float(sums[1]), float(sums[2]), float(sums[3])


def activation_bytes(
    backbone: Backbone,
    ids: int,
    precision: Precision,
    *,
    preset: str = "full",
    lora_rank: int = 16,
    checkpointing: bool = False,
) -> int:
    """Bytes that autograd keeps of `ids` positions until the backward pass, from the input rows to the final norm.

    With `checkpointing`: the input of every layer, and one layer at a time in full. Copies of weights, which autocast
    makes, and the logits are not in here.
    """
    width, inner, compute = backbone.hidden_size, backbone.intermediate_size, precision.compute
    full = preset == "full"

    def operands(size: int, maps: int) -> int:
        """Inputs kept for the gradients of `maps` matrices or of their adapters; autocast copies them for each."""
        return 0 if preset == "rows" else compute * size * (maps if precision.mixed else 1)

    def norm(size: int, kept: int) -> int:
        """Input in float32 and, for the gradient of its scale, what it gave; and one number per position."""
        return 4 * size + (kept * size if full else 0)

    attention = compute * (2 * backbone.q_size + 2 * backbone.kv_size) + 4 * backbone.num_heads
    attention += operands(width, 3)
    if preset == "lora" and precision.mixed:  # else the map o keeps what attention keeps anyway
        attention += compute * backbone.q_size
    if backbone.qk_norm:
        attention += norm(backbone.q_size + backbone.kv_size, compute)
        attention += 4 * (backbone.num_heads + backbone.num_kv_heads)
    mlp = compute * inner * 3 + operands(width, 2) + operands(inner, 1)
    layer = attention + mlp + 2 * (norm(width, precision.residual) + 4)
    if preset == "lora":
        layer += 7 * lora_rank * compute
    ends = norm(width, precision.residual) + 4 + precision.residual * (width + 2 * backbone.head_dim) + 8
    if checkpointing:
        return ids * (backbone.num_layers * precision.residual * width + layer + ends)
    return ids * (backbone.num_layers * layer + ends)


def _trained(
    backbone: Backbone, vocab_size: int, preset: str, lora_rank: int, new_rows: int
) -> tuple[list[tuple[int, int]], int]:
    """Shapes of the trained matrices of the layers, and how many other numbers train (rows, norms, biases)."""
    others = new_rows * backbone.hidden_size * backbone.row_matrices()
    if preset == "rows":
        return [], others
    if preset == "lora":
        pairs = [[(lora_rank, inputs), (outputs, lora_rank)] for inputs, outputs in backbone.matrices()]
        return [shape for pair in pairs for shape in pair] * backbone.num_layers, others
    others += backbone.num_layers * sum(backbone.vectors()) + backbone.hidden_size
    return backbone.matrices() * backbone.num_layers, others


def _loss_bytes(backbone: Backbone, ids: int, precision: Precision, vocab_size: int, new_rows: int) -> int:
    """Of `span_nll` in the backward pass, if every id competes with all others (`sliced=False`; at most that much)."""
    logits = min(LOSS_CHUNK, 4 * ids * vocab_size)
    tile = logits if precision.compute == 4 else logits + 2 * (logits * precision.compute // 4)  # product and slope
    hidden = ids * backbone.hidden_size * (precision.compute + 4 + precision.residual)  # sorted; gradients; put back
    rows = 4 + (precision.weights if precision.weights < 4 else 0)  # the head's gradient in float32, and as it is given
    return tile + hidden + rows * new_rows * backbone.hidden_size


@dataclass
class Cost:
    """An estimate: bytes per GPU by part, FLOPs per id, ids per second of all GPUs, days.

    `setting` says what was asked. `days` is None without a number of ids to train on.
    """

    setting: dict[str, Any]
    parameters: int
    trained: int
    active: int
    memory: dict[str, int]
    device_memory: int
    flops_per_id: float
    flops_per_id_computed: float
    ids_per_s: float
    days: float | None = None
    total_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.total_bytes = sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """A tenth of the device's memory stays free for what is not counted."""
        return self.total_bytes <= 0.9 * self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**asdict(self), "fits": self.fits}

    def describe(self) -> str:
        """A short table."""
        s = self.setting
        layout = f"{s['gpus']} x {s['device']}" + (f", weights over {s['fsdp']}" if s["fsdp"] > 1 else "")
        extra = ", gradient checkpointing" if s["checkpointing"] else ""
        verdict = "fits" if self.fits else "does not fit"
        lines = [
            f"{s['name']}: {_short(self.parameters)} parameters with {s['vocab_size']:,} rows, "
            f"{_short(self.active)} active per id, {_short(self.trained)} trained ({s['preset']})",
            f"{layout}, {s['packs']} x {s['seq_len']:,} ids each, {s['precision']}, {s['optimizer']}{extra}",
            "GiB per GPU",
            *(f"  {part:12s} {size / GIB:7.2f}" for part, size in self.memory.items() if size),
            f"  {'total':12s} {self.total_bytes / GIB:7.2f}  {verdict} in {self.device_memory / GIB:g}",
            f"FLOPs per id   {_short(self.flops_per_id)}"
            + (f", {_short(self.flops_per_id_computed)} with the second forward" if s["checkpointing"] else ""),
            f"ids/s          {self.ids_per_s:,.0f} at {100 * s['mfu']:g} % of {s['peak'] / 1e12:g} TFLOP/s each",
        ]
        if self.days is not None:
            lines.append(f"time           {_duration(self.days)} for {_short(s['tokens'])} ids")
        return "\n".join(lines)


def _short(number: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1e3 * size else f"{number / size:.0f}{unit}"
    return f"{number:g}"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:.3g} days"
    return f"{24 * days:.3g} hours" if 24 * days >= 1 else f"{1440 * days:.3g} minutes"


def estimate(
    backbone: Backbone,
    *,
    name: str = "model",
    vocab_size: int | None = None,
    preset: str = "full",
    train_old_rows: bool = False,
    lora_rank: int = 16,
    optimizer: str = "adamw",
    precision: str = "bf16-mixed",
    seq_len: int = 4096,
    packs: int = 1,
    checkpointing: bool = False,
    gpus: int = 1,
    fsdp: int = 1,
    device: str = "h100",
    mfu: float = 0.4,
    tokens: float | None = None,
) -> Cost:
    """What a training run costs.

    Args:
        backbone: the model before its vocabulary grows.
        name: for the table.
        vocab_size: rows after that, default those it has.
        preset: "full", "lora" (adapters on every linear map, new rows) or "rows" (new rows only); see `tuning.py`.
        train_old_rows: with "full", the old rows train too; they do anyway where there are no new ones.
        lora_rank: of "lora".
        optimizer: "adamw" keeps two numbers per trained one; "muon" one for hidden matrices (`MuonAdamW`).
        precision: "32-true", "bf16-mixed" (float32 weights, gradients and states, matmuls in bfloat16), "bf16-true".
        seq_len: ids of a pack. Attention is counted as if one document filled it.
        packs: packs per GPU and micro-batch.
        checkpointing: of every layer.
        gpus: all of them.
        fsdp: GPUs that share one copy of weights, gradients and states; 1 is DDP.
        device: a key of `DEVICES`.
        mfu: share of the device's peak that the arithmetic of the step reaches, second forwards counted.
        tokens: ids to train on, for the time.

    Raises:
        ManifestError: an unknown name or an impossible number.
    """
    for what, value, known in (
        ("preset", preset, PRESETS),
        ("optimizer", optimizer, OPTIMIZERS),
        ("precision", precision, tuple(PRECISIONS)),
        ("device", device, tuple(DEVICES)),
    ):
        if value not in known:
            raise ManifestError(f"{what} {value!r}: no such {what}; use {', '.join(known)}")
    vocab_size = backbone.vocab_size if vocab_size is None else vocab_size
    counts = {"vocab_size": vocab_size, "seq_len": seq_len, "packs": packs, "gpus": gpus, "fsdp": fsdp}
    for what, number in {**counts, "lora_rank": lora_rank}.items():
        if number < 1:
            raise ManifestError(f"{what} is {number}; it must be at least 1")
    if gpus % fsdp:
        raise ManifestError(f"fsdp={fsdp} does not divide gpus={gpus}; use a divisor, such as {math.gcd(gpus, fsdp)}")
    if not 0 < mfu <= 1:
        raise ManifestError(f"mfu is {mfu}; it is a share of the peak, above 0 and at most 1 (0.4 is usual)")
    if tokens is not None and not 0 < tokens < math.inf:
        raise ManifestError(f"tokens is {tokens}; it must be above 0")
    added = vocab_size - backbone.vocab_size
    if preset != "full" and added < 1:
        raise ManifestError(
            f"preset {preset}: vocab_size {vocab_size} brings no new rows to the {backbone.vocab_size} of the model; "
            "give the rows after expansion, or use preset full"
        )
    if preset != "full" and train_old_rows:
        raise ManifestError(f"train_old_rows is for preset full; preset {preset} leaves old rows as they are")
    new_rows = vocab_size if preset == "full" and (train_old_rows or added < 1) else added
    kind, gadget = PRECISIONS[precision], DEVICES[device]
    shapes, others = _trained(backbone, vocab_size, preset, lora_rank, new_rows)
    trained = sum(rows * columns for rows, columns in shapes) + others
    total = backbone.parameters(vocab_size) + (backbone.lora_parameters(lora_rank) if preset == "lora" else 0)
    muon = sum(m * n for m, n in shapes if optimizer == "muon" and min(m, n) >= SMALLEST)
    rows = vocab_size * backbone.hidden_size * backbone.row_matrices()
    if fsdp > 1:  # two layers whole at a time, rows and head throughout; gradients of one layer and of the trained rows
        layer = backbone.layer_weights() + sum(backbone.vectors())
        gradients = new_rows * backbone.hidden_size * backbone.row_matrices() + (layer if preset == "full" else 0)
        gathered = kind.compute * (2 * layer + rows + gradients)
    else:
        copies = total - rows + vocab_size * backbone.hidden_size
        gathered = kind.compute * copies if kind.mixed else 0
    ids = seq_len * packs
    # FSDP2 gathers weights in the dtype of the matmuls: no autocast, and the stream between layers has that dtype too.
    running = replace(kind, weights=kind.compute, residual=kind.compute) if fsdp > 1 else kind
    memory = {
        "weights": -(-total * kind.weights // fsdp),
        "gradients": -(-trained * kind.grads // fsdp),
        "optimizer": -(-(2 * trained - muon) * kind.states // fsdp),
        "copies": gathered,
        "buckets": trained * kind.grads if gpus > 1 and fsdp == 1 else 0,  # what DDP sends (no gradient_as_bucket_view)
        "activations": activation_bytes(
            backbone, ids, running, preset=preset, lora_rank=lora_rank, checkpointing=checkpointing
        ),
        "loss": _loss_bytes(backbone, ids, running, vocab_size, new_rows),
    }
    numbers = Backbone(**{**asdict(backbone), "vocab_size": vocab_size})
    work = {"trained": preset, "new_rows": new_rows, "lora_rank": lora_rank}
    flops = flops_per_id(numbers, seq_len, **work)  # type: ignore[arg-type]
    computed = flops_per_id(numbers, seq_len, checkpointing=checkpointing, **work)  # type: ignore[arg-type]
    ids_per_s = gpus * mfu * gadget.flops / computed
    setting: dict[str, Any] = {
        "name": name,
        "preset": preset,
        "optimizer": optimizer,
        "precision": precision,
        "device": device,
    }
    setting |= {**counts, "checkpointing": checkpointing, "mfu": mfu, "peak": gadget.flops, "tokens": tokens}
    if preset == "lora":
        setting["lora_rank"] = lora_rank
    active = total - (vocab_size - 1) * backbone.hidden_size * (backbone.row_matrices() - 1)
    return Cost(
        setting,
        total,
        trained,
        active,
        memory,
        round(gadget.memory * GIB),
        flops,
        computed,
        ids_per_s,
        None if tokens is None else tokens / ids_per_s / 86400,
    )
