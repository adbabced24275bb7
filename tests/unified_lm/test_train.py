"""Training on tiny shards: the loss falls, a killed run ends like another, wrong checkpoints are refused."""

from __future__ import annotations

import csv
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from anyglot_lm.data import PackedDataset, TokenDataModule
from anyglot_lm.factored import factor_rows, unfactor_rows
from anyglot_lm.model import new_llama
from anyglot_lm.plan import Plan, build_plan
from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.shards import ShardWriter
from anyglot_lm.train import LitUnified, fit_lm
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, FingerprintError, ManifestError

STEPS, BATCH = 12, 2
pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


class Letters:
    """A text codec of one id per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(i) + ord("a")) for i in ids)


@dataclass
class World:
    vocabulary: Vocabulary
    plan: Plan


def make_world(folder: Path, codebook_size: int = 16, packs: int = STEPS * BATCH) -> World:
    vocabulary = Vocabulary.build(26, BlockSpec("image", "i", codebook_size, grid=(2, 2)))
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards", vocabulary) as writer:
        for _ in range(40):
            value = int(rng.integers(0, 16))
            image = Segment("image", np.full((1, 2, 2), value), "user")
            sample = Sample([image, Segment("text", chr(ord("a") + value), "assistant")])
            ids, loss = Template().render(sample, vocabulary, Letters())
            writer.add(ids, loss, "image->text")
    return World(vocabulary, build_plan([folder / "shards"], seq_len=32, num_packs=packs, seed=0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


class Killed(Exception):
    """Stands for the end of a process."""


class Dying(LitUnified):
    """Dies in the batch number `dies_at`, counted from 0."""

    dies_at = -1
    dies_of: type[BaseException] = Killed

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.dies_at:
            raise self.dies_of
        return super().training_step(batch, batch_idx)


def module(world: World, *, factored: bool = False, kind: type[Dying] | None = None, **options: Any) -> Dying:
    model = new_llama(world.vocabulary, hidden_size=32, num_layers=1, num_heads=2, seed=0)
    if factored:
        entries = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0))
        factor_rows(model, world.vocabulary, {"image": entries}, {"image": (4, 4)})
    settings = {"max_steps": STEPS, "targets_per_pack": 8.0, "lr": 1e-2, "warmup_steps": 2, "log_every": 2}
    return (kind or Dying)(model, world.vocabulary, **{**settings, **options})


def fit(lit: LitUnified, world: World, run_dir: Path, **options: Any) -> float:
    accumulate = options.get("accumulate", 1)
    data = TokenDataModule(world.plan, batch_size=BATCH // accumulate, num_workers=0)
    settings = {"precision": "32-true", "accelerator": "cpu", "checkpoint_every": 4}
    return fit_lm(lit, data, run_dir=run_dir, **{**settings, **options})


def weights(lit: LitUnified) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in lit.model.parameters()]


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, list[bytes]]]:
    """Loss and weights of uninterrupted runs, by accumulation."""
    runs = {}
    for accumulate in (1, 2):
        lit = module(world)
        loss = fit(lit, world, tmp_path_factory.mktemp("whole"), accumulate=accumulate)
        runs[accumulate] = (loss, weights(lit))
    return runs


def test_overfits_one_batch(world: World) -> None:
    lit = module(world)
    rows = [PackedDataset(world.plan)[i] for i in range(BATCH)]
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    optimizer = lit.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = lit.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [3, 6, 9, 11])
def test_a_killed_run_ends_like_an_uninterrupted_one(
    world: World, whole: dict[int, tuple[float, list[bytes]]], tmp_path: Path, step: int, accumulate: int
) -> None:
    killed = module(world)
    killed.dies_at = step * accumulate + accumulate - 1
    with pytest.raises(Killed):
        fit(killed, world, tmp_path, accumulate=accumulate)
    assert (tmp_path / "last.ckpt").exists() == (step >= 4)
    resumed = module(world)
    loss = fit(resumed, world, tmp_path, accumulate=accumulate)
    assert repr(loss) == repr(whole[accumulate][0])
    assert weights(resumed) == whole[accumulate][1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_says_so(world: World, tmp_path: Path, kind: type[BaseException]) -> None:
    stopped, before = module(world), signal.getsignal(signal.SIGINT)
    stopped.dies_at, stopped.dies_of = 6, kind
    with pytest.raises(kind):
        fit(stopped, world, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before and (tmp_path / "last.ckpt").exists()


def test_a_killed_run_with_factored_rows_ends_like_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    killed, resumed, whole = (module(world, factored=True) for _ in range(3))
    killed.dies_at = 6
    with pytest.raises(Killed):
        fit(killed, world, tmp_path / "killed")
    assert repr(fit(resumed, world, tmp_path / "killed")) == repr(fit(whole, world, tmp_path / "whole"))
    assert weights(resumed) == weights(whole) != weights(module(world, factored=True))
    for lit in (resumed, whole):
        unfactor_rows(lit.model)
    assert weights(resumed) == weights(whole), "and the rows that they make"


@pytest.mark.parametrize("checkpoint_every", [4, 10])
def test_a_finished_run_gives_its_loss_again(
    world: World, whole: dict[int, tuple[float, list[bytes]]], tmp_path: Path, checkpoint_every: int
) -> None:
    fit(module(world), world, tmp_path, checkpoint_every=checkpoint_every)
    again = module(world)
    loss = fit(again, world, tmp_path, checkpoint_every=checkpoint_every)
    assert (repr(loss), weights(again)) == (repr(whole[1][0]), whole[1][1])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_every_window_once(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int
) -> None:
    fit(module(world), world, tmp_path, accumulate=accumulate)
    assert len(list(tmp_path.glob("logs/version_0/metrics.csv"))) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{n}/{STEPS}" for n in range(2, STEPS + 1, 2)]
    assert all("| text " in line and "ids/s" in line for line in lines)


def test_the_last_window_is_in_the_table_too(world: World, tmp_path: Path) -> None:
    fit(module(world, log_every=5), world, tmp_path, checkpoint_every=5)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["step"])) for row in rows] == [5, 10, STEPS]
    assert all(float(row["loss"]) > 0 for row in rows)


@pytest.mark.parametrize("content", ["", "step,loss\n1,abc\n"])
def test_a_log_that_cannot_be_drawn_stops_nothing(
    world: World, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(module(world), world, tmp_path)
    (tmp_path / "logs" / "version_0" / "metrics.csv").write_text(content)
    assert fit(module(world), world, tmp_path) > 0
    assert "curves.png is not drawn: " in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(world: World, tmp_path: Path) -> None:
    lit = module(world)
    torch.nn.init.constant_(lit.model.base_model.norm.weight, math.inf)
    with pytest.raises(AnyglotError, match="step 2: loss is nan; start again with a lower lr"):
        fit(lit, world, tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


class Exploding(Dying):
    """Has an infinite gradient in the batch `dies_at`."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = LitUnified.training_step(self, batch, batch_idx)
        return loss * math.inf - loss.detach() * math.inf + loss.detach() if batch_idx == self.dies_at else loss


