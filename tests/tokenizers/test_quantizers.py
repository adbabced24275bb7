"""All kinds of quantizer behind one interface; and each against the library's own where it has one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ, ResidualFSQ, ResidualLFQ, SimVQ

from anyglot_tokenizers import CodesError
from anyglot_tokenizers.quantizers import KINDS, levels_of, make_quantizer

PLAIN = {"rvq": 6, "fsq": 2, "lfq": 6, "simvq": 6}  # dims where 64 codes need no projection
every_kind = pytest.mark.parametrize("kind", KINDS)
in_both_modes = pytest.mark.parametrize("training", [True, False])


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(kind, dim=6, num_quantizers=2, codebook_size=64, **options):
    torch.manual_seed(0)
    return make_quantizer(kind, dim, num_quantizers, codebook_size, **{"stage_steps": 0, "dropout": 0.0, **options})


def projected(kind, **options):
    """With entries of fewer dims than the latents."""
    return build(kind, dim=9, **({"codebook_dim": 5} if kind in ("rvq", "simvq") else {}), **options)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@every_kind
@in_both_modes
@pytest.mark.parametrize("num_quantizers", range(1, 9))
def test_gradient_scale_is_one(kind, training, num_quantizers):
    """Exactly that of no quantizer at all; for FSQ, of what bounds the latents."""
    quantizer = build(kind, PLAIN[kind], num_quantizers).train(training)
    x, weights = latents(2, PLAIN[kind], 20).requires_grad_(), latents(2, PLAIN[kind], 20, seed=1)
    (quantizer(x)[0] * weights).sum().backward()
    slope = 1 - torch.tanh(x.detach() * 7 / 8).square() if kind == "fsq" else torch.ones(())
    assert torch.allclose(x.grad, weights * slope, atol=1e-6)


@every_kind
@in_both_modes
@pytest.mark.parametrize("make", [build, projected])
def test_masked_positions_do_not_matter(kind, training, make):
    mask = torch.arange(32) < torch.tensor([[32], [5], [0], [17]])
    outputs = []
    for fill in (0.0, 1e4):
        quantizer = make(kind).train(training)
        x = torch.where(mask[:, None], latents(4, quantizer.dim, 32), torch.tensor(fill)).requires_grad_()
        quantized, codes, loss, stats = quantizer(x, mask=mask)
        (quantized.square().sum() + loss).backward()
        assert (x.grad.transpose(1, 2)[~mask] == 0).all() and (x.grad.transpose(1, 2)[mask] != 0).any()
        outputs.append((quantized, codes, loss, stats["counts"], *quantizer.state_dict().values()))
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    quantized, codes, _, counts = outputs[0][:4]
    assert (quantized.transpose(1, 2)[~mask] == 0).all() and (counts.sum(1) == mask.sum()).all()
    assert codes.min() >= 0 and codes.max() < 64
    assert torch.isfinite(quantizer.decode(codes)).all()


@every_kind
@pytest.mark.parametrize("make", [build, projected])
@pytest.mark.parametrize("used", [1, 2, 3])
def test_encode_decode_forward_agree(kind, make, used):
    quantizer = make(kind, num_quantizers=3).eval()
    x = latents(4, quantizer.dim, 32)
    quantized, codes, _, stats = quantizer(x, used)
    assert quantized.shape == x.shape and codes.shape == (4, used, 32) and codes.dtype == torch.int64
    assert torch.equal(quantizer.encode(x, used), codes) and torch.equal(quantizer.train().encode(x, used), codes)
    assert torch.equal(quantizer.encode(x)[:, :used], codes)
    assert torch.allclose(quantizer.decode(codes), quantized, atol=1e-6)
    assert stats["counts"].shape == (used, 64) and stats["counts"].sum() == 4 * 32 * used
    assert quantizer.codebook_sizes == (64, 64, 64) and quantizer.codebooks.shape[:2] == (3, 64)


@every_kind
def test_more_quantizers_are_finer(kind):
    quantizer = build(kind, PLAIN[kind], 4)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02) if kind == "simvq" else None
    for step in range(60 if optimizer else 20):
        loss = quantizer(latents(8, PLAIN[kind], 64, seed=step))[2]
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x = latents(8, PLAIN[kind], 64, seed=99)
    target = 8 / 7 * torch.tanh(x * 7 / 8) if kind == "fsq" else x
    codes = quantizer.eval().encode(x)
    errors = [F.mse_loss(quantizer.decode(codes[:, :k]), target).item() for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.6 * errors[0]


@every_kind
def test_eval_changes_nothing_and_draws_nothing(kind):
    quantizer = build(kind, num_quantizers=3, dropout=0.5).eval()
    before, state = snapshot(quantizer), torch.get_rng_state()
    quantizer(latents(2, 6, 20))
    quantizer.train().encode(latents(2, 6, 20))
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    quantizer(latents(2, 6, 20))
    assert int(quantizer.steps) == 1


@every_kind
@in_both_modes
def test_image_maps(kind, training):
    images, rows = build(kind).train(training), build(kind).train(training)
    x, mask = latents(2, 6, 3, 5), latents(2, 3, 5, seed=1) > -1
    torch.manual_seed(1)
    quantized, codes, loss, _ = images(x, mask=mask)
    assert quantized.shape == x.shape and codes.shape == (2, 2, 3, 5)
    torch.manual_seed(1)
    flat_quantized, flat_codes, flat_loss, _ = rows(x.flatten(2), mask=mask.flatten(1))
    assert torch.equal(quantized.flatten(2), flat_quantized) and torch.equal(codes.flatten(2), flat_codes)
    assert loss == flat_loss
    codes = images.encode(x)
    assert torch.equal(codes.flatten(2), rows.encode(x.flatten(2)))
    assert torch.equal(images.decode(codes).flatten(2), rows.decode(codes.flatten(2)))


@every_kind
@in_both_modes
def test_float32_under_autocast_and_when_cast(kind, training):
    plain, other = projected(kind).train(training), projected(kind).train(training)
    x = latents(2, 9, 20)
    torch.manual_seed(1)
    wanted = plain(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = other(x)
        assert all(torch.equal(one, two) for one, two in zip(wanted[:3], outputs[:3], strict=True))
        assert torch.equal(other.encode(x), plain.encode(x))
        assert torch.equal(other.decode(outputs[1]), plain.decode(wanted[1]))
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), other]).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(other.encode(x), plain.encode(x)) and other(x.bfloat16())[0].dtype == torch.float32
    assert other.to("meta").project_in.weight.is_meta


@every_kind
def test_item_dropout_is_drawn_per_item(kind):
    quantizer = build(kind, num_quantizers=4, dropout=1.0)
    quantized, codes, _, stats = quantizer(latents(32, 6, 20))
    depths = (codes != 0).any(2).sum(1)
    assert depths.min() < 4 and depths.max() == 4 and stats["counts"][0].sum() > stats["counts"][3].sum() > 0
    if kind != "rvq":  # whose entries have moved since
        for row, depth in enumerate(depths.tolist()):
            assert torch.allclose(quantizer.decode(codes[row : row + 1, :depth])[0], quantized[row], atol=1e-5)


@every_kind
def test_encode_compiles_without_a_break(kind):
    quantizer = projected(kind).eval()
    compiled = torch.compile(quantizer.encode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(latents(2, 9, 20)), quantizer.encode(latents(2, 9, 20)))


@pytest.mark.parametrize(("num_quantizers", "levels"), [(1, [8, 8]), (1, [5, 4, 3]), (3, [8, 6, 5]), (3, [2, 3, 4])])
def test_fsq_codes_are_those_of_the_library(num_quantizers, levels):
    quantizer = build("fsq", 7, num_quantizers, math.prod(levels), levels=levels).eval()
    peer = ResidualFSQ(levels=levels, num_quantizers=num_quantizers, dim=7).eval()
    peer.project_in, peer.project_out = quantizer.project_in, quantizer.project_out
    x = latents(4, 50, 7) * 3
    quantized, codes = peer(x)
    assert torch.equal(quantizer.encode(x.transpose(1, 2)), codes.long().permute(0, 2, 1))
    assert torch.allclose(quantizer.decode(codes.long().permute(0, 2, 1)), quantized.transpose(1, 2), atol=1e-6)


def test_fsq_uses_its_levels_evenly():
    """Without the margin around the outer levels, the library's default gives these half a share each."""
    share = torch.linspace(-0.9999, 0.9999, 1001)
    quantizer = build("fsq", 1, 1, 5, levels=[5]).eval()
    counts = quantizer(5 / 4 * torch.atanh(share)[None, None])[3]["counts"][0]
    assert (counts - 1001 / 5).abs().max() <= 1
    assert FSQ([5])(torch.atanh(share)[None, :, None])[1].flatten().bincount()[0] < 0.7 * 1001 / 5


