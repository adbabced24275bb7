"""Codes of answers that are read back as others: which, how many, always the same for a seed, and never a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyglot_lm.data import PackedDataset, TokenDataModule
from anyglot_lm.history import HistoryNoise
from anyglot_lm.model import new_llama
from anyglot_lm.plan import Plan, build_plan
from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.shards import ShardWriter
from anyglot_lm.train import LitUnified, fit_lm
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import ManifestError

VOCABULARY = Vocabulary.build(
    26,
    BlockSpec("image", "i", 64, grid=(4, 4)),
    BlockSpec("speech", "s", 32, num_quantizers=2, pattern="frame_major", max_frames=8),
)


class Letters:
    """A text codec of one id per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(i) + ord("a")) for i in ids)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Documents with a picture as prompt, and speech and a picture as answer."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    with ShardWriter(folder / "shards", VOCABULARY) as writer:
        for _ in range(300):
            sample = Sample(
                [
                    Segment("image", rng.integers(64, size=(1, 4, 4)), "user"),
                    Segment("text", "ab", "user"),
                    Segment("speech", rng.integers(32, size=(2, 8)), "assistant"),
                    Segment("image", rng.integers(64, size=(1, 4, 4)), "assistant"),
                ]
            )
            ids, loss = Template().render(sample, VOCABULARY, Letters())
            writer.add(ids, loss, "all")
    return build_plan([folder / "shards"], seq_len=128, num_packs=64, seed=0)


@pytest.fixture
def batch(plan: Plan) -> dict[str, Tensor]:
    rows = [PackedDataset(plan)[i] for i in range(64)]
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def own(batch: dict[str, Tensor], modality: str) -> Tensor:
    """Where a code of an answer is read: bool `[B, T]`."""
    block, ids = VOCABULARY.block(modality), batch["input_ids"]
    said = torch.zeros_like(ids, dtype=torch.bool)
    said[:, 1:] = (batch["labels"][:, :-1] == ids[:, 1:]) & (batch["position_ids"][:, 1:] > 0)
    return said & (ids >= block.first_id) & (ids < block.stop_id)


def test_only_codes_of_answers_are_others(batch: dict[str, Tensor]) -> None:
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    noisy = HistoryNoise(VOCABULARY, {"speech": 0.4})(batch, 1)
    changed = noisy != batch["input_ids"]
    assert all(torch.equal(batch[name], kept[name]) for name in kept)
    assert changed.any() and not (changed & ~own(batch, "speech")).any()
    block = VOCABULARY.block("speech")
    book = (batch["input_ids"] - block.first_id).div(block.codebook_size, rounding_mode="floor")
    assert torch.equal((noisy - block.first_id).div(block.codebook_size, rounding_mode="floor")[changed], book[changed])
    assert set(book[changed].tolist()) == {0, 1}
    assert len(set((noisy[changed] - block.first_id).tolist())) == 64  # every code of both codebooks is drawn


def test_half_of_the_documents_by_their_rate(batch: dict[str, Tensor]) -> None:
    noise = HistoryNoise(VOCABULARY, {"speech": 0.4, "image": 1.0})
    noisy = torch.cat([noise(batch, seed) for seed in range(8)])
    batch = {name: tensor.repeat(8, 1) for name, tensor in batch.items()}
    changed, document = noisy != batch["input_ids"], (batch["position_ids"] == 0).long().cumsum(1)
    place = document + torch.arange(len(noisy))[:, None] * 1000
    touched = torch.isin(place, place[changed & own(batch, "image")])
    for modality, rate, size in (("speech", 0.4, 32), ("image", 1.0, 64)):
        codes = own(batch, modality)
        assert not changed[codes & ~touched].any()
        assert changed[codes & touched].float().mean().item() == pytest.approx(rate * (size - 1) / size, abs=0.02)
        assert touched[codes].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_seed_says_which(batch: dict[str, Tensor]) -> None:
    noise = HistoryNoise(VOCABULARY, {"speech": 0.4})
    assert torch.equal(noise(batch, 1), noise(batch, 1))
    assert not torch.equal(noise(batch, 1), noise(batch, 2))
    rows = [noise({name: tensor[i : i + 1] for name, tensor in batch.items()}, 1) for i in range(len(batch["labels"]))]
    assert torch.equal(noise(batch, 1), torch.cat(rows)), "whatever rows are a batch"
    assert not HistoryNoise(VOCABULARY, {}) and not HistoryNoise(VOCABULARY, {"speech": 0.0})


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"text": 0.1}, "no modality 'text' with codes; there are image, speech"),
        ({"speech": 1.5}, "speech 1.5 is no share"),
        ({"speech": float("nan")}, "speech nan is no share"),
    ],
)
def test_wrong_rates_are_one_error(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        HistoryNoise(VOCABULARY, rates)


class Killed(Exception):
    """Stands for the end of a process."""


class Recording(LitUnified):
    """Keeps what the model reads, and dies in batch `dies_at`."""

    dies_at = -1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.dies_at:
            raise Killed
        return super().training_step(batch, batch_idx)

    def watch(self) -> list[Tensor]:
        read: list[Tensor] = []
        self.lm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone()))
        return read


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_training_reads_it_and_a_resumed_run_in_other_batches_the_same(plan: Plan, tmp_path: Path) -> None:
    def run(folder: str, accumulate: int, dies_at: int = -1) -> list[Tensor]:
        model = new_llama(VOCABULARY, hidden_size=32, num_layers=1, num_heads=2, seed=0)
        torch.manual_seed(len(plan) + dies_at)  # another process has another one
        lit = Recording(model, VOCABULARY, max_steps=8, log_every=2, history_noise={"speech": 0.4}, seed=5)
        lit.dies_at, read = dies_at, lit.watch()
        data = TokenDataModule(plan, batch_size=4 // accumulate, num_workers=0)
        how: dict[str, Any] = {"precision": "32-true", "accelerator": "cpu", "checkpoint_every": 4}
        try:
            fit_lm(lit, data, run_dir=tmp_path / folder, accumulate=accumulate, **how)
        except Killed:
            assert dies_at >= 0
        return read

    whole = torch.cat(run("whole", 1))
    begun, rest = run("cut", 2, dies_at=12), run("cut", 2)
    assert len(begun) == 12 and len(rest) == 8
    assert torch.equal(whole, torch.cat([*begun[:8], *rest]))
    plain = torch.stack([torch.as_tensor(PackedDataset(plan)[i]["input_ids"]) for i in range(32)])
    assert whole.shape == plain.shape and (whole != plain).any(1).float().mean() > 0.5
