"""Training on one GPU: ids per second, MFU and peak memory for SmolLM2-135M's shape and a Llama of 1.3 B.

    python benchmarks/gpu_training.py                          both models; needs CUDA, 80 GB for the 1.3 B
    python benchmarks/gpu_training.py --models smollm2-135m    one of them
    python benchmarks/gpu_training.py --device cpu --tiny      a small model: tries the script, says nothing of speed

Random weights, rows of 4,096 ids packed with documents of a mixed corpus, all weights trained by AdamW, our sliced
loss, bf16 by autocast over float32 weights (`bf16-mixed`). MFU is FLOPs of the model (`anyglot_lm.cost`: second
forwards not counted, attention within documents only, the head's slices as they are) over the rate of a large bf16
matmul measured right before in the same process. Checked first: packed documents give what they give alone.

Attention is FlashAttention 2 where flash_attn is installed, else FlexAttention with a block mask, both skipping what
lies between documents; on a CPU sdpa. Decoder layers are compiled one by one (`--no-compile` leaves them).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flex_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anyglot_lm.cost import BACKBONES, Backbone, estimate, flops_per_id
from anyglot_lm.loss import SliceTable, span_nll
from anyglot_lm.meter import matmul_rate
from anyglot_lm.model import hidden_states
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

MODELS = {"smollm2-135m": "mfu_135m", "llama-1.3b": "mfu_1300m"}
PACKS = {"smollm2-135m": 8, "llama-1.3b": 2}
TINY = Backbone(320, 64, 160, 2, 4, 2, 16, tied=True)


def flex(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
    """FlexAttention in the values' dtype: under autocast, rotary embeddings leave queries and keys in float32."""
    return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, mask, **settings)


ALL_ATTENTION_FUNCTIONS.register("packed_flex", flex)
ALL_MASK_ATTENTION_FUNCTIONS.register("packed_flex", flex_attention_mask)


def vocabulary_for(backbone: Backbone, tiny: bool) -> Vocabulary:
    if tiny:
        return Vocabulary.build(
            backbone.vocab_size, BlockSpec("image", "a", 64, grid=(4, 4)), BlockSpec("speech", "b", 64, max_frames=99)
        )
    return Vocabulary.build(
        backbone.vocab_size,
        BlockSpec("image", "a", 8192, grid=(32, 32)),
        BlockSpec("speech", "b", 4096, max_frames=750),
        BlockSpec("music", "c", 2048, 2, max_frames=1500),
    )


