"""The adversarial game apart from networks and trainers: losses of both sides, and how their gradients are balanced.

`Adversary` holds a discriminator with these choices, so that a trainer asks it for two numbers a step: the
tokenizer's loss and the discriminator's. Hinge (Lim and Ye, arXiv 1705.02894), least squares (Mao et al., arXiv
1611.04076), feature matching and balancer (EnCodec, arXiv 2210.13438), adaptive weight (VQGAN, arXiv 2012.09841).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.discriminators import Judgement, audio_discriminator, image_discriminator
from anyglot_tokenizers.errors import ManifestError

KINDS = ("hinge", "lsgan")
BALANCES = ("fixed", "adaptive", "balancer")


def discriminator_loss(real: Sequence[Judgement], fake: Sequence[Judgement], kind: str = "hinge") -> Tensor:
    """Mean over sub-discriminators: real scores up to 1, generated ones down to -1 (hinge) or 0 (lsgan)."""
    losses = []
    for (real_scores, _), (fake_scores, _) in zip(real, fake, strict=True):
        if kind == "hinge":
            losses.append(0.5 * (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean()))
        else:
            losses.append(0.5 * ((1 - real_scores.float()).square().mean() + fake_scores.float().square().mean()))
    return torch.stack(losses).mean()


def generator_loss(fake: Sequence[Judgement], kind: str = "hinge") -> Tensor:
    """Mean over sub-discriminators of minus the score (hinge) or its squared distance from 1 (lsgan)."""
    if kind == "hinge":
        return torch.stack([-scores.float().mean() for scores, _ in fake]).mean()
    return torch.stack([(1 - scores.float()).square().mean() for scores, _ in fake]).mean()


def feature_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """Mean over layers of the L1 distance between features, each over the mean size of the real ones."""
    distances = []
    for (_, real_features), (_, fake_features) in zip(real, fake, strict=True):
        for one, other in zip(real_features, fake_features, strict=True):
            one = one.detach().float()
            distances.append(F.l1_loss(other.float(), one) / one.abs().mean().clamp(min=1e-6))
    return torch.stack(distances).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, at: Tensor, limit: float = 1e4) -> Tensor:
    """Weight of the adversarial loss at which its gradient at `at` is as long as that of the reconstruction loss.

    VQGAN takes the last layer's weight for `at`; the output itself serves any architecture. Between 0 and `limit`.
    """
    (target,) = torch.autograd.grad(reconstruction, at, retain_graph=True)
    (gradient,) = torch.autograd.grad(adversarial, at, retain_graph=True)
    return (target.norm() / (gradient.norm() + 1e-8)).clamp(0, limit).detach()


class Balancer(nn.Module):
    """Gives each loss a fixed share of the gradient at the output, whatever its scale (EnCodec, section 3.4).

    Each gradient is divided by the running mean of its norm (per item, averaged over the batch and all devices) and
    multiplied by its weight and by the first loss's running norm. EnCodec gives the sum a norm of 1 instead; here the
    first loss keeps its own size, so that losses beside the output, such as commitment, keep theirs in proportion.

    Args:
        weights: of each loss; the first is the reference.
        decay: of the running means.
    """

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999) -> None:
        super().__init__()
        if not weights or min(weights.values()) <= 0:
            raise ManifestError(f"balancer weights {dict(weights)} must be positive")
        self.weights = dict(weights)
        self.decay = decay
        for name in weights:
            self.register_buffer(f"sum_{name}", torch.zeros(()))
            self.register_buffer(f"count_{name}", torch.zeros(()))

    def forward(self, losses: Mapping[str, Tensor], output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss with the value of the first and the balanced gradient at `output`, and the scales used."""
        reference: Tensor | None = None
        balanced = torch.zeros_like(output)
        scales = {}
        for name, weight in self.weights.items():
            (gradient,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm = self._mean_norm(name, gradient)
            reference = norm if reference is None else reference
            scale = weight * reference / norm.clamp(min=1e-12)
            balanced += scale * gradient
            scales[name] = scale
        pull = (output * balanced).sum()
        return losses[next(iter(self.weights))].detach() + pull - pull.detach(), scales

    @torch.no_grad()
    def _mean_norm(self, name: str, gradient: Tensor) -> Tensor:
        norm = gradient.float().flatten(1).norm(dim=1).mean()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(norm)
            norm /= distributed.get_world_size()
        sums, count = getattr(self, f"sum_{name}"), getattr(self, f"count_{name}")
        sums.mul_(self.decay).add_(norm)
        count.mul_(self.decay).add_(1)
        mean: Tensor = sums / count
        return mean


class Adversary(nn.Module):
    """A discriminator and how it plays.

    Args:
        discriminator: media to judgements.
        kind: "hinge" or "lsgan".
        weight: of the adversarial loss.
        feature_weight: of feature matching; 0 leaves it out.
        balance: "fixed" adds the losses as they are; "adaptive" first scales the adversarial one to the gradient of
            reconstruction; "balancer" scales both it and feature matching to the gradient of reconstruction.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        kind: str = "hinge",
        weight: float = 0.8,
        feature_weight: float = 0.0,
        balance: str = "adaptive",
    ) -> None:
        super().__init__()
        if kind not in KINDS or balance not in BALANCES or weight <= 0 or feature_weight < 0:
            raise ManifestError(
                f"adversary: kind {kind!r} must be one of {KINDS}, balance {balance!r} one of {BALANCES}, "
                f"weight {weight} positive and feature_weight {feature_weight} not negative"
            )
        self.discriminator = discriminator
        self.kind, self.weight, self.feature_weight, self.balance = kind, weight, feature_weight, balance
        shares = {"reconstruction": 1.0, "adversarial": weight}
        if feature_weight:
            shares["features"] = feature_weight
        self.balancer = Balancer(shares) if balance == "balancer" else None

    def generator(self, reconstruction: Tensor, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's loss, reconstruction included, and its parts. Gives the discriminator no gradient."""
        parameters = [p for p in self.discriminator.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            fake = self.discriminator(output)
            losses = {"reconstruction": reconstruction, "adversarial": generator_loss(fake, self.kind)}
            if self.feature_weight:
                with torch.no_grad():
                    real = self.discriminator(target)
                losses["features"] = feature_loss(real, fake)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
        parts = {name: loss.detach() for name, loss in losses.items() if name != "reconstruction"}
        if self.balancer is not None:
            total, _ = self.balancer(losses, output)
            return total, parts
        weight: Tensor | float = self.weight
        if self.balance == "adaptive":
            weight = weight * adaptive_weight(reconstruction, losses["adversarial"], output)
            parts["adversarial_weight"] = weight.detach()
        total = reconstruction + weight * losses["adversarial"]
        return total + self.feature_weight * losses.get("features", total.new_zeros(())), parts

    def judge(self, output: Tensor, target: Tensor) -> Tensor:
        """The discriminator's loss. Gives the tokenizer no gradient."""
        return discriminator_loss(self.discriminator(target), self.discriminator(output.detach()), self.kind)


def adversary_for(modality: str, channels: int, options: Mapping[str, Any]) -> Adversary:
    """The adversary of a modality: PatchGAN for images, multi-period and multi-scale STFT for sounds.

    Args:
        modality: "image", or anything that sounds.
        channels: of the media.
        options: of `Adversary`, and under "discriminator" those of `image_discriminator` or `audio_discriminator`.

    Raises:
        ManifestError: an option does not exist or is out of range.
    """
    settings = dict(options)
    build = image_discriminator if modality == "image" else audio_discriminator
    try:
        return Adversary(build(channels, **settings.pop("discriminator", {})), **settings)
    except TypeError as error:
        raise ManifestError(f"adversary: {error}") from error