@pytest.mark.parametrize("num_quantizers", [1, 3])
def test_lfq_codes_are_those_of_the_library(num_quantizers):
    quantizer = build("lfq", 6, num_quantizers).eval()
    peer = ResidualLFQ(dim=6, codebook_size=64, num_quantizers=num_quantizers).eval()
    x = latents(4, 50, 6)
    quantized, codes, _ = peer(x.flip(2))  # the library's first dim is the highest bit
    assert torch.equal(quantizer.encode(x.transpose(1, 2)), codes.long().permute(0, 2, 1))
    assert torch.allclose(quantizer.decode(codes.long().permute(0, 2, 1)), quantized.flip(2).transpose(1, 2), atol=1e-6)


def test_lfq_loss_is_that_of_the_library():
    quantizer = build("lfq", 6, 1, entropy_weight=0.3, diversity=0.7, inverse_temperature=1.0)
    peer = LFQ(
        dim=6, codebook_size=64, entropy_loss_weight=0.3, commitment_loss_weight=1.0, diversity_gamma=0.7
    ).train()
    x = (0.4 * latents(4, 50, 6)).requires_grad_()
    (_, _, wanted), parts = peer(x, inv_temperature=1.0, return_loss_breakdown=True)
    loss = quantizer(x.transpose(1, 2))[2]
    entropies = quantizer._entropies(x.reshape(-1, 6))
    assert torch.allclose(entropies[0], parts.per_sample_entropy, atol=1e-3)
    assert torch.allclose(entropies[1], parts.batch_entropy, atol=1e-4)
    assert torch.allclose(loss, wanted, atol=1e-3)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (loss, wanted))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_lfq_of_many_codes_trains_in_little_memory():
    """Positions x codes probabilities would take 8 GiB here."""
    quantizer = build("lfq", 18, 1, 2**18)
    x = (0.1 * latents(8, 18, 1024)).requires_grad_()
    quantizer(x)[2].backward()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).any()