@pytest.mark.parametrize("dies_at", [7, STEPS - 1])
def test_a_gradient_that_is_no_number_spoils_no_checkpoint(world: World, tmp_path: Path, dies_at: int) -> None:
    lit = module(world, kind=Exploding)
    lit.dies_at = dies_at
    with pytest.raises(AnyglotError, match=f"step {dies_at + 1}: a gradient's norm was"):
        fit(lit, world, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == (dies_at + 1) - 4
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


def test_a_plan_that_is_too_short_is_no_success(world: World, tmp_path: Path) -> None:
    with pytest.raises(AnyglotError, match=f"the data ended after {STEPS} of {STEPS + 5} steps"):
        fit(module(world, max_steps=STEPS + 5), world, tmp_path)


def test_rows_are_known_whatever_they_are_called(world: World) -> None:
    size = world.vocabulary.size
    config = GPTNeoXConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = GPTNeoXForCausalLM(config)
    lit = LitUnified(model, world.vocabulary, max_steps=1, targets_per_pack=1.0, lr=1e-3, rows_lr=1e-2)
    matrices, rows, others = lit.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for p in rows["params"]} == {
        id(model.gpt_neox.embed_in.weight),
        id(model.get_output_embeddings().weight),
    }
    assert (rows["muon"], rows["weight_decay"]) == (False, 0.0)
    assert len(matrices["params"]) == 4 and all(min(p.shape) >= 32 for p in matrices["params"])
    assert all(p.ndim == 1 for p in others["params"])


def test_muon_without_a_matrix_is_refused(world: World) -> None:
    lit = module(world)
    lit.model.requires_grad_(False)
    lit.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ManifestError, match="muon: none of what trains is a hidden matrix of 16 rows"):
        lit.configure_optimizers()
    lit.muon = False
    assert len(lit.configure_optimizers()["optimizer"].param_groups) == 1


