"""The grammar in both model runners of vLLM 0.33.0, which needs a GPU and is not installed here.

`run_v1` and `run_v2` drive our classes as vLLM's runners do, through stand-ins with its names, arguments and rules:
`vllm/v1/sample/logits_processor/interface.py` and `vllm/v1/worker/gpu_input_batch.py` (V1),
`vllm/v1/worker/gpu/sample/logits_processor/interface.py` and `vllm/v1/worker/gpu/states.py` (V2).
"""

from __future__ import annotations

import enum
import importlib
import pickle
import subprocess
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anyglot_lm.engine import GREEDY, generate
from anyglot_lm.grammar import Request, RequestError, SpanGrammar
from anyglot_lm.vllm_processor import request_of, sampling_arguments
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

VOCABULARY = Vocabulary.build(
    60,
    BlockSpec("image", "i", 16, 2, "raster", grid=(2, 3)),
    BlockSpec("speech", "s", 16, 3, "delay", "first", max_frames=6),
    BlockSpec("music", "m", 16, 2, "frame_major", max_frames=9),
)
GRAMMAR = SpanGrammar(VOCABULARY)
EOS = VOCABULARY.controls["eos"]
REQUESTS = [
    Request(order=("image",), max_ids=40),
    Request(order=("text", "speech"), max_ids=60, max_length={"text": 9}),
    Request(order=("speech", "music"), max_ids=60, min_frames={"music": 2}, max_frames={"music": 4}),
    Request(max_ids=40),
    Request(required={"image", "text"}, max_ids=50),
    Request(forbidden={"text"}, max_ids=45),
    Request(allowed={"text", "music"}, max_ids=20, min_text=2),
    Request(order=("text",), max_ids=1 + 7),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY.size + 64,  # a head with more rows than ids
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[61, 63, *rng.integers(0, 60, rng.integers(0, 12)).tolist(), 64] for _ in range(count)]


def check(ids: Sequence[int], request: Request) -> None:
    """A whole answer of the request."""
    assert len(ids) <= request.max_ids and ids[-1] == EOS
    names = [span.modality for span in GRAMMAR.parse(ids)]
    if request.order is not None:
        assert tuple(names) == request.order
    assert set(request.required) <= set(names) and not set(request.forbidden) & set(names)
    assert request.allowed is None or set(names) <= set(request.allowed)


def greedy(model: Any, rows: list[list[int]], requests: list[Request]) -> list[list[int]]:
    return generate(model, VOCABULARY, rows, requests, dict.fromkeys(("text", *VOCABULARY.modalities), GREEDY))


@dataclass
class Params:
    """The fields of `vllm.SamplingParams` that matter here. Plain requests have no stops, so that they write any id."""

    extra_args: dict[str, Any] | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    detokenize: bool = True


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, Params, list[int] | None, list[int]]]
    moved: Sequence[tuple[int, int, MoveDirectionality]]


class V1Base(ABC):
    @classmethod
    def validate_params(cls, sampling_params: Params) -> None:
        return None

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...
    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor: ...
    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...
    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None: ...


@dataclass
class Buffer:
    """`UvaBackedTensor` and `StagedWriteTensor`: `.np` on the host, `.gpu` on the device."""

    gpu: torch.Tensor

    @property
    def np(self) -> np.ndarray:
        return self.gpu.numpy()


@dataclass(frozen=True)
class LogitsProcRequestState:
    device: torch.device
    max_num_reqs: int
    vocab_size: int
    all_token_ids: Buffer
    prompt_len: Buffer
    prefill_len: Buffer
    total_len: Buffer


@dataclass(frozen=True)
class LogitsContext:
    expanded_idx_mapping: torch.Tensor
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    expanded_local_pos: torch.Tensor
    input_ids: torch.Tensor
    pos: torch.Tensor
    seq_lens_upper_bound_np: np.ndarray


