"""The residual quantizer: gradient scale, staging, eval purity, masks, search, and training on several processes."""

import copy
import subprocess
import sys

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize

from anyglot_tokenizers import CodesError, ResidualQuantizer, quantize
from anyglot_tokenizers.quantize import nearest


def latents(items=4, dim=6, length=32, seed=0):
    return torch.randn(items, dim, length, generator=torch.Generator().manual_seed(seed))


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("num_quantizers", range(1, 9))
@pytest.mark.parametrize("training", [True, False])
def test_gradient_scale_is_one(num_quantizers, training):
    quantizer = ResidualQuantizer(6, num_quantizers, 8, stage_steps=0).train(training)
    x = latents().requires_grad_()
    quantized = quantizer(x)[0]
    weights = latents(seed=1)
    (quantized * weights).sum().backward()
    assert torch.allclose(x.grad, weights)


def test_stages_start_one_after_another():
    quantizer = ResidualQuantizer(6, 3, 8, stage_steps=2)
    started = []
    for step in range(8):
        x = latents(seed=step)
        quantized, codes, commit, _ = quantizer(x)
        started.append(sum(bool(layer._codebook.initted) for layer in quantizer.layers))
        if started[-1] == 0:
            assert torch.equal(quantized, x) and commit == 0
        for index in range(started[-1], 3):  # not started: contributes nothing, neither here nor in encode
            assert (codes[:, index] == 0).all() and (quantizer.encode(x)[:, index] == 0).all()
            assert (quantizer.codebooks[index] == 0).all()
    assert started == [0, 0, 1, 1, 2, 2, 3, 3]


def test_residual_start_gives_distinct_codes():
    quantizer = ResidualQuantizer(6, 3, 32, stage_steps=3)
    for step in range(12):
        quantizer(latents(items=8, length=32, seed=step))
    for entries in quantizer.codebooks:
        assert len(entries.unique(dim=0)) == 32
    norms = quantizer.codebooks.norm(dim=2).mean(1)
    assert norms[0] > norms[1] > norms[2] > 0


def test_eval_changes_nothing_and_draws_nothing():
    quantizer = ResidualQuantizer(6, 2, 8, stage_steps=0).eval()
    before, state = snapshot(quantizer), torch.get_rng_state()
    quantizer(latents())
    quantizer.encode(latents())
    quantizer.train().encode(latents())
    assert not quantizer.layers[0]._codebook.initted
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("used", [1, 2, 3])
def test_encode_decode_forward_agree(used):
    quantizer = ResidualQuantizer(6, 3, 8).eval()
    quantized, codes, _, stats = quantizer(latents(), used)
    assert torch.equal(quantizer.encode(latents(), used), codes) and codes.shape == (4, used, 32)
    assert torch.allclose(quantizer.decode(codes), quantized, atol=1e-6)
    assert torch.equal(quantizer.encode(latents())[:, :used], codes)
    assert stats["counts"].sum() == 4 * 32 * used and stats["usage"].shape == (used,)


def test_nearest_entries_are_taken():
    quantizer = ResidualQuantizer(6, 1, 16).eval()
    x = latents()
    distances = torch.cdist(x.transpose(1, 2), quantizer.codebooks[0])
    assert torch.equal(quantizer.encode(x)[:, 0], distances.argmin(2))


@pytest.mark.parametrize("training", [True, False])
def test_masked_positions_do_not_matter(training):
    mask = torch.arange(32) < torch.tensor([[32], [5], [1], [17]])
    outputs = []
    for fill in (0.0, 1e4):
        torch.manual_seed(0)
        quantizer = ResidualQuantizer(6, 2, 8, stage_steps=0).train(training)
        x = torch.where(mask[:, None], latents(), torch.tensor(fill))
        outputs.append((*quantizer(x, mask=mask)[:3], quantizer.codebooks))
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    assert (outputs[0][0].transpose(1, 2)[~mask] == 0).all()


def test_item_dropout_is_drawn_per_item():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 4, 8, stage_steps=0, dropout=1.0)
    _, codes, _, stats = quantizer(latents(items=32))
    depths = (codes != 0).any(2).sum(1)
    assert depths.min() < 4 and depths.max() == 4 and stats["counts"][0].sum() > stats["counts"][3].sum() > 0


def test_dead_codes_restart_relative_to_uniform_usage():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 1, 16, stage_steps=0, decay=0.5)
    for step in range(3):
        quantizer(latents(seed=step))
    for step in range(12):
        quantizer(latents(seed=step) + 50)
    assert (quantizer.codebooks[0].mean(1) > 25).float().mean() > 0.9