@pytest.mark.parametrize("sliced", [True, False])
def test_the_uniform_baseline_is_of_what_competes(world: World, tmp_path: Path, sliced: bool) -> None:
    lit = module(world, sliced=sliced)
    fit(lit, world, tmp_path)
    lo, hi, _ = world.vocabulary.slice_table()
    index = lit.class_names.index("text")
    assert lit.last["uniform/text"] == math.log(int(hi[index] - lo[index]) if sliced else world.vocabulary.size)


def test_checkpoints_need_whole_log_windows(world: World, tmp_path: Path) -> None:
    for every in (3, 0):
        with pytest.raises(AnyglotError, match=f"checkpoint_every {every} is no multiple of log_every 2"):
            fit(module(world), world, tmp_path, checkpoint_every=every)


def test_a_checkpoint_of_another_run_is_refused(world: World, tmp_path: Path) -> None:
    fit(module(world), world, tmp_path / "run")
    longer = make_world(tmp_path / "longer", packs=STEPS * BATCH + 1)
    with pytest.raises(FingerprintError, match="the checkpoint is of plan .* start a new run"):
        fit(module(longer), longer, tmp_path / "run")
    other = make_world(tmp_path / "other", codebook_size=17)
    with pytest.raises(FingerprintError, match="was trained with the vocabulary .*; use another run_dir"):
        fit(module(other), other, tmp_path / "run")
    wide = LitUnified(
        new_llama(world.vocabulary, hidden_size=64, num_layers=1, num_heads=2),
        world.vocabulary,
        max_steps=STEPS,
        targets_per_pack=8.0,
        log_every=2,
    )
    with pytest.raises(CheckpointError, match="of another model: .* has shape .*; use another run_dir"):
        fit(wide, world, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "zeros", "other"])
def test_a_damaged_checkpoint_is_one_clear_error(world: World, tmp_path: Path, damage: str) -> None:
    fit(module(world), world, tmp_path)
    path = tmp_path / "last.ckpt"
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes({"cut": whole[:half], "zeros": whole[:half] + bytes(len(whole) - half), "other": b""}[damage])
    if damage == "other":
        torch.save({"a": 1}, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: no readable checkpoint .*; delete it to begin"):
        fit(module(world), world, tmp_path)
    path.unlink()
    fit(module(world), world, tmp_path)


def test_modality_weights(world: World) -> None:
    rows = PackedDataset(world.plan)[0]
    batch = {name: torch.as_tensor(value)[None] for name, value in rows.items()}
    plain, half, off = (
        module(world, modality_weights=w).training_step(batch, 0).item() for w in (None, {"text": 0.5}, {"text": 0.0})
    )
    # Text and image weigh 1 on average, so text at half of image's weight has 0.5 / 0.75 of its own.
    assert half == pytest.approx(plain * 2 / 3, rel=1e-5) and off == 0
    with pytest.raises(ManifestError, match="no modality 'txt'; there are text, image"):
        module(world, modality_weights={"txt": 1.0})


def test_schedule_warms_up_and_cools_down(world: World) -> None:
    lit = module(world, max_steps=1000, warmup_steps=100)
    shares = [lit._schedule(step) for step in range(1000)]
    assert shares[0] == 0.01 and shares[99:400] == [1.0] * 301
    assert math.isclose(shares[700], 0.5) and shares[-1] == 0.02


def test_rows_may_stand_still(world: World) -> None:
    rates = [group["lr"] for group in module(world, rows_lr=0.0).configure_optimizers()["optimizer"].param_groups]
    assert rates[1] == 0 and rates[0] > 0


def test_another_optimizer_cannot_go_on(world: World, tmp_path: Path) -> None:
    fit(module(world, muon=False), world, tmp_path)
    with pytest.raises(CheckpointError, match="trained with muon: false, whose state is of no use"):
        fit(module(world, muon=True), world, tmp_path)


def test_the_constant_of_the_loss_is_that_of_the_first_start(world: World, tmp_path: Path) -> None:
    fit(module(world, targets_per_pack=None), world, tmp_path)
    longer, saved = module(world, targets_per_pack=None), torch.load(tmp_path / "last.ckpt", weights_only=True)
    found = saved["anyglot"]["targets_per_pack"]
    assert 1 < found < 32
    longer.targets_per_pack = 99.0  # of a plan that has grown
    longer.on_load_checkpoint(saved)
    assert longer.targets_per_pack == found
    given = module(world, targets_per_pack=5.0)
    given.on_load_checkpoint(saved)
    assert given.targets_per_pack == 5.0