class V2Base(ABC):
    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        return None

    @classmethod
    def validate_params(cls, sampling_params: Params) -> None:
        return None

    def add_request(self, req_idx: int, sampling_params: Params) -> bool:
        return True

    def apply_staged_writes(self) -> None:
        return None

    @abstractmethod
    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor: ...


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`anyglot_lm.vllm_processor` where vLLM's interfaces are the ones above."""
    from anyglot_lm import vllm_processor

    for name, base in [
        ("vllm.v1.sample.logits_processor", V1Base),
        ("vllm.v1.worker.gpu.sample.logits_processor", V2Base),
    ]:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            parent = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
        monkeypatch.setattr(sys.modules[name], "LogitsProcessor", base, raising=False)
    vllm_processor._made.cache_clear()
    yield vllm_processor
    vllm_processor._made.cache_clear()


@pytest.fixture
def served(tmp_path: Path) -> Any:
    VOCABULARY.save(tmp_path / "vocabulary.json")
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(model=str(tmp_path), revision=None), speculative_config=None
    )


Next = Callable[[list[int]], torch.Tensor]
"""The model: a sequence -> logits float32 `[V]`."""


@dataclass
class Job:
    """A request on its way through a runner."""

    prompt: list[int]
    params: Params
    ids: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        stops = self.params.stop_token_ids or ()
        return (bool(self.ids) and self.ids[-1] in stops) or len(self.ids) == self.params.max_tokens


def run_v1(processor: Any, jobs: list[Job], model: Next, rng: np.random.Generator, pick: Callable[..., int]) -> None:
    """As `InputBatch` does it: batches of up to four, holes filled by moving the last row, random swaps, preemption."""
    waiting, rows = list(jobs), []  # type: ignore[var-annotated]
    while waiting or rows:
        removed, added, moved = [], [], []
        for place in reversed(range(len(rows))):
            job = rows[place]
            if job.done or rng.random() < 0.03:  # done, or preempted: comes back with its ids
                if not job.done:
                    waiting.append(job)
                rows[place] = None
                removed.append(place)
        while waiting and (removed or len(rows) < 4):
            job = waiting.pop(0)
            if removed:
                place = removed.pop()
                rows[place] = job
            else:
                place = len(rows)
                rows.append(job)
            job.ids = list(job.ids)  # the runner's own list, which it will extend in place
            added.append((place, job.params, job.prompt, job.ids))
        for place in sorted(removed):
            while rows and rows[-1] is None:
                rows.pop()
            if place < len(rows):
                moved.append((len(rows) - 1, place, MoveDirectionality.UNIDIRECTIONAL))
                rows[place] = rows.pop()
        if len(rows) > 1 and rng.random() < 0.3:
            a, b = rng.choice(len(rows), 2, replace=False).tolist()
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        change = BatchUpdate(len(rows), removed, added, moved) if removed or added or moved else None
        processor.update_state(change)
        if not rows:
            continue
        logits = torch.stack([model(job.prompt + job.ids) for job in rows])
        found = processor.apply(logits)
        for job, row in zip(rows, found, strict=True):
            job.ids.append(pick(row))


