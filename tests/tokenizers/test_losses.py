"""Reconstruction and adversarial losses: values, gradients, and how gradients are balanced."""

import sys

import pytest
import torch
from torch import nn

from anyglot_tokenizers.adversarial import (
    Adversary,
    Balancer,
    adaptive_weight,
    adversary_for,
    discriminator_loss,
    feature_loss,
    generator_loss,
)
from anyglot_tokenizers.discriminators import PatchDiscriminator
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.losses import ImageLoss, PerceptualLoss, SpectralLoss, load_lpips, psnr, psnr_per_item

TIME = torch.arange(8000) / 16000


def tone(hertz, level=0.3):
    return torch.sin(2 * torch.pi * hertz * TIME)[None] * level


def test_image_loss_favours_the_foreground():
    target = torch.full((1, 3, 8, 8), 0.1)
    target[..., :2, :2] = 0.9
    flat, missed = torch.full_like(target, 0.1), target.clone()
    missed[..., 4:6, 4:6] += 0.8
    loss = ImageLoss(foreground_weight=20.0)
    assert loss(target, target)[0] == 0
    assert loss(flat, target)[0] > 3 * loss(missed, target)[0]
    assert loss.weights(target).mean() == pytest.approx(1.0)
    plain = ImageLoss(foreground_weight=0.0)
    assert torch.allclose(plain.weights(target), torch.ones(()))


def test_psnr():
    target = torch.rand(2, 3, 8, 8) * 0.5
    output = target + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert torch.allclose(psnr_per_item(output, target), torch.tensor([20.0, 40.0]), atol=1e-3)
    assert psnr(output, target) == pytest.approx(-10 * torch.tensor((0.01 + 0.0001) / 2).log10().item(), abs=1e-3)
    assert psnr_per_item(torch.full((1, 3, 2, 2), 1.5), torch.ones(1, 3, 2, 2)) == 100  # clamped


def test_spectral_loss_ranks_and_has_finite_gradients():
    target = tone(440)
    loss = SpectralLoss(16000)
    near = loss(target * 0.9, target)[0]
    far = loss(tone(660), target)[0]
    assert loss(target, target)[0] < 1e-4 < near < far
    silent = torch.zeros(1, 8000, requires_grad=True)
    loss(silent, target)[0].backward()
    assert torch.isfinite(silent.grad).all()
    loss(silent, torch.zeros(1, 8000))[0].backward()
    assert torch.isfinite(silent.grad).all()


def test_channels_count_as_items():
    loss = SpectralLoss(16000)
    output, target = torch.cat([tone(440), tone(500)]), torch.cat([tone(450), tone(480)])
    assert torch.equal(loss(output[None], target[None])[0], loss(output, target)[0])


def test_wave_and_side_terms():
    left, right = tone(440), tone(660)
    stereo, narrow = torch.stack([left, right], 1), torch.stack([(left + right) / 2] * 2, 1)
    plain, wide = SpectralLoss(16000)(narrow, stereo)[0], SpectralLoss(16000, side_weight=2.0)(narrow, stereo)
    side = SpectralLoss(16000)((left - left), (left - right) / 2)[0]
    assert wide[0] == pytest.approx(float(plain + 2 * side), rel=1e-5) and wide[1]["side"] == pytest.approx(float(side))
    shifted = SpectralLoss(16000, wave_weight=1.0)(left, -left)
    assert shifted[1]["mel"] < 1e-4 and shifted[0] == pytest.approx(2 * float(left.abs().mean()), rel=1e-3)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, 2)])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        first = self.norm(self.layers[0](x))
        return [first, self.layers[1](first.relu())]


@pytest.mark.parametrize("weights", [None, [torch.rand(4), torch.rand(6)]])
def test_perceptual_loss_is_lpips_on_any_backbone(weights):
    backbone = Features()
    loss = PerceptualLoss(backbone, weights).train()
    output, target = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    expected = torch.zeros(2)
    for index, (one, other) in enumerate(zip(backbone(output), backbone(target), strict=True)):
        one, other = (f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt() for f in (one, other))
        weight = torch.full((one.shape[1],), 1 / one.shape[1]) if weights is None else weights[index]
        expected += torch.einsum("bchw,c->bhw", (one - other) ** 2, weight).mean((1, 2))
    assert torch.allclose(loss(output, target), expected, atol=1e-6)
    assert (loss(target, target) == 0).all() and not backbone.training
    whole, parts = ImageLoss(0.0, perceptual_weight=0.5, perceptual=loss)(output, target)
    plain, _ = ImageLoss(0.0)(output, target)
    assert whole.item() == pytest.approx(plain.item() + 0.5 * parts["perceptual"].item())
    whole.backward()
    assert output.grad.abs().sum() > 0 and all(p.grad is None for p in backbone.parameters())