def rows_of(vocabulary: Vocabulary, packs: int, seq_len: int, device: str) -> tuple[dict[str, Tensor], list[int]]:
    """Full rows of documents: pictures with captions, speech with words, music, text; the last one of a row is cut."""
    generator = torch.Generator().manual_seed(0)
    unit = max(1, seq_len // 64)
    kinds = [("image", 16 * unit), ("speech", 6 * unit), ("text", 8 * unit), ("text", 3 * unit)]
    ids = torch.empty(packs, seq_len, dtype=torch.long)
    positions = torch.empty_like(ids)
    lengths: list[int] = []
    for row in range(packs):
        at = kind = 0
        while at < seq_len:
            modality, typical = kinds[kind % len(kinds)]
            jitter = int(torch.randint(0, max(1, typical // 4), (1,), generator=generator))
            length = min(typical + jitter, seq_len - at)
            if modality == "text":
                first, last = 0, vocabulary.text_size
            else:
                block = vocabulary.block(modality)
                first, last = block.first_id, block.stop_id
            ids[row, at : at + length] = torch.randint(first, last, (length,), generator=generator)
            positions[row, at : at + length] = torch.arange(length)
            lengths.append(length)
            at, kind = at + length, kind + 1
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(positions[:, 1:] > 0, ids[:, 1:], -100)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}, lengths


def check_no_leak(model: Any, batch: dict[str, Tensor], lengths: list[int], autocast: Any) -> None:
    """The second document of the first row, packed and alone, in the arithmetic of the run."""
    start, stop = lengths[0], lengths[0] + lengths[1]
    with torch.no_grad(), autocast:
        ids, positions = batch["input_ids"][:1], batch["position_ids"][:1]
        packed = hidden_states(model.base_model, ids, positions)[:, start:stop].float()
        alone = hidden_states(model.base_model, ids[:, start:stop], positions[:, start:stop]).float()
    worst = ((packed - alone).norm() / alone.norm()).item()
    assert worst < 0.02, f"documents leak into each other: relative difference {worst:.3f}"
    print(f"  packed document against itself alone: relative difference {worst:.1e}")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    device, cuda = arguments.device, arguments.device.startswith("cuda")
    backbone = TINY if arguments.tiny else BACKBONES[name]
    seq_len = 256 if arguments.tiny else arguments.seq_len
    packs = arguments.packs or (2 if arguments.tiny else PACKS[name])
    vocabulary = vocabulary_for(backbone, arguments.tiny)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=backbone.hidden_size,
        intermediate_size=backbone.intermediate_size,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_heads,
        num_key_value_heads=backbone.num_kv_heads,
        head_dim=backbone.head_dim,
        max_position_embeddings=seq_len,
        tie_word_embeddings=backbone.tied,
        use_cache=False,
        attn_implementation=arguments.attention,
    )
    true = arguments.precision == "bf16-true"
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
    if true:
        model = model.bfloat16()
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=not true)
    batch, lengths = rows_of(vocabulary, packs, seq_len, device)
    if arguments.attention == "flash_attention_2":  # reads documents from one flat row only
        batch = {key: value.reshape(1, -1) for key, value in batch.items()}
    check_no_leak(model, batch, lengths, autocast)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if arguments.compile:
        for layer in model.base_model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    lo, hi, class_of_id = vocabulary.slice_table()
    table = SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id, device=device))
    labels_N = batch["labels"].flatten()

    def step() -> Tensor:
        with autocast:
            hidden_BTD = hidden_states(model.base_model, batch["input_ids"], batch["position_ids"])
            out = span_nll(hidden_BTD.flatten(0, 1), model.get_output_embeddings().weight, labels_N, table)
            loss = out.nll.sum() / (labels_N >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    synchronize = torch.get_device_module(device).synchronize
    first = step().item()
    for _ in range(arguments.warmup - 1):
        step()
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rate = matmul_rate(device, torch.bfloat16)
    seconds = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        last = step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    assert last.item() < first, "the loss of one repeated batch must fall"
    ids = packs * seq_len
    speed = ids / statistics.median(seconds)
    context = sum(n * n for n in lengths) / sum(lengths)
    width = table.class_of_id[labels_N[labels_N >= 0]]
    head_rows = (torch.tensor(table.hi) - torch.tensor(table.lo))[width.cpu()].float().mean().item()
    mfu = flops_per_id(model, context, head_rows=head_rows) * speed / rate
    found = {"ids_per_s": speed, "mfu": mfu, "matmul_tflops": rate / 1e12}
    print(
        f"  {packs} x {seq_len:,} ids, {len(lengths)} documents (mean context {context:,.0f}), "
        f"{vocabulary.size:,} rows\n"
        f"  {speed:,.0f} ids/s (steps {1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f} ms), "
        f"MFU {mfu:.3f} of {rate / 1e12:,.1f} TFLOP/s measured"
    )
    if cuda:
        settings = {"precision": arguments.precision, "checkpointing": arguments.checkpointing}
        said = estimate(
            backbone, vocab_size=vocabulary.size, train_old_rows=True, seq_len=seq_len, packs=packs, **settings
        )
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["estimated_gib"] = said.total_bytes / 2**30
        print(f"  peak memory {found['peak_gib']:.1f} GiB; `anyglot plan cost` says {found['estimated_gib']:.1f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attention", choices=["flash_attention_2", "packed_flex", "sdpa"])
    parser.add_argument("--precision", choices=["bf16-mixed", "bf16-true"], default="bf16-mixed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--packs", type=int)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():  # `make bench` runs everywhere
        print("no CUDA device here: nothing measured (try the script with --device cpu --tiny)")
        print(json.dumps({"benchmark": "gpu_training", "ratios": {}, "versions": {"torch": torch.__version__}}))
        return
    if arguments.attention is None:
        flash = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "packed_flex"
        arguments.attention = flash if cuda else "sdpa"
    if arguments.compile is None:
        arguments.compile = cuda
    where = torch.cuda.get_device_name() if cuda else arguments.device
    print(f"{where}, {arguments.attention}, {arguments.precision}, compile {arguments.compile}")
    ratios: dict[str, float] = {}
    for name in arguments.models[: 1 if arguments.tiny else None]:
        print("tiny" if arguments.tiny else name)
        found = measure(name, arguments)
        ratios |= {"mfu_tiny" if arguments.tiny else MODELS[name]: float(f"{found['mfu']:.3g}")}
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.compiler.reset()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "gpu_training", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