def run_v2(
    make: Callable[[LogitsProcRequestState], Any],
    jobs: list[Job],
    model: Next,
    rng: np.random.Generator,
    pick: Callable[..., int],
) -> None:
    """As `GPUModelRunner` does it: four slots from a free list, rows in any order, prompts in chunks, preemption."""
    size = (4, 300)
    states = LogitsProcRequestState(
        torch.device("cpu"),
        4,
        VOCABULARY.size,
        Buffer(torch.full(size, -7, dtype=torch.int32)),
        *(Buffer(torch.zeros(4, dtype=torch.int32)) for _ in range(3)),
    )
    processor = make(states)
    waiting, slots, free, read = list(jobs), {}, [0, 1, 2, 3], {}  # type: ignore[var-annotated]
    changes: dict[int, bool] = {}
    while waiting or slots:
        for slot in [slot for slot, job in slots.items() if job.done or rng.random() < 0.03]:
            job = slots.pop(slot)
            free.append(slot)
            if not job.done:
                waiting.append(job)
        while waiting and free:
            job, slot = waiting.pop(0), free.pop()
            slots[slot] = job
            tokens = job.prompt + job.ids
            states.all_token_ids.gpu[slot] = -7
            states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            states.prompt_len.gpu[slot], states.prefill_len.gpu[slot] = len(job.prompt), len(tokens)
            states.total_len.gpu[slot] = len(tokens)
            read[slot] = 0
            changes[slot] = processor.add_request(slot, job.params)
        processor.apply_staged_writes()
        if not slots:
            continue
        order = rng.permutation(list(slots)).tolist()
        total = [int(states.total_len.gpu[slot]) for slot in order]
        lengths = [min(n, read[slot] + 5) if read[slot] < n - 1 else n for slot, n in zip(order, total, strict=True)]
        tokens = [slots[slot].prompt + slots[slot].ids for slot in order]
        ctx = LogitsContext(
            torch.tensor(order),
            torch.tensor(order),
            np.array(order),
            torch.zeros(len(order), dtype=torch.int64),
            torch.tensor([row[n - 1] for row, n in zip(tokens, lengths, strict=True)]),
            torch.tensor(lengths) - 1,
            np.array(lengths),
        )
        logits = torch.stack([model(row[:n]) for row, n in zip(tokens, lengths, strict=True)])
        before = logits.clone()
        found = processor.apply(logits, ctx) if any(changes[slot] for slot in order) else logits
        for i, slot in enumerate(order):
            if not changes[slot]:
                assert torch.equal(found[i], before[i])
            read[slot] = lengths[i]
            if lengths[i] < int(states.prefill_len.gpu[slot]):
                continue  # the sample of a chunk is thrown away
            token = pick(found[i])
            slots[slot].ids.append(token)
            states.all_token_ids.gpu[slot, total[i]] = token
            states.total_len.gpu[slot] += 1


def _logits(model: LlamaForCausalLM) -> Next:
    return lambda ids: model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].detach()


def jobs_of(rows: list[list[int]], requests: list[Request]) -> list[Job]:
    return [
        Job(row, Params(**sampling_arguments(VOCABULARY, request))) for row, request in zip(rows, requests, strict=True)
    ]