def test_float32_under_autocast():
    quantizer = ResidualQuantizer(6, 2, 8).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, codes, _, _ = quantizer(latents())
    assert quantized.dtype == torch.float32 and torch.equal(codes, quantizer.encode(latents()))


def test_few_vectors_still_start():
    quantizer = ResidualQuantizer(6, 2, 64, stage_steps=0)
    quantizer(latents(items=1, length=3))
    assert torch.isfinite(quantizer.codebooks).all() and quantizer.layers[1]._codebook.initted


@pytest.mark.parametrize(
    "codes",
    [torch.full((1, 1, 2), 8), torch.full((1, 1, 2), -1), torch.zeros(1, 3, 2).long(), torch.zeros(1, 1, 2)],
)
def test_decode_refuses(codes):
    with pytest.raises(CodesError):
        ResidualQuantizer(6, 2, 8).decode(codes)


def test_bad_counts():
    quantizer = ResidualQuantizer(6, 2, 8)
    for count in (0, 3):
        with pytest.raises(CodesError):
            quantizer.encode(latents(), count)
    with pytest.raises(ValueError, match="codebook_size"):
        ResidualQuantizer(6, 2, 1)


@pytest.mark.parametrize("size", [16, 300])
def test_codes_are_those_of_the_library(size):
    peer = VectorQuantize(8, size, rotation_trick=False).eval()
    ours = ResidualQuantizer(8, 1, size).eval()
    ours.layers[0]._codebook.embed.copy_(peer._codebook.embed)
    x = latents(dim=8)
    assert torch.equal(ours.encode(x)[:, 0], peer(x.transpose(1, 2))[1])


@pytest.mark.parametrize("max_bytes", [1, 4 * 16 * 5, 4 * 16 * 64, 2**20])
def test_search_in_chunks(max_bytes):
    x_MD, embed_CD = torch.randn(64, 6), torch.randn(16, 6)
    code_M = nearest(x_MD, embed_CD, embed_CD.square().sum(1) / 2, max_bytes)
    assert torch.equal(code_M, torch.cdist(x_MD, embed_CD).argmin(1))


def test_the_kept_search_table_follows_the_codebook():
    quantizer = ResidualQuantizer(6, 1, 8, stage_steps=0).eval()
    x = latents()

    def check():
        wanted = torch.cdist(x.transpose(1, 2), quantizer.codebooks[0]).argmin(2)
        assert torch.equal(quantizer.encode(x)[:, 0], wanted)
        assert torch.equal(quantizer(x)[1][:, 0], wanted)
        return wanted

    with torch.inference_mode():
        first = check()
    quantizer(latents().requires_grad_())[2].backward()  # tables built in inference mode serve outside
    with torch.no_grad():
        quantizer.layers[0]._codebook.embed.mul_(torch.linspace(-2, 2, 8)[None, :, None])
    assert not torch.equal(check(), first)
    quantizer.load_state_dict(ResidualQuantizer(6, 1, 8).state_dict())
    check()
    for _ in range(3):
        quantizer.train()(x)
    check()
    quantizer.eval()
    check()
    check_of_copy = copy.deepcopy(quantizer)
    check_of_copy.layers[0]._codebook.embed.neg_()
    assert torch.equal(check_of_copy.encode(-x), quantizer.encode(x))


def test_large_steps_avoid_the_one_hot_and_compute_the_same(monkeypatch):
    ends = []
    for limit in (quantize.ONE_HOT_BYTES, 0):
        monkeypatch.setattr(quantize, "ONE_HOT_BYTES", limit)
        torch.manual_seed(0)
        quantizer = ResidualQuantizer(6, 3, 8, stage_steps=1, dropout=0.3)
        quantized = [quantizer(latents(seed=step))[0] for step in range(9)]
        ends.append((quantized[-1], quantizer.codebooks, quantizer.layers[2]._codebook.cluster_size))
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_small_first_batch_leaves_no_deep_codebook_dead():
    """From 200 frames for 256 codes, the library's residual class goes on to use 67, 29, 14 and 6 % of its codes."""
    quantizer = ResidualQuantizer(16, 4, 256, stage_steps=0, dropout=0.0, decay=0.9)
    quantizer(latents(items=1, dim=16, length=200))
    assert [len(entries.unique(dim=0)) for entries in quantizer.codebooks] == [256] * 4
    for step in range(15):
        stats = quantizer(latents(items=8, dim=16, length=200, seed=step))[3]
    assert stats["usage"].min() > 0.6


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_padding_only(training):
    quantizer = ResidualQuantizer(6, 2, 8, stage_steps=0).train(training)
    quantized, codes, commit, _ = quantizer(latents(), mask=torch.zeros(4, 32, dtype=torch.bool))
    assert (quantized == 0).all() and (codes == 0).all() and commit == 0