def test_a_missing_lpips_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(AnyglotError, match="pip install lpips"):
        load_lpips()
    with pytest.raises(AnyglotError, match="perceptual_weight"):
        ImageLoss(perceptual_weight=1.0)


def judged(*scores):
    return [(torch.tensor(values), [torch.tensor(values) * 2]) for values in scores]


def test_scores_to_losses():
    real, fake = judged([2.0, 0.5], [0.0]), judged([-3.0, 1.0], [0.5])
    assert discriminator_loss(real, fake) == pytest.approx((0.5 * (0.25 + 1.0) + 0.5 * (1 + 1.5)) / 2)
    assert discriminator_loss(real, fake, "lsgan") == pytest.approx((0.5 * (0.625 + 5) + 0.5 * (1 + 0.25)) / 2)
    assert generator_loss(fake) == pytest.approx((1.0 - 0.5) / 2)
    assert generator_loss(fake, "lsgan") == pytest.approx((8.0 + 0.25) / 2)
    assert feature_loss(judged([1.0, 3.0]), judged([2.0, 1.0])) == pytest.approx(3.0 / 4.0)
    assert feature_loss(real, real) == 0


def test_adaptive_weight_is_that_of_vqgan():
    """Ratio of the gradient norms at the last layer's weight."""
    last = nn.Conv2d(4, 3, 3)
    features, target = torch.rand(2, 4, 10, 10), torch.rand(2, 3, 8, 8)
    output = last(features)
    near, far = (output - target).abs().mean(), 50 * output.square().mean()
    weight = adaptive_weight(near, far, last.weight)
    one = torch.autograd.grad(near, last.weight, retain_graph=True)[0].norm()
    other = torch.autograd.grad(far, last.weight, retain_graph=True)[0].norm()
    assert weight == pytest.approx(float(one / other), rel=1e-4) and not weight.requires_grad
    assert adaptive_weight(near, far * 0, last.weight) == 1e4


def test_balancer_gives_each_loss_its_share():
    output = torch.randn(4, 10, requires_grad=True)
    middle = output * 1.0
    pulls = {"first": torch.randn(4, 10), "second": torch.randn(4, 10) * 1e3}
    losses = {name: (middle * pull).sum() for name, pull in pulls.items()}
    balancer = Balancer({"first": 2.0, "second": 0.5})
    total, scales = balancer(losses, middle)
    total.backward()
    size = {name: pull.norm(dim=1).mean() for name, pull in pulls.items()}
    expected = 2.0 * pulls["first"] + 0.5 * size["first"] / size["second"] * pulls["second"]
    assert torch.allclose(output.grad, expected, rtol=1e-4)
    assert total.item() == pytest.approx(losses["first"].item()) and scales["first"] == 2.0


def test_balancer_remembers_norms():
    balancer = Balancer({"only": 1.0, "other": 1.0}, decay=0.5)
    for size in (1.0, 3.0):
        x = torch.zeros(1, 1, requires_grad=True) * 1
        balancer({"only": x.sum(), "other": size * x.sum()}, x)
    mean = balancer.sum_other / balancer.count_other
    assert mean == pytest.approx((0.5 * 1 + 3) / 1.5)
    twin = Balancer({"only": 1.0, "other": 1.0}, decay=0.5)
    twin.load_state_dict(balancer.state_dict())
    assert twin.sum_other == balancer.sum_other


@pytest.mark.parametrize("balance", ["fixed", "adaptive", "balancer"])
def test_each_side_trains_itself_only(balance):
    adversary = Adversary(PatchDiscriminator(width=4, depth=1), balance=balance, feature_weight=1.0)
    source = torch.rand(2, 3, 16, 16, requires_grad=True)
    output, target = source * 1, torch.rand(2, 3, 16, 16)
    total, parts = adversary.generator((output - target).abs().mean(), output, target)
    total.backward()
    assert source.grad.abs().sum() > 0 and {"adversarial", "features"} <= set(parts)
    assert all(p.grad is None and p.requires_grad for p in adversary.parameters())
    source.grad = None
    adversary.judge(output, target).backward()
    assert source.grad is None and all(p.grad is not None for p in adversary.parameters())


def test_adaptive_balance_makes_gradients_equally_long():
    adversary = Adversary(PatchDiscriminator(width=4, depth=1), weight=1.0)
    output, target = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    near = (output - target).abs().mean()
    total, _ = adversary.generator(near, output, target)
    mine = torch.autograd.grad(near, output, retain_graph=True)[0]
    both = torch.autograd.grad(total, output)[0]
    assert (both - mine).norm() == pytest.approx(float(mine.norm()), rel=1e-3)


def test_wrong_options():
    for options in (
        {"kind": "wasserstein"},
        {"balance": "no"},
        {"weight": 0.0},
        {"colour": 1},
        {"discriminator": {"x": 1}},
    ):
        with pytest.raises(ManifestError):
            adversary_for("image", 3, options)
    with pytest.raises(ManifestError):
        Balancer({"only": 0.0})