def run(runner: str, vllm: Any, served: Any, jobs: list[Job], model: Next, pick: Callable[..., int]) -> None:
    rng = np.random.default_rng(0)
    if runner == "v1":
        processor = vllm.V1SpanProcessor(served, torch.device("cpu"), False)
        assert not processor.is_argmax_invariant()
        run_v1(processor, jobs, model, rng, pick)
    else:
        run_v2(lambda states: vllm.V2SpanProcessor(served, states), jobs, model, rng, pick)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_vllm_greedy_equals_the_engine(runner: str, vllm: Any, served: Any, model: LlamaForCausalLM) -> None:
    rows = prompts(10)
    requests = [REQUESTS[i % len(REQUESTS)] for i in range(10)]
    jobs = jobs_of(rows, requests)
    run(runner, vllm, served, jobs, _logits(model), lambda row: int(row.argmax()))
    assert [job.ids for job in jobs] == greedy(model, rows, requests)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_whatever_vllm_samples_parses(runner: str, vllm: Any, served: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    requests = [REQUESTS[i % len(REQUESTS)] for i in range(60)]
    jobs = jobs_of(prompts(60, seed=2), requests)
    plain = [Job([61, 64], Params(None, 9)) for _ in range(6)]
    mixed = [*jobs, *plain]
    run(
        runner,
        vllm,
        served,
        [mixed[i] for i in np.random.default_rng(4).permutation(len(mixed))],
        lambda ids: torch.randn(VOCABULARY.size + 64, generator=generator),
        lambda row: int(row.softmax(-1).multinomial(1, generator=generator)),
    )
    for job, request in zip(jobs, requests, strict=True):
        check(job.ids, request)
    assert all(len(job.ids) == 9 for job in plain)
    assert max(max(job.ids) for job in plain) >= VOCABULARY.size, "rows without a request are left alone"


def test_vllm_may_take_ids_back(vllm: Any, served: Any) -> None:
    processor, ids = vllm.V1SpanProcessor(served, torch.device("cpu"), False), []  # type: ignore[var-annotated]
    params = Params({"anyglot": {"order": ["text", "image"], "min_text": 3}}, 50, [EOS])
    processor.update_state(BatchUpdate(1, [], [(0, params, [61, 64], ids)], []))
    legal = []
    for written in ([], [1, 2], [1, 2, 3], [1], [1, 2, 3]):
        ids[:] = written
        legal.append(processor.apply(torch.zeros(1, VOCABULARY.size)).isfinite().sum().item())
    assert legal == [60, 60, 61, 60, 61]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_what_cannot_be_fulfilled_ends_at_once(
    runner: str, vllm: Any, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    request = Request(order=("image",))
    jobs = [
        Job([61, 64], Params({"anyglot": '{"order": ["video"]}'}, 50, [EOS])),
        Job([61, 64], Params({"anyglot": request.to_dict()}, 10, [EOS])),  # no room for an image
        Job([61, 64], Params({"anyglot": request.to_dict()}, 50, [EOS])),
    ]
    run(runner, vllm, served, jobs, lambda ids: torch.randn(VOCABULARY.size), lambda row: int(row.argmax()))
    assert jobs[0].ids == jobs[1].ids == [EOS]
    check(jobs[2].ids, request)
    assert "order names 'video'" in caplog.text and "max_ids is 10, but image + eos needs 15" in caplog.text


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_an_id_that_was_not_legal_ends_the_answer(
    runner: str, vllm: Any, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job([61, 64], Params({"anyglot": {"order": ["image"]}}, 50, [EOS]))
    run(
        runner,
        vllm,
        served,
        [job],
        lambda ids: torch.zeros(VOCABULARY.size),
        lambda row: 3 if len(job.ids) == 4 else int(row.argmax()),
    )
    assert job.ids[4:] == [3, EOS] and "id 3 is not legal" in caplog.text


@pytest.mark.parametrize("name", ["V1SpanProcessor", "V2SpanProcessor"])
def test_vllm_finds_the_class_and_refuses_broken_requests(name: str, vllm: Any) -> None:
    found = getattr(importlib.import_module("anyglot_lm.vllm_processor"), name)  # "module:Class" on the command line
    base = V1Base if name.startswith("V1") else V2Base
    assert isinstance(found, type) and issubclass(found, base) and pickle.loads(pickle.dumps(found)) is found
    found.validate_params(Params())
    found.validate_params(Params({"other": 1}))
    found.validate_params(Params({"anyglot": '{"order": ["image"]}'}))
    for content, message in [('{"order', "is no JSON"), ('{"orders": []}', "no entry 'orders'"), (3, "JSON object")]:
        with pytest.raises(ValueError, match=message):
            found.validate_params(Params({"anyglot": content}))
    with pytest.raises(AttributeError, match="V3SpanProcessor"):
        vllm.V3SpanProcessor  # noqa: B018


def test_vllm_without_what_we_need(vllm: Any, served: Any, tmp_path: Path) -> None:
    served.speculative_config = object()
    with pytest.raises(ValueError, match="without speculative decoding"):
        vllm.V2SpanProcessor(served, None)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(OSError, match=r"vocabulary.json"):
        vllm.V1SpanProcessor(served, torch.device("cpu"), False)


def test_sampling_arguments() -> None:
    request = Request(order=("image",))
    found = sampling_arguments(VOCABULARY, request)
    assert found["max_tokens"] == 15 and found["stop_token_ids"] == [EOS] and found["detokenize"] is False
    assert request_of(Params(found["extra_args"], 15)) == Request(order=("image",), max_ids=15)
    assert request_of(Params(found["extra_args"], None)) == request
    with pytest.raises(RequestError, match="order names 'video'"):
        sampling_arguments(VOCABULARY, Request(order=("video",)))


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, anyglot_lm.vllm_processor as v; print('vllm' in sys.modules, 'transformers' in sys.modules);"
        "\ntry: v.V1SpanProcessor\nexcept ModuleNotFoundError as e: print(e.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "vllm"]