# Two processes, as a user starts them: everything is built before there is a process group.
PROCESSES = """
import datetime, sys
import torch, torch.distributed as distributed, torch.multiprocessing as processes
from anyglot_tokenizers.quantizers import KINDS, make_quantizer

FOLDER = sys.argv[1]
TIMEOUT = datetime.timedelta(seconds=300)


def build():
    torch.manual_seed(0)
    rvq = make_quantizer("rvq", 6, 2, 16, stage_steps=1, dropout=0.0, dead_code_ratio=1e-9)
    return {"rvq": rvq, "lfq": make_quantizer("lfq", 6, 2, 64, dropout=0.0)}


def train(quantizers, batches):
    torch.manual_seed(1)
    for x in batches:
        gradients = []
        for quantizer in quantizers.values():
            x = x.detach().requires_grad_()
            quantizer(x)[2].backward()
            gradients.append(x.grad)
    return {"gradients": gradients, **{name: quantizer.state_dict() for name, quantizer in quantizers.items()}}


def batches():
    return torch.randn(5, 4, 6, 40, generator=torch.Generator().manual_seed(2))


def work(rank, quantizers):
    meet = f"file://{FOLDER}/meet"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=TIMEOUT)
    torch.save(train(quantizers, batches()[:, 2 * rank : 2 * rank + 2]), f"{FOLDER}/plain{rank}.pt")
    distributed.destroy_process_group()


def plain():
    processes.start_processes(work, (build(),), nprocs=2, start_method="fork")
    torch.save(train(build(), batches()), f"{FOLDER}/alone.pt")


def lightning():
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    class Lit(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Conv1d(4, 6, 1)
            self.quantizers = torch.nn.ModuleDict(
                {kind: make_quantizer(kind, 6, 3, 64, stage_steps=1, dropout=0.5) for kind in KINDS}
            )

        def training_step(self, x, index):
            torch.manual_seed(10 * index + self.global_rank)
            mask = torch.rand(2, 30) < 0.7
            if index % 4 == 3:
                mask &= torch.tensor(self.global_rank == 1)  # one process has nothing to quantize
            z = self.encoder(x)
            outputs = [quantizer(z, mask=mask) for quantizer in self.quantizers.values()]
            return sum(output[0].square().mean() + output[2] for output in outputs)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

        def on_train_end(self):
            torch.save(self.state_dict(), f"{FOLDER}/lightning{self.global_rank}.pt")

    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_steps=12, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, strategy=DDPStrategy(start_method="fork", broadcast_buffers=False, timeout=TIMEOUT),
    )
    data = torch.randn(48, 4, 30, generator=torch.Generator().manual_seed(3))
    trainer.fit(Lit(), torch.utils.data.DataLoader(data, batch_size=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"plain": plain, "lightning": lightning}[sys.argv[2]]()
"""


def run_processes(folder, name):
    script = folder / "train.py"
    script.write_text(PROCESSES)
    done = subprocess.run([sys.executable, str(script), str(folder), name], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return [torch.load(folder / f"{name}{rank}.pt") for rank in (0, 1)]


def assert_equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        close = torch.allclose(tensor, other[name], **tolerance) if tolerance else torch.equal(tensor, other[name])
        assert close, name


def test_processes_learn_as_one(tmp_path):
    """Codebooks of two processes are equal to the last bit, and what one process learns from both batches."""
    first, second = run_processes(tmp_path, "plain")
    alone = torch.load(tmp_path / "alone.pt")
    assert bool(first["rvq"]["layers.1._codebook.initted"])
    for kind in ("rvq", "lfq"):
        assert_equal(first[kind], second[kind])
        assert_equal(first[kind], alone[kind], atol=1e-5)
    for one, other, both in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        assert torch.allclose(torch.cat([one, other]) / 2, both, atol=1e-7)  # as data-parallel training averages them


def test_processes_stay_equal_under_lightning(tmp_path):
    first, second = run_processes(tmp_path, "lightning")
    assert int(first["quantizers.rvq.steps"]) == 12 and bool(first["quantizers.rvq.layers.2._codebook.initted"])
    assert_equal(first, second)
