"""MuonAdamW: Muon for hidden matrices and convolutions, AdamW for everything else, as one torch optimizer.

Muon (K. Jordan, 2024; "Muon is scalable", arXiv 2502.16982) orthogonalises the momentum of each matrix with a few
Newton-Schulz steps; the update is scaled by 0.2 sqrt(max(rows, columns)) so that AdamW's learning rates and weight
decay carry over. Convolutions are matrices [outputs, inputs x kernel]. One optimizer (not two), so that Lightning's
automatic optimisation, clipping and checkpoints apply. It does not schedule learning rates: a `LambdaLR` over it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyglot_tokenizers.precision import native_bf16

BATCH = 1 << 24
"""Numbers that are orthogonalised in one go: many small matrices fill the cores, large ones would only take memory."""
SMALLEST = 16  # a parameter with fewer rows or columns than this is no hidden matrix (depthwise kernels, for one)


def orthogonalise(update_BMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices `[B, M, N]`, about: quintic Newton-Schulz, in bfloat16 where that is native."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update_BMN.bfloat16() if native_bf16(update_BMN.device.type) else update_BMN.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(update_BMN.dtype)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon should train a parameter: a matrix or convolution that is no embedding and no output head."""
    if parameter.ndim < 2 or any(part in name for part in ("embed_tokens", "lm_head")):
        return False
    return min(parameter.shape[0], parameter.shape[1:].numel()) >= SMALLEST


class MuonAdamW(torch.optim.Optimizer):
    """See the module docstring.

    Args:
        model: its trainable parameters are split by `is_hidden_matrix`; or parameter groups, each with a bool "muon",
            and with "lr" and "weight_decay" where it has its own.
        lr: learning rate of both parts.
        weight_decay: decoupled decay of the hidden matrices; of a whole model nothing else is decayed.
        betas: of AdamW.
        momentum: of Muon.
        muon: False puts every parameter under AdamW.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        muon: bool = True,
    ) -> None:
        groups: Sequence[dict[str, Any]]
        if isinstance(model, nn.Module):
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            matrices = [p for name, p in trained if is_hidden_matrix(name, p)]
            others = [p for name, p in trained if not is_hidden_matrix(name, p)]
            groups = [
                {"params": matrices, "muon": muon, "weight_decay": weight_decay},
                {"params": others, "muon": False, "weight_decay": 0.0},
            ]
        else:
            groups = model
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "momentum": momentum, "eps": 1e-8}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; `closure` recomputes the loss as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            update([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            shape = parameter.shape[0], parameter.shape[1:].numel()
            alike.setdefault((*shape, parameter.device, parameter.dtype), []).append(parameter)
        for (rows, columns, *_), matrices in alike.items():
            many = max(1, BATCH // (rows * columns))
            for first in range(0, len(matrices), many):
                self._move(matrices[first : first + many], group)

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates_BMN = orthogonalise(torch.stack([self._nesterov(parameter, group) for parameter in matrices]))
        step = group["lr"] * 0.2 * max(updates_BMN.shape[1:]) ** 0.5
        for parameter, update_MN in zip(matrices, updates_BMN, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update_MN.view_as(parameter), alpha=-step)

    def _nesterov(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The momentum that takes this step's gradient in twice, as a matrix."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state["momentum"], group["momentum"]).flatten(1)

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["step"] = torch.zeros(())
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["step"] += 1
            steps = state["step"].item()
            state["mean"].lerp_(gradient, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            denominator = (state["square"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1 - beta1**steps))
