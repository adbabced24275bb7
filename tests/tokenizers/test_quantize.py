"""The residual quantizer: gradient scale, staging, eval purity, masks, and what EMA training must keep."""

import pytest
import torch

from anyglot_tokenizers import CodesError, ResidualQuantizer


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
