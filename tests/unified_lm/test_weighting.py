"""Weights of the loss: what they are, and that ranks and accumulation change nothing, against float64 by hand."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyglot_lm.loss import SpanNLL
from anyglot_lm.weighting import SpanWeights, weighted_sum
from anyglot_tokenizers.errors import ManifestError

PROGRAM = Path(__file__).with_name("loss_program.py")
NAMES = ["text", "image", "speech/0", "speech/1", "speech/2"]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(classes: list[int], nll: list[float], lse: list[float] | None = None) -> SpanNLL:
    slice_class = torch.tensor(classes)
    nll_N = torch.tensor(nll, requires_grad=True)
    lse_N = torch.tensor(lse or [0.0] * len(nll), requires_grad=True)
    return SpanNLL(nll_N, lse_N, slice_class, slice_class == 0, slice_class)


def test_the_name_of_a_codebook_beats_its_modality_and_the_mean_is_one() -> None:
    factors = {"speech": 0.5, "speech/1": 0.25, "text": 2.0}
    weight, cost = SpanWeights(NAMES, factors).weights()
    raw = torch.tensor([2.0, 1.0, 0.5, 0.25, 0.5])
    torch.testing.assert_close(weight, raw / raw.mean())
    assert not cost.any()
    shares = [60, 20, 10, 10, 0]
    weight, _ = SpanWeights(NAMES, factors, shares=shares).weights()
    assert (weight * torch.tensor(shares)).sum().item() == pytest.approx(100)
    torch.testing.assert_close(weight / weight[0], raw / raw[0])
    assert SpanWeights(NAMES).weights()[0].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("factors", "shares", "message"),
    [
        ({"smell": 1.0}, None, "no modality 'smell'; there are text, image, speech, speech/0, speech/1, speech/2"),
        ({"speech/3": 1.0}, None, "no codebook 'speech/3'"),
        ({"speech": -1.0}, None, "the factor of 'speech/0' is -1.0"),
        ({"text": math.nan}, None, "the factor of 'text' is nan"),
        ({}, [1.0, 1.0], "2 shares for 5 classes"),
        ({}, [1.0, 1.0, -2.0, 1.0, 1.0], "the share of 'speech/0' is -2.0"),
        ({"text": 0.0}, [1.0, 0.0, 0.0, 0.0, 0.0], "nothing would train"),
    ],
)
def test_what_makes_no_sense_is_refused(factors: dict[str, float], shares: list[float] | None, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        SpanWeights(NAMES, factors, shares=shares)


def test_z_loss_counts_valid_positions_only() -> None:
    nll = values([0, -1, 1], [1.0, 0.0, 2.0], [3.0, 0.0, -4.0])
    weights = SpanWeights(["text", "image"], {"image": 3.0})
    total = weighted_sum(nll, weights, z_loss=0.1)
    assert total.item() == pytest.approx(0.5 * (1 + 0.1 * 9) + 1.5 * (2 + 0.1 * 16))
    total.backward()
    assert nll.nll.grad is not None and nll.lse.grad is not None
    torch.testing.assert_close(nll.nll.grad, torch.tensor([0.5, 0.0, 1.5]))
    torch.testing.assert_close(nll.lse.grad, torch.tensor([0.5 * 0.1 * 6, 0.0, 1.5 * 0.1 * -8]))


def learn(nll_of_class: list[float], seen: list[int], steps: int = 3000) -> SpanWeights:
    """Weights after `steps`, class c seen in every `seen[c]`-th batch (never for 0)."""
    weights = SpanWeights(["text", "image", "speech"], learned=True)
    assert weights.log_variance is not None
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.01)
    for step in range(steps):
        classes = [c for c, every in enumerate(seen) if every and step % every == 0]
        optimizer.zero_grad()
        weighted_sum(values(classes, [nll_of_class[c] for c in classes]), weights).backward()
        optimizer.step()
    return weights


def test_learned_weights_settle_at_one_over_twice_the_nll_however_rare_the_class() -> None:
    weights = learn([1.0, 4.0, 8.0], [1, 1, 5])
    weight, _ = weights.weights()
    wanted = torch.tensor([1 / 2, 1 / 8, 1 / 16])
    torch.testing.assert_close(weight, wanted / wanted.mean(), rtol=0.05, atol=0)


def test_learned_weights_stay_bounded_without_error_and_without_data() -> None:
    weights = learn([0.0, 4.0, 4.0], [1, 1, 0])
    weight, _ = weights.weights()
    assert weights.log_variance is not None
    assert weights.log_variance[2] == 0  # never seen, never moved
    assert weight.mean().item() == pytest.approx(1)
    assert 1 < (weight[0] / weight[2]).item() < math.exp(4)


def by_hand(program: ModuleType) -> dict[str, Tensor]:
    """Gradients in float64 of all micro-batches of all ranks at once, divided by the two ranks."""
    model = program.Model().double()
    t = program.table()
    total = torch.zeros((), dtype=torch.float64)
    factor = torch.tensor([1.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    factor = factor / (factor * share).sum()
    s = 4 * torch.tanh(model.weights.log_variance / 4)
    mean = (share * factor * (-s).exp()).sum().item()
    rows = torch.cat([model.old, model.new])
    for inputs, labels in (batch for rank in (0, 1) for batch in program.micro_batches(rank)):
        for vector, label in zip(inputs.double(), labels.tolist(), strict=True):
            if label < 0:
                continue
            c = int(t.class_of_id[label])
            logits = rows[t.lo[c] : t.hi[c]] @ model.layer(vector)
            lse = logits.exp().sum().log()
            learned = ((-s[c]).exp() * (lse - logits[label - t.lo[c]]) + s[c] / 2) / mean
            total = total + factor[c] * (learned + program.Z_LOSS * lse**2)
    (total / program.CONSTANT / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys() == {"layer.weight", "new", "weights.log_variance"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name].double(), gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulation_with_uneven_counts_equals_the_whole(program: ModuleType) -> None:
    model = program.Model()
    for rank in (0, 1):
        for inputs, labels in program.micro_batches(rank):
            (model(inputs, labels) / 2).backward()
    check({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, by_hand(program))


def test_two_ranks_with_uneven_counts_equal_the_whole(
    program: ModuleType, tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    out = tmp_path / "gradients.safetensors"
    run_ranks(PROGRAM, out)
    found, wanted = load_file(out), by_hand(program)
    for kind in ("ddp", "fsdp"):
        check({name[len(kind) + 1 :]: g for name, g in found.items() if name.startswith(f"{kind}.")}, wanted)