def test_simvq_is_that_of_the_library():
    quantizer = build("simvq", 6, 1)
    peer = SimVQ(6, 64, rotation_trick=False, input_to_quantize_commit_loss_weight=1.0)
    peer.load_state_dict(quantizer.layers[0].state_dict())
    x = latents(4, 50, 6).requires_grad_()
    quantized, codes, wanted = peer(x)
    ours, our_codes, loss, _ = quantizer(x.transpose(1, 2))
    assert torch.equal(our_codes[:, 0], codes) and torch.allclose(ours.transpose(1, 2), quantized, atol=1e-6)
    assert torch.allclose(loss, wanted)
    loss.backward()
    wanted.backward()
    weight, other = quantizer.layers[0].code_transform.weight, peer.code_transform.weight
    assert torch.allclose(weight.grad, other.grad, atol=1e-7) and weight.grad.abs().sum() > 0


def test_simvq_search_follows_the_map():
    quantizer = build("simvq", 6, 1).eval()
    x = latents(4, 6, 50)
    before = quantizer.encode(x)
    with torch.no_grad():
        quantizer.layers[0].code_transform.weight.neg_()
    assert torch.equal(quantizer.encode(-x), before)


@given(st.lists(st.integers(2, 8), min_size=1, max_size=6))
def test_levels_of_products(levels):
    found = levels_of(math.prod(levels))
    assert math.prod(found) == math.prod(levels) and len(found) <= len(levels) and 2 <= min(found) <= max(found) <= 8


def test_levels_of_usual_sizes():
    assert levels_of(512) == [8, 8, 8] and levels_of(1000) == [8, 5, 5, 5] and levels_of(1024) == [8, 8, 4, 4]


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("vq", {}, "known are rvq, fsq, lfq, simvq"),
        ("rvq", {"dim": 0}, "dim"),
        ("simvq", {"codebook_size": 1}, "codebook_size"),
        ("simvq", {"dropout": 1.5}, "probability"),
        ("rvq", {"stage_steps": -1}, "stage_steps"),
        ("fsq", {"codebook_size": 509}, "give levels"),
        ("fsq", {"levels": [8, 9]}, "product"),
        ("fsq", {"levels": [64, 1]}, "levels"),
        ("fsq", {"codebook_size": 2**30}, "2\\*\\*24"),
        ("lfq", {"codebook_size": 1000}, "power of two"),
        ("lfq", {"codebook_size": 0}, "power of two"),
    ],
)
def test_bad_settings(kind, options, match):
    with pytest.raises(ValueError, match=match):
        build(kind, **options)


@every_kind
def test_bad_input(kind):
    with pytest.raises(TypeError):
        build(kind, levels_=3)
    quantizer = build(kind)
    for count in (0, 3):
        with pytest.raises(CodesError, match=r"1\.\.2"):
            quantizer(latents(1, 6, 4), count)
    for codes in (torch.full((1, 1, 2), 64), torch.full((1, 1, 2, 2), -1), torch.zeros(1, 3, 2).long()):
        with pytest.raises(CodesError):
            quantizer.decode(codes)
